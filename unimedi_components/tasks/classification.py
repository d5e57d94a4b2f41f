# SPDX-License-Identifier: Apache-2.0
"""Classification of images: how a classifier is measured, and the files that are written of its predictions."""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from unimedi_components.data.chains import task_transforms
from unimedi_components.figures.charts import RocCurve, draw_confusion, draw_roc
from unimedi_components.figures.panels import draw_prediction
from unimedi_components.loading import ImageDataset
from unimedi_components.losses.classification import UNCERTAIN, probabilities
from unimedi_components.metrics.classification import classification_metrics, predicted_labels
from unimedi_components.networks.classifier import ImageClassifier
from unimedi_components.tasks.evaluate import Row, TaskEvaluation
from unimedi_components.tasks.writer import PredictionWriter, check_finite, check_probability


def scored_names(card: Mapping[str, Any]) -> list[str]:
    """Labels that have a probability: of a binary task the second class alone."""
    return card["label_names"][1:] if card["task"] == "binary" else card["label_names"]


class ClassifierEvaluation(TaskEvaluation):
    """AUROC, accuracy and calibration of a classifier, see `classification_metrics`.

    `cases.csv` has one line per case, with labels, probabilities and prediction; findings are 1, 0 or -1 (uncertain).
    The figures are `roc.png` and `confusion.png`. ``transform``: list of transforms; None takes those that the
    classifier's card describes.
    """

    batch_size = 32

    def __init__(self, network: ImageClassifier, device: Any, transform: Sequence[Any] | None = None) -> None:
        super().__init__(network, device)
        self.task, self.dim = network.card["task"], network.spatial_dims
        self.transform = task_transforms(network.card["preprocessing"]) if transform is None else transform

    def dataset(self, items: Sequence[Row], root: Path, **options: Any) -> ImageDataset:
        known: dict[str, Any] = {"label_names": self.label_names, "task": self.task, "dim": self.dim}
        return ImageDataset(items, self.transform, root, "label", **known, **options)

    def predict(self, batch: Mapping[str, Any]) -> list[Row]:
        logits = self.finite(self.network(batch["image"].to(self.device)).double().cpu())
        values = (batch["id"], batch["patient"], batch["label"].numpy(), probabilities(logits, self.task).numpy())
        names = ("id", "patient", "label", "probability")
        return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]

    def fault(self, rows: Sequence[Row], split: str) -> str:
        uncertain = all((row["label"] == UNCERTAIN).all() for row in rows)
        return f"every label of the {split} split is uncertain; nothing can be measured on it" if uncertain else ""

    def measure(self, rows: Sequence[Row], bootstrap: int, seed: int) -> dict[str, Any]:
        label, probability = _stacked(rows)
        patients = [row["patient"] for row in rows]
        return classification_metrics(probability, label, self.task, self.label_names, patients, bootstrap, seed)

    def table(self, rows: Sequence[Row]) -> pd.DataFrame:
        (label, probability), names = _stacked(rows), np.asarray(self.label_names)
        predicted = predicted_labels(probability, self.task)
        table: dict[str, Any] = {name: [row[name] for row in rows] for name in ("id", "patient")}
        scored = scored_names(self.network.card)
        shown = {f"probability_{name}": column for name, column in zip(scored, probability.T, strict=True)}
        if self.task == "multilabel":
            table |= {f"label_{name}": column for name, column in zip(names, label.T, strict=True)} | shown
            table |= {f"predicted_{name}": column for name, column in zip(names, predicted.T, strict=True)}
        else:
            table |= {"label": names[label], **shown, "predicted": names[predicted.reshape(-1)]}
        return pd.DataFrame(table)

    def draw(self, rows: Sequence[Row], values: Mapping[str, Any], folder: Path) -> None:
        heading = f"{values['split']} split, {values['cases']} images of {values['patients']} patients"
        draw_roc(self._curves(rows, values), folder / "roc.png", f"ROC, {heading}")
        matrix, single = values["confusion_matrix"], self.task != "multilabel"
        names = self.label_names if single else ["absent", "present"]
        title = f"Confusion, {heading}" if single else f"Confusion at 0.5, {heading}"
        draw_confusion({"": matrix} if single else matrix, names, folder / "confusion.png", title)

    def _curves(self, rows: Sequence[Row], values: Mapping[str, Any]) -> list[RocCurve]:
        label, probability = _stacked(rows)
        intervals = values.get("intervals", {}).get("auroc", {})
        curves = []
        for i, (name, auroc) in enumerate(values["auroc"].items()):
            score = probability[:, i]
            truth = (label == i).astype(int) if self.task == "multiclass" else label.reshape(len(score), -1)[:, i]
            curves.append(RocCurve.of(name, truth, score, auroc, intervals.get(name)))
        return curves


