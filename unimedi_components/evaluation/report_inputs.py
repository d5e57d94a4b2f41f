# SPDX-License-Identifier: Apache-2.0
"""What the reports on trained task networks ask of a datalist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unimedi_components.data.datalist import select
from unimedi_components.errors import DataError

__all__ = ["check_labels", "split_items"]

Datalist = dict[str, Any]


def check_labels(card: Mapping[str, Any], lists: Datalist, checkpoint: str, datalist: str) -> None:
    """Compare what a network was trained for with what a datalist holds.

    Raises:
        DataError: task or label names differ; a datalist that names neither passes.
    """
    meta = lists.get("meta", {})
    own = (card["task"], list(card["label_names"]))
    other = (meta.get("task", own[0]), list(meta.get("label_names", own[1])))
    if own != other:
        raise DataError(
            f"{checkpoint} was trained for the {own[0]} labels {', '.join(own[1])}, but {datalist} holds the "
            f"{other[0]} labels {', '.join(other[1])}; prepare the data with the former, in this order, or train on "
            "the latter"
        )


def split_items(lists: Datalist, split: str, dim: int, datalist: str) -> tuple[str, list[dict[str, Any]]]:
    """The items of a split and its name; for "test" those of the validation split where there is no test item.

    Raises:
        DataError: there is no item.
    """
    tried = [split, "validation"] if split == "test" else [split]
    for name in tried:
        if items := select(lists, name, dim):
            return name, items
    raise DataError(f"{datalist}: no {dim}D item in the {' or '.join(tried)} split; prepare the data with one")
