# SPDX-License-Identifier: Apache-2.0
"""Mask metrics against loops over images and pixels, their intervals against drawing patients one by one."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from ignite.exceptions import NotComputableError

from unimedi_components.losses.segmentation import FocalDiceLoss
from unimedi_components.metrics.masks import MaskLossMetric, MaskScore, mask_counts, mask_metrics


def masks(images=24, seed=0):
    """Predictions and truths, a third of them empty on either side."""
    rng = np.random.default_rng(seed)
    found, wanted = (rng.random((images, 1, 6, 7)) < 0.4 for _ in range(2))
    found[rng.random(images) < 0.3] = False
    wanted[rng.random(images) < 0.4] = False
    return torch.from_numpy(found), torch.from_numpy(wanted)


def dice_of(found, wanted):
    both = total = 0
    for a, b in zip(found.flatten().tolist(), wanted.flatten().tolist(), strict=True):
        both, total = both + (a and b), total + a + b
    if not any(wanted.flatten().tolist()):
        return 0.0 if any(found.flatten().tolist()) else 1.0
    return 2 * both / total


def by_loops(found, wanted):
    rows = [(dice_of(f, w), bool(f.any()), bool(w.any())) for f, w in zip(found, wanted, strict=True)]
    positive = [row for row in rows if row[2]]
    empty = [row for row in rows if not row[2]]
    iou = [d / (2 - d) for d, *_ in rows]
    return {
        "dice": np.mean([row[0] for row in rows]),
        "dice_positive": np.mean([row[0] for row in positive]),
        "iou": np.mean(iou),
        "iou_positive": np.mean([d / (2 - d) for d, *_ in positive]),
        "false_alarms": np.mean([row[1] for row in empty]),
        "missed": np.mean([not row[1] for row in positive]),
    }


def test_values_by_loops():
    found, wanted = masks()
    values = mask_metrics(mask_counts(found, wanted), range(24), bootstrap=0)
    expected = by_loops(found, wanted)
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert 0 < expected["false_alarms"] < 1 and 0 < expected["missed"] < 1
    assert (values["cases"], values["patients"]) == (24, 24)
    assert values["positive"] == int(wanted.flatten(1).any(1).sum())
    assert "intervals" not in values


@pytest.mark.parametrize(
    ("found", "wanted", "dice"),
    [([0, 0], [0, 0], 1), ([1, 0], [0, 0], 0), ([0, 0], [1, 0], 0), ([1, 1], [1, 0], 2 / 3)],
)
def test_rule_of_empty_masks(found, wanted, dice):
    pair = (torch.tensor(mask, dtype=torch.bool).view(1, 1, 1, 2) for mask in (found, wanted))
    assert mask_metrics(mask_counts(*pair), ["a"], 0)["dice"] == pytest.approx(dice)


def test_intervals_by_drawing_patients():
    found, wanted = masks(30, seed=3)
    counts, patients = mask_counts(found, wanted), [f"p{i // 3}" for i in range(30)]
    intervals = mask_metrics(counts, patients, bootstrap=400, seed=5)["intervals"]
    dice = np.array([dice_of(f, w) for f, w in zip(found, wanted, strict=True)])
    positive = wanted.flatten(1).any(1).numpy()
    rng, means, means_positive = np.random.default_rng(5), [], []
    for _ in range(400):
        cases = [3 * p + i for p in rng.integers(10, size=10) for i in range(3)]
        means.append(dice[cases].mean())
        means_positive.append(dice[cases][positive[cases]].mean())
    assert intervals["dice"] == pytest.approx(list(np.percentile(means, [2.5, 97.5])))
    assert intervals["dice_positive"] == pytest.approx(list(np.percentile(means_positive, [2.5, 97.5])))
    assert (intervals["level"], intervals["resamples"]) == (0.95, 400)


def test_what_is_not_defined_is_none():
    empty = np.array([[0, 0, 0], [5, 0, 0]])
    values = mask_metrics(empty, ["a", "b"], bootstrap=50)
    assert values["dice_positive"] is None and values["missed"] is None and values["iou_positive"] is None
    assert values["intervals"]["dice_positive"] is None
    assert (values["dice"], values["false_alarms"], values["positive"]) == (0.5, 0.5, 0)
    assert mask_metrics(empty, ["a", "a"], bootstrap=50)["intervals"]["dice"] is None


def test_wrong_input():
    with pytest.raises(ValueError, match="0 images and 0 patients"):
        mask_metrics(np.zeros((0, 3), int), [])
    with pytest.raises(ValueError, match="2 images and 1 patients"):
        mask_metrics(np.zeros((2, 3), int), ["a"])
    with pytest.raises(ValueError, match=r"prediction \(1, 1, 2, 2\) and truth \(1, 1, 2, 3\) differ"):
        mask_counts(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 3))
    with pytest.raises(ValueError, match=r"threshold must be a probability from 0 to 1, not 1.5"):
        MaskScore(1.5)


def evaluated(metric, logits, label, sizes):
    """The metric of an engine that goes through batches of these sizes."""
    starts = np.cumsum([0, *sizes])
    batches = [(logits[a:b], label[a:b]) for a, b in pairwise(starts)]
    engine = Engine(lambda engine, batch: {"pred": batch[0], "label": batch[1]})
    metric.attach(engine, "value")
    return engine.run(batches).metrics["value"]


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_score_of_an_evaluator_run(threshold):
    found, wanted = masks()
    generator = torch.Generator().manual_seed(1)
    logits = torch.where(found, 2.0, -1.0) + 0.4 * torch.randn(found.shape, generator=generator)
    chosen = logits.sigmoid() >= threshold
    expected = np.mean([dice_of(f, w) for f, w in zip(chosen, wanted, strict=True)])
    assert evaluated(MaskScore(threshold), logits, wanted.float(), [5, 16, 3]) == pytest.approx(expected)


@pytest.mark.parametrize("options", [{}, {"dice": "log"}, {"batch": False}])
def test_loss_of_an_evaluator_run_is_that_of_all_images_at_once(options):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(9, 1, 6, 7, generator=generator)
    label = masks(9)[1].float()
    loss = FocalDiceLoss(**options)
    expected = float(loss(logits, label))
    for sizes in ([9], [4, 4, 1], [1] * 9):
        assert evaluated(MaskLossMetric(loss), logits, label, sizes) == pytest.approx(expected, rel=1e-5)


def test_no_image_is_no_score():
    for metric in (MaskScore(), MaskLossMetric(FocalDiceLoss())):
        with pytest.raises(NotComputableError, match="no image was evaluated"):
            metric.compute()
