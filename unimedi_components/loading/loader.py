# SPDX-License-Identifier: Apache-2.0
"""Batches of images, the same for any number of workers."""

import contextlib
import gc
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from monai.data import DataLoader

from unimedi_components.errors import ConfigError, DataError
from unimedi_components.loading.collate import MixedCollate
from unimedi_components.loading.sampler import MixedBatchSampler, rank_share


class ImageLoader(DataLoader):
    """MONAI's loader over images, with one `set_epoch` for the data set and the sampler.

    With `shuffle` or `batch_sampler`, as in training, batches are a pure function of (seed, epoch), and another item
    stands in where none of a dimension can be read. Otherwise every readable item comes once and in order, X-rays
    before volumes and never both in one batch; a batch of which nothing could be read is not yielded.

    Workers stay alive between epochs, and the loader draws from a generator of its own, so that iterating over it
    does not move PyTorch's global random state.

    Args:
        batch_size: images per batch and rank, or a pair of X-rays and volumes.
        batch_sampler: a `MixedBatchSampler` in place of `batch_size` and `shuffle`.
        collate_fn: a `MixedCollate`; None for the data set's own, `collate`.
        seed: of the shuffles and of the loader's generator; give the data set the same to have one seed for a run.
        drop_last: with `shuffle`, leave out an incomplete last batch.
        share: without `shuffle`, give each rank its own part of the items, as validation on several devices wants.
        allow_empty: without `shuffle`, whether there may be no items.

    Raises:
        DataError: there are no items.
        ConfigError: batches of no images, without `shuffle`.
    """

    dataset: Any

    def __init__(
        self,
        dataset: Any,
        batch_size: int | Sequence[int] = 1,
        batch_sampler: MixedBatchSampler | None = None,
        collate_fn: Callable[..., Any] | None = None,
        num_workers: int = 0,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        share: bool = False,
        allow_empty: bool = False,
        **kwargs: Any,
    ) -> None:
        batch_2d, batch_3d = (batch_size, batch_size) if isinstance(batch_size, int) else batch_size
        batches: Any = batch_sampler
        if batches is None and shuffle:
            batches = MixedBatchSampler(
                dataset.dims, batch_2d, batch_3d, seed=seed, drop_last=drop_last, epoch_over="longest"
            )
        elif batches is None:
            if min(batch_2d, batch_3d) < 1:
                raise ConfigError(f"batch_size {batch_size} must be at least 1, of X-rays and of volumes")
            dataset = dataset.without_stand_ins()
            if not (dims := dataset.dims) and not allow_empty:
                raise DataError("no images to evaluate: the split is empty; prepare the data with items in it")
            indices = rank_share(range(len(dims))) if share else range(len(dims))
            batches = []
            for dim, size in ((2, batch_2d), (3, batch_3d)):
                part = [index for index in indices if dims[index] == dim]
                batches += [part[i : i + size] for i in range(0, len(part), size)]
        num_workers = 0 if getattr(dataset, "enabled", False) else num_workers
        kwargs.setdefault("persistent_workers", num_workers > 0)
        # with the trainer's `non_blocking`, copies to a GPU then run beside its work
        kwargs.setdefault("pin_memory", torch.cuda.is_available())
        kwargs.setdefault("generator", torch.Generator().manual_seed(seed))
        if isinstance(collate_fn, MixedCollate):
            context: Any = kwargs.get("multiprocessing_context") or multiprocessing
            method = context if isinstance(context, str) else context.get_start_method()
            forked = not num_workers or method == "fork"
            collate_fn = collate_fn.remembering(len(dataset), skip_empty=isinstance(batches, list), forked=forked)
        collate_fn = collate_fn or dataset.collate
        super().__init__(dataset, num_workers, batch_sampler=batches, collate_fn=collate_fn, **kwargs)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)
        if isinstance(self.batch_sampler, MixedBatchSampler):
            self.batch_sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        with _frozen() if self.num_workers and self._iterator is None else contextlib.nullcontext():
            batches = super().__iter__()
        return (batch for batch in batches if batch is not None)


@contextlib.contextmanager
def _frozen() -> Iterator[None]:
    """Keep the garbage collectors of processes that are forked here off this one's objects, whose pages they copy."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
