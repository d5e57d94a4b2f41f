# SPDX-License-Identifier: Apache-2.0
"""The datalist: one JSON file that says which image goes with which report, in MONAI's own format.

``{"training": [...], "validation": [...], "test": [...], "meta": {...}}`` with items ``{"id", "patient",
"image" (POSIX path relative to the data set's root), "dim" (2 | 3)}`` and, as far as the data set has them,
``"report"``, ``"label"`` (int for one of several classes, [int, ...] for several findings), ``"mask"`` (path of
a label map), ``"boxes"`` ([[x0, y0, x1, y1], ...] in pixels of the file, x1 and y1 just beyond the box). Splits
never share a patient. ``monai.data.load_decathlon_datalist`` reads the same file.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from unimedi_components.data.sources import progress_map, sha256_of
from unimedi_components.errors import DataError
from unimedi_components.files import ANY_NAME, replacing
from unimedi_components.images.xray_checks import xray_fault

logger = logging.getLogger(__name__)

#: Options that converters share; a docstring describes the others, and those that mean something else there.
OPTIONS = {
    "strict": "raise at the first broken or missing file.",
    "seed": "seed of the splits that the data set does not define.",
    "min_sentences": "fewest sentences after cleaning (the paper's three).",
    "min_tokens": "fewest word tokens after cleaning.",
    "keep_punct": "keep the punctuation of reports, see clean_report.",
    "assume_hu": "take CT values for Hounsfield units that do not look like it.",
    "check_images": '"quick" (first and last bytes), "full" (decode), "exists" or "none".',
    "num_workers": "threads that read files.",
    "progress": "show progress bars.",
}
SPLITS = ("training", "validation", "test")
REQUIRED_KEYS = ("id", "patient", "image", "dim")
LISTED_DROPS = 20

#: Reasons that mean a broken or missing file, not a filter of the recipe; ``strict`` raises at the first.
FAULT_REASONS = frozenset(
    (
        *("unreadable image", "unreadable mask", "unreadable report", "missing image", "missing mask"),
        *("missing report", "not a 3D volume", "affine not finite", "zero affine", "singular affine"),
        *("spacing out of range", "affine and spacing disagree", "non-finite voxels", "not Hounsfield units"),
        *("mask and image differ in geometry", "target and boxes disagree", "unknown label values", "unusable box"),
    )
)


class DatalistBuilder:
    """Collects items and drops while a converter reads a data set.

    Args:
        root: folder that image paths are relative to.
        strict: raise at the first drop whose reason is one of :data:`FAULT_REASONS`.
    """

    def __init__(self, dataset: str, root: str | Path, strict: bool = False) -> None:
        self.dataset = dataset
        self.root = Path(root)
        self.strict = strict
        self.items: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self.dropped: dict[str, list[dict[str, str]]] = {}
        self.sources: dict[str, str] = {}
        self.remedies: list[str] = []
        self.meta: dict[str, Any] = {}

    def add_source(self, path: Path) -> None:
        """Record the SHA-256 of a table that the items come from."""
        try:
            name = path.resolve().relative_to(self.root.resolve()).as_posix()
        except ValueError:
            name = str(path)
        self.sources[name] = sha256_of(path)

    def add(self, split: str, item: dict[str, Any], fault: tuple[str, str] | None = None) -> None:
        """Keep an item, or drop it where its file has a fault, (reason, detail)."""
        if fault is None:
            self.items[split].append(item)
        else:
            self.drop(fault[0], item["id"], fault[1])

    def drop(self, reason: str, item_id: str, detail: str = "") -> None:
        """Count an item that is left out. Raises DataError: the reason is a fault and the builder is strict."""
        if self.strict and reason in FAULT_REASONS:
            raise DataError(
                f"{reason}: {(detail or item_id).rstrip('.')}. "
                "Repair or remove it, or prepare without --strict to skip and list such items."
            )
        self.dropped.setdefault(reason, []).append({"id": item_id, **({"detail": detail} if detail else {})})

    def drop_many(self, reason: str, item_ids: Iterable[str]) -> None:
        """Count many items that are left out for one reason without a detail each."""
        for name in item_ids:
            self.drop(reason, name)

    def without(self, frame: Any, mask: Any, reason: str, ids: str = "id") -> Any:
        """The rows of a table that a mask leaves; the others are dropped, by the ids in a column."""
        self.drop_many(reason, frame.loc[mask, ids])
        return frame[~mask]

    def add_films(
        self, rows: Iterable[tuple[str, dict[str, Any]]], check: str, num_workers: int, progress: bool
    ) -> None:
        """Add X-rays, (split, item), the images checked by `xray_fault` under a progress bar."""
        found = list(rows)

        def fault(row: tuple[str, Any]) -> tuple[str, str] | None:
            return xray_fault(self.root.expanduser() / row[1]["image"], check)

        faults = progress_map(fault, found, "images", num_workers, progress)
        for (split, item), reason in zip(found, faults, strict=True):
            self.add(split, item, reason)

    def keep_apart(self) -> None:
        """Drop training items of patients in validation or test, and validation items of patients in test."""
        taken: set[str] = set()
        for split in reversed(SPLITS):
            shared = [item for item in self.items[split] if item["patient"] in taken]
            self.drop_many("patient in another split", (item["id"] for item in shared))
            self.items[split] = [item for item in self.items[split] if item["patient"] not in taken]
            taken |= {item["patient"] for item in self.items[split]}

    def build(self) -> dict[str, Any]:
        """The datalist with its ``meta`` block, sorted by id within a split; errors as of `validate_datalist`."""
        splits = {split: sorted(items, key=lambda item: item["id"]) for split, items in self.items.items()}
        listed = {reason: [drop["id"] for drop in drops[:LISTED_DROPS]] for reason, drops in self.dropped.items()}
        datalist: dict[str, Any] = {
            **splits,
            "meta": {
                "dataset": self.dataset,
                "root": str(self.root),
                "created_with": f"unimedi_components {_version()}",
                "sources": self.sources,
                "kept": {split: len(items) for split, items in splits.items()},
                "dropped": {reason: len(drops) for reason, drops in self.dropped.items()},
                "dropped_items": listed,
                **self.meta,
            },
        }
        validate_datalist(datalist, f"{self.dataset} at {self.root}", require_training=False)
        return datalist


@dataclass(frozen=True)
class Dataset:
    """A data set that can be prepared.

    Args:
        task: what it is used for here, with the paper's section.
        tree: the layout that the converter reads, one path or group of paths per line.
        collect: called as (root, \\*, strict, ...); returns the kept and the dropped items. Raises ConfigError where an
            option's value is unknown, DataError where a table, a column or all images are missing, and at the first
            fault under ``strict``.
        notes: what to know before using it: official figures, traps, options.
        training: images in the training split that `collect` makes of the whole set, under ""; with other options,
            under the value of one. Exact where the lists are official, else the share that the split takes.
    """

    name: str
    title: str
    task: str
    source: str
    licence: str
    tree: str
    collect: Callable[..., DatalistBuilder]
    notes: str = ""
    training: Mapping[str, int] = field(default_factory=dict)

    def convert(self, root: Any, **options: Any) -> dict[str, Any]:
        return self.collect(root, **options).build()


def _version() -> str:
    try:
        return metadata.version("unimedi_components")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def write_json(content: Any, path: str | Path) -> Path:
    """Write JSON under a temporary name and rename it, so that no reader ever sees half a file."""
    return _write_atomic([json.dumps(content, indent=1, ensure_ascii=False), "\n"], path)


def write_metrics(values: Mapping[str, Any], folder: str | Path) -> None:
    """Write `metrics.json` to a folder, and name it in the log: where a run's bars end, its numbers are found."""
    logger.info("%s: what was measured", write_json(values, Path(folder, "metrics.json")))


