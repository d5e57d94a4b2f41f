# SPDX-License-Identifier: Apache-2.0
"""Whatever a user names, files, folders or patterns, as items that a trained network can read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import DataLoader

from unimedi_components.command_options import path_names
from unimedi_components.data.datalist import load_datalist
from unimedi_components.data.volume_loading import part_of
from unimedi_components.errors import DataError
from unimedi_components.images import find
from unimedi_components.images.xray import film_notes
from unimedi_components.loading.dataset import PretrainDataset, Skipped

__all__ = ["find_images", "image_loader"]

_DATALIST = "pretrain.json"


def find_images(
    inputs: str | Sequence[str] | None = None, root: str | Path = ".", assume_hu: bool = False
) -> find.ImageList:
    """Items for each X-ray and CT volume that the inputs name, as `images.find.find_images` takes them.

    Args:
        inputs: a file, folder, DICOMDIR or pattern, or several. None takes the test split of `root`/pretrain.json if
            that is there, as in a folder that pre-training has read, and all below `root` otherwise.
        root: folder of relative inputs.
        assume_hu: take CT values for Hounsfield units that do not say how they are rescaled.

    Returns:
        items of absolute paths, and under `left_out` the files that are none.

    Raises:
        DataError: an input names nothing, or nothing was found.
    """
    base = Path(root).expanduser().absolute()
    if inputs is None and (base / _DATALIST).is_file():
        items = load_datalist(base / _DATALIST, base)["test"]
        return find.ImageList(_absolute(item, base) for item in items)
    if inputs is None and not base.is_dir():
        raise DataError(f"{base}: no such folder of images; name files or folders with --inputs PATH")
    return find.find_images(path_names(inputs) if inputs else None, base, assume_hu)


def _absolute(item: dict[str, Any], base: Path) -> dict[str, Any]:
    place = str(base / item["image"])
    files = {"files": [str(base / file) for file in item["files"]]} if "files" in item else {}
    return {**item, "image": place, "source": place, **files}


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
        A loader of {"image": (B, 1, ...) float, and lists of B: "id", "dim", "source", "report", and "part",
        see `part_of`}; a batch of which
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
    batch["part"] = [part_of(item) for item in good]
    batch |= film_notes(good)
    if good:
        batch["image"] = torch.stack([item["image"] for item in good])
    return batch
