# SPDX-License-Identifier: Apache-2.0
"""What a trained classifier says about images, and the files that are written of it."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.transforms import Transform
from torch import Tensor

from unimedi_components.data.labelled import LabelledDataset
from unimedi_components.engines.prediction_figures import draw_prediction
from unimedi_components.engines.predictions import check_any_read, prediction_rows, write_csv, write_predictions
from unimedi_components.errors import CheckpointError
from unimedi_components.networks.classifier import ImageClassifier

__all__ = ["SavePredictions"]

logger = logging.getLogger(__name__)


class SavePredictions(Transform):
    """Collect the probabilities of images and write a figure of each; a postprocessing step after the activation.

    - `predictions.csv`: "id", "source", "probability_<label>" for each label (of a binary task the second class
      alone), "predicted": the class, or the findings with "; " between them.
    - `predictions.json`: the same by name, with the task, the threshold, and the inputs that could not be read.
    - `<id>.png`: the image with Eq. 1's **v** over it and the probabilities; see `draw_prediction`.

    Items without "id" pass untouched: a server's request is no image of a data set.

    Args:
        output_dir: folder to write to; made when missing.
        network: of `load_classifier`; its card gives the task and the labels' names.
        figures: write the PNG files, for which each image goes through the encoder once more.
        threshold: a finding, or the second class of a binary task, is predicted from this probability on.

    Raises:
        ValueError: a threshold that is no probability.
    """

    def __init__(
        self, output_dir: str | Path, network: ImageClassifier, figures: bool = True, threshold: float = 0.5
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be a probability from 0 to 1, not {threshold!r}")
        self.folder, self.network = Path(output_dir), network
        self.figures, self.threshold = figures, threshold
        self.task: str = network.card["task"]
        self.label_names: list[str] = network.card["label_names"]
        self.rows: dict[str, dict[str, Any]] = {}

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Take in one decollated item with "pred", its probabilities (C,), and return it unchanged.

        Raises:
            CheckpointError: values that are not finite.
        """
        if "id" not in data:
            return data
        name, values = str(data["id"]), torch.as_tensor(data["pred"]).double().cpu().reshape(-1)
        if not torch.isfinite(values).all():
            raise CheckpointError(f"{name}: probabilities that are not finite; the network diverged, train it again")
        names = self.label_names[1:] if self.task == "binary" else self.label_names
        probability = {label: round(float(value), 6) for label, value in zip(names, values, strict=True)}
        chosen = self._predicted(values)
        self.rows[name] = {"probability": probability, "predicted": chosen}
        if self.figures:
            image, attention = self._look(torch.as_tensor(data["image"]))
            draw_prediction(name, image, attention, probability, tuple(chosen), self.folder / f"{name}.png")
        return data

    def _predicted(self, values: Tensor) -> list[str]:
        if self.task == "multilabel":
            return [name for name, value in zip(self.label_names, values, strict=True) if value >= self.threshold]
        index = int(values[0] >= self.threshold) if self.task == "binary" else int(values.argmax())
        return [self.label_names[index]]

    @torch.no_grad()
    def _look(self, image: Tensor) -> tuple[np.ndarray, np.ndarray]:
        attention = self.network.attention_maps(image[None].to(self.network.head.weight.device))[0]
        return image[0].float().cpu().numpy(), attention.float().cpu().numpy()

    def finish(self, dataset: LabelledDataset) -> None:
        """Write `predictions.csv` and `predictions.json`, and say how many inputs could not be read.

        Args:
            dataset: what was gone through, with "source" in its items.

        Raises:
            DataError: not one input could be read.
        """
        rows = prediction_rows(dataset, self.rows)
        single = self.task != "multilabel"
        shown = [{**row, "predicted": row["predicted"][0] if single else row["predicted"]} for row in rows]
        about = {
            "task": self.task,
            "label_names": self.label_names,
            "threshold": None if self.task == "multiclass" else self.threshold,
        }
        write_predictions(self.folder, about, shown, dataset)
        self._write_table(rows)
        check_any_read(self.folder, rows, dataset)
        logger.info("%s: predictions of %d inputs; %d could not be read", self.folder, len(rows), len(dataset.skipped))

    def _write_table(self, rows: list[dict[str, Any]]) -> None:
        names = self.label_names[1:] if self.task == "binary" else self.label_names
        columns = ["id", "source", *(f"probability_{name}" for name in names), "predicted"]
        cells = [[row["id"], row["source"], *row["probability"].values(), "; ".join(row["predicted"])] for row in rows]
        write_csv(pd.DataFrame(cells, columns=columns), self.folder / "predictions.csv")
