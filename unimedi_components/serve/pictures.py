# SPDX-License-Identifier: Apache-2.0
"""Checks of an uploaded picture: whole, of a sensible size, and grey as a radiograph is."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image

from unimedi_components.errors import DataError
from unimedi_components.images.xray import read_xray
from unimedi_components.images.xray_checks import PICTURE_FORMATS
from unimedi_components.serve.faults import Limits, UploadError, too_large, unusable

__all__ = ["check_picture", "check_size"]

_MIN_SIDE, _MAX_RATIO = 32, 5


def check_picture(path: Path, name: str, limits: Limits) -> dict[str, str]:
    """Decode a picture as a check.

    Returns:
        what to say about the file.

    Raises:
        UploadError: too many pixels, damaged, too small or a strip, or what `read_xray` refuses.
    """
    # a picture of too many pixels is refused by its header, before anything is decoded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path, formats=PICTURE_FORMATS) as image:
                check_size(image.size, name, limits)
                facts = {"File": f"{image.format} picture, {image.width} × {image.height} pixels"}
            read_xray(path)
            return facts
        except UploadError:
            raise
        except DataError as error:
            raise unusable(f"{name}: {str(error).removeprefix(f'{path}: ')}.") from error
        except Image.DecompressionBombError:
            raise too_large(f"{name}: has more than {limits.pixels:,} pixels. Scale the X-ray down.") from None
        except Exception as error:  # pillow raises many kinds for broken files
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            reason = reason.replace(str(path), name)[:160]
            raise unusable(
                f"{name}: the picture is damaged or cut off ({reason}). Export or download it again."
            ) from error


def check_size(size: tuple[int, int], name: str, limits: Limits) -> None:
    """Check an X-ray's width and height.

    Raises:
        UploadError: too many pixels, too few, or a strip.
    """
    width, height = size
    if width * height > limits.pixels:
        raise too_large(
            f"{name}: has {width} × {height} pixels, more than {limits.pixels:,} in all. Scale the X-ray down."
        )
    if min(size) < _MIN_SIDE:
        raise unusable(
            f"{name}: has only {width} × {height} pixels; an X-ray needs {_MIN_SIDE} on each side. Give the full image."
        )
    if max(size) > _MAX_RATIO * min(size):
        raise unusable(f"{name}: is a strip of {width} × {height} pixels, not an X-ray. Give the whole image.")
