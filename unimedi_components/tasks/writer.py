# SPDX-License-Identifier: Apache-2.0
"""Write what is predicted of images: rows in the inputs' order, whole files, an error where nothing was read."""

import logging
from abc import abstractmethod
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from monai.transforms import Transform

from unimedi_components.data.datalist import write_json
from unimedi_components.errors import CheckpointError, DataError
from unimedi_components.files import ANY_NAME, replacing
from unimedi_components.loading import ImageDataset
from unimedi_components.tasks.dicom_outputs import check_dicom_outputs

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class PredictionWriter(Transform):
    """Collect the predictions of images, as the last postprocessing step, and write them when all came in.

    A subclass says what a row holds, `row`, what `predictions.json` says of all of them, `about`, and which tables are
    written beside it, `tables`. Items without "id" pass untouched: a server's request is no image of a data set.
    ``dicom``: write DICOM objects too, of images that are DICOM. Raises ConfigError: `dicom` without highdicom.
    """

    def __init__(self, output_dir: str | Path, figures: bool = True, dicom: bool = False) -> None:
        if dicom:
            check_dicom_outputs()
        self.folder, self.figures, self.dicom = Path(output_dir), figures, dicom
        self.rows: dict[str, Row] = {}

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Take in one decollated item with "pred" and return it unchanged."""
        if "id" in data:
            name = str(data["id"])
            self.rows[name] = self.row(name, data)
            if "film_values" in data:
                self.rows[name]["film_values"] = str(data["film_values"])
        return data

    @abstractmethod
    def row(self, name: str, data: Mapping[Hashable, Any]) -> Row:
        """What stands of one image in `predictions.json`; writes the image's own files."""

    @abstractmethod
    def about(self) -> Row:
        """What stands above the rows in `predictions.json`."""

    def tables(self, rows: list[Row]) -> dict[str, pd.DataFrame]:
        """Tables to write, by file name, from rows that also have "id" and "source"."""
        return {}

    def finish(self, dataset: ImageDataset) -> None:
        """Write `predictions.json` and the tables, and say what was not read. Raises DataError: no input could be."""
        rows = [
            {"id": item["id"], "source": item.get("source") or item["image"], **self.rows[item["id"]]}
            for item in dataset.data
            if item["id"] in self.rows
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        skipped = [record._asdict() for record in dataset.skipped]
        write_json({**self.about(), "predictions": rows, "skipped": skipped}, self.folder / "predictions.json")
        for file, table in self.tables(rows).items():
            write_csv(table, self.folder / file)
        if not rows:
            first = dataset.skipped[0]
            raise DataError(
                f"none of {len(dataset)} inputs could be read, first {first.file}: {first.reason}; "
                f"see {self.folder}/predictions.json"
            )
        logger.info("%s: predictions of %d inputs; %d could not be read", self.folder, len(rows), len(skipped))


def check_finite(name: str, values: Any, what: str = "probabilities") -> None:
    """Let finite predictions of an image pass. Raises CheckpointError: one is not."""
    if not torch.isfinite(torch.as_tensor(values)).all():
        raise CheckpointError(f"{name}: {what} that are not finite; the network diverged, train it again")


def check_probability(threshold: float) -> float:
    """The threshold. Raises ValueError: it is no probability."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a probability from 0 to 1, not {threshold!r}")
    return threshold


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table whole or not at all."""
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, errors=ANY_NAME)
