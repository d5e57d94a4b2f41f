# SPDX-License-Identifier: Apache-2.0
"""Images with labels for the classification bundles, and the features of a frozen encoder in their place."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from unimedi_components.data.transforms import ByDimension
from unimedi_components.distributed import gather_objects, rank, world_size
from unimedi_components.errors import DataError
from unimedi_components.images.find import ImageList
from unimedi_components.images.xray import film_notes
from unimedi_components.loading.dataset import PretrainDataset, Skipped
from unimedi_components.loading.loader import MixedDataLoader
from unimedi_components.loading.sampler import MixedBatchSampler, rank_share

__all__ = ["FeatureDataset", "LabelledDataset", "collate_labelled", "distinguish", "labelled_loader"]


class LabelledDataset(PretrainDataset):
    """Items of one dimension with labels; cached, seeded and tolerant of unreadable files as `PretrainDataset`.

    Args:
        data: datalist items; of MONAI Label's items, {"image", "label"} alone, the rest is filled in.
        transform: list of transforms of one dimension.
        label_names: classes (binary, multiclass) or findings (multilabel).
        task: "binary", "multilabel" or "multiclass"; decides what a label may be. A label may also be the name of a
            class, or a JSON file, absolute or below `root`, that holds one, alone or under "label".
        dim: 2 or 3.
        require_label: whether items without a label are an error.
        kwargs: of `PretrainDataset`.

    Raises:
        DataError: a label is missing or is none that the task knows.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Sequence[Any],
        root: str | Path,
        label_names: Sequence[str],
        task: str,
        dim: int,
        require_label: bool = True,
        **kwargs: Any,
    ) -> None:
        chain = ByDimension(transform, ()) if dim == 2 else ByDimension((), transform)
        self.label_names, self.task = list(label_names), task
        self._labels_from = Path(root)
        items = ImageList((self._complete(item, dim, require_label) for item in data), getattr(data, "left_out", ()))
        distinguish(items)
        super().__init__(items, chain, root, require_report=False, **kwargs)

    def _complete(self, item: Mapping[str, Any], dim: int, require_label: bool) -> dict[str, Any]:
        name = Path(str(item.get("image", ""))).name.partition(".")[0]
        full = {"id": name, "patient": item.get("id", name), "dim": dim, **item}
        if "label" in item:
            full["label"] = self._label(item["label"], full["id"])
        elif require_label:
            raise DataError(f"item {full['id']!r} has no label; prepare the data with labels, or give the item one")
        return full

    def _label(self, value: Any, name: str) -> int | list[int]:
        if isinstance(value, str) and value.endswith(".json"):
            try:
                content = json.loads((self._labels_from / value).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise DataError(f"{value}: cannot be read as the label of {name!r} ({error})") from error
            value = content.get("label") if isinstance(content, Mapping) else content
        if isinstance(value, str) and value in self.label_names:
            value = self.label_names.index(value)
        count = len(self.label_names)
        if self.task == "multilabel":
            good = isinstance(value, (list, tuple)) and len(value) == count and all(v in (0, 1, -1) for v in value)
            wanted = f"a list of {count} values 0, 1 or -1 (uncertain)"
        else:
            good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count
            wanted = f"a whole number from 0 to {count - 1}, or one of {', '.join(self.label_names)}"
        if not good:
            raise DataError(f"item {name!r} has the label {value!r}; for this {self.task} task it must be {wanted}")
        return list(value) if self.task == "multilabel" else value  # type: ignore[arg-type, return-value]


def distinguish(items: Sequence[dict[str, Any]]) -> None:
    """Number equal ids: MONAI Label's items have none, and files of different folders may share a name."""
    known = {item["id"] for item in items}
    seen: set[str] = set()
    for item in items:
        name, number = item["id"], 2
        while item["id"] in seen or (number > 2 and item["id"] in known):
            item["id"], number = f"{name}-{number}", number + 1
        seen.add(item["id"])


class FeatureDataset(Dataset[Any]):
    """A data set whose images are replaced by the features of a frozen encoder, each computed once.

    The encoder runs over all items before the first one is asked for, under a progress bar; items that cannot be
    read are left out then.

    Args:
        dataset: the images; with random transforms they pass through, or every epoch would see the same draw.
        network: with `features`; in evaluation mode for the pass.
        enabled: False passes the images through.
        share: let each rank run the encoder over its share of the items and exchange the features; for items that are
            the same on every rank.

    Raises:
        DataError: not one image can be read.
    """

    def __init__(
        self,
        dataset: LabelledDataset,
        network: nn.Module,
        device: torch.device | str,
        enabled: bool = True,
        batch_size: int = 32,
        num_workers: int = 0,
        share: bool = True,
        desc: str = "features",
    ) -> None:
        self.dataset = dataset
        self.network: Any = getattr(network, "module", network)
        self.device, self.desc = torch.device(device), desc
        self.enabled = enabled and not any(chain.transforms for chain in dataset.transform.random.branches.values())
        self.batch_size, self.num_workers, self.share = batch_size, num_workers, share
        self._items: list[dict[str, Any]] | None = None
        self._encoder: list[int] = []

    @property
    def data(self) -> list[dict[str, Any]]:
        """The items, without those that the pass could not read."""
        return self._computed() if self.enabled else list(self.dataset.data)

    @property
    def dims(self) -> list[int]:
        """2 or 3 for every item."""
        return [item["dim"] for item in self.data]

    @property
    def skipped(self) -> list[Skipped]:
        """The items that could not be read."""
        return self.dataset.skipped

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of random transforms; features have none."""
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        if not self.enabled:
            return self.dataset.__getitems__(indices)
        items = self.data
        return [items[index] for index in indices]

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def _computed(self) -> list[dict[str, Any]]:
        # a checkpoint that is loaded when training starts brings another encoder
        encoder = self._versions()
        if self._items is None or encoder != self._encoder:
            self._encoder = encoder
            images = _without_stand_ins(self.dataset)
            if self.share:
                images.set_data(images.data[rank() :: world_size()])
            rows = self._encode(images)
            parts = gather_objects(rows) if self.share else [rows]
            found = {name: row for part in parts for name, row in part.items()}
            items = [item for item in self.dataset.data if item["id"] in found]
            self._items = [{**item, "image": found[item["id"]]} for item in items]
            if self.dataset.data and not self._items:
                first = next((f", first {record.file}: {record.reason}" for record in images.skipped), "")
                raise DataError(f"none of {len(self.dataset.data)} images can be read{first}")
        return self._items

    def _versions(self) -> list[int]:
        """How often each tensor of the encoder was written to."""
        encoder = self.network.encoder
        return [tensor._version for tensor in (*encoder.parameters(), *encoder.buffers())]

    def _encode(self, images: LabelledDataset) -> dict[str, Tensor]:
        """Features by item id."""
        rows: dict[str, Tensor] = {}
        if not images.data:
            return rows
        training = self.network.training
        self.network.eval()
        with tqdm(total=len(images), desc=self.desc, unit="image", leave=False) as bar, torch.no_grad():
            for batch in labelled_loader(images, self.batch_size, num_workers=self.num_workers):
                features = self.network.features(batch["image"].to(self.device)).float().cpu()
                rows |= dict(zip(batch["id"], features, strict=True))
                bar.update(len(features))
        self.network.train(training)
        return rows


def collate_labelled(items: Sequence[dict[str, Any] | Skipped]) -> dict[str, Any] | None:
    """Items to a batch, without those that could not be read.

    Returns:
        "image" (B, ...), "id" and "patient" lists, and "label" int64 (B,) or (B, C) where every item has one; None
        where nothing could be read.
    """
    good = [item for item in items if not isinstance(item, Skipped)]
    if not good:
        return None
    batch: dict[str, Any] = {"image": torch.stack([item["image"] for item in good])}
    batch |= {name: [item[name] for item in good] for name in ("id", "patient")}
    batch |= film_notes(good)
    if all("label" in item for item in good):
        batch["label"] = torch.as_tensor([item["label"] for item in good], dtype=torch.int64)
    return batch


def labelled_loader(
    dataset: Any,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    num_workers: int = 0,
    drop_last: bool = False,
    share: bool = False,
    **kwargs: Any,
) -> DataLoader[Any]:
    """Batches of a task's data set, shuffled as a pure function of (seed, epoch) and shared among ranks.

    Args:
        dataset: a `LabelledDataset`, `FeatureDataset` or `DenseDataset`.
        shuffle: reshuffle every epoch (training); otherwise every readable item comes once, in order, and none
            stands in for an unreadable one.
        share: without `shuffle`, give each rank its own part of the items, as validation on several devices wants.
        kwargs: of `torch.utils.data.DataLoader`.

    Raises:
        DataError: there are no items.
    """
    workers = 0 if getattr(dataset, "enabled", False) else num_workers
    batches: Any
    if shuffle:
        batches = MixedBatchSampler(
            dataset.dims, batch_size, batch_size, seed=seed, drop_last=drop_last, epoch_over="longest"
        )
    else:
        dataset = _without_stand_ins(dataset)
        if not len(dataset):
            raise DataError("no images to evaluate: the split is empty; prepare the data with items in it")
        indices = rank_share(range(len(dataset))) if share else list(range(len(dataset)))
        batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    collate: Any = getattr(dataset, "collate", collate_labelled)
    return MixedDataLoader(dataset, batches, collate, num_workers=workers, seed=seed, **kwargs)


def _without_stand_ins(dataset: Any) -> Any:
    dataset = copy.copy(dataset)
    if isinstance(dataset, FeatureDataset):
        dataset.dataset = _without_stand_ins(dataset.dataset)
    else:
        dataset.refill = False
    return dataset
