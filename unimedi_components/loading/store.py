# SPDX-License-Identifier: Apache-2.0
"""Prepared images in shards on disk, which any number of processes map and append to, and items without Python objects.

A store is a folder. Each process that adds images appends them to a shard of its own, `<name>.shard`, and then one
record of 32 bytes to `<name>.index`: no locks, and what was half written when a process died has no record.
"""

import contextlib
import hashlib
import json
import logging
import mmap
import os
import pickle
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import monai
import numpy as np
import torch
from torch import Tensor

from unimedi_components.data.fingerprint import VERSION

logger = logging.getLogger(__name__)

# raise it when shards or keys are laid out in another way
_FORMAT = 2
_VERSIONS = f"{_FORMAT}.{VERSION}-{monai.__version__}"
_RECORD = np.dtype([("key", "<u8"), ("more", "<u8"), ("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")])
_ROW = np.dtype([*_RECORD.descr, ("shard", "<i4"), ("sound", "?")])
_SHARD_BYTES = 2**30
# the share of a process's time that it may look for what others have added
_LOOK_SHARE = 0.02
# grey levels of 8 bits, -1 to 1
_HALF_LEVELS = 127.5


def store_folder(cache_dir: Path, dim: int, made_by: Any) -> Path:
    """Where images of a dimension lie that were made as `made_by` says; the name begins with the versions at work."""
    digest = hashlib.sha256(json.dumps([dim, made_by]).encode()).hexdigest()
    return cache_dir / f"{dim}d-{_VERSIONS}-{digest[:16]}"


def older_entries(cache_dir: Path) -> list[Path]:
    """What other versions of this package or of MONAI left in a cache, and this one does not read."""
    names = (*cache_dir.glob("[23]d-*"), *cache_dir.glob("*.pt"))
    return sorted(path for path in names if not path.name[3:].startswith(f"{_VERSIONS}-"))


def pack(tensors: Mapping[str, Tensor], greys: Sequence[str] = ("image",)) -> bytes:
    """Tensors as bytes.

    Float tensors under a name in `greys` whose values lie in [-1, 1] take 8 bits a value: they come back within half a
    grey level, 1 / 255. Others come back exactly; float ones that hold whole numbers from 0 to 255, such as masks, take
    8 bits too.
    """
    header, parts = [], []
    for name, tensor in tensors.items():
        kind = stored = tensor.numpy().dtype.str
        if tensor.is_floating_point() and tensor.numel():
            low, high = (float(end) for end in tensor.aminmax())
            if name in greys and low >= -1 and high <= 1:
                kind, tensor = "grey", tensor.add(1).mul_(_HALF_LEVELS).round_().to(torch.uint8)
            elif low >= 0 and high <= 255 and torch.equal(tensor, (whole := tensor.to(torch.uint8)).to(tensor.dtype)):
                kind, tensor = "|u1", whole
        header.append([name, kind, stored, list(tensor.shape)])
        parts.append(tensor.numpy().tobytes())
    head = json.dumps(header).encode()
    return b"".join([len(head).to_bytes(4, "little"), head, *parts])


def unpack(block: bytes | memoryview) -> dict[str, Tensor]:
    start = 4 + int.from_bytes(block[:4], "little")
    found = {}
    for name, kind, stored, shape, count, size in _header(bytes(block[4:start])):
        array = np.frombuffer(block, np.uint8 if kind == "grey" else kind, count, start).reshape(shape)
        tensor = torch.from_numpy(array.astype(stored))
        found[name] = tensor.div_(_HALF_LEVELS).sub_(1) if kind == "grey" else tensor
        start += size
    return found


@lru_cache(maxsize=256)
def _header(text: bytes) -> list[tuple[str, str, str, list[int], int, int]]:
    rows = [(*row, int(np.prod(row[3], dtype=np.int64))) for row in json.loads(text)]
    return [(*row, row[4] * np.dtype(np.uint8 if row[1] == "grey" else row[1]).itemsize) for row in rows]


