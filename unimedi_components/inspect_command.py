# SPDX-License-Identifier: Apache-2.0
"""The command inspect: what files, series and folders are taken for, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimedi_components.errors import ConfigError, DataError

if TYPE_CHECKING:
    from unimedi_components.images.inspect import Listing

__all__ = ["inspect", "write_sheets"]

_XRAY, _XRAYS_A_SHEET, _COLUMNS = 320, 20, 5
_SLICES, _SLICE = 16, 192
_CAPTION = 14


def inspect(
    *paths: str,
    json: str | None = None,
    png: str | None = None,
    identifiers: bool = False,
    assume_hu: bool = False,
    values: bool = True,
) -> None:
    """Say what each file, series and folder is taken for, and what will be left out and why.

    Every other command reads images in the same way. Ends with exit code 2 where there is no image that can be used.

    Args:
        paths: files, folders, DICOMDIRs or patterns.
        json: file to write {"items": [...], "left_out": [{"file", "reason"}]} to.
        png: folder for contact sheets of what a network will see, with the preparation that bundles have by default.
        identifiers: add the patient's name, id and dates from DICOM headers; nothing of them is told otherwise.
        assume_hu: take CT values for Hounsfield units that do not say how they are rescaled.
        values: read pixels too, for the range of values and whether they are Hounsfield units; False is faster.
    """
    from unimedi_components.data.datalist import write_json
    from unimedi_components.images.inspect import inspect_paths

    if not paths:
        raise ConfigError("inspect: name at least one file or folder")
    for name, switch in (("identifiers", identifiers), ("assume_hu", assume_hu), ("values", values)):
        if not isinstance(switch, bool):
            raise ConfigError(f"--{name} is True or False, got {switch!r}")
    listing = inspect_paths([str(path) for path in paths], assume_hu, values, identifiers)
    print(listing.table())
    if json is not None:
        Path(str(json)).absolute().parent.mkdir(parents=True, exist_ok=True)
        write_json(listing.as_json(), str(json))
    if png is not None:
        for sheet in write_sheets(listing, Path(str(png)), assume_hu):
            print(sheet)
    if not listing.items:
        raise DataError(f"{', '.join(map(str, paths))}: no X-ray or CT volume that can be used")


def write_sheets(listing: Listing, folder: Path, assume_hu: bool = False) -> list[Path]:
    """Write contact sheets: X-rays twenty to a sheet, and of each volume slices from the lowest to the highest.

    Args:
        listing: of `inspect_paths`.
        folder: to write to; made when missing.
        assume_hu: see `inspect_paths`.

    Returns:
        the PNG files.
    """
    from monai.transforms import Compose

    from unimedi_components.data.transforms import ct_transforms, xray_transforms

    xray_chain = Compose(xray_transforms(_XRAY))
    ct_chain = Compose(ct_transforms((_SLICES, _SLICE, _SLICE)))
    folder.mkdir(parents=True, exist_ok=True)
    written, films = [], []
    for item, image in zip(listing.items, listing.images, strict=True):
        files = {"files": [str(file) for file in image.files]} if image.is_folder else {}
        chain = xray_chain if image.dim == 2 else ct_chain
        tensor: Any = chain({"image": str(image.path), "assume_hu": assume_hu, **files})
        greys = (tensor["image"][0].numpy() + 1) / 2
        if image.dim == 2:
            films.append((item["id"], greys))
        else:
            pictures = [(f"{item['id']}  {number + 1}/{_SLICES}", plane) for number, plane in enumerate(greys)]
            written.append(_sheet(pictures, 4, folder / f"{item['id']}.png"))
    for start in range(0, len(films), _XRAYS_A_SHEET):
        name = folder / f"xrays_{start // _XRAYS_A_SHEET + 1:03d}.png"
        written.append(_sheet(films[start : start + _XRAYS_A_SHEET], _COLUMNS, name))
    return written


def _sheet(pictures: Sequence[tuple[str, Any]], columns: int, file: Path) -> Path:
    """Greys (H, W) in [0, 1] of one size side by side, each with its caption."""
    import numpy as np
    from PIL import Image, ImageDraw

    height, width = pictures[0][1].shape
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("L", (columns * width, rows * (height + _CAPTION)))
    draw = ImageDraw.Draw(sheet)
    for number, (caption, greys) in enumerate(pictures):
        x, y = number % columns * width, number // columns * (height + _CAPTION)
        sheet.paste(Image.fromarray(np.rint(255 * np.clip(greys, 0, 1)).astype(np.uint8)), (x, y + _CAPTION))
        # the built-in font knows Latin letters alone
        draw.text((x + 2, y), caption[-(width // 6) :].encode("latin-1", "replace").decode("latin-1"), fill=255)
    sheet.save(file)
    return file
