# SPDX-License-Identifier: Apache-2.0
"""ITK for code that runs in threads."""

from __future__ import annotations

import threading
from typing import Any

__all__ = ["load_itk"]

_lock = threading.Lock()
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
