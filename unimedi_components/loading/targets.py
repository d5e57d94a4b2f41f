# SPDX-License-Identifier: Apache-2.0
"""What goes with an image: its report, label, mask or boxes, in items of datalists and of MONAI Label."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unimedi_components.errors import DataError
from unimedi_components.images.find import ImageList

#: Target -> what a prepared item holds in tensors.
KEPT: dict[str | None, tuple[str, ...]] = {
    None: ("image",),
    "report": ("image",),
    "label": ("image",),
    "mask": ("image", "mask"),
    "boxes": ("image", "boxes", "affine"),
}
# target and dimension -> the fields of an item, one of which must give it
_FIELDS = {("mask", 2): ("mask", "boxes"), ("boxes", 2): ("boxes", "box"), ("boxes", 3): ("boxes", "box")}


class Skipped(NamedTuple):
    """An item that could not be read: its id, its file and why."""

    id: str
    file: str
    reason: str


def complete(
    data: Sequence[Mapping[str, Any]],
    target: str | None,
    dim: int,
    root: Path,
    label_names: Sequence[str] = (),
    task: str = "",
) -> ImageList:
    """Items with what MONAI Label's lack, an id of their own, "patient" and "dim", and with their targets checked.

    Raises:
        DataError: an item has no target, or a label that the task does not know.
    """
    items = ImageList((), getattr(data, "left_out", ()))
    for item in data:
        name = Path(str(item.get("image", ""))).name.partition(".")[0]
        full = {"id": name, "patient": item.get("id", name), "dim": dim, **item}
        if target == "mask" and isinstance(full.get("label"), str):
            full["mask"] = full.pop("label")
        fields = _FIELDS.get((target, dim), (target,)) if target else ()
        if fields and all(full.get(field) is None for field in fields):
            raise DataError(f"item {full['id']!r} has no {target}; prepare the data for this task, or give it one")
        if target == "label":
            full["label"] = _label(full["label"], full["id"], root, label_names, task)
        items.append(full)
    # files of different folders may share a name
    known = {item["id"] for item in items}
    seen: set[str] = set()
    for item in items:
        name, number = item["id"], 2
        while item["id"] in seen or (number > 2 and item["id"] in known):
            item["id"], number = f"{name}-{number}", number + 1
        seen.add(item["id"])
    return items


def _label(value: Any, name: str, root: Path, label_names: Sequence[str], task: str) -> int | list[int]:
    if isinstance(value, str) and value.endswith(".json"):
        try:
            content = json.loads((root / value).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{value}: cannot be read as the label of {name!r} ({error})") from error
        value = content["label"] if isinstance(content, Mapping) and "label" in content else content
    label, count = _by_number(value, label_names), len(label_names)
    if task == "multilabel":
        if isinstance(label, (list, tuple)) and len(label) == count and all(entry in (0, 1, -1) for entry in label):
            return [int(entry) for entry in label]
        wanted = f"a list of {count} values 0, 1 or -1 (uncertain), or findings by name, with such values or without"
    else:
        # by name, it is the one that is there
        if label is not value and label.count(1) == 1 and label.count(0) == count - 1:
            label = label.index(1)
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < count:
            return label
        wanted = f"a whole number from 0 to {count - 1}, or one of the names"
    names = ", ".join(label_names)
    raise DataError(f"item {name!r} has the label {value!r}; for this {task} task it must be {wanted}: {names}")


def _by_number(value: Any, names: Sequence[str]) -> Any:
    """A list of a value for each name, of a name, a list of names or values by name; all else as it is."""
    named = [value] if isinstance(value, str) else value
    if isinstance(named, (list, tuple)) and all(isinstance(entry, str) for entry in named):
        named = dict.fromkeys(named, 1)
    elif not isinstance(named, Mapping) or not named:
        return value
    # MONAI Label tells its viewers the names in small letters
    numbers = {name.casefold(): number for number, name in enumerate(names)}
    given = {numbers.get(str(key).casefold()): entry for key, entry in named.items()}
    # what is not named is not there, as in CheXpert's tables
    return value if None in given or len(given) < len(named) else [given.get(n, 0) for n in range(len(names))]
