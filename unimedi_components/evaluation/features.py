# SPDX-License-Identifier: Apache-2.0
"""A trained network over the items of a datalist: features, embeddings, selected slices, attention."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from unimedi_components.data.phantom.paired import PAIRED
from unimedi_components.data.text import as_trained
from unimedi_components.data.transforms import input_transforms
from unimedi_components.distributed import gather_objects, is_distributed, rank, wait_for_ranks, world_size
from unimedi_components.errors import DataError
from unimedi_components.images.find import ImageList
from unimedi_components.loading import ImageDataset, ImageLoader, MixedCollate
from unimedi_components.networks.output import ImageFeatures
from unimedi_components.networks.pretrained import Pretrained

__all__ = [
    "Features",
    "Paired",
    "check_punct",
    "extract_features",
    "features_of_all_ranks",
    "labels_of",
    "load_truth",
    "make_dataset",
    "pool",
]

Truth = Mapping[str, Mapping[str, Any]]

_TRUTH = "truth.json"


@dataclass(frozen=True)
class Paired:
    """N images of one dimension with their reports.

    Args:
        items: the datalist items that could be read; rows follow them.
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
        """Patient of each item."""
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
        root: folder that the items' image paths are relative to.
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
        """Image file of each item."""
        return [self.root / item["image"] for item in self.items]


def check_punct(pretrained: Pretrained, lists: Mapping[str, Any]) -> None:
    """Warn where a datalist's reports lack the punctuation that the network's training reports had.

    Args:
        lists: the datalist; those of before meta.keep_punct pass.
    """
    meta = lists.get("meta", {})
    if pretrained.keep_punct and meta.get("keep_punct") is False:
        warnings.warn(
            f"{meta.get('dataset', 'the datalist')}: its reports lost their punctuation, which those that the network "
            "was trained on kept; prepare the data with --keep_punct for the values that it can reach",
            stacklevel=3,
        )


