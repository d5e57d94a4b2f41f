# SPDX-License-Identifier: Apache-2.0
"""Images with masks or boxes for the segmentation and detection bundles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from monai.data.utils import collate_meta_tensor
from torch import Tensor

from unimedi_components.data.films import TARGETS
from unimedi_components.data.roi_boxes import boxes_of_rois
from unimedi_components.data.transforms import ByDimension
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.images.find import ImageList
from unimedi_components.images.xray import film_notes
from unimedi_components.loading.dataset import PretrainDataset, Skipped
from unimedi_components.loading.labelled import distinguish

__all__ = ["DenseDataset", "collate_dense"]


class DenseDataset(PretrainDataset):
    """Items of one dimension with a mask or boxes; cached, seeded and tolerant of bad files as `PretrainDataset`.

    Args:
        data: datalist items. Of MONAI Label's items, the mask's file stands under "label", or boxes under "box" as
            centre and size in the film's world; the rest is filled in.
        transform: list of transforms of one dimension that gives "image" and the target, such as `film_transforms` or
            `segmentation_transforms`, and random ones behind.
        target: "mask", "boxes", or None for images alone.
        dim: 2 or 3.
        keep_meta: give MetaTensors, with which predictions go back to the file's geometry; nothing is cached then.
        require_target: whether items without a target are an error. An X-ray's mask may also be painted from its boxes.
        kwargs: of `PretrainDataset`.

    Raises:
        ConfigError: an unknown target.
        DataError: an item has no target.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Sequence[Callable[..., Any]],
        root: str | Path,
        target: str | None = "mask",
        dim: int = 2,
        keep_meta: bool = False,
        require_target: bool = True,
        **kwargs: Any,
    ) -> None:
        if target is not None and target not in TARGETS:
            raise ConfigError(f"target {target!r} is unknown; use {', '.join(TARGETS)}, or None")
        self.target, self.keep_meta = target, keep_meta
        extra = () if target is None else (target, "affine") if target == "boxes" else (target,)
        self.kept = ("image", *extra)
        items = ImageList((self._complete(item, dim, require_target) for item in data), getattr(data, "left_out", ()))
        distinguish(items)
        chain = ByDimension(transform, ()) if dim == 2 else ByDimension((), transform)
        super().__init__(items, chain, root, require_report=False, **kwargs)

    def _complete(self, item: Mapping[str, Any], dim: int, require_target: bool) -> dict[str, Any]:
        name = Path(str(item.get("image", ""))).name.partition(".")[0]
        full = {"id": name, "patient": item.get("id", name), "dim": dim, **item}
        if self.target == "mask" and isinstance(full.get("label"), str):
            full["mask"] = full.pop("label")
        # masks of films are painted from boxes; MONAI Label's boxes stand under "box"
        known = {"mask": ("mask", "boxes") if dim == 2 else ("mask",), "boxes": ("boxes", "box")}
        wanted = known[self.target] if self.target and require_target else ()
        if wanted and all(full.get(field) is None for field in wanted):
            raise DataError(f"item {full['id']!r} has no {self.target}; prepare the data for this task, or give it one")
        return full

    def _source(self, item: Mapping[str, Any]) -> dict[str, Any]:
        source = super()._source(item)
        if self.target == "mask" and item.get("mask") is not None:
            source["mask"] = str(self.root / item["mask"])
        elif self.target and item.get("boxes") is not None:
            source["boxes"] = item["boxes"]
        elif self.target == "boxes":
            source["boxes"] = boxes_of_rois(source["image"], item["box"]) if "box" in item else []
        return source

    def _prepared(self, item: Mapping[str, Any], index: int) -> dict[str, Any]:
        if not self.keep_meta:
            return super()._prepared(item, index)
        source = self._source(item)
        prepared = dict(self._pre_transform(source))
        if not torch.isfinite(prepared["image"]).all():
            raise DataError(f"{source['image']}: holds values that are not finite numbers")
        return prepared

    def _tensors(self, prepared: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: prepared[name] for name in self.kept} if self.keep_meta else super()._tensors(prepared)

    @staticmethod
    def collate(items: Sequence[dict[str, Any] | Skipped]) -> dict[str, Any] | None:
        """`collate_dense`, which `labelled_loader` looks for here."""
        return collate_dense(items)


def collate_dense(items: Sequence[dict[str, Any] | Skipped]) -> dict[str, Any] | None:
    """Items to a batch, without those that could not be read.

    Returns:
        "image" (B, 1, ...), "id" and "patient" lists; of masks "label" (B, 1, ...), as MONAI's engines name what is to
        be predicted; of boxes "boxes", a list of (N, 4), and "affine" (B, 4, 4). "source" where the items have it. None
        where nothing could be read.
    """
    good = [item for item in items if not isinstance(item, Skipped)]
    if not good:
        return None
    batch: dict[str, Any] = {"image": _stack([item["image"] for item in good])}
    batch |= {name: [item[name] for item in good] for name in ("id", "patient", "source") if name in good[0]}
    batch |= film_notes(good)
    if isinstance(good[0].get("mask"), Tensor):
        batch["label"] = _stack([item["mask"] for item in good])
    if isinstance(good[0].get("boxes"), Tensor):
        batch |= {"boxes": [item["boxes"] for item in good], "affine": torch.stack([item["affine"] for item in good])}
    return batch


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return collate_meta_tensor(list(tensors)) if isinstance(tensors[0], MetaTensor) else torch.stack(list(tensors))