class ImageStore:
    """Packed images by a key of 16 bytes, shared by all processes that open the same folder.

    The first half of a key says which image it is, the second one of what state of its files.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._reset()

    def _reset(self) -> None:
        # sorted by the first half of their keys, which stand beside them in one piece for the search
        self._rows, self._keys = np.zeros(0, _ROW), np.zeros(0, np.uint64)
        self._read: dict[str, int] = {}
        self._maps: dict[int, mmap.mmap] = {}
        # what this process added since it last looked
        self._added: dict[tuple[int, int], bytes] = {}
        self._writer: tuple[int, int, int] | None = None
        self._looked, self._pause, self._full, self._outdated = -np.inf, 0.0, False, False

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder = state["folder"]
        self._reset()

    def get(self, key: bytes) -> dict[str, Tensor] | None:
        """The image that was added under a key, by whichever process; None if there is none, or it is damaged."""
        pair = _pair(key)
        if (block := self._added.get(pair)) is not None:
            return unpack(block)
        rows = self._find_fresh(pair)
        for row in rows:
            view = self._block(row)
            if view is not None and (row["sound"] or zlib.crc32(view) == row["crc"]):
                row["sound"] = True
                return unpack(view)
        if len(rows):
            logger.warning("a cached image in %s is damaged and is made again", self._name(rows[-1]["shard"]))
        elif len(self._of(pair[0])) and not self._outdated:
            self._outdated = True
            logger.warning("%s: files have changed since their images were cached; these are made again", self.folder)
        return None

    def __contains__(self, key: bytes) -> bool:
        pair = _pair(key)
        return pair in self._added or len(self._find_fresh(pair)) > 0

    def put(self, key: bytes, block: bytes) -> None:
        """Add a packed image. Where nothing can be written, say so once and go on without."""
        if self._full:
            return
        pair = _pair(key)
        try:
            shard, index = self._files()
            offset = os.lseek(shard, 0, os.SEEK_END)
            _write(shard, block)
            record = np.array((*pair, offset, len(block), zlib.crc32(block)), _RECORD)
            _write(index, record.tobytes())
        except OSError as error:
            self._full = True
            logger.warning("could not cache in %s (%s); images are computed again next time", self.folder, error)
        else:
            self._added[pair] = block

    def look(self) -> None:
        """Read what was added to the folder since the last time, by this process or others."""
        begun = time.process_time()
        fresh = []
        with contextlib.suppress(FileNotFoundError):
            for path in sorted(self.folder.glob("*.index")):
                if path.stem not in self._read:
                    self._read[path.stem] = 0
                done = self._read[path.stem]
                # a record that is being written, or was cut off, is left for later
                if (count := path.stat().st_size // _RECORD.itemsize - done) > 0:
                    records = np.fromfile(path, _RECORD, count, offset=done * _RECORD.itemsize)
                    rows = np.zeros(len(records), _ROW)
                    for field in _RECORD.names or ():
                        rows[field] = records[field]
                    rows["shard"] = list(self._read).index(path.stem)
                    self._read[path.stem] = done + len(records)
                    fresh.append(rows)
        if fresh:
            joined = np.concatenate([self._rows, *fresh])
            self._rows = joined[np.argsort(joined["key"], kind="stable")]
            self._keys = np.ascontiguousarray(self._rows["key"])
        self._added.clear()
        self._looked = time.perf_counter()
        self._pause = (time.process_time() - begun) / _LOOK_SHARE

    def _find_fresh(self, pair: tuple[int, int]) -> np.ndarray:
        rows = self._find(pair)
        if not len(rows) and time.perf_counter() - self._looked > self._pause:
            self.look()
            rows = self._find(pair)
        return rows

    def _find(self, pair: tuple[int, int]) -> np.ndarray:
        """Rows of a key, mostly one; a view, so that what is noted in them stays."""
        rows = self._of(pair[0])
        return rows if (rows["more"] == pair[1]).all() else rows[rows["more"] == pair[1]]

    def _of(self, half: int) -> np.ndarray:
        start = stop = int(np.searchsorted(self._keys, np.uint64(half)))
        while stop < len(self._keys) and self._keys[stop] == half:
            stop += 1
        return self._rows[start:stop]

    def _name(self, shard: int) -> Path:
        return self.folder / f"{list(self._read)[shard]}.shard"

    def _block(self, row: np.void) -> memoryview | None:
        shard, start = int(row["shard"]), int(row["offset"])
        stop = start + int(row["size"])
        if shard not in self._maps or len(self._maps[shard]) < stop:
            try:
                with open(self._name(shard), "rb") as file:
                    self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):
                return None
        block = memoryview(self._maps[shard])[start:stop]
        return block if len(block) == stop - start else None

    def _files(self) -> tuple[int, int]:
        """Descriptors of this process's shard and index; a process that was forked opens its own."""
        if self._writer is not None and self._writer[0] != os.getpid():
            self._close()
        if self._writer is None or os.lseek(self._writer[1], 0, os.SEEK_END) > _SHARD_BYTES:
            self._close()
            self.folder.mkdir(parents=True, exist_ok=True)
            base, flags = self.folder / uuid.uuid4().hex, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
            shard, index = (os.open(base.with_suffix(end), flags, 0o644) for end in (".shard", ".index"))
            self._writer = os.getpid(), shard, index
        return self._writer[1:]

    def _close(self) -> None:
        for descriptor in self._writer[1:] if self._writer else ():
            os.close(descriptor)
        self._writer = None

    def __del__(self) -> None:
        self._close()


def _pair(key: bytes) -> tuple[int, int]:
    return int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class ItemList(Sequence[dict[str, Any]]):
    """Items of a datalist as one array of bytes, which processes that load share instead of copying.

    Python objects are copied into each forked process as soon as it counts references to them; tensors are not, and go
    to spawned processes through shared memory. Each access gives a new dictionary.
    """

    def __init__(self, items: Sequence[Mapping[str, Any]]) -> None:
        parts = [pickle.dumps(dict(item), protocol=pickle.HIGHEST_PROTOCOL) for item in items]
        self._ends = torch.tensor([0, *map(len, parts)], dtype=torch.int64).cumsum(0)
        self._bytes = torch.frombuffer(bytearray(b"".join(parts)) or bytearray(1), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        index %= len(self)
        start, stop = self._ends.numpy()[index : index + 2]
        return pickle.loads(self._bytes.numpy()[start:stop].data)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))
