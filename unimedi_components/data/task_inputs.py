# SPDX-License-Identifier: Apache-2.0
"""What a user names as the images of one dimension that a task bundle reads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimedi_components.command_options import path_names
from unimedi_components.data.datalist import load_datalist, select
from unimedi_components.data.slice_files import IMAGE_ENDINGS
from unimedi_components.errors import DataError
from unimedi_components.images.find import ImageList, LeftOut, find_images

__all__ = ["find_task_images"]

logger = logging.getLogger(__name__)

_KIND, _OTHER = {2: "X-ray", 3: "CT volume"}, {2: "a CT volume", 3: "an X-ray"}


def find_task_images(
    inputs: str | Sequence[str] | None = None,
    root: str | Path = ".",
    dim: int = 2,
    slice_folders: bool = False,
    datalist: str | Path | None = None,
    assume_hu: bool = False,
) -> ImageList:
    """Items for each image of one dimension; those of the other one are left out, with a warning.

    Args:
        inputs: a file, folder or pattern, or several, as `find_images` takes them. None takes the test split of
            `datalist` if that is there, and all below `root` otherwise.
        root: folder of relative inputs and of the datalist's images.
        dim: 2 for X-rays, 3 for volumes.
        slice_folders: two or more PNG, JPG, BMP or TIFF files in one folder are the slices of one volume; volumes only.
        datalist: file that a training run has made.
        assume_hu: see `find_images`.

    Returns:
        {"id", "image" and "source": absolute path, "dim"} each, and from a datalist "patient", "slices" and "center"
        where they are there.

    Raises:
        DataError: an input names nothing, or no image of this dimension was found.
    """
    base = Path(root).expanduser().absolute()
    if inputs is None and datalist is not None and Path(datalist).is_file():
        return _test_split(Path(datalist), base, dim)
    if inputs is None and not base.is_dir():
        raise DataError(f"{base}: no such folder of images; name files or folders with --inputs PATH")
    found = find_images("." if inputs is None else path_names(inputs), base, assume_hu)
    left_out = found.left_out
    if dim == 3 and slice_folders:
        found = ImageList(_gather_slices(found, base), left_out)
    fields = ("id", "image", "source", "dim", "files", "assume_hu", "check_hu")
    kept = [{name: item[name] for name in fields if name in item} for item in found if item["dim"] == dim]
    others = [item["source"] for item in found if item["dim"] != dim]
    if others:
        logger.warning(
            "%d of %d images left out, this bundle reads %ss: first %s", len(others), len(found), _KIND[dim], others[0]
        )
    if not kept:
        raise DataError(
            f"{others[0]}: no {_KIND[dim]}, nor any of {len(found)} images named; this bundle reads no other"
        )
    reason = f"is {_OTHER[dim]}, and this bundle reads {_KIND[dim]}s"
    return ImageList(kept, [*left_out, *(LeftOut(other, reason, False) for other in others)])


def _test_split(path: Path, base: Path, dim: int) -> ImageList:
    items = select(load_datalist(path, base), "test", dim)
    if not items:
        raise DataError(f"{path}: no {dim}D image in its test split; name files or folders with --inputs PATH")
    fields = ("id", "patient", "dim", "slices", "center", "assume_hu")
    known = [{name: item[name] for name in fields if name in item} for item in items]
    for one, item in zip(known, items, strict=True):
        one["image"] = one["source"] = str(base / item["image"])
        if "files" in item:
            one["files"] = [str(base / file) for file in item["files"]]
    return ImageList(known)


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