def make_dataset(
    pretrained: Pretrained,
    items: Sequence[dict[str, Any]],
    root: str | Path,
    cache_dir: str | Path | None = None,
    strict: bool = False,
) -> ImageDataset:
    """The items as the network was trained to see them, by its card, reports as well, without random transforms.

    Args:
        pretrained: its card holds "preprocessing": arguments of `xray_transforms` and `ct_transforms`, and
            "keep_punct".
    """
    transform = input_transforms(pretrained.card["preprocessing"])
    texts = [as_trained(item.get("report") or "", pretrained.keep_punct) for item in items]
    read = ({**item, "report": text} if text else item for item, text in zip(items, texts, strict=True))
    known = ImageList(read, getattr(items, "left_out", ()))
    return ImageDataset(known, transform, root, cache_dir=cache_dir, strict=strict)


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
        pretrained: the network, in evaluation mode; runs on the device that it is on.
        items: datalist items of one or both dimensions.
        use_slices: feed the selected slices beside the volume, as in pre-training.
        cache_dir: folder to keep prepared images in, for a second network over the same items.

    Returns:
        `Features` by dimension, 2 and 3; a dimension without a readable item is left out.
    """
    if not items:
        return {}
    dataset = make_dataset(pretrained, items, root, cache_dir)
    length = pretrained.card["preprocessing"].get("max_length", 112)
    collate = MixedCollate(pretrained.tokenizer, length, length)
    loader = ImageLoader(dataset, (batch_2d, batch_3d), collate_fn=collate, num_workers=num_workers)
    by_id = {item["id"]: item for item in items}
    rows: dict[int, list[dict[str, Any]]] = {}
    with tqdm(total=len(items), desc="embedding", unit="study", disable=not progress) as bar:
        for batch in loader:
            for dim in (2, 3):
                if f"image{dim}d" in batch:
                    part = _run_batch(pretrained, batch, dim, use_slices)
                    rows.setdefault(dim, []).append({"items": [by_id[name] for name in batch["id"]], **part})
            bar.update(len(batch["id"]))
    return {dim: _join(parts, Path(root)) for dim, parts in rows.items()}


def features_of_all_ranks(
    pretrained: Pretrained, items: Sequence[dict[str, Any]], root: str | Path, **options: Any
) -> dict[int, Features]:
    """`extract_features` with the items shared out among the ranks, each of which gets all features.

    Args:
        pretrained, items, root, options: as there.
    """
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
        parts = [share[dim] for share in shares if dim in share]
        joined = [item for part in parts for item in part.items]
        rows = sorted(range(len(joined)), key=lambda row: place[joined[row]["id"]])
        values: dict[str, Any] = {}
        for name in (field.name for field in fields(Features) if field.name not in ("items", "root")):
            columns = [getattr(part, name) for part in parts]
            values[name] = None if columns[0] is None else torch.cat(columns)[rows]
        found[dim] = Features(items=[joined[row] for row in rows], root=Path(root), **values)
    return found


@torch.no_grad()
def _run_batch(pretrained: Pretrained, batch: Mapping[str, Any], dim: int, use_slices: bool) -> dict[str, Any]:
    network = pretrained.network
    device = next(network.parameters()).device
    pixels = batch[f"image{dim}d"].to(device)
    image = network.encode_image(pixels, use_slices)
    modality = torch.full((len(image.cls),), dim - 2, device=device)
    text = network.encode_text(batch["input_ids"].to(device), batch["attention_mask"].to(device), modality)
    found = {
        "cls": image.cls,
        "image_embed": image.embed,
        "text_embed": text,
        "attention": image.attention,
        "selected": image.selected,
        "scores": image.scores,
        "slice_attention": _slice_attention(image),
        "pooled": pool(pixels),
    }
    return {name: None if value is None else value.cpu() for name, value in found.items()}


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


def _join(parts: list[dict[str, Any]], root: Path) -> Features:
    items = [item for part in parts for item in part["items"]]
    names = [name for name in parts[0] if name != "items"]
    joined: dict[str, Any] = {n: None if parts[0][n] is None else torch.cat([part[n] for part in parts]) for n in names}
    return Features(items=items, root=root, **joined)


def load_truth(root: str | Path) -> dict[str, Any] | None:
    """The truth of the phantom set at `root`, or of those in its folders; None for real data.

    Args:
        root: a folder with truth.json, or one with a folder per data set, as pre-training's datalist has it.

    Returns:
        "findings", the names of the labels, and "studies", by item id: "labels", "findings", and for volumes
        "lesion_slices" (inferior to superior), "n_slices" and, where the patient can be made again for an X-ray,
        "phantom" (layout, seed, number). Studies of a folder NAME also go by NAME-ID, as `merge_datalists` calls ids
        that collide.

    Raises:
        DataError: a file is damaged.
    """
    if (Path(root) / _TRUTH).is_file():
        return _read_truth(Path(root) / _TRUTH)
    parts = {path.parent.name: _read_truth(path) for path in sorted(Path(root).glob(f"*/{_TRUTH}"))}
    if not parts:
        return None
    studies: dict[str, Any] = {}
    for name, part in parts.items():
        studies.update(part["studies"])
        studies.update({f"{name}-{key}": study for key, study in part["studies"].items()})
    return {"findings": next(iter(parts.values()))["findings"], "studies": studies}


def _read_truth(path: Path) -> dict[str, Any]:
    try:
        truth = json.loads(path.read_text(encoding="utf-8"))
        studies = truth["studies"]
        if truth.get("layout") in PAIRED:
            made = enumerate(studies.items())
            studies = {name: {**study, "phantom": (truth["layout"], truth["seed"], i)} for i, (name, study) in made}
        return {"findings": truth["findings"], "studies": studies}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no truth file of phantoms ({error!r}); write them again") from error


def labels_of(items: Sequence[Mapping[str, Any]], studies: Truth) -> npt.NDArray[np.int64]:
    """True labels of datalist items, (N, F).

    Raises:
        DataError: an item is not in the truth file.
    """
    missing = [item["id"] for item in items if item["id"] not in studies]
    if missing:
        raise DataError(f"truth.json does not know {missing[0]} ({len(missing)} such); write the phantoms again")
    return np.asarray([studies[item["id"]]["labels"] for item in items], dtype=np.int64)
