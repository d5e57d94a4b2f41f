# SPDX-License-Identifier: Apache-2.0
"""Whatever a user names, files, folders or patterns, as items that a trained network can read."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.data import DataLoader

from unimedi_components.command_options import path_names
from unimedi_components.data.datalist import load_datalist
from unimedi_components.data.dataset import PretrainDataset, Skipped
from unimedi_components.data.itk_loading import load_itk
from unimedi_components.data.table import VOLUME_ENDINGS
from unimedi_components.errors import DataError

__all__ = ["find_images", "image_loader"]

logger = logging.getLogger(__name__)

_PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
_DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
_DATALIST = "pretrain.json"


class _Dicom(NamedTuple):
    path: Path
    series: str
    modality: str
    depth: int


def find_images(inputs: str | Sequence[str] | None = None, root: str | Path = ".") -> list[dict[str, Any]]:
    """Items for each X-ray and CT volume that the inputs name.

    JPG, PNG, BMP and TIFF files and DICOM files of one frame are X-rays; NIfTI, MetaImage and NRRD files, DICOM files
    of many frames, and folders that hold one DICOM series are volumes. Other files in a folder are left alone.

    Args:
        inputs: a file, folder or pattern such as `scans/**/*.nii.gz`, or several; relative ones are looked for in
            `root`, then in the current folder. None takes the test split of `root`/pretrain.json if that is there,
            as in a folder that pre-training has read, and all below `root` otherwise.
        root: folder of relative inputs.

    Returns:
        {"id", "image" and "source": absolute path, "dim": 2 or 3, "report": where it is known} each; ids are unique
        and can be file names.

    Raises:
        DataError: an input names nothing, or nothing was found.
    """
    base = Path(root).expanduser().absolute()
    if inputs is None and (base / _DATALIST).is_file():
        items = load_datalist(base / _DATALIST, base)["test"]
        return [{**item, "image": str(base / item["image"]), "source": str(base / item["image"])} for item in items]
    if inputs is None and not base.is_dir():
        raise DataError(f"{base}: no such folder of images; name files or folders with --inputs PATH")
    named = path_names(inputs or ["."])
    files = dict.fromkeys(file for name in named for file in _expand(name, base))
    found = _volumes_and_xrays(files)
    if not found:
        raise DataError(f"{', '.join(named)}: no image in it; name X-ray or CT files, or folders that hold them")
    ids = _unique_names([path for path, _ in found], base)
    return [
        {"id": name, "image": str(path), "source": str(path), "dim": dim, "report": ""}
        for name, (path, dim) in zip(ids, found, strict=True)
    ]


def _expand(name: str, base: Path) -> list[Path]:
    """All files that a file, folder or pattern names, in order."""
    for folder in (base, Path.cwd()):
        pattern = os.path.normpath(os.path.join(folder, os.path.expanduser(name)))
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if matches:
            break
    else:
        raise DataError(
            f"{name}: no such file, folder or pattern, neither in {base} nor in {Path.cwd()}{_quoted(name)}"
        )
    files: list[Path] = []
    for match in map(Path, matches):
        if match.is_dir():
            below = sorted(file for file in match.rglob("*") if file.is_file() and not file.name.startswith("."))
            files += [file for file in below if _is_image(file)]
        else:
            files.append(match)
    return files


def _quoted(name: str) -> str:
    """What to say of a name that the command line may have read as a number, such as 2024_01."""
    return f"; a name of digits alone is written ./{name}" if name.replace(".", "").isdigit() else ""


def _ends(path: Path, endings: Sequence[str]) -> bool:
    return path.name.lower().endswith(tuple(endings))


def _is_image(path: Path) -> bool:
    # what only calls itself DICOM is an image that cannot be read: left out by name, not in silence
    return _ends(path, (*_PICTURE_ENDINGS, *VOLUME_ENDINGS, *_DICOM_ENDINGS)) or _is_dicom(path)


def _is_dicom(path: Path) -> bool:
    if path.suffix.lower() not in (*_DICOM_ENDINGS, "") and not path.suffix[1:].isdigit():
        return False
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _volumes_and_xrays(files: Iterable[Path]) -> list[tuple[Path, int]]:
    found: list[tuple[Path, int]] = []
    folders: dict[Path, list[Path]] = {}
    for file in files:
        if _is_dicom(file):
            folders.setdefault(file.parent, []).append(file)
        else:
            found.append((file, 3 if _ends(file, VOLUME_ENDINGS) else 2))
    for folder, members in folders.items():
        found += _dicom_images(folder, members)
    return sorted(found)


def _dicom_images(folder: Path, files: list[Path]) -> list[tuple[Path, int]]:
    """A folder's DICOM files as one volume, or each file by itself; what is neither is left out with a warning."""
    headers = [header for file in files if (header := _read_header(file)) is not None]
    series = {header.series for header in headers}
    if len(series) == 1 and len(headers) > 1:
        return [(folder, 3)]
    if len(series) < len(headers):
        logger.warning("%s: left out, it holds %d DICOM series; put each into its own folder", folder, len(series))
        return []
    images = []
    for header in headers:
        if header.depth > 1:
            images.append((header.path, 3))
        elif header.modality == "CT":
            logger.warning("%s: left out, it is one slice of a CT series; give the series' folder", header.path)
        else:
            images.append((header.path, 2))
    return images


