# SPDX-License-Identifier: Apache-2.0
"""A trained network over the items of a datalist: features, embeddings, selected slices, attention."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from unimedi_components.distributed import gather_objects, is_distributed, rank, wait_for_ranks, world_size
from unimedi_components.networks.output import ImageFeatures
from unimedi_components.networks.pretrained import Pretrained
from unimedi_components.retrieval.embedder import Embedder, make_dataset


@dataclass(frozen=True)
class Paired:
    """N images of one dimension with their reports.

    Args:
        image_embed, text_embed: projected embeddings, (N, E); those of missing reports are meaningless.
    """

    items: list[dict[str, Any]]
    image_embed: Tensor
    text_embed: Tensor

    @property
    def reports(self) -> list[str]:
        """Report texts, empty where an item has none."""
        return [item.get("report") or "" for item in self.items]

    @property
    def patients(self) -> list[str]:
        return [item["patient"] for item in self.items]


@dataclass(frozen=True)
class Features(Paired):
    """What a network makes of N images of one dimension and their reports; rows follow `items`.

    Args:
        cls: CLS features before the projection, (N, D); embeddings, see `Paired`, are not normalised.
        attention: Eq. 1's **v** of the image's own tokens, (N, P).
        selected: selected slices of each volume, (N, k); None for X-rays.
        scores: Eq. 2 score of each slab, (N, S); None for X-rays.
        slice_attention: share of Eq. 1's **v** that falls on the tokens of the selected slices, beside which share of
            the tokens they are, (N, 2); None where no slices joined.
        pooled: the input averaged to 32 x 32 pixels or 8 x 8 x 8 voxels, (N, 1024) or (N, 512).
    """

    cls: Tensor
    attention: Tensor
    selected: Tensor | None = None
    scores: Tensor | None = None
    slice_attention: Tensor | None = None
    pooled: Tensor | None = None
    root: Path = Path()

    @property
    def files(self) -> list[Path]:
        return [self.root / item["image"] for item in self.items]

    def take(self, rows: Sequence[int]) -> Self:
        """Some of the images, in this order."""
        tensors: dict[str, Any] = {name: value[rows] for name, value in self._tensors().items()}
        return replace(self, items=[self.items[row] for row in rows], **tensors)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Several parts of one dimension as one."""
        columns = [part._tensors() for part in parts]
        tensors: dict[str, Any] = {name: torch.cat([column[name] for column in columns]) for name in columns[0]}
        return replace(parts[0], items=[item for part in parts for item in part.items], **tensors)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def extract_features(
    pretrained: Pretrained,
    items: Sequence[dict[str, Any]],
    root: str | Path,
    *,
    batch_2d: int = 32,
    batch_3d: int = 16,
    use_slices: bool = True,
    num_workers: int = 0,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> dict[int, Features]:
    """Run a network over datalist items.

    Args:
        use_slices: feed the selected slices beside the volume, as in pre-training.
        cache_dir: folder to keep prepared images in, for a second network over the same items.

    Returns:
        `Features` by dimension, 2 and 3; a dimension without a readable item is left out.
    """
    if not items:
        return {}
    embedder = Embedder(pretrained, next(pretrained.network.parameters()).device, use_slices)
    dataset = make_dataset(pretrained, items, root, cache_dir)
    by_id = {item["id"]: item for item in items}
    parts: dict[int, list[Features]] = {}
    for batch, image, found in embedder.run(dataset, batch_2d, batch_3d, num_workers, progress):
        dim, reports = batch["dim"][0], embedder.encode_reports(batch["report"], batch["dim"][0])
        values = {**vars(found), "slice_attention": _slice_attention(found), "pooled": pool(image)}
        del values["joint_attention"]
        rows: Any = {name: None if value is None else value.cpu() for name, value in values.items()}
        own = [by_id[name] for name in batch["id"]]
        parts.setdefault(dim, []).append(Features(own, rows.pop("embed"), reports.cpu(), root=Path(root), **rows))
    return {dim: Features.join(part) for dim, part in parts.items()}


def features_of_all_ranks(
    pretrained: Pretrained, items: Sequence[dict[str, Any]], root: str | Path, **options: Any
) -> dict[int, Features]:
    """`extract_features` with the items shared out among the ranks, each of which gets all features."""
    if not is_distributed():
        return extract_features(pretrained, items, root, **options)
    # reports progress once
    quiet = {"progress": False} if rank() else {}
    mine = extract_features(pretrained, items[rank() :: world_size()], root, **{**options, **quiet})
    wait_for_ranks()
    shares = gather_objects(mine)
    place = {item["id"]: number for number, item in enumerate(items)}
    found = {}
    for dim in sorted({dim for share in shares for dim in share}):
        joined = Features.join([share[dim] for share in shares if dim in share])
        order = [place[item["id"]] for item in joined.items]
        found[dim] = joined.take(sorted(range(len(order)), key=order.__getitem__))
    return found


def pool(image: Tensor) -> Tensor:
    """Images (B, C, H, W) averaged to 32 x 32 pixels, or volumes (B, C, D, H, W) to 8 x 8 x 8 voxels, flattened."""
    volume = image.ndim == 5
    return (F.adaptive_avg_pool3d(image, 8) if volume else F.adaptive_avg_pool2d(image, 32)).flatten(1)


def _slice_attention(image: ImageFeatures) -> Tensor | None:
    if image.joint_attention is None or image.attention is None:
        return None
    own = image.attention.shape[1]
    joint = image.joint_attention
    share = joint[:, own:].sum(1) / joint.sum(1)
    return torch.stack([share, torch.full_like(share, 1 - own / joint.shape[1])], dim=1)
