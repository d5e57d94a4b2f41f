# SPDX-License-Identifier: Apache-2.0
"""Whatever a user names, files, folders or patterns, as items that a trained network can read."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimedi_components.command_options import path_names
from unimedi_components.data.datalist import load_datalist, select
from unimedi_components.data.slice_files import IMAGE_ENDINGS
from unimedi_components.errors import DataError
from unimedi_components.images import find

logger = logging.getLogger(__name__)

_DATALIST = "pretrain.json"
_KIND, _OTHER = {2: "X-ray", 3: "CT volume"}, {2: "a CT volume", 3: "an X-ray"}


def find_images(
    inputs: str | Sequence[str] | None = None,
    root: str | Path = ".",
    assume_hu: bool = False,
    dim: int | None = None,
    slice_folders: bool = False,
    datalist: str | Path | None = None,
) -> find.ImageList:
    """Items for each X-ray and CT volume that the inputs name, as `images.find.find_images` takes them.

    Raises DataError: an input names nothing, or nothing was found.

    Args:
        inputs: a file, folder, DICOMDIR or pattern, or several. None takes the test split of `datalist` if that is
            there, as after training, and all below `root` otherwise.
        assume_hu: take CT values for Hounsfield units that do not say how they are rescaled.
        dim: 2 or 3; images of the other dimension are left out with a warning. None takes both.
        slice_folders: two or more PNG, JPG, BMP or TIFF files in one folder are the slices of one volume; volumes only.
        datalist: file; None for `root`/pretrain.json, which pre-training leaves.

    Returns:
        items of absolute paths, and under `left_out` the files that are none, with images of the other dimension.
    """
    base = Path(root).expanduser().absolute()
    path = base / _DATALIST if datalist is None else Path(datalist)
    if inputs is None and path.is_file():
        items = select(load_datalist(path, base), "test", dim)
        if not items:
            kind = f"{dim}D image" if dim else "image"
            raise DataError(f"{path}: no {kind} in its test split; name files or folders with --inputs PATH")
        return find.ImageList(_absolute(item, base) for item in items)
    if inputs is not None and not inputs and inputs != 0:
        raise DataError(f"--inputs {inputs!r} names nothing; give a file, a folder, a pattern, or a list of them")
    if inputs is None and not base.is_dir():
        raise DataError(f"{base}: no such folder of images; name files or folders with --inputs PATH")
    found = find.find_images(None if inputs is None else path_names(inputs), base, assume_hu)
    if dim is None:
        return found
    items = _gather_slices(found, base) if dim == 3 and slice_folders else found
    kept = [item for item in items if item["dim"] == dim]
    others = [item["source"] for item in items if item["dim"] != dim]
    if others:
        text = "%d of %d images left out, this bundle reads %ss: first %s"
        logger.warning(text, len(others), len(items), _KIND[dim], others[0])
    if not kept:
        raise DataError(
            f"{others[0]}: no {_KIND[dim]}, nor any of {len(items)} images named; this bundle reads no other"
        )
    reason = f"is {_OTHER[dim]}, and this bundle reads {_KIND[dim]}s"
    return find.ImageList(kept, [*found.left_out, *(find.LeftOut(other, reason, False) for other in others)])


def _absolute(item: dict[str, Any], base: Path) -> dict[str, Any]:
    place = str(base / item["image"])
    files = {"files": [str(base / file) for file in item["files"]]} if "files" in item else {}
    return {**item, "image": place, "source": place, **files}


def _gather_slices(found: Sequence[dict[str, Any]], base: Path) -> list[dict[str, Any]]:
    """Folders of pictures in place of the pictures, unless something else in the folder is a volume already."""
    pictures: dict[Path, list[dict[str, Any]]] = {}
    for item in found:
        if item["source"].lower().endswith(IMAGE_ENDINGS):
            pictures.setdefault(Path(item["source"]).parent, []).append(item)
    volumes = {Path(item["source"]).parent for item in found if item["dim"] == 3}
    folders = {folder for folder, items in pictures.items() if len(items) > 1 and folder not in volumes}
    rest = [item for item in found if Path(item["source"]).parent not in folders]
    for folder in sorted(folders):
        inside = folder.is_relative_to(base) and folder != base
        name = "_".join(folder.relative_to(base).parts) if inside else folder.name
        rest.append({"id": name, "image": str(folder), "source": str(folder), "dim": 3})
    return sorted(rest, key=lambda item: item["source"])
