# SPDX-License-Identifier: Apache-2.0
"""Metrics of detectors: average precision by two rules, sensitivity at false positives, intervals over patients.

Letters: N images, n boxes of an image, T IoU thresholds.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from ignite.exceptions import NotComputableError
from ignite.metrics import Metric
from monai.handlers import from_engine

from unimedi_components.arrays import Array
from unimedi_components.distributed import gather_objects
from unimedi_components.metrics.bootstrap import LEVEL, interval_table, patient_index, resampled, resamples_used

IOUS = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75)
"""IoU thresholds of the MGCA repository, whose tables the paper compares with."""
SHOWN = (0.4, 0.5, 0.75)
MGCA_SCORE = 0.5
FALSE_POSITIVES = (0.125, 0.25, 0.5, 1.0, 2.0)
MAX_BOXES = 100
_RECALLS = np.linspace(0, 1, 101)

RULES = {
    "map_coco": "COCO: mean over IoU 0.40 to 0.75 in steps of 0.05 of the average precision (at 101 recalls); every "
    "image counts: boxes on images without truth are false, truth on images without boxes is missed",
    "map_mgca": "as the MGCA repository: the same, of boxes with a score of at least 0.5 alone, over the images that "
    "have both truth and such boxes; the others are skipped, so that missed images and false alarms never count",
    "sensitivity": "FROC at IoU 0.4: share of the true boxes found, by mean number of false boxes per image",
}


@dataclass(frozen=True)
class Detections:
    """What was found and what is true of N images; boxes [x0, y0, x1, y1] in any one unit per image.

    Args:
        boxes: predicted, (n, 4) of each image.
        scores: of them, (n,) of each image.
        truth: true boxes, (m, 4) of each image.
        patients: of the images; None: every image is a patient of its own.
    """

    boxes: Sequence[npt.ArrayLike]
    scores: Sequence[npt.ArrayLike]
    truth: Sequence[npt.ArrayLike]
    patients: Sequence[Hashable] | None = None


@dataclass(frozen=True)
class _Pool:
    """All boxes of all images, highest score first: scores (M,), image (M,), hits (T, M), truths per image (N,)."""

    scores: Array
    image: Array
    hits: Array
    truths: Array


def box_ious(boxes: npt.ArrayLike, truth: npt.ArrayLike) -> Array:
    """Intersection over union of each pair: (n, m) from (n, 4) and (m, 4) boxes [x0, y0, x1, y1]."""
    a, b = (np.asarray(part, dtype=np.float64).reshape(-1, 4) for part in (boxes, truth))
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    area = [np.clip(part[:, 2:] - part[:, :2], 0, None).prod(-1) for part in (a, b)]
    union = area[0][:, None] + area[1][None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def match_boxes(boxes: npt.ArrayLike, scores: npt.ArrayLike, truth: npt.ArrayLike, iou: float) -> Array:
    """Which true box each predicted one finds, as COCO matches them: index, -1 for none, int64 (n,).

    Boxes (n, 4) take turns by falling score (equal scores in their order); each takes the free true box, of (m, 4),
    of highest IoU, if that is at least `iou`.
    """
    table = box_ious(boxes, truth)
    found = np.full(len(table), -1)
    free = np.ones(table.shape[1], dtype=bool)
    for i in np.argsort(-np.asarray(scores, dtype=np.float64).reshape(-1), kind="stable"):
        row = np.where(free, table[i], -1.0)
        if len(row) and row.max() >= iou - 1e-12:
            found[i] = row.argmax()
            free[found[i]] = False
    return found


def _weighted_ap(hits: Array, weights: Array, truths: Array) -> Array:
    """Average precision (R,) under each row of box weights (R, M), with weighted numbers of true boxes (R,)."""
    right = np.cumsum(weights * hits, axis=1)
    every = np.cumsum(weights, axis=1)
    precision = np.divide(right, every, out=np.zeros_like(right), where=every > 0)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = np.divide(right, truths[:, None], out=np.zeros_like(right), where=truths[:, None] > 0)
    values = np.full(len(weights), np.nan)
    for row in np.flatnonzero(truths > 0):
        place = np.searchsorted(recall[row] + 1e-12, _RECALLS, side="left")
        reached = place < len(hits)
        values[row] = best[row, place[reached]].sum() / len(_RECALLS)
    return values


def detection_metrics(found: Detections, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Measure boxes of one class, of scores above about 0.01 on, or average precision misses its tail.

    Raises ValueError: lists of different lengths, values that are not finite, or not one true box.

    Returns:
        plain values for JSON; None where something is not defined. "map_coco" and "map_mgca", see "rules";
        "ap_40", "ap_50", "ap_75": COCO's average precision at one IoU; "sensitivity" by "0.125", ... "2" mean false
        boxes per image at IoU 0.4, the highest that some threshold on the score reaches; "images", "patients",
        "true_boxes", "predicted_boxes", "images_with_truth", "images_of_mgca" are counts; "intervals": [low, high]
        of "map_coco", "map_mgca", "ap_40", "ap_50", "ap_75", with "resamples_used".
    """
    patients = _checked(found)
    thresholds = sorted({*IOUS, *SHOWN})
    every = _pool(found, thresholds, 0.0)
    strict = _mgca(_pool(found, thresholds, MGCA_SCORE))
    index = {iou: i for i, iou in enumerate(thresholds)}
    one = np.ones((1, len(every.truths)))
    rows = _named(_precisions(every, one), _precisions(strict, one), index)
    result: dict[str, Any] = {
        "ious": list(IOUS),
        "images": len(found.boxes),
        "patients": int(patients.max()) + 1,
        "images_with_truth": int((every.truths > 0).sum()),
        "images_of_mgca": int((strict.truths > 0).sum()),
        "true_boxes": int(every.truths.sum()),
        "predicted_boxes": len(every.scores),
        **{name: None if np.isnan(value[0]) else float(value[0]) for name, value in rows.items()},
        "sensitivity": _froc(every, index[0.4]),
        "rules": RULES,
    }
    if bootstrap > 0:

        def statistics(weights: Array) -> dict[str, Array]:
            return _named(_precisions(every, weights), _precisions(strict, weights), index)

        values = resampled(statistics, patients, bootstrap, seed, len(every.scores))
        limits = {"level": LEVEL, "resamples": bootstrap, **interval_table(values, patients)}
        result["intervals"] = {**limits, "resamples_used": resamples_used(values)}
    return result


