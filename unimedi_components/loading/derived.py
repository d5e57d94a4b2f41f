# SPDX-License-Identifier: Apache-2.0
"""Data sets over a data set: features of a frozen encoder in place of its images, and its items several times over."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from unimedi_components.distributed import gather_objects, rank, world_size
from unimedi_components.errors import DataError
from unimedi_components.loading.dataset import ImageDataset
from unimedi_components.loading.loader import ImageLoader
from unimedi_components.loading.targets import Skipped

# seeds of the passes lie far apart, beyond any seed that a person would choose next
_SEED_STEP = 1_000_003


class _Derived(Dataset[Any]):
    """What a data set over another passes on: its items, epochs, batches and unreadable files."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    @property
    def data(self) -> Sequence[dict[str, Any]]:
        return self.dataset.data

    @property
    def dims(self) -> list[int]:
        return [item["dim"] for item in self.data]

    @property
    def skipped(self) -> list[Skipped]:
        return self.dataset.skipped

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def without_stand_ins(self) -> Any:
        dataset = copy.copy(self)
        dataset.dataset = self.dataset.without_stand_ins()
        return dataset

    def collate(self, items: Sequence[dict[str, Any] | Skipped]) -> dict[str, Any] | None:
        return self.dataset.collate(items)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        raise NotImplementedError


class RepeatedDataset(_Derived):
    """Each item `times` times in an epoch, with random transforms drawn anew; prepared images are shared.

    nnU-Net calls 250 steps an epoch whatever the number of cases, for what is done once an epoch (validation,
    checkpoints, the progress bar) is too much for a pass over four cases.

    Args:
        times: at least 1; None repeats it as often as comes closest to `steps` batches of `batch_size` items.

    Raises:
        ValueError: less than 1.
    """

    def __init__(self, dataset: ImageDataset, times: int | None = None, steps: int = 250, batch_size: int = 1) -> None:
        super().__init__(dataset)
        self.times = max(1, round(steps * batch_size / max(1, len(dataset)))) if times is None else times
        if self.times < 1:
            raise ValueError(f"times must be at least 1, not {times}")

    @property
    def dims(self) -> list[int]:
        return self.dataset.dims * self.times

    def __len__(self) -> int:
        return len(self.dataset) * self.times

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        items = []
        for index in indices:
            number, place = divmod(index, len(self.dataset))
            # a shallow copy shares the cache, the epoch and the list of unreadable files
            part = copy.copy(self.dataset)
            part.seed += number * _SEED_STEP
            items += part.__getitems__([place])
        return items


class FeatureDataset(_Derived):
    """A data set whose images are replaced by the features of a frozen encoder, each computed once.

    The encoder runs over all items before the first one is asked for, under a progress bar; items that cannot be
    read are left out then.

    Args:
        dataset: the images; with random transforms they pass through, or every epoch would see the same draw.
        share: let each rank run the encoder over its share of the items and exchange the features; for items that are
            the same on every rank.

    Raises:
        DataError: not one image can be read.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        network: nn.Module,
        device: torch.device | str,
        enabled: bool = True,
        batch_size: int = 32,
        num_workers: int = 0,
        share: bool = True,
        desc: str = "features",
    ) -> None:
        super().__init__(dataset)
        self.network: Any = getattr(network, "module", network)
        self.device, self.desc = torch.device(device), desc
        self.enabled = enabled and not any(chain.transforms for chain in dataset.transform.random.branches.values())
        self.batch_size, self.num_workers, self.share = batch_size, num_workers, share
        self._items: list[dict[str, Any]] | None = None
        self._encoder: list[int] = []

    @property
    def data(self) -> list[dict[str, Any]]:
        return self._computed() if self.enabled else list(self.dataset.data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        if not self.enabled:
            return self.dataset.__getitems__(indices)
        items = self.data
        return [items[index] for index in indices]

    def _computed(self) -> list[dict[str, Any]]:
        # a checkpoint that is loaded when training starts brings another encoder
        tensors = (*self.network.encoder.parameters(), *self.network.encoder.buffers())
        encoder = [tensor._version for tensor in tensors]
        if self._items is None or encoder != self._encoder:
            self._encoder = encoder
            images = self.dataset.without_stand_ins()
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

    def _encode(self, images: ImageDataset) -> dict[str, Tensor]:
        """Features by item id."""
        rows: dict[str, Tensor] = {}
        if not images.data:
            return rows
        training = self.network.training
        self.network.eval()
        with tqdm(total=len(images), desc=self.desc, unit="image", leave=False) as bar, torch.no_grad():
            for batch in ImageLoader(images, self.batch_size, num_workers=self.num_workers):
                features = self.network.features(batch["image"].to(self.device)).float().cpu()
                rows |= dict(zip(batch["id"], features, strict=True))
                bar.update(len(features))
        self.network.train(training)
        return rows
