# SPDX-License-Identifier: Apache-2.0
"""A datalist as images with their targets: cached on disk, repeatable, and tolerant of unreadable files."""

import contextlib
import copy
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from monai.data import MetaTensor, PersistentDataset, get_track_meta, set_track_meta
from monai.transforms import CenterSpatialCropd, DeleteItemsd, EnsureTyped, Resized, ScaleIntensityRanged, SpatialPadd
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from unimedi_components.data.roi_boxes import boxes_of_rois
from unimedi_components.data.transforms import ByDimension
from unimedi_components.data.xray_loading import LoadXrayd
from unimedi_components.distributed import cores
from unimedi_components.errors import ConfigError, DataError, reason_of
from unimedi_components.images.find import ImageList
from unimedi_components.loading.collate import collate
from unimedi_components.loading.store import ImageStore, ItemList, older_entries, pack, store_folder, unpack
from unimedi_components.loading.targets import KEPT, Skipped, complete

logger = logging.getLogger(__name__)

# where no item of a dimension could be read, at most this many following items are tried in their place
_MAX_REFILL = 8
_SKIPPED_FILE = "skipped.jsonl"
# fields of an item that say what its file is to be taken for: the slices of a folder, the centre of a cube, units
_PART_FIELDS = ("slices", "center", "assume_hu", "check_hu")
# fields that name a file, whose size and time decide whether what is kept of it is still valid
_FILE_FIELDS = ("image", "mask")

# transforms of arrays alone, whose results do not depend on what a MetaTensor knows
_BLIND = {LoadXrayd, Resized, SpatialPadd, ScaleIntensityRanged, CenterSpatialCropd, DeleteItemsd, EnsureTyped}


