# SPDX-License-Identifier: Apache-2.0
"""How well predicted label maps follow the true ones: Dice, surface Dice and HD95 of every organ of every case.

Letters: N cases, O organs (the labels without the background), R resamples of the patients.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from torch import Tensor

from unimedi_components.arrays import Array
from unimedi_components.metrics.bootstrap import LEVEL, interval_table, patient_index, resampled, weighted_mean
from unimedi_components.metrics.summed import SummedMetric

METRICS = ("dice", "surface_dice", "hd95_mm")


def organ_scores(
    prediction: Array, truth: Array, num_organs: int, spacing: Sequence[float], tolerance_mm: float = 3.0
) -> dict[str, Array]:
    """Scores of one case on the voxels of its file.

    An organ that the truth lacks has no score, and neither counts for it nor against it; the voxels that the prediction
    gives it are "false_voxels". An organ that the truth has and the prediction misses scores 0 in both kinds of Dice
    and has no HD95, since no distance to an empty surface is defined; it is "missed". Raises ValueError: the shapes
    differ.

    Args:
        prediction: labels 0 to O, (D, H, W).
        tolerance_mm: distance up to which surfaces agree (surface Dice, also called NSD).

    Returns:
        each (O,): "dice", "surface_dice", "hd95_mm" as float64 with NaN where there is no score, "voxels" of the truth,
        "predicted_voxels", "false_voxels", and "missed" as bool.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} differ in shape")
    scores = {name: np.full(num_organs, np.nan) for name in METRICS}
    counts = [np.bincount(labels.ravel().astype(np.int64), minlength=num_organs + 1) for labels in (truth, prediction)]
    voxels, predicted = (count[1 : num_organs + 1] for count in counts)
    for organ in range(num_organs):
        if not voxels[organ]:
            continue
        if not predicted[organ]:
            scores["dice"][organ] = scores["surface_dice"][organ] = 0.0
            continue
        found, wanted = _cropped(prediction == organ + 1, truth == organ + 1)
        both = np.count_nonzero(found & wanted)
        scores["dice"][organ] = 2 * both / float(voxels[organ] + predicted[organ])
        seen, true = (torch.from_numpy(mask)[None, None].float() for mask in (found, wanted))
        step = tuple(float(value) for value in spacing)
        shared: dict[str, Any] = {"include_background": True, "spacing": step}
        with warnings.catch_warnings():
            # MONAI's metrics call MONAI by an argument that it has given up
            warnings.filterwarnings("ignore", message=".*always_return_as_numpy")
            surface = compute_surface_dice(seen, true, class_thresholds=[tolerance_mm], **shared)
            distance = compute_hausdorff_distance(seen, true, percentile=95, **shared)
        scores["surface_dice"][organ], scores["hd95_mm"][organ] = float(surface), float(distance)
    return {
        **scores,
        "voxels": voxels,
        "predicted_voxels": predicted,
        "false_voxels": np.where(voxels == 0, predicted, 0),
        "missed": (voxels > 0) & (predicted == 0),
    }


def _cropped(found: Array, wanted: Array) -> tuple[Array, Array]:
    """Both masks, cut to the box that holds them: all surfaces lie in it, and distances become cheap."""
    either = found | wanted
    box = []
    for axis in range(3):
        inside = np.flatnonzero(either.any(axis=tuple(other for other in range(3) if other != axis)))
        box.append(slice(int(inside[0]), int(inside[-1]) + 1))
    # one voxel of air around, so that a mask that fills the box has a surface
    return tuple(np.pad(mask[tuple(box)], 1) for mask in (found, wanted))  # type: ignore[return-value]


