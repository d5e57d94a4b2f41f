# SPDX-License-Identifier: Apache-2.0
"""The label column of a team's own table: class numbers, names, several names, or the path of a label map."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimedi_components.data.datalist import DatalistBuilder
from unimedi_components.errors import ConfigError, DataError

__all__ = ["add_labels"]

TASKS = ("multilabel", "multiclass", "binary")
_Cell = tuple[str, Path, dict[str, Any]]


def add_labels(
    builder: DatalistBuilder,
    cells: Sequence[_Cell],
    base: Path,
    task: str | None = None,
    label_names: str | Sequence[str] | None = None,
) -> None:
    """Turn label cells into class numbers, 0/1 vectors or mask paths.

    Args:
        builder: its meta block gets the names and the task.
        cells: for each item its label cell and the folder of its table; the item gets ``label`` or ``mask``. Several
            names in a cell are separated by ``|``.
        base: folder that mask paths are relative to.
        task: how labels are written; None gives ``[int]`` for numbers and 0/1 vectors over the names otherwise.
        label_names: classes or findings in order; findings that are not among them do not count.

    Raises:
        ConfigError: an unknown task, or names without one.
        DataError: a label is none of the classes.
    """
    if task is not None and task not in TASKS:
        raise ConfigError(f"task={task!r} is unknown. Use one of {', '.join(TASKS)}.")
    if label_names is not None and task is None:
        raise ConfigError(f"label_names needs task, one of {', '.join(TASKS)}.")
    named: list[tuple[str, dict[str, Any]]] = []
    for label, folder, item in cells:
        if label and (folder / label).is_file():
            item["mask"] = os.path.relpath(os.path.abspath(folder / label), base).replace(os.sep, "/")
        elif label:
            named.append((label, item))
    if not named:
        return
    numbers = all(label.lstrip("-").isdigit() for label, _ in named)
    if task is None and numbers:
        for label, item in named:
            item["label"] = [int(label)]
        return
    own = [[part.strip() for part in label.split("|") if part.strip()] for label, _ in named]
    names = _names(own, label_names, numbers)
    builder.meta["label_names"] = names
    if task is not None:
        builder.meta["task"] = task
    for parts, (label, item) in zip(own, named, strict=True):
        item["label"] = _label(parts, names, task, f"{item['id']}: label {label!r}")


def _names(own: Sequence[Sequence[str]], given: str | Sequence[str] | None, numbers: bool) -> list[str]:
    if given is not None:
        # a command line may hand over the text of a tuple
        parts = given.strip("()[] ").split(",") if isinstance(given, str) else given
        return [part.strip(" '\"") for part in parts]
    found = {part for parts in own for part in parts}
    return sorted(found, key=int) if numbers else sorted(found)


def _label(parts: Sequence[str], names: Sequence[str], task: str | None, place: str) -> int | list[int]:
    if task in (None, "multilabel"):
        return [int(name in parts) for name in names]
    if task == "binary" and len(names) != 2:
        raise DataError(f"a binary task has two classes, the labels have {len(names)}: {', '.join(names)}")
    if len(parts) == 1 and parts[0] in names:
        return list(names).index(parts[0])
    number = parts[0] if len(parts) == 1 else ""
    if number.isdigit() and int(number) < len(names):
        return int(number)
    raise DataError(f"{place} is none of the classes {', '.join(names)}. Correct it, or name it in label_names.")