def _read_header(path: Path) -> _Dicom | None:
    itk = load_itk()

    image_io = itk.GDCMImageIO.New()
    image_io.SetFileName(str(path))
    try:
        image_io.ReadImageInformation()
    except RuntimeError as error:
        logger.warning("%s: left out, not readable as DICOM (%s)", path, str(error).strip().splitlines()[-1])
        return None
    tags = image_io.GetMetaDataDictionary()

    def tag(name: str) -> str:
        return str(tags[name]).strip() if tags.HasKey(name) else ""

    depth = int(image_io.GetDimensions(2)) if image_io.GetNumberOfDimensions() > 2 else 1
    return _Dicom(path, tag("0020|000e") or str(path), tag("0008|0060"), depth)


def _unique_names(paths: Sequence[Path], base: Path) -> list[str]:
    """File names without endings; the folders below `base` are part of them."""
    names: dict[str, None] = {}
    numbers: dict[str, int] = {}
    for path in paths:
        relative = path.relative_to(base) if path.is_relative_to(base) and path != base else Path(path.name)
        ending = next((end for end in (*VOLUME_ENDINGS[::-1], path.suffix) if _ends(path, [end])), "")
        stem = "_".join(relative.parts)
        stem = stem[: len(stem) - len(ending)] if path.is_file() and ending else stem
        number, name = numbers.get(stem, 2), stem
        while name in names:
            number, name = number + 1, f"{stem}-{number}"
        names[name], numbers[stem] = None, number
    return list(names)


def image_loader(
    dataset: PretrainDataset, batch_2d: int = 16, batch_3d: int = 4, num_workers: int = 0, **kwargs: Any
) -> DataLoader:
    """Batches of X-rays, then of volumes, without reports.

    Args:
        dataset: items of `find_images`; unreadable ones are left out and stay listed in `dataset.skipped`.
        batch_2d: X-rays per batch.
        batch_3d: volumes per batch.
        num_workers: loading processes.
        kwargs: of `torch.utils.data.DataLoader`.

    Returns:
        A loader of {"image": (B, 1, ...) float, and lists of B: "id", "dim", "source", "report"}; a batch of which
        nothing could be read has empty lists and no image.
    """
    dataset.refill = False
    batches = []
    for dim, size in ((2, batch_2d), (3, batch_3d)):
        indices = [index for index, item_dim in enumerate(dataset.dims) if item_dim == dim]
        batches += [indices[start : start + size] for start in range(0, len(indices), size)]
    return DataLoader(dataset, num_workers, batch_sampler=batches, collate_fn=_collate_images, **kwargs)


def _collate_images(items: Sequence[dict[str, Any] | Skipped]) -> dict[str, Any]:
    good = [item for item in items if not isinstance(item, Skipped)]
    batch: dict[str, Any] = {name: [item[name] for item in good] for name in ("id", "dim", "source", "report")}
    if good:
        batch["image"] = torch.stack([item["image"] for item in good])
    return batch