def precision_recall(found: Detections, iou: float) -> tuple[Array, Array]:
    """Recall and precision over all images after each box, from the highest score to the lowest: (M,) each."""
    pool = _pool(found, [iou], 0.0)
    right = np.cumsum(pool.hits[0])
    return right / max(1, pool.truths.sum()), right / np.arange(1, len(right) + 1)


def _checked(found: Detections) -> Array:
    sizes = {len(found.boxes), len(found.scores), len(found.truth)}
    sizes |= set() if found.patients is None else {len(found.patients)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"boxes, scores, truth and patients of {sorted(sizes)} images; give each for every image")
    for boxes, scores, truth in zip(found.boxes, found.scores, found.truth, strict=True):
        parts = [np.asarray(part, dtype=np.float64) for part in (boxes, scores, truth)]
        if parts[0].size != 4 * parts[1].size:
            raise ValueError(f"{parts[0].shape} boxes with {parts[1].shape} scores; every box needs one")
        if not all(np.isfinite(part).all() for part in parts):
            raise ValueError("boxes or scores are not finite; the network diverged")
    if not any(np.asarray(truth).size for truth in found.truth):
        raise ValueError("not one image has a true box; there is nothing to find")
    return np.arange(len(found.boxes)) if found.patients is None else patient_index(found.patients)


