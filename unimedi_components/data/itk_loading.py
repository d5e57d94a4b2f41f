# SPDX-License-Identifier: Apache-2.0
"""ITK for code that runs in threads, and the values of films that it inverts."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

__all__ = ["load_itk", "monochrome1_values"]

_lock = threading.Lock()
_PHOTOMETRIC, _BITS, _SIGNED, _INTERCEPT, _SLOPE = "0028|0004", "0028|0101", "0028|0103", "0028|1052", "0028|1053"
_USED = ("CommonEnums", "Image", "ImageFileReader", "ImageIOFactory", "ImageRegion")


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


def monochrome1_values(image: Any, read: np.ndarray) -> np.ndarray | None:
    """Return the rescaled values of a MONOCHROME1 film, in which the largest is black.

    ITK reads such a film inverted about the largest value that its bits can hold, or about -1 if it is signed: as
    slope * (largest - stored) + intercept. An image need not reach that value.

    Args:
        image: what ITK read from a DICOM file, with its tags.
        read: its array.

    Returns:
        float32 like ``read``, or None where the array is good as it is: no MONOCHROME1, or 8 bits, which are not
        scaled by an image's own largest value.
    """
    tags = image.GetMetaDataDictionary()
    if not tags.HasKey(_PHOTOMETRIC) or str(tags[_PHOTOMETRIC]).strip() != "MONOCHROME1":
        return None
    if not tags.HasKey(_BITS) or read.dtype == np.uint8:
        return None
    slope = float(str(tags[_SLOPE])) if tags.HasKey(_SLOPE) else 1.0
    intercept = float(str(tags[_INTERCEPT])) if tags.HasKey(_INTERCEPT) else 0.0
    signed = tags.HasKey(_SIGNED) and int(str(tags[_SIGNED])) == 1
    largest = -1 if signed else 2 ** int(str(tags[_BITS])) - 1
    values = slope * largest + 2 * intercept - read.astype(np.float32)
    # Unsigned stored values below zero would mean that it was not inverted so.
    return values if signed or values.min() >= intercept else None
