# SPDX-License-Identifier: Apache-2.0
"""Loaders: batches of images with tokenised reports, the same for any number of workers."""

from __future__ import annotations

import contextlib
import copy
import gc
import mmap
import multiprocessing
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader
from torch import Tensor

from unimedi_components.data.dataset import PretrainDataset, Skipped
from unimedi_components.data.sampler import MixedBatchSampler
from unimedi_components.errors import DataError

__all__ = [
    "MixedBatchSampler",
    "MixedCollate",
    "MixedDataLoader",
    "PretrainDataset",
    "build_loader",
    "eval_loader",
]


class MixedCollate:
    """Turn items into a batch: 2D items first, then 3D items, with their tokenised reports in that order.

    Args:
        tokenizer: a `transformers` tokenizer, or the name or folder to load one from at first use.
        max_length_2d: most tokens of an X-ray report, special ones included (112 in the MGCA repository).
        max_length_3d: most tokens of a CT report.
        skip_empty: return None where no item could be read, instead of raising.
    """

    def __init__(
        self, tokenizer: Any, max_length_2d: int = 112, max_length_3d: int = 112, skip_empty: bool = False
    ) -> None:
        self.tokenizer: Any = str(tokenizer) if isinstance(tokenizer, os.PathLike) else tokenizer
        self.max_length = {2: max_length_2d, 3: max_length_3d}
        self.skip_empty = skip_empty
        self._rows: Any = np.zeros((0, 0), np.uint32)
        self._shared: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": self._rows[:0] if self._shared is None else self._shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self._rows, Tensor):
            self._rows = self._rows.numpy().view(np.uint32)

    def remembering(self, count: int, forked: bool = True) -> MixedCollate:
        """A copy that tokenises the report of each of `count` items, told by their "index", once for all processes.

        Their tokens lie in one array, which later processes share, instead of lists in each of them.

        Args:
            count: items.
            forked: the processes are forked; else the array lies in `/dev/shm`, which containers often keep small.
        """
        collate = copy.copy(self)
        width = 2 + max(self.max_length.values())
        # a row: checksum of the report, number of tokens, tokens plus one; pages that nobody writes take no memory
        if forked:
            rows = np.frombuffer(mmap.mmap(-1, max(4, 4 * count * width)), np.uint32)[: count * width]
            collate._rows = rows.reshape(count, width)
        else:
            collate._shared = torch.zeros((count, width), dtype=torch.int32).share_memory_()
            collate._rows = collate._shared.numpy().view(np.uint32)
        return collate

    def __call__(self, items: Sequence[dict[str, Any] | Skipped]) -> dict[str, Any] | None:
        """Collate.

        Returns:
            "image2d" (B2, 1, H, W) and "image3d" (B3, 1, D, H, W), each where there are such items;
            "input_ids" and "attention_mask" int64 (B2 + B3, T), T the longest of the batch; "id" and "dim"
            lists.

        Raises:
            DataError: no item could be read.
        """
        good = [item for item in items if not isinstance(item, Skipped) and item is not None]
        if not good:
            if self.skip_empty:
                return None
            faults = [f"{item.file} ({item.reason})" for item in items if isinstance(item, Skipped)]
            more = f"; and {len(faults) - 4} more" if len(faults) > 4 else ""
            raise DataError(f"no file of a batch could be read: {'; '.join(faults[:4])}{more}")
        good.sort(key=lambda item: item["dim"])
        batch: dict[str, Any] = {}
        for dim in (2, 3):
            images = [item["image"] for item in good if item["dim"] == dim]
            if images:
                batch[f"image{dim}d"] = torch.stack(images)
        batch["input_ids"], batch["attention_mask"] = self._text(good)
        batch["id"] = [item["id"] for item in good]
        batch["dim"] = [item["dim"] for item in good]
        return batch

    def _tokenised(self, item: Mapping[str, Any]) -> np.ndarray:
        report, index = item["report"], item.get("index", len(self._rows))
        checksum = zlib.crc32(report.encode(errors="surrogatepass"))
        if index < len(self._rows) and self._rows[index, 0] == checksum:
            row = self._rows[index, 2 : 2 + self._rows[index, 1]]
            # another process may be writing it
            if len(row) and row.all():
                return row.astype(np.int64) - 1
        encoded = self.tokenizer(report, truncation=True, max_length=self.max_length[item["dim"]])
        tokens = np.asarray(encoded["input_ids"], np.int64)
        if index < len(self._rows):
            self._rows[index, 1 : 2 + len(tokens)] = [len(tokens), *(tokens + 1)]
            self._rows[index, 0] = checksum
        return tokens

    def _text(self, items: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        if isinstance(self.tokenizer, str):
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        rows = [torch.from_numpy(self._tokenised(item)) for item in items]
        ids = torch.full((len(rows), max(map(len, rows))), self.tokenizer.pad_token_id or 0, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return ids, mask


class MixedDataLoader(DataLoader):
    """MONAI's loader with one `set_epoch` for the data set and the sampler.

    Workers stay alive between epochs, and the loader draws from a generator of its own, so that iterating
    over it does not move PyTorch's global random state.

    Args:
        dataset: a `PretrainDataset`.
        batch_sampler: a `MixedBatchSampler`, or a list of lists of indices.
        collate_fn: a `MixedCollate`.
        num_workers: processes that load; 0 loads in this one.
        seed: of the loader's generator.
        kwargs: of `torch.utils.data.DataLoader`.
    """

    dataset: PretrainDataset

    def __init__(
        self,
        dataset: PretrainDataset,
        batch_sampler: MixedBatchSampler | Sequence[Sequence[int]],
        collate_fn: MixedCollate,
        num_workers: int = 0,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("persistent_workers", num_workers > 0)
        # with the trainer's `non_blocking`, copies to a GPU then run beside its work
        kwargs.setdefault("pin_memory", torch.cuda.is_available())
        kwargs.setdefault("generator", torch.Generator().manual_seed(seed))
        if isinstance(collate_fn, MixedCollate):
            context: Any = kwargs.get("multiprocessing_context") or multiprocessing
            method = context if isinstance(context, str) else context.get_start_method()
            collate_fn = collate_fn.remembering(len(dataset), forked=not num_workers or method == "fork")
        super().__init__(dataset, num_workers, batch_sampler=batch_sampler, collate_fn=collate_fn, **kwargs)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the epoch of the next iteration, and how many of its first batches to leave out (resume)."""
        self.dataset.set_epoch(epoch)
        if isinstance(self.batch_sampler, MixedBatchSampler):
            self.batch_sampler.set_epoch(epoch, skip)

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


def build_loader(
    dataset: PretrainDataset,
    tokenizer: Any,
    batch_2d: int = 12,
    batch_3d: int = 6,
    seed: int = 0,
    shuffle: bool = True,
    drop_last: bool = True,
    epoch_over: str = "2d",
    mode: str = "mixed",
    max_length_2d: int = 112,
    max_length_3d: int = 112,
    num_workers: int = 0,
    **kwargs: Any,
) -> MixedDataLoader:
    """Training loader over mixed batches.

    Args:
        dataset: the training items.
        tokenizer: a tokenizer, or the name or folder of one.
        batch_2d: X-rays per batch and rank.
        batch_3d: CT volumes per batch and rank.
        seed: of the shuffles; give the data set the same to have one seed for a run.
        shuffle: see `MixedBatchSampler`, as for `drop_last`, `epoch_over` and `mode`.
        drop_last: leave out an incomplete last batch.
        epoch_over: "2d", "3d" or "longest".
        mode: "mixed" or "alternate".
        max_length_2d: most tokens of an X-ray report.
        max_length_3d: most tokens of a CT report.
        num_workers: loading processes.
        kwargs: of `torch.utils.data.DataLoader`, for example `pin_memory`.
    """
    sampler = MixedBatchSampler(
        dataset.dims,
        batch_2d,
        batch_3d,
        seed=seed,
        shuffle=shuffle,
        drop_last=drop_last,
        epoch_over=epoch_over,
        mode=mode,
    )
    collate = MixedCollate(tokenizer, max_length_2d, max_length_3d)
    return MixedDataLoader(dataset, sampler, collate, num_workers=num_workers, seed=seed, **kwargs)


def eval_loader(
    dataset: PretrainDataset,
    tokenizer: Any,
    batch_2d: int = 32,
    batch_3d: int = 16,
    max_length_2d: int = 112,
    max_length_3d: int = 112,
    num_workers: int = 0,
    **kwargs: Any,
) -> MixedDataLoader:
    """Every readable item once, in order: first the X-rays, then the CT volumes, never both in one batch.

    Unreadable items are left out and stay listed in `dataset.skipped`; a batch of them alone is not yielded.

    Args:
        dataset: the items to evaluate; seen through a shallow copy that never lets another item stand in.
        tokenizer: a tokenizer, or the name or folder of one.
        batch_2d: X-rays per batch.
        batch_3d: CT volumes per batch.
        max_length_2d: most tokens of an X-ray report.
        max_length_3d: most tokens of a CT report.
        num_workers: loading processes.
        kwargs: of `torch.utils.data.DataLoader`.
    """
    dataset = copy.copy(dataset)
    dataset.refill = False
    batches = []
    for dim, size in ((2, batch_2d), (3, batch_3d)):
        indices = [i for i, item_dim in enumerate(dataset.dims) if item_dim == dim]
        batches += [indices[i : i + size] for i in range(0, len(indices), size)]
    collate = MixedCollate(tokenizer, max_length_2d, max_length_3d, skip_empty=True)
    return MixedDataLoader(dataset, batches, collate, num_workers=num_workers, **kwargs)