def organ_metrics(
    cases: Sequence[Mapping[str, Array]],
    patients: Sequence[Any],
    organs: Sequence[str],
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Means over cases for each organ, then over organs, with intervals over patients.

    Returns:
        plain values for JSON: "cases", "patients", "mean_dice", "mean_surface_dice", "mean_hd95_mm": means over the
        organs that have a value; "dice", "surface_dice", "hd95_mm" by organ, means over the cases that have one, or
        None; "cases_with", "missed" (organs of the truth without a voxel) and "false_alarms" (cases in which an absent
        organ was given voxels) by organ; "intervals" with "level", "resamples" and [low, high] of the three means and
        of each organ's Dice.
    """
    if not cases or len(cases) != len(patients):
        raise ValueError(f"{len(cases)} cases and {len(patients)} patients: give at least one case, one patient each")
    index = patient_index(patients)
    table = {name: np.stack([case[name] for case in cases]) for name in METRICS}
    values: dict[str, Any] = {"cases": len(cases), "patients": int(index.max()) + 1}
    plain = np.ones((1, len(cases)))
    by_organ = {name: _organ_means(table[name], plain)[0] for name in METRICS}
    values |= {f"mean_{name}": _none(_mean_over_organs(by_organ[name][None])[0]) for name in METRICS}
    values |= {name: dict(zip(organs, map(_none, by_organ[name]), strict=True)) for name in METRICS}
    counts = {
        "cases_with": np.stack([case["voxels"] > 0 for case in cases]).sum(0),
        "missed": np.stack([case["missed"] for case in cases]).sum(0),
        "false_alarms": np.stack([case["false_voxels"] > 0 for case in cases]).sum(0),
    }
    values |= {name: dict(zip(organs, map(int, count), strict=True)) for name, count in counts.items()}
    if bootstrap > 0:

        def means(weights: Array) -> dict[str, Array]:
            parts = {name: _organ_means(table[name], weights) for name in METRICS}
            overall = {f"mean_{name}": _mean_over_organs(part) for name, part in parts.items()}
            return overall | {f"dice {organ}": row for organ, row in zip(organs, parts["dice"].T, strict=True)}

        limits = interval_table(resampled(means, index, bootstrap, seed, len(cases)), index)
        dice = {organ: limits.pop(f"dice {organ}") for organ in organs}
        values["intervals"] = {"level": LEVEL, "resamples": bootstrap, **limits, "dice": dice}
    return values


def _organ_means(scores: Array, weights: Array) -> Array:
    """(R, O) means over the cases that have a score (N, O), under each row of weights (R, N); NaN where none has."""
    return weighted_mean(weights, scores, np.isfinite(scores))


def _mean_over_organs(means: Array) -> Array:
    """(R,) of (R, O): the mean of the organs that have a value."""
    known = np.isfinite(means)
    count = known.sum(1)
    return np.divide(np.where(known, means, 0).sum(1), count, out=np.full(len(means), np.nan), where=count > 0)


def _none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


class OrganDice(SummedMetric):
    """Mean Dice of an evaluator run on the network's grid: over cases for each organ, then over organs.

    Organs that a case's label map lacks do not count in it, as in `organ_scores`. Ranks may hold different numbers of
    cases, or none. The engine's output holds logits "pred" (B, C, D, H, W) and labels "label" (B, 1, D, H, W).
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        super().__init__(2 * (num_classes - 1), "case with an organ")

    def terms(self, logits: Tensor, label: Tensor) -> Tensor:
        sums = torch.zeros(2, self.num_classes - 1, dtype=torch.float64)
        for found, wanted in zip(logits.argmax(1), label[:, 0].long(), strict=True):
            parts = (part.flatten() for part in (found, wanted, wanted[found == wanted]))
            seen, true, both = (torch.bincount(x, minlength=self.num_classes).double().cpu()[1:] for x in parts)
            sums += torch.stack([true > 0, torch.where(true > 0, 2 * both / (seen + true).clamp(min=1), 0.0)])
        return sums.flatten()

    def value(self, sums: Tensor) -> Tensor:
        count, total = sums.chunk(2)
        return (total[count > 0] / count[count > 0]).mean()
