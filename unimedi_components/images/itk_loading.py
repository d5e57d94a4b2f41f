# SPDX-License-Identifier: Apache-2.0
"""ITK for code that runs in threads, and MONAI's loader without a word about decoders that nothing here uses."""

from __future__ import annotations

import logging
import threading
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monai.transforms import LoadImaged

__all__ = ["load_imaged", "load_itk"]

_lock = threading.Lock()
_USED = ("CommonEnums", "Image", "ImageFileReader", "ImageIOFactory", "ImageRegion", "VectorImage")


def load_itk() -> Any:
    """Return the module `itk`, loaded by one thread at a time.

    ITK fills its module while it is imported, and a second thread that imports it meanwhile meets one without
    ``ImageIOFactory``.
    """
    with _lock:
        import itk

        for name in _USED:
            getattr(itk, name)
    return itk


def load_imaged(key: str, reader: Any = None) -> LoadImaged:
    """Return MONAI's `LoadImaged`, which warns, where pydicom is installed, that it lacks a decoder on the GPU."""
    # which takes seconds that commands without a network need not wait
    from monai.transforms import LoadImaged

    # it says so twice, as a warning and in its log
    logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="NvImgCodec")
        return LoadImaged(key, reader=reader, image_only=True)
