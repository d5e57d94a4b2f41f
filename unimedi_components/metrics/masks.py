# SPDX-License-Identifier: Apache-2.0
"""How well predicted masks of images cover the true ones: Dice and IoU per image, with intervals over patients.

Letters: N images, R resamples of the patients.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unimedi_components.arrays import Array
from unimedi_components.losses.segmentation import FocalDiceLoss
from unimedi_components.metrics.bootstrap import LEVEL, interval_table, patient_index, resampled, weighted_mean
from unimedi_components.metrics.summed import SummedMetric


def mask_counts(predicted: Tensor, truth: Tensor) -> Array:
    """Pixels of prediction and truth, bool (N, 1, H, W), and of both: int64 (N, 3). ValueError where shapes differ."""
    if predicted.shape != truth.shape:
        raise ValueError(f"prediction {tuple(predicted.shape)} and truth {tuple(truth.shape)} differ in shape")
    found, wanted = (mask.flatten(1).bool() for mask in (predicted, truth))
    counts = torch.stack([found.sum(1), wanted.sum(1), (found & wanted).sum(1)], 1)
    return counts.cpu().numpy()


def mask_metrics(counts: Array, patients: Sequence[Any], bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Mean Dice and IoU per image, and false alarms.

    An image whose true mask is empty scores 1 if the prediction is empty too, and 0 otherwise (MGCA's rule); a mean
    over many empty images says more about false alarms than about outlines, so "dice_positive" leaves them out.
    ``counts``: of `mask_counts`, (N, 3).

    Returns:
        plain values for JSON: "cases", "patients", "positive" (images with a mask), "dice", "dice_positive", "iou",
        "iou_positive", "false_alarms" (share of the images without a mask that got one) and "missed" (share of the
        images with a mask that got none), None where there is no such image; "intervals" with "level", "resamples"
        and [low, high] of each, None where a value is not defined or cannot vary.
    """
    if not len(counts) or len(counts) != len(patients):
        raise ValueError(f"{len(counts)} images and {len(patients)} patients: give images, and a patient for each")
    scores, kept = mask_scores(np.asarray(counts)), _kept(np.asarray(counts))
    index = patient_index(patients)

    def means(weights: Array) -> dict[str, Array]:
        return {name: weighted_mean(weights, scores[name], kept[name]) for name in scores}

    values: dict[str, Any] = {"cases": len(counts), "patients": int(index.max()) + 1}
    values["positive"] = int((counts[:, 1] > 0).sum())
    values |= {n: None if np.isnan(mean[0]) else float(mean[0]) for n, mean in means(np.ones((1, len(counts)))).items()}
    if bootstrap > 0:
        limits = interval_table(resampled(means, index, bootstrap, seed, len(index)), index)
        values["intervals"] = {"level": LEVEL, "resamples": bootstrap, **limits}
    return values


def mask_scores(counts: Array) -> dict[str, Array]:
    """Score of each image (N,) by metric of `mask_metrics`, with its rule for empty masks."""
    predicted, truth, both = np.asarray(counts).T.astype(np.float64)
    union, total = predicted + truth - both, predicted + truth
    dice = np.divide(2 * both, total, out=np.ones(len(counts)), where=total > 0)
    iou = np.divide(both, union, out=np.ones(len(counts)), where=union > 0)
    scores = {"dice": dice, "dice_positive": dice, "iou": iou, "iou_positive": iou}
    return {**scores, "false_alarms": (predicted > 0).astype(float), "missed": (predicted == 0).astype(float)}


def _kept(counts: Array) -> dict[str, Array]:
    """Which images count for a metric."""
    positive = counts[:, 1] > 0
    kept = {"dice": np.ones(len(counts), bool), "dice_positive": positive}
    kept |= {"iou": kept["dice"], "iou_positive": positive}
    return {**kept, "false_alarms": ~positive, "missed": positive}


class MaskScore(SummedMetric):
    """Mean Dice per image over all batches and ranks of an evaluator run, empty masks as in `mask_metrics`.

    The engine's output holds logits "pred" and labels "label", both (B, 1, H, W).
    """

    def __init__(self, threshold: float = 0.5) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be a probability from 0 to 1, not {threshold!r}")
        self.threshold = threshold
        super().__init__(2)

    def terms(self, logits: Tensor, label: Tensor) -> Tensor:
        counts = mask_counts(logits.float().sigmoid() >= self.threshold, label > 0.5)
        return torch.tensor([len(counts), mask_scores(counts)["dice"].sum()], dtype=torch.float64)

    def value(self, sums: Tensor) -> Tensor:
        return sums[1] / sums[0]


class MaskLossMetric(SummedMetric):
    """`FocalDiceLoss` of a whole evaluator run, over all batches and ranks.

    It is the loss of one batch that holds all images, so that neither the batch size nor the number of ranks changes
    it, and a batch that happens to hold empty masks alone does not disturb it.
    """

    def __init__(self, loss: FocalDiceLoss, num_classes: int = 1) -> None:
        self.loss = loss
        super().__init__(4 + 3 * num_classes)

    def terms(self, logits: Tensor, label: Tensor) -> Tensor:
        return self.loss.sums(logits, label)

    def value(self, sums: Tensor) -> Tensor:
        return self.loss.from_sums(sums)