def _stacked(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) or (N, C) and probabilities (N, C)."""
    label, probability = (np.stack([row[name] for row in rows]) for name in ("label", "probability"))
    return label, probability


class SavePredictions(PredictionWriter):
    """Write the probabilities of images and a figure of each; a postprocessing step after the activation.

    - `predictions.csv`: "id", "source", "probability_<label>" for each label (of a binary task the second class
      alone), "predicted": the class, or the findings with "; " between them.
    - `predictions.json`: the same by name, with the task, the threshold, and the inputs that could not be read.
    - `<id>.png`: the image with Eq. 1's **v** over it and the probabilities; see `draw_prediction`.

    ``threshold``: a finding, or the second class of a binary task, is predicted from this probability on; ValueError
    where it is none.
    """

    def __init__(
        self, output_dir: str | Path, network: ImageClassifier, figures: bool = True, threshold: float = 0.5
    ) -> None:
        super().__init__(output_dir, figures)
        self.network, self.threshold = network, check_probability(threshold)
        self.task: str = network.card["task"]
        self.label_names: list[str] = network.card["label_names"]
        self.scored = scored_names(network.card)

    def row(self, name: str, data: Mapping[Hashable, Any]) -> Row:
        """Probability by label and what is predicted: a class, or a list of findings."""
        values = torch.as_tensor(data["pred"]).double().cpu().reshape(-1)
        check_finite(name, values)
        probability = {label: round(float(value), 6) for label, value in zip(self.scored, values, strict=True)}
        chosen = self._predicted(values)
        if self.figures:
            image, attention = self._look(torch.as_tensor(data["image"]))
            draw_prediction(name, image, attention, probability, tuple(chosen), self.folder / f"{name}.png")
        return {"probability": probability, "predicted": chosen if self.task == "multilabel" else chosen[0]}

    def _predicted(self, values: Tensor) -> list[str]:
        if self.task == "multilabel":
            return [name for name, value in zip(self.label_names, values, strict=True) if value >= self.threshold]
        index = int(values[0] >= self.threshold) if self.task == "binary" else int(values.argmax())
        return [self.label_names[index]]

    @torch.no_grad()
    def _look(self, image: Tensor) -> tuple[np.ndarray, np.ndarray]:
        attention = self.network.attention_maps(image[None].to(self.network.head.weight.device))[0]
        return image[0].float().cpu().numpy(), attention.float().cpu().numpy()

    def about(self) -> Row:
        threshold = None if self.task == "multiclass" else self.threshold
        return {"task": self.task, "label_names": self.label_names, "threshold": threshold}

    def tables(self, rows: list[Row]) -> dict[str, pd.DataFrame]:
        columns = ["id", "source", *(f"probability_{name}" for name in self.scored), "predicted"]
        cells = [[row["id"], row["source"], *row["probability"].values(), row["predicted"]] for row in rows]
        table = pd.DataFrame(cells, columns=columns)
        table["predicted"] = ["; ".join(found) if isinstance(found, list) else found for found in table["predicted"]]
        return {"predictions.csv": table}
