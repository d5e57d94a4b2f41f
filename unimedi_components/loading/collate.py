# SPDX-License-Identifier: Apache-2.0
"""Items to batches: images of one dimension with their targets, or of both with tokenised reports."""

import copy
import mmap
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import collate_meta_tensor
from torch import Tensor

from unimedi_components.data.volume_loading import part_of
from unimedi_components.errors import DataError
from unimedi_components.images.xray import film_notes
from unimedi_components.loading.targets import Skipped


def collate(items: Sequence[dict[str, Any] | Skipped], target: str | None) -> dict[str, Any] | None:
    """Items of one dimension to a batch, without those that could not be read.

    Returns:
        "image" (B, ...) and lists of B: "id", "dim", and where all items have them "patient", "source", "report" and
        "film_values"; "part" where an item is some files of a folder, see `part_of`. By target "label", int64 (B,) or
        (B, C), or the masks (B, 1, ...), as MONAI's engines name what is to be predicted; or "boxes", a list of (N, 4),
        and "affine" (B, 4, 4). None where nothing could be read.
    """
    good = [item for item in items if not isinstance(item, Skipped)]
    if not good:
        return None
    batch: dict[str, Any] = {"image": _stack([item["image"] for item in good])}
    for name in ("id", "patient", "dim", "source", "report"):
        if all(name in item for item in good):
            batch[name] = [item[name] for item in good]
    if any(parts := [part_of(item) for item in good]):
        batch["part"] = parts
    batch |= film_notes(good)
    if target == "label":
        batch["label"] = torch.as_tensor([item["label"] for item in good], dtype=torch.int64)
    elif target == "mask":
        batch["label"] = _stack([item["mask"] for item in good])
    elif target == "boxes":
        batch |= {"boxes": [item["boxes"] for item in good], "affine": torch.stack([item["affine"] for item in good])}
    return batch


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return collate_meta_tensor(list(tensors)) if isinstance(tensors[0], MetaTensor) else torch.stack(list(tensors))


class MixedCollate:
    """Turn items into a batch: 2D items first, then 3D items, with their tokenised reports in that order.

    Args:
        tokenizer: a `transformers` tokenizer, or the name or folder to load one from at first use.
        max_length_2d: most tokens of an X-ray report, special ones included (112 in the MGCA repository).
    """

    def __init__(self, tokenizer: Any, max_length_2d: int = 112, max_length_3d: int = 112) -> None:
        self.tokenizer: Any = str(tokenizer) if isinstance(tokenizer, os.PathLike) else tokenizer
        self.max_length = {2: max_length_2d, 3: max_length_3d}
        self.skip_empty = False
        self._rows: Any = np.zeros((0, 0), np.uint32)
        self._shared: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": self._rows[:0] if self._shared is None else self._shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self._rows, Tensor):
            self._rows = self._rows.numpy().view(np.uint32)

    def remembering(self, count: int, skip_empty: bool = False, forked: bool = True) -> Self:
        """A copy that tokenises the report of each of `count` items, told by their "index", once for all processes.

        Their tokens lie in one array, which later processes share, instead of lists in each of them.

        Args:
            forked: the processes are forked; else the array lies in `/dev/shm`, which containers often keep small.
        """
        collate = copy.copy(self)
        collate.skip_empty = skip_empty
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
        """Pad and stack what could be read; None if nothing could and `skip_empty`.

        Returns:
            "image2d" (B2, 1, H, W) and "image3d" (B3, 1, D, H, W), each where there are such items; "input_ids" and
            "attention_mask" int64 (B2 + B3, T), T the longest of the batch; lists "id" and "dim".

        Raises:
            DataError: no item could be read.
        """
        good = [item for item in items if not isinstance(item, Skipped)]
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
        report, index = item.get("report") or "", item.get("index", len(self._rows))
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
