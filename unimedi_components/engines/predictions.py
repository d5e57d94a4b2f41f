# SPDX-License-Identifier: Apache-2.0
"""What all writers of predictions share: rows in the inputs' order, whole files, an error where nothing was read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from unimedi_components.data.datalist import write_json
from unimedi_components.data.dataset import PretrainDataset
from unimedi_components.errors import DataError

__all__ = ["check_any_read", "prediction_rows", "write_csv", "write_predictions"]

Rows = list[dict[str, Any]]


def prediction_rows(dataset: PretrainDataset, found: Mapping[str, Mapping[str, Any]]) -> Rows:
    """What was found, by id, as rows with "id" and "source" in the order of the data set's items."""
    return [
        {"id": item["id"], "source": item.get("source") or item["image"], **found[item["id"]]}
        for item in dataset.data
        if item["id"] in found
    ]


def write_predictions(folder: Path, about: Mapping[str, Any], rows: Rows, dataset: PretrainDataset) -> None:
    """Write `predictions.json`: `about`, the rows, and the inputs that could not be read."""
    folder.mkdir(parents=True, exist_ok=True)
    skipped = [record._asdict() for record in dataset.skipped]
    write_json({**about, "predictions": rows, "skipped": skipped}, folder / "predictions.json")


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    table.to_csv(temporary, index=False)
    os.replace(temporary, path)


def check_any_read(folder: Path, rows: Rows, dataset: PretrainDataset) -> None:
    """Pass where there is a prediction.

    Raises:
        DataError: not one input could be read.
    """
    if not rows:
        first = dataset.skipped[0]
        raise DataError(
            f"none of {len(dataset)} inputs could be read, first {first.file}: {first.reason}; "
            f"see {folder}/predictions.json"
        )
