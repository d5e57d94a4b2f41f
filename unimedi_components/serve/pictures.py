# SPDX-License-Identifier: Apache-2.0
"""Checks of an uploaded picture: whole, of a sensible size, and grey as a radiograph is."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from unimedi_components.serve.faults import Limits, UploadError, too_large, unusable

__all__ = ["check_picture", "check_size", "colour_fault"]

Array = npt.NDArray[Any]

_MIN_SIDE, _MAX_RATIO = 32, 5
_FORMATS = ("JPEG", "PNG", "BMP", "TIFF")
# A grey film that was saved as colour JPEG strays by a few levels; burnt-in coloured marks cover little of it.
_COLOURED, _COLOURED_SHARE, _THUMBNAIL = 32, 0.05, 256


def check_picture(path: Path, name: str, limits: Limits) -> dict[str, str]:
    """Decode a picture as a check.

    Returns:
        what to say about the file: its size and, where colours were dropped, that.

    Raises:
        UploadError: too many pixels, damaged, several pages, too small or a strip, or in colour, see `colour_fault`.
    """
    # a picture of too many pixels is refused by its header, before anything is decoded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path, formats=_FORMATS) as image:
                check_size(image.size, name, limits)
                pages = getattr(image, "n_frames", 1)
                if pages > 1 and image.format != "MPO":
                    raise unusable(f"{name}: holds {pages} pages or frames. Give one X-ray per file.")
                image.load()
                colours = image.mode not in ("1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L")
                if colours and (fault := colour_fault(_small_rgb(image), name)) is not None:
                    raise fault
                return {"File": f"{image.format} picture, {image.width} × {image.height} pixels"}
        except UploadError:
            raise
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


def colour_fault(rgb: Array, name: str) -> UploadError | None:
    """Judge whether a picture is too colourful for a radiograph.

    It is where in more than 5% of the pixels the largest and the smallest of red, green and blue differ by more than
    32 of 255. Grey films stored as RGB pass, with coloured arrows and letters on them; photographs and films that are
    tinted all over do not.

    Args:
        rgb: (H, W, 3) in 0 to 255.
        name: of the file.
    """
    chroma = rgb.max(-1).astype(np.int32) - rgb.min(-1).astype(np.int32)
    share = float((chroma > _COLOURED).mean())
    if share <= _COLOURED_SHARE:
        return None
    return unusable(
        f"{name}: is a colour picture, not a radiograph ({share:.0%} of its pixels are coloured). "
        "If it is a tinted X-ray, convert it to greyscale."
    )


def _small_rgb(image: Image.Image) -> Array:
    rgb = image.convert("RGB")
    rgb.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return np.asarray(rgb)