def _pool(found: Detections, ious: Sequence[float], threshold: float) -> _Pool:
    scores, image, hits, truths = [], [], [], []
    for i, (boxes, score, truth) in enumerate(zip(found.boxes, found.scores, found.truth, strict=True)):
        own = np.asarray(score, dtype=np.float64).reshape(-1)
        order = np.argsort(-own, kind="stable")[:MAX_BOXES]
        order = order[own[order] >= threshold]
        box, true = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)[order], np.asarray(truth).reshape(-1, 4)
        scores.append(own[order])
        image.append(np.full(len(order), i))
        hits.append(np.stack([match_boxes(box, own[order], true, iou) >= 0 for iou in ious]))
        truths.append(len(true))
    ranked = np.concatenate(scores)
    order = np.argsort(-ranked, kind="stable")
    return _Pool(ranked[order], np.concatenate(image)[order], np.concatenate(hits, 1)[:, order], np.asarray(truths))


def _mgca(pool: _Pool) -> _Pool:
    """Without the images that have no truth or no box."""
    seen = np.zeros(len(pool.truths), dtype=bool)
    seen[pool.image] = True
    kept = seen & (pool.truths > 0)
    part = kept[pool.image]
    return _Pool(pool.scores[part], pool.image[part], pool.hits[:, part], np.where(kept, pool.truths, 0))


def _precisions(pool: _Pool, weights: Array) -> Array:
    """Average precision (T, R) under weights of the images (R, N)."""
    truths = weights @ pool.truths.astype(np.float64)
    rows = weights[:, pool.image]
    return np.stack([_weighted_ap(hits, rows, truths) for hits in pool.hits])


def _named(every: Array, strict: Array, index: Mapping[float, int]) -> dict[str, Array]:
    chosen = [index[iou] for iou in IOUS]
    names = {"map_coco": every[chosen].mean(0), "map_mgca": strict[chosen].mean(0)}
    return names | {f"ap_{round(100 * iou)}": every[index[iou]] for iou in SHOWN}


def _froc(pool: _Pool, row: int) -> dict[str, float]:
    hits, images = pool.hits[row], len(pool.truths)
    # boxes of equal score come in together
    ends = np.flatnonzero(np.append(pool.scores[1:] != pool.scores[:-1], True)) if len(hits) else np.empty(0, int)
    right, wrong = np.cumsum(hits)[ends], np.cumsum(~hits)[ends]
    total = pool.truths.sum()
    return {f"{limit:g}": float(right[wrong <= limit * images].max(initial=0) / total) for limit in FALSE_POSITIVES}


class _PerImage(Metric):
    """Keeps a row per image; `compute` sees those of all ranks, which may hold different numbers, or none."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        super().__init__(from_engine(["pred", "label"]))

    def reset(self) -> None:
        self.rows = []

    def _all(self) -> list[Any]:
        rows = [row for part in gather_objects(self.rows) for row in part]
        if not rows:
            raise NotComputableError(f"{type(self).__name__} saw no image; is the validation split empty?")
        return rows


class DetectionLossMetric(_PerImage):
    """Mean over the images of the loss that each has alone, "loss" of `ViTDet` in evaluation with targets."""

    def update(self, output: tuple[Sequence[Mapping[str, Any]], Any]) -> None:
        self.rows += [float(row["loss"]) for row in output[0]]

    def compute(self) -> float:
        return float(np.mean(self._all()))


class DetectionScore(_PerImage):
    """A value of `detection_metrics` over the images, such as "map_coco"; NaN where it is not defined.

    Boxes are in pixels of the network's input.
    """

    def __init__(self, name: str = "map_coco") -> None:
        self.name = name
        super().__init__()

    def update(self, output: tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]) -> None:
        for found, true in zip(*output, strict=True):
            tensors = (found["boxes"], found["scores"], true["boxes"])
            self.rows.append(tuple(tensor.detach().float().cpu().numpy() for tensor in tensors))

    def compute(self) -> float:
        boxes, scores, truth = zip(*self._all(), strict=True)
        finite = all(np.isfinite(part).all() for row in (*boxes, *scores) for part in (row,))
        if not finite or not any(len(part) for part in truth):
            return float("nan")
        value = detection_metrics(Detections(boxes, scores, truth), bootstrap=0)[self.name]
        return float("nan") if value is None else float(value)
