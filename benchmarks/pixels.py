# SPDX-License-Identifier: Apache-2.0
"""The baseline without a network: logistic regression on X-rays of 32 x 32 pixels, or volumes of 8 x 8 x 8 voxels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.bundle import ConfigParser

from unimedi_components.data.chains import task_transforms
from unimedi_components.loading import ImageDataset, ImageLoader
from unimedi_components.metrics.classification import classification_metrics
from unimedi_components.retrieval.features import pool
from unimedi_components.retrieval.probe import LogisticProbe
from unimedi_components.tasks.evaluate import split_items

__all__ = ["pixel_probabilities", "pixel_probe"]

Array = npt.NDArray[Any]


def pixel_probe(config: ConfigParser, seed: int = 0) -> dict[str, Any]:
    """Train on a classification bundle's training images, prepared as for its network, and test on its test images.

    Args:
        config: the bundle's, with its overlays and overrides; its share of the labels counts.
        seed: of the folds in which the penalty is chosen.

    Returns:
        the values of `classification_metrics`.
    """
    training: ImageDataset = config.get_parsed_content("train#dataset")
    task, names, dim = training.task, training.label_names, training.data[0]["dim"]
    _, test = split_items(config.get_parsed_content("data#items"), "test", dim, str(training.root))
    chain = task_transforms(config.get_parsed_content("preprocessing"))
    known: dict[str, Any] = {"label_names": names, "task": task, "dim": dim}
    (x, y, groups), (x_test, y_test, patients) = (
        _inputs(ImageDataset(items, chain, training.root, "label", cache_dir=training.cache_dir, **known))
        for items in (training.data, test)
    )
    probabilities = pixel_probabilities(x, y, groups, x_test, task, len(names), seed)
    return classification_metrics(probabilities, y_test, task, names, patients)


def _inputs(dataset: ImageDataset) -> tuple[Array, Array, list[str]]:
    """Averaged images (N, D), labels and patients of what can be read."""
    rows, labels, patients = [], [], []
    for batch in ImageLoader(dataset, 32):
        rows.append(pool(batch["image"]))
        labels.append(batch["label"])
        patients += batch["patient"]
    return torch.cat(rows).double().numpy(), torch.cat(labels).numpy(), patients


def pixel_probabilities(
    x: Array, y: Array, patients: list[str], x_test: Array, task: str, classes: int, seed: int = 0
) -> Array:
    """Probabilities as `classification_metrics` takes them; what the training images show nothing of gets 0.5 or 0.

    Args:
        x: (N, D).
        y: labels of the task, -1 for uncertain ones, which do not count.
        patients: of the N images.
        x_test: (M, D).
        task: "multiclass", "multilabel" or "binary".
        classes: of the task.
        seed: of the folds in which the penalty is chosen.
    """
    groups = np.unique(patients, return_inverse=True)[1]
    if task == "multiclass":
        found = np.zeros((len(x_test), classes))
        probe = LogisticProbe(seed=seed).fit(x[y >= 0], y[y >= 0], groups[y >= 0])
        found[:, probe.classes] = probe.probabilities(x_test)
        return found
    columns = y.reshape(len(y), -1)
    found = np.full((len(x_test), columns.shape[1]), 0.5)
    for c, column in enumerate(columns.T):
        known = column >= 0
        if len(np.unique(column[known])) == 2:
            probe = LogisticProbe(seed=seed).fit(x[known], column[known], groups[known])
            found[:, c] = probe.probabilities(x_test)[:, 1]
    return found