class ImageDataset(PersistentDataset):
    """Items of a datalist as images with a target; deterministic transforms run once and are kept on disk.

    Random transforms are seeded by (`seed`, epoch, index): neither the number of workers nor what was drawn
    before matters. Cached images are keyed by the file's path, size and time and by the parameters of the
    transforms that made them, so that changing any of these never meets a stale image; a file's size and time are
    looked at once a run. With a cache, images have 256 grey levels from -1 to 1, see `store.pack`, also when they are
    made. Any number of workers, ranks and runs fill and read one cache at a time, see `store.ImageStore`.

    Args:
        data: items {"id", "image": path relative to `root`, "dim": 2 or 3} with their target; "slices" and "center",
            which say which part of the file is meant, reach the transforms too. With `dim`, what MONAI Label's items
            lack is filled in.
        transform: chains that turn a file name under "image" into a (1, ...) float image, and with it the target; or
            one list of transforms, of dimension `dim`.
        target: what every item must have. "report", its text. "label", one that `task` and `label_names` allow; also
            the name of a class, or a JSON file, absolute or below `root`, that holds one, alone or under "label".
            "mask", a file, also as a path under "label"; an X-ray's may be painted from its boxes. "boxes" in pixels
            of the file, or under "box" as centre and size in the film's world, as MONAI Label has them. None asks for
            images alone.
        task: "binary", "multilabel" or "multiclass"; decides what a label may be.
        cache_dir: folder for cached images, made when missing; None computes each image every time, unrounded.
        strict: an unreadable file ends the run; otherwise it is left out of its batch, counted and listed.
        keep_meta: give MetaTensors, with which predictions go back to the file's geometry; nothing is cached then.

    Raises:
        ConfigError: an unknown target.
        DataError: `root` is missing and an image's path is relative to it, or an item lacks a field or its target.
    """

    transform: ByDimension

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: ByDimension | Sequence[Callable[..., Any]],
        root: str | os.PathLike[str],
        target: str | None = None,
        *,
        dim: int | None = None,
        label_names: Sequence[str] = (),
        task: str = "",
        cache_dir: str | os.PathLike[str] | None = None,
        seed: int = 0,
        strict: bool = False,
        keep_meta: bool = False,
    ) -> None:
        if target not in KEPT:
            raise ConfigError(f"target {target!r} is unknown; use {', '.join(filter(None, KEPT))}, or None")
        if dim is None and (target not in (None, "report") or not isinstance(transform, ByDimension)):
            raise ConfigError(f"give dim, 2 or 3, with the target {target!r} and with one list of transforms")
        if not isinstance(transform, ByDimension):
            transform = ByDimension(*((transform, ()) if dim == 2 else ((), transform)))
        absolute = all(os.path.isabs(str(item.get("image", ""))) for item in data)
        if not absolute and not Path(root).is_dir():
            raise DataError(f"data set root {root} is not a folder; set `dataset_dir` to where the data set lies")
        not_read = data.not_read if isinstance(data, ImageList) else []
        if strict and (fault := next((one for one in not_read if one.fault), None)):
            raise DataError(f"{fault.file}: {fault.reason}; repair or remove it")
        super().__init__(data=(), transform=transform, cache_dir=None if cache_dir is None else str(cache_dir))
        self.root, self.seed, self.strict, self.keep_meta = Path(root), seed, strict, keep_meta
        self.target, self.label_names, self.task, self.refill = target, list(label_names), task, True
        # what a prepared item holds, and what is kept on disk of it
        self.kept = KEPT[target]
        if dim is not None:
            data = complete(data, target, dim, self.root, self.label_names, task)
        self.set_data(data)
        self._stores: dict[int, ImageStore] = {}
        if self.cache_dir is not None:
            _name_older_images(self.cache_dir)
            made_by = {dim: [self.transform.fingerprints[dim], self.kept] for dim in (2, 3)}
            self._stores = {dim: ImageStore(store_folder(self.cache_dir, dim, made)) for dim, made in made_by.items()}
        # shared memory, so that workers which outlive an epoch see the next one
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._run = uuid.uuid4().hex
        # what was named and is no image that can be read is listed with what turns out to be unreadable
        self._skipped = {one.file: Skipped(one.file, one.file, one.reason) for one in not_read}

    def set_data(self, data: Sequence[Mapping[str, Any]]) -> None:
        """Replace the items. The cache stays: its keys tell which images are still valid."""
        _check_items(data, self.target)
        self.data = ItemList(data)
        self._dims = np.array([item["dim"] for item in data], np.uint8)
        # what an item is kept under, once its files were looked at; zeros before
        self._keys = np.zeros((len(data), 16), np.uint8)

    def missing(self) -> list[int]:
        """Indices of the items whose images are not in the cache; none without one."""
        if not self._stores or self.keep_meta:
            return []
        return [index for index in range(len(self)) if not self._is_cached(index)]

    def prepare(self, indices: Sequence[int], workers: int | None = None, what: str = "images") -> list[Skipped]:
        """Put images into the cache with several processes; returns the items that cannot be read.

        An interrupted call loses nothing, and any number of them, on any number of machines, may run at a time.

        Args:
            workers: processes; None for one per core.
            what: what the progress bar calls the images.

        Raises:
            DataError: a file cannot be read, and the data set is `strict`.
        """
        count = min(len(indices), cores() if workers is None else workers)
        # a generator of its own: a run's random numbers are those that it has when all is cached
        loader = DataLoader(_Prepared(self, indices), batch_size=None, num_workers=count, generator=torch.Generator())
        skipped = []
        for fault in tqdm(loader, total=len(indices), desc=f"caching {what}", unit="image"):
            if isinstance(fault, str):
                raise DataError(fault)
            if fault is not None:
                skipped.append(fault)
        self._skipped.update((fault.id, fault) for fault in skipped)
        return skipped

    def without_stand_ins(self) -> Self:
        """The same items, none of which stands in for an unreadable one."""
        dataset = copy.copy(self)
        dataset.refill = False
        return dataset

    def collate(self, items: Sequence[dict[str, Any] | Skipped]) -> dict[str, Any] | None:
        return collate(items, self.target)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose random transforms the next items get; workers follow at once."""
        self._epoch.fill_(epoch)

    @property
    def dims(self) -> list[int]:
        return self._dims.tolist()

    @property
    def skipped(self) -> list[Skipped]:
        """The unreadable items that this run met, each once; those of other processes need a `cache_dir`."""
        found = dict(self._skipped)
        listing = None if self.cache_dir is None else self.cache_dir / _SKIPPED_FILE
        for line in listing.read_text().splitlines() if listing and listing.is_file() else []:
            try:
                record = json.loads(line)
            except ValueError:
                # half a line, left by a run that was killed
                continue
            if record.pop("run") == self._run:
                found.setdefault(record["id"], Skipped(**record))
        return sorted(found.values())

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any] | Skipped]:
        """Fetch a batch.

        Where no item of a dimension can be read, the next readable one of that dimension stands in, so that a
        training step never lacks a dimension; not so in evaluation, see `without_stand_ins`.
        """
        items = [self._transform(index) for index in indices]
        fetched = list(zip(indices, items, strict=True))
        for dim in (2, 3) if self.refill else ():
            own = [(index, item) for index, item in fetched if self._dims[index] == dim]
            if own and all(isinstance(item, Skipped) for _, item in own):
                items += self._stand_in(dim, own[0][0], set(indices))
        return items

    def _stand_in(self, dim: int, start: int, taken: set[int]) -> list[dict[str, Any] | Skipped]:
        tried: list[dict[str, Any] | Skipped] = []
        for index in (*range(start + 1, len(self)), *range(start)):
            if self._dims[index] != dim or index in taken:
                continue
            tried.append(self._transform(index))
            if not isinstance(tried[-1], Skipped) or len(tried) == _MAX_REFILL:
                break
        return tried

    def _transform(self, index: int) -> dict[str, Any] | Skipped:
        item = self.data[index]
        try:
            prepared = self._prepared(item, index)
            key = [self.seed, int(self._epoch), index]
            self.transform.seed_random(item["dim"], int(np.random.SeedSequence(key).generate_state(1)[0]))
            with _meta(any(isinstance(value, MetaTensor) for value in prepared.values())):
                made = self._kept(self.transform.random(prepared | {"dim": item["dim"]}))
        except MemoryError:
            raise
        except Exception as error:
            return self._skip(item["id"], self.root / item["image"], error)
        return {**item, "index": index, **made}

    def _source(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """What the transforms are given of an item: "id", "dim", and what says where and which the image is."""
        part = {field: item[field] for field in _PART_FIELDS if field in item}
        if item.get("files"):
            part["files"] = [str(self.root / file) for file in item["files"]]
        source = {"id": item["id"], "dim": item["dim"], "image": str(self.root / item["image"]), **part}
        if self.target == "mask" and item.get("mask") is not None:
            source["mask"] = str(self.root / item["mask"])
        elif self.target in ("mask", "boxes") and item.get("boxes") is not None:
            source["boxes"] = item["boxes"]
        elif self.target == "boxes":
            source["boxes"] = boxes_of_rois(source["image"], item["box"])
        return source

    def _kept(self, prepared: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors of an item that its batch needs, and what was done to a film's values."""
        # goes with the image where nothing is cached
        notes = {name: prepared[name] for name in ("film_values",) if name in prepared}
        if self.keep_meta:
            return notes | {name: prepared[name] for name in self.kept}
        return notes | {name: _plain(prepared[name], float_only=name == "image") for name in self.kept}

    def _skip(self, item_id: str, path: Path, error: BaseException) -> Skipped:
        record = Skipped(item_id, str(path), reason_of(error, path)[:400])
        if self.strict:
            what = f"it or its {self.target}" if self.target else "it"
            raise DataError(f"{path}: {record.reason}; repair or remove {what}") from error
        if item_id not in self._skipped:
            self._skipped[item_id] = record
            logger.warning("skipped %s (%s): %s", record.file, record.id, record.reason)
            if self.cache_dir is not None:
                with open(self.cache_dir / _SKIPPED_FILE, "a") as file:
                    file.write(json.dumps({**record._asdict(), "run": self._run}) + "\n")
        return record

    def _prepared(self, item: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The tensors of an item before random transforms, from the cache where there is one."""
        dim = item["dim"]
        if dim not in self._stores or self.keep_meta:
            return self._compute(self._source(item))
        key = self._key(item, index)
        if (found := self._stores[dim].get(key)) is None:
            made = self._compute(self._source(item))
            block = pack({name: made[name] for name in self.kept})
            self._stores[dim].put(key, block)
            # rounded as it will be when it is read
            found = unpack(block)
        return found

    def _key(self, item: Mapping[str, Any], index: int) -> bytes:
        if not self._keys[index].any():
            self._keys[index] = np.frombuffer(_key(self._source(item)), np.uint8)
        return self._keys[index].tobytes()

    def _is_cached(self, index: int) -> bool:
        item = self.data[index]
        try:
            return self._key(item, index) in self._stores[item["dim"]]
        except Exception:
            # whoever prepares it says why
            return False

    def _compute(self, item: dict[str, Any]) -> dict[str, Any]:
        steps = self.transform.cached_transforms(item["dim"])
        with _meta(self.keep_meta or not all(type(step) in _BLIND for step in steps)):
            prepared = dict(self._pre_transform(item))
            found = prepared if self.keep_meta else self._kept(prepared)
        # one pass, in which a NaN comes through
        if not torch.isfinite(torch.stack(found["image"].as_subclass(Tensor).aminmax())).all():
            raise DataError(f"{item['image']}: holds values that are not finite numbers")
        return found


class _Prepared(Dataset[Skipped | str | None]):
    """Images of a data set to be put into its cache; of each comes back why it cannot be read, or nothing."""

    def __init__(self, dataset: ImageDataset, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Skipped | str | None:
        try:
            item = self.dataset[self.indices[index]]
        except DataError as error:
            # a worker's exception would arrive with its traceback in its text
            return str(error)
        return item if isinstance(item, Skipped) else None


def _check_items(data: Sequence[Mapping[str, Any]], target: str | None) -> None:
    needed = ("id", "image", "dim", "report") if target == "report" else ("id", "image", "dim")
    for i, item in enumerate(data):
        missing = [field for field in needed if not item.get(field)]
        if missing or item["dim"] not in (2, 3):
            fault = f"lacks {', '.join(missing)}" if missing else f'has "dim" {item["dim"]!r}, not 2 or 3'
            raise DataError(f"item {i} ({item.get('id')!r}) of the datalist {fault}; make the datalist again")


@contextlib.contextmanager
def _meta(wanted: bool) -> Iterator[None]:
    """Let MONAI's transforms give plain tensors where nobody wants their notes, which take most of the time."""
    tracks = get_track_meta()
    set_track_meta(tracks and wanted)
    try:
        yield
    finally:
        set_track_meta(tracks)


@lru_cache
def _name_older_images(cache_dir: Path) -> None:
    if older := older_entries(cache_dir):
        text = (
            "%s: %s is of another version and not read; `python -m unimedi_components cache CONFIG --clean` removes it"
        )
        logger.warning(text, cache_dir, f"{older[0].name} and {len(older) - 1} more" if older[1:] else older[0].name)


def _key(source: Mapping[str, Any]) -> bytes:
    """What decides on tensors beside the transforms: 8 bytes of what a source names, 8 of its files' sizes, times."""
    place = {name: value for name, value in source.items() if name not in ("id", "dim")}
    place["image"] = os.path.abspath(source["image"])
    places = {name: [place[name]] for name in _FILE_FIELDS if name in place}
    # of an image that is some files of a folder, the others do not matter
    places |= {"image": source["files"]} if "files" in source else {}
    stamps = [_stamp(Path(file)) for named in places.values() for file in named]
    halves = (hashlib.sha256(json.dumps(half).encode()).digest()[:8] for half in (place, [place, stamps]))
    return b"".join(halves)


def _plain(value: Any, float_only: bool) -> Tensor:
    value = value.as_tensor() if isinstance(value, MetaTensor) else torch.as_tensor(value)
    # a label map keeps its small whole numbers
    kind = torch.float32 if float_only or value.is_floating_point() else value.dtype
    value = value.to(kind).contiguous()
    # a crop is a view: cloning lets go of the rest and makes what workers send small
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def _stamp(path: Path) -> list[Any]:
    """Size and time of a file, of all files of a folder, or of a MetaImage header and the voxels beside it."""
    files = sorted(entry for entry in path.iterdir() if entry.is_file()) if path.is_dir() else [path]
    if path.suffix.lower() == ".mhd":
        files += [voxels for ending in (".raw", ".zraw") if (voxels := path.with_suffix(ending)).is_file()]
    stats = [(file.name, file.stat()) for file in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
