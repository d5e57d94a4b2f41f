# SPDX-License-Identifier: Apache-2.0
"""Average precision and its relatives: by hand, against slow references, and against MONAI's COCO metric."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from ignite.exceptions import NotComputableError
from monai.apps.detection.metrics.coco import COCOMetric
from monai.apps.detection.metrics.matching import matching_batch
from monai.data.box_utils import box_iou

from unimedi_components.metrics import DetectionLossMetric, Detections, DetectionScore, detection_metrics
from unimedi_components.metrics.boxes import IOUS, box_ious, match_boxes, precision_recall


def test_ious_by_hand() -> None:
    boxes = [[0, 0, 4, 2], [10, 10, 12, 12]]
    truth = [[2, 0, 6, 2], [0, 0, 4, 2], [12, 10, 14, 12]]
    # two of six pixels; the same; an edge in common
    assert box_ious(boxes, truth) == pytest.approx(np.array([[1 / 3, 1, 0], [0, 0, 0]]))
    assert box_ious([], truth).shape == (0, 3)


def test_a_true_box_is_found_once_by_the_likeliest_box() -> None:
    truth = [[0, 0, 10, 10], [20, 0, 30, 10]]
    boxes = [[0, 0, 10, 9], [0, 0, 10, 10], [21, 0, 30, 10], [50, 50, 60, 60]]
    # the second box would fit better, but the first is likelier
    assert match_boxes(boxes, [0.9, 0.8, 0.7, 0.6], truth, 0.5).tolist() == [0, -1, 1, -1]
    assert match_boxes(boxes, [0.8, 0.9, 0.7, 0.6], truth, 0.5).tolist() == [-1, 0, 1, -1]
    assert match_boxes(boxes[:1], [0.9], truth, 0.95).tolist() == [-1]
    assert match_boxes(boxes[:1], [0.9], truth, 0.9).tolist() == [0]
    assert match_boxes(boxes[:1], [0.9], [], 0.5).tolist() == [-1]


def test_average_precision_by_hand() -> None:
    """Recalls 0 to 0.5 at precision 1 (51 of 101), 0.51 to 1 at 2/3 (50 of 101)."""

    def ap(hits: list[bool], truths: int) -> float:
        true = [[20 * i, 0, 20 * i + 10, 10] for i in range(truths)]
        boxes = [true[i] if hit else [500, 500, 510, 510] for i, hit in enumerate(hits)]
        scores = [0.9 - 0.1 * i for i in range(len(hits))]
        return detection_metrics(Detections([boxes], [scores], [true]), bootstrap=0)["ap_50"]

    assert ap([True, False, True], 3) == pytest.approx((34 + 33 * 2 / 3) / 101)
    assert ap([True, False, True], 5) == pytest.approx((21 + 20 * 2 / 3) / 101)
    assert ap([False], 1) == 0
    assert ap([], 3) == 0


def slow_ap(found: Detections, iou: float, threshold: float = 0.0, skip: bool = False) -> float:
    """Average precision by loops, without the package's matching."""
    pool, total = [], 0
    for boxes, scores, truth in zip(found.boxes, found.scores, found.truth, strict=True):
        kept = sorted(
            ((float(s), [float(v) for v in b]) for s, b in zip(scores, boxes, strict=True) if s >= threshold),
            key=lambda row: -row[0],
        )
        if skip and (not kept or not len(truth)):
            continue
        total += len(truth)
        free = list(range(len(truth)))
        for score, (x0, y0, x1, y1) in kept:
            best, which = 0.0, None
            for g in free:
                u0, v0, u1, v1 = (float(v) for v in truth[g])
                shared = max(0.0, min(x1, u1) - max(x0, u0)) * max(0.0, min(y1, v1) - max(y0, v0))
                value = shared / ((x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - shared)
                if value > best:
                    best, which = value, g
            hit = which is not None and best >= iou
            if hit:
                free.remove(which)
            pool.append((score, hit))
    pool.sort(key=lambda row: -row[0])
    values = []
    for recall in np.linspace(0, 1, 101):
        reached = [0.0]
        right = 0
        for rank, (_, hit) in enumerate(pool, 1):
            right += hit
            if right / total >= recall - 1e-12:
                reached.append(right / rank)
        values.append(max(reached))
    return float(np.mean(values))


def random_cases(seed: int, images: int = 24) -> Detections:
    """Some true boxes found closely, some roughly, some not; false boxes; images without either."""
    rng = np.random.default_rng(seed)
    boxes, scores, truth = [], [], []
    for _ in range(images):
        corner = rng.uniform(0, 80, (int(rng.integers(0, 4)), 2))
        true = np.concatenate([corner, corner + rng.uniform(10, 30, corner.shape)], 1)
        found = true[rng.random(len(true)) < 0.8] + 0.0
        found = found + rng.normal(0, 2, found.shape)
        start = rng.uniform(0, 80, (int(rng.integers(0, 3)), 2))
        wrong = np.concatenate([start, start + rng.uniform(10, 30, start.shape)], 1)
        boxes.append(np.concatenate([found, wrong]))
        scores.append(rng.random(len(boxes[-1])))
        truth.append(true)
    return Detections(boxes, scores, truth)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_metrics_equal_slow_ones(seed: int) -> None:
    found = random_cases(seed)
    result = detection_metrics(found, bootstrap=0)
    assert result["map_coco"] == pytest.approx(np.mean([slow_ap(found, iou) for iou in IOUS]))
    assert result["map_mgca"] == pytest.approx(np.mean([slow_ap(found, iou, 0.5, skip=True) for iou in IOUS]))
    for name, iou in (("ap_40", 0.4), ("ap_50", 0.5), ("ap_75", 0.75)):
        assert result[name] == pytest.approx(slow_ap(found, iou)), name
    assert 0.05 < result["ap_75"] < result["ap_40"] < 0.95
    recall, precision = precision_recall(found, 0.4)
    assert (len(recall), recall[-1]) == (result["predicted_boxes"], pytest.approx(result["sensitivity"]["2"]))
    assert precision[-1] == pytest.approx(recall[-1] * result["true_boxes"] / result["predicted_boxes"])


@pytest.mark.parametrize("seed", [3, 4])
def test_map_coco_is_monais_coco_metric(seed: int) -> None:
    found = random_cases(seed)
    classes = [np.zeros(len(scores), int) for scores in found.scores]
    metric = COCOMetric(["opacity"], iou_list=[0.4, 0.75], iou_range=(0.4, 0.75, 0.05), max_detection=[100])
    rows = matching_batch(
        iou_fn=box_iou,
        iou_thresholds=metric.iou_thresholds,
        pred_boxes=found.boxes,
        pred_classes=classes,
        pred_scores=found.scores,
        gt_boxes=found.truth,
        gt_classes=[np.zeros(len(truth), int) for truth in found.truth],
    )
    expected: dict[str, Any] = metric(rows)[0]
    result = detection_metrics(found, bootstrap=0)
    assert result["map_coco"] == pytest.approx(expected["mAP_IoU_0.40_0.75_0.05_MaxDet_100"], abs=1e-6)
    assert result["ap_40"] == pytest.approx(expected["AP_IoU_0.40_MaxDet_100"], abs=1e-6)
    assert result["ap_75"] == pytest.approx(expected["AP_IoU_0.75_MaxDet_100"], abs=1e-6)


def test_what_each_rule_counts() -> None:
    """One image found, one missed, one without truth and with a false box of the highest score."""
    box = [[0.0, 0, 10, 10]]
    found = Detections([box, [], box], [[0.9], [], [0.95]], [box, box, []])
    result = detection_metrics(found, bootstrap=0)
    # precision 1/2 up to recall 1/2, of two true boxes
    assert result["map_coco"] == pytest.approx(51 / 101 / 2)
    assert result["map_mgca"] == pytest.approx(1.0)
    assert (result["images"], result["images_with_truth"], result["images_of_mgca"]) == (3, 2, 1)
    weak = detection_metrics(Detections([box, [], box], [[0.4], [], [0.3]], [box, box, []]), bootstrap=0)
    assert weak["map_mgca"] is None
    assert weak["ap_40"] == pytest.approx(51 / 101)


def test_sensitivity_by_hand() -> None:
    """Four images: hits at 0.9, 0.6 and 0.3, false boxes at 0.8, 0.5, 0.4 and 0.4 (two at once); five true boxes."""
    a, b = [0.0, 0, 10, 10], [50.0, 50, 60, 60]
    found = Detections(
        [[a, b], [a, b, [80.0, 0, 90, 10]], [a, b], []],
        [[0.9, 0.8], [0.6, 0.5, 0.4], [0.3, 0.4], []],
        [[a], [a], [a], [a, b]],
    )
    result = detection_metrics(found, bootstrap=0)["sensitivity"]
    assert result == {"0.125": 0.2, "0.25": 0.4, "0.5": 0.4, "1": pytest.approx(0.6), "2": pytest.approx(0.6)}


def test_intervals_resample_patients() -> None:
    found = random_cases(5, 30)
    patients = [f"{i // 2:02}" for i in range(30)]
    pairs = Detections(found.boxes, found.scores, found.truth, patients)
    result = detection_metrics(pairs, bootstrap=50, seed=3)
    rng, draws = np.random.default_rng(3), []
    for _ in range(50):
        count = np.bincount(rng.integers(15, size=15), minlength=15)
        rows = [i for i in range(30) for _ in range(count[i // 2])]
        parts = ([part[i] for i in rows] for part in (found.boxes, found.scores, found.truth))
        draws.append(detection_metrics(Detections(*parts), bootstrap=0)["ap_50"])
    low, high = np.percentile(draws, [2.5, 97.5])
    assert result["intervals"]["ap_50"] == pytest.approx([low, high], abs=1e-9)
    assert low < result["ap_50"] < high
    assert result["intervals"]["resamples_used"]["ap_50"] == 50
    alone = detection_metrics(Detections(found.boxes, found.scores, found.truth, [0] * 30), bootstrap=10)
    assert alone["intervals"]["map_coco"] is None


def test_bad_cases_are_named() -> None:
    box = [[0.0, 0, 10, 10]]
    for wrong, said in [
        (Detections([box], [[0.5]], []), "images"),
        (Detections([box], [[0.5, 0.4]], [box]), "every box needs one"),
        (Detections([[[0, 0, np.nan, 1]]], [[0.5]], [box]), "not finite"),
        (Detections([box], [[0.5]], [[]]), "nothing to find"),
    ]:
        with pytest.raises(ValueError, match=said):
            detection_metrics(wrong)


def test_ignites_metrics_gather_batches() -> None:
    found = random_cases(6, 10)
    rows = [
        {"boxes": torch.tensor(b), "scores": torch.tensor(s), "loss": torch.tensor(float(i))}
        for i, (b, s) in enumerate(zip(found.boxes, found.scores, strict=True))
    ]
    targets = [{"boxes": torch.tensor(truth)} for truth in found.truth]
    batches = [(0, 4), (4, 8), (8, 10)]
    engine = Engine(lambda engine, part: {"pred": rows[slice(*part)], "label": targets[slice(*part)]})
    DetectionScore("map_coco").attach(engine, "val_map")
    DetectionLossMetric().attach(engine, "val_loss")
    for _ in range(2):
        metrics = engine.run(batches).metrics
    assert metrics["val_loss"] == pytest.approx(4.5)
    expected = Detections(*([part.astype(np.float32) for part in p] for p in (found.boxes, found.scores, found.truth)))
    assert metrics["val_map"] == pytest.approx(detection_metrics(expected, bootstrap=0)["map_coco"])
    with pytest.raises(NotComputableError, match="no image"):
        DetectionScore().compute()
    score = DetectionScore()
    score.update(([{**rows[0], "boxes": torch.full((1, 4), float("nan")), "scores": torch.ones(1)}], targets[:1]))
    assert np.isnan(score.compute())