def write_datalist(lists: Mapping[str, Any], path: str | Path) -> Path:
    """Write a mapping of lists, one item per line: quick for hundreds of thousands, and readable in a diff."""
    return _write_atomic(_lines(lists), path)


def _lines(lists: Mapping[str, Any]) -> Iterator[str]:
    encode = json.JSONEncoder(ensure_ascii=False).encode
    yield "{"
    for position, (name, content) in enumerate(lists.items()):
        yield f"{',' if position else ''}\n {encode(name)}: "
        if isinstance(content, list) and content:
            yield from (f"{',' if index else '['}\n  {encode(item)}" for index, item in enumerate(content))
            yield "\n ]"
        else:
            yield json.dumps(content, indent=1, ensure_ascii=False)
    yield "\n}\n"


def _write_atomic(parts: Iterable[str], path: str | Path) -> Path:
    path = Path(path).expanduser()
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", errors=ANY_NAME) as stream:
        stream.writelines(parts)
    return path


def validate_datalist(
    datalist: Any, name: str, required: Sequence[str] = REQUIRED_KEYS, require_training: bool = True
) -> None:
    """Check what every user of a datalist relies on.

    Raises DataError: not a datalist, a key is missing, an id repeats, ``dim`` is neither 2 nor 3, a patient is in two
    splits, or training is empty.

    Args:
        required: keys that every item must have.
        require_training: whether an empty training split is an error.
    """
    remedy = "Make it again with 'python -m unimedi_components prepare'."
    if not isinstance(datalist, dict) or "training" not in datalist:
        raise DataError(f'{name}: not a datalist, the key "training" is missing. {remedy}')
    seen: set[str] = set()
    split_of: dict[str, str] = {}
    for split in SPLITS:
        items = datalist.get(split, [])
        if not isinstance(items, list):
            raise DataError(f"{name}: {split!r} is not a list of items. {remedy}")
        for index, item in enumerate(items):
            place = f"{name}: {split}[{index}]"
            missing = [key for key in required if not isinstance(item, dict) or key not in item]
            if missing:
                raise DataError(f"{place} has no {', '.join(map(repr, missing))}. {remedy}")
            if item["dim"] not in (2, 3):
                raise DataError(f"{place} (id {item['id']}) has dim {item['dim']!r}; it must be 2 or 3.")
            if item["id"] in seen:
                raise DataError(f"{place}: the id {item['id']!r} is used twice. Give every item its own id.")
            seen.add(item["id"])
            other = split_of.setdefault(item["patient"], split)
            if other != split:
                raise DataError(
                    f"{name}: patient {item['patient']!r} is in two splits, {other} and {split}. "
                    "Put all items of a patient into one split, or prepare the data again."
                )
    if require_training and not datalist["training"]:
        raise DataError(f"{name}: the training split is empty. Prepare the data again and read why items were dropped.")


