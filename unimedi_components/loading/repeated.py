# SPDX-License-Identifier: Apache-2.0
"""A small data set several times over, so that an epoch has a useful number of steps."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from unimedi_components.loading.dataset import PretrainDataset, Skipped

__all__ = ["RepeatedDataset"]

# seeds of the copies lie far apart, beyond any seed that a person would choose next
_SEED_STEP = 1_000_003


class RepeatedDataset(Dataset[Any]):
    """Each item `times` times in an epoch, with random transforms drawn anew; prepared images are shared.

    nnU-Net calls 250 steps an epoch whatever the number of cases, for what is done once an epoch (validation,
    checkpoints, the progress bar) is too much for a pass over four cases.

    Args:
        dataset: what is repeated.
        times: at least 1; None repeats it as often as comes closest to `steps` batches of `batch_size` items.
        steps: of an epoch.
        batch_size: items per batch.

    Raises:
        ValueError: less than 1.
    """

    def __init__(
        self, dataset: PretrainDataset, times: int | None = None, steps: int = 250, batch_size: int = 1
    ) -> None:
        if times is None:
            times = max(1, round(steps * batch_size / max(1, len(dataset))))
        if times < 1:
            raise ValueError(f"times must be at least 1, not {times}")
        self.dataset, self.times = dataset, times
        self.collate: Any = getattr(dataset, "collate", None)
        self._copies: list[PretrainDataset] = []
        for number in range(times):
            # a shallow copy shares the cache, the epoch and the list of unreadable files
            part = copy.copy(dataset)
            part.seed = dataset.seed + number * _SEED_STEP
            self._copies.append(part)

    @property
    def data(self) -> Sequence[Any]:
        """The items of one pass."""
        return self.dataset.data

    @property
    def dims(self) -> list[int]:
        """2 or 3 for every item of an epoch."""
        return list(self.dataset.dims) * self.times

    @property
    def skipped(self) -> list[Skipped]:
        """The items that could not be read."""
        return self.dataset.skipped

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the random transforms."""
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset) * self.times

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        count = len(self.dataset)
        return [item for index in indices for item in self._copies[index // count].__getitems__([index % count])]

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]
