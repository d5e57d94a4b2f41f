# SPDX-License-Identifier: Apache-2.0
"""One X-ray of any common format as upright greys in [0, 1], and what was done to its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from unimedi_components.arrays import Array
from unimedi_components.errors import DataError, reason_of
from unimedi_components.images.dicom import modality_values, read_header
from unimedi_components.images.greys import dicom_greys, robust_ends, robust_greys
from unimedi_components.images.identify import DICOM, content_fault, identify
from unimedi_components.images.itk_loading import load_itk
from unimedi_components.images.xray_checks import PICTURE_FORMATS, colour_fault, film_fault, marks_fault, pages_fault

__all__ = ["XrayReader", "film_notes", "read_xray"]


_LUMA = np.asarray([0.299, 0.587, 0.114], np.float32)
_BITS_PER_SAMPLE, _PHOTOMETRIC, _ORIENTATION, _PLANAR = 258, 262, 0x0112, 284
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# 16-bit colours of less than this use no more than 12 bits or so of them
_SHALLOW = 2**15


def read_xray(path: str | Path, draft_size: int | None = None) -> tuple[Array, list[str]]:
    """Read a projection image of any common format as an upright grey array, 0 black.

    DICOM, told by its content, becomes what a screen shows of it, see `dicom_greys`: the modality transform, then the
    file's first VOI LUT or window, otherwise its robust ends; colour becomes ITU-R 601 luma.
    JPG, PNG, BMP and TIFF: colour becomes luma, an alpha channel is ignored, the EXIF rotation is applied. Values of 8
    bits are divided by 255. Deeper grey ones, which commonly hold 10 or 12 bits, go from 0 to their robust largest
    value, see `robust_greys`; 16-bit colours and grey with alpha likewise where they use half of their range at most,
    otherwise they are divided by 65535. TIFF whose least value is white is inverted about the largest of its bits.

    Args:
        path: the file.
        draft_size: JPEG files may be decoded at a reduced DCT scale, never below this many pixels per side; None
            decodes all pixels. Twice the size that they are resized to later costs no visible detail.

    Returns:
        float32 (H, W) in [0, 1], and what was done to the values, a line each.

    Raises:
        DataError: the file is damaged or of an unknown format, or holds several frames or pages, a CT slice or what
            else is no X-ray, or pixels of one constant value.
        FileNotFoundError: there is none.
    """
    content = identify(path)
    if content == DICOM:
        return _read_dicom(path)
    if fault := content_fault(Path(path).name, content) or marks_fault(Path(path)):
        raise DataError(f"{path}: {fault}")
    try:
        return _read_picture(str(path), draft_size)
    except (DataError, MemoryError, FileNotFoundError, Image.DecompressionBombError):
        raise
    except Exception as error:
        raise DataError(f"{path}: {reason_of(error, path)}") from error


def _read_dicom(path: str | Path) -> tuple[Array, list[str]]:
    header = read_header(path)
    if (fault := film_fault(header)) is not None:
        raise DataError(f"{path}: {fault.detail}")
    pixels = modality_values(header)
    if pixels.values.ndim == 3:
        return dicom_greys(header, pixels)
    notes = [*pixels.notes, "luma of colours"]
    if text := colour_fault(pixels.values[0] * 255):
        raise DataError(f"{path}: {text}")
    luma = pixels.values[0] @ _LUMA
    if header.bits_stored <= 8 or header.photometric == "PALETTE COLOR":
        return _eight_bits(np.round(luma * 255).astype(np.uint8), str(path), notes)
    return _deep(luma * 65535, str(path), notes)


def _read_picture(path: str, draft_size: int | None) -> tuple[Array, list[str]]:
    with Image.open(path, formats=PICTURE_FORMATS) as image:
        if text := pages_fault(image):
            raise DataError(f"{path}: {text}")
        if image.mode not in ("1", "L") and _is_deep_colour(image, path):
            return _deep_colour(image, path)
        # by a name Pillow maps the pixels, of a turned TIFF by the size that it has upright
        image.filename = ""
        if draft_size is not None:
            # colours of a JPEG as they are coded, whose first channel is luma
            image.draft("L" if image.mode == "L" else "YCbCr", (draft_size, draft_size))
        upright = ImageOps.exif_transpose(image)
        if upright.mode[0] in "IF":
            values, notes = np.asarray(upright), []
            if image.format == "TIFF" and _tag(image, _PHOTOMETRIC) == 0 and values.dtype.kind != "f":
                values = 2 ** _tag(image, _BITS_PER_SAMPLE) - 1 - values.astype(np.int64)
                notes = ["inverted (MinIsWhite)"]
            greys, said = robust_greys(values, path)
            return greys, [*notes, said]
        if upright.mode in ("1", "L", "LA"):
            return _eight_bits(np.asarray(upright.convert("L")), path, [])
        # a palette or CMYK image has to become RGB before its luma can be taken
        colours = upright if upright.mode in ("RGB", "RGBA", "YCbCr") else upright.convert("RGB")
        if text := colour_fault(_small_rgb(colours)):
            raise DataError(f"{path}: {text}")
        return _eight_bits(np.asarray(colours.convert("L")), path, ["luma of colours"])


def _eight_bits(values: Array, path: str, notes: list[str]) -> tuple[Array, list[str]]:
    if (low := int(values.min())) == int(values.max()):
        raise DataError(f"{path}: all pixels have the value {low}; this is no X-ray")
    return values.astype(np.float32) / 255, [*notes, "value / 255"]


def _tag(image: Image.Image, number: int) -> int:
    value = getattr(image, "tag_v2", {}).get(number, 1)
    return int(value[0] if isinstance(value, tuple) else value)


def _is_deep_colour(image: Image.Image, path: str) -> bool:
    """Whether Pillow would cut more than 8 bits of several channels down to 8."""
    if image.format == "PNG":
        with open(path, "rb") as stream:
            head = stream.read(26)
        # IHDR: bits per sample, then colour type
        return head[24] == 16 and head[25] in (2, 4, 6)
    return image.format == "TIFF" and image.mode in ("LA", "RGB", "RGBA") and _tag(image, _BITS_PER_SAMPLE) > 8


def _deep_colour(image: Image.Image, path: str) -> tuple[Array, list[str]]:
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    if image.format == "TIFF" and (turn is not None or _tag(image, _PLANAR) == 2):
        # ITK gives 8 bits of these alone
        how = "that are to be turned" if turn is not None else "in planes of their own"
        raise DataError(f"{path}: holds 16-bit colours {how}. Save it upright and interleaved, or in grey")
    itk = load_itk()
    # ITK has no images of 16-bit colours, but of vectors
    reader = itk.ImageFileReader[itk.VectorImage[itk.F, 2]].New(FileName=path)
    reader.Update()
    values = np.asarray(itk.array_from_image(reader.GetOutput()))
    if values.ndim == 3 and values.shape[2] >= 3:
        if text := colour_fault(values[..., :3] * (255 / max(int(values[..., :3].max()), 1))):
            raise DataError(f"{path}: {text}")
        luma, notes = values[..., :3] @ _LUMA, ["luma of 16-bit colours"]
    else:
        luma, notes = values[..., 0] if values.ndim == 3 else values, ["16-bit grey, its alpha ignored"]
    upright = luma if turn is None else np.asarray(Image.fromarray(luma).transpose(turn))
    return _deep(upright, path, notes)


def _deep(values: Array, path: str, notes: list[str]) -> tuple[Array, list[str]]:
    if robust_ends(values, path)[1] >= _SHALLOW:
        return values.astype(np.float32) / 65535, [*notes, "value / 65535"]
    greys, said = robust_greys(values, path)
    return greys, [*notes, said]


def _small_rgb(image: Image.Image) -> Array:
    rgb = image.convert("RGB")
    rgb.thumbnail((256, 256))
    return np.asarray(rgb)


class XrayReader:
    """Read one X-ray with its meta data, among them what was done to its values, "film_values".

    Args:
        draft_size: see `read_xray`.
    """

    def __init__(self, draft_size: int | None = None) -> None:
        self.draft_size = draft_size

    def get_data(self, path: str | Path) -> tuple[Array, dict[str, Any]]:
        """Decode the file at a path.

        Returns:
            float32 (H, W) in [0, 1], and its meta data.

        Raises:
            DataError, OSError: see `read_xray`.
        """
        greys, notes = read_xray(path, self.draft_size)
        return greys, {"spatial_shape": np.asarray(greys.shape), "film_values": "; ".join(notes)}


def film_notes(items: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """What was done to the values of a batch's films, {"film_values": a line each}; empty where an item is no film."""
    return {"film_values": [item["film_values"] for item in items]} if all("film_values" in i for i in items) else {}