def load_datalist(
    path: str | Path, root: str | Path | None = None, required: Sequence[str] = REQUIRED_KEYS
) -> dict[str, Any]:
    """Read and check a datalist.

    Args:
        root: when given, the folder that image paths are relative to; it and the first image of each split must exist.
        required: keys that every item must have; add ``"report"`` for image-report training.

    Raises:
        DataError: the file is missing, not JSON, or fails :func:`validate_datalist`, or images are not below ``root``.
    """
    path = Path(path).expanduser()
    try:
        with open(path, encoding="utf-8") as stream:
            datalist = json.load(stream)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError(
            f"{path}: no such datalist. Make it with 'python -m unimedi_components prepare DATASET ROOT {path}'."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON ({error}). Prepare the data again.") from error
    validate_datalist(datalist, str(path), required)
    for split in SPLITS:
        datalist.setdefault(split, [])
    if root is not None:
        _check_root(datalist, path, Path(root).expanduser())
    return datalist


def _check_root(datalist: dict[str, Any], path: Path, root: Path) -> None:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. Give the folder that the images of {path} are relative to.")
    for split in SPLITS:
        for item in datalist[split][:1]:
            if not (root / item["image"]).exists():
                prepared = datalist.get("meta", {}).get("root", "unknown")
                raise DataError(
                    f"{path}: {split} image {item['image']} is not below {root}. "
                    f"Give the data set's root (prepared from {prepared})."
                )


def select(datalist: dict[str, Any], split: str, dims: Iterable[int] | int | None = None) -> list[dict[str, Any]]:
    """Items of a split, of ``dims``: 2, 3 or several of them. Raises DataError: no split has this name."""
    if split not in SPLITS:
        raise DataError(f"split {split!r} is unknown. Use one of {', '.join(SPLITS)}.")
    wanted = {2, 3} if dims is None else {dims} if isinstance(dims, int) else set(dims)
    return [item for item in datalist.get(split, []) if item["dim"] in wanted]
