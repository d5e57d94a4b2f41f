# SPDX-License-Identifier: Apache-2.0
"""The labels of datalist items as one table, whatever their data sets call and count them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from unimedi_components.errors import DataError

__all__ = ["NOT_MENTIONED", "label_table"]

Array = npt.NDArray[Any]

NOT_MENTIONED = -2


def label_table(items: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> tuple[list[str], Array]:
    """Labels of items by finding.

    Args:
        items: of a datalist; "label" is one number for each label name, or the index of a class.
        meta: of the datalist: "label_names", of all items or by source for a joined datalist, whose patients are called
            SOURCE-PATIENT.

    Returns:
        the names, in the order of their first source, and int64 (N, F): 1 present, 0 absent, -1 uncertain, -2 not
        mentioned, as for an item without labels or of a source that does not know the finding.

    Raises:
        DataError: a label does not fit its names.
    """
    known = meta.get("label_names") or {}
    by_source: dict[str, list[str]] = known if isinstance(known, dict) else {"": list(known)}
    rows = [_row(item, _names_of(item, by_source)) for item in items]
    # only of sources that have items here: X-rays alone need no column of the CT data
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = np.full((len(rows), len(names)), NOT_MENTIONED, dtype=np.int64)
    column = {name: i for i, name in enumerate(names)}
    for number, row in enumerate(rows):
        for name, value in row.items():
            table[number, column[name]] = value
    return names, table


def _names_of(item: Mapping[str, Any], by_source: Mapping[str, list[str]]) -> list[str]:
    if "" in by_source:
        return by_source[""]
    return next((names for source, names in by_source.items() if item["patient"].startswith(f"{source}-")), [])


def _row(item: Mapping[str, Any], names: Sequence[str]) -> dict[str, int]:
    label = item.get("label")
    if label is None or not names:
        return {}
    if isinstance(label, int):
        if not -1 <= label < len(names):
            raise DataError(f"{item['id']}: label {label} is no index of {len(names)} classes; prepare the data again")
        return {name: int(label == i) if label >= 0 else -1 for i, name in enumerate(names)}
    if len(label) != len(names):
        raise DataError(f"{item['id']}: {len(label)} labels for {len(names)} label names; prepare the data again")
    return dict(zip(names, label, strict=True))
