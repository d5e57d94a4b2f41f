# SPDX-License-Identifier: Apache-2.0
"""Reads one X-ray of any common format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import ImageReader
from PIL import Image, ImageOps

from unimedi_components.data.itk_loading import load_itk, monochrome1_values
from unimedi_components.errors import DataError

__all__ = ["XrayReader"]


class XrayReader(ImageReader):
    """Read a projection image of any common format as an upright grey array (H, W) in [0, 1], 0 black.

    JPG, PNG, BMP and TIFF go through PIL: colour becomes ITU-R 601 luma, an alpha channel is ignored, the
    EXIF rotation is applied. DICOM goes through ITK, which applies the rescale slope and inverts MONOCHROME1.
    8-bit values are divided by 255; deeper ones by the image's own maximum, since 16-bit files commonly hold
    10 or 12 bits (RSNA's scaling in the MGCA repository), after negative values were shifted to start at 0.

    Args:
        draft_size: JPEG files may be decoded at a reduced DCT scale, never below this many pixels per side;
            None decodes all pixels. Twice the size that they are resized to later costs no visible detail.
    """

    def __init__(self, draft_size: int | None = None) -> None:
        super().__init__()
        self.draft_size = draft_size

    def verify_suffix(self, filename: Any) -> bool:
        """Whether `filename` names one file; its content decides about the format."""
        return not isinstance(filename, Sequence) or isinstance(filename, str) or len(filename) == 1

    def read(self, data: Any, **kwargs: Any) -> str:
        """Return the path alone: `LoadImage` would hand a file whose opening fails to its next reader."""
        if not isinstance(data, (str, Path)):
            if len(data) != 1:
                raise DataError(f"an X-ray item must name one file, got {len(data)}: {data}")
            data = data[0]
        return str(data)

    def get_data(self, img: str) -> tuple[np.ndarray, dict]:
        """Decode the file at path `img`.

        Returns:
            float32 (H, W) in [0, 1], and its meta data.

        Raises:
            DataError: the file holds more than one frame or is of one constant value, which is no X-ray.
            OSError: the file is missing, truncated or of an unknown format.
        """
        with open(img, "rb") as file:
            is_dicom = file.read(132)[128:] == b"DICM"
        scaled = self._read_dicom(img) if is_dicom else _scale_to_unit(self._read_pil(img), img)
        return scaled, {"spatial_shape": np.asarray(scaled.shape), "original_channel_dim": float("nan")}

    def _read_pil(self, path: str) -> np.ndarray:
        with Image.open(path) as image:
            if self.draft_size is not None:
                image.draft("L", (self.draft_size, self.draft_size))
            upright = ImageOps.exif_transpose(image)
            if upright.mode[0] not in "IF":
                # a palette or CMYK image has to become RGB before its luma can be taken
                upright = upright if upright.mode in ("L", "LA", "RGB", "RGBA", "1") else upright.convert("RGB")
                upright = upright.convert("L")
            return np.asarray(upright)

    def _read_dicom(self, path: str) -> np.ndarray:
        itk = load_itk()
        image = itk.imread(path)
        array = itk.array_from_image(image)
        if image.GetNumberOfComponentsPerPixel() > 1:
            array = array[..., :3].astype(np.float32) @ np.asarray([0.299, 0.587, 0.114], np.float32)
            array = np.round(array).astype(np.uint8) if array.max() < 256 else array
        if len(frames := array.reshape(-1, *array.shape[-2:])) != 1:
            raise DataError(f"{path}: {len(frames)} frames where one X-ray was expected")
        if (film := monochrome1_values(image, frames[0])) is not None:
            return 1 - _scale_to_unit(film, path)
        return _scale_to_unit(frames[0], path)


def _scale_to_unit(array: np.ndarray, path: str) -> np.ndarray:
    scaled = array.astype(np.float32)
    low, high = float(scaled.min()), float(scaled.max())
    if not np.isfinite([low, high]).all() or low == high:
        raise DataError(f"{path}: all pixels have the value {low:g}, or some are not finite; this is no X-ray")
    if array.dtype == np.uint8:
        return scaled / 255
    low = min(low, 0.0)
    return (scaled - low) / (high - low)
