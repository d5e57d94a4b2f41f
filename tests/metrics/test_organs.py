# SPDX-License-Identifier: Apache-2.0
"""Scores of organs against sums over voxels and pairs of surface voxels, and their means against plain loops."""

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from ignite.exceptions import NotComputableError

from unimedi_components.metrics.organs import OrganDice, organ_metrics, organ_scores

SPACING = (5.0, 0.8, 1.5)


def blob(centre, radii, shape=(9, 14, 12)):
    grid = np.indices(shape)
    return sum(((axis - c) / r) ** 2 for axis, c, r in zip(grid, centre, radii, strict=True)) <= 1


def maps():
    """A truth with organs 1, 2 and 4 of 4; organ 2 is missed, and the absent organ 3 is predicted."""
    truth, prediction = np.zeros((2, 9, 14, 12), np.uint8)
    truth[blob((4, 6, 5), (3, 4, 3))] = 1
    prediction[blob((4, 7, 6), (2.5, 4, 3.5))] = 1
    truth[0, :3, :3] = 2
    prediction[8, 12:, 10:] = 3
    # touches the border of the volume
    truth[5:, :4, 9:] = 4
    prediction[6:, :5, 9:] = 4
    return prediction, truth


def surface(mask):
    """Voxels of a mask with a face that is not shared with it, in voxels."""
    found = []
    for place in np.argwhere(mask):
        for axis in range(3):
            for step in (-1, 1):
                near = place.copy()
                near[axis] += step
                if near[axis] < 0 or near[axis] >= mask.shape[axis] or not mask[tuple(near)]:
                    found.append(tuple(place))
    return np.array(sorted(set(found)))


def distances(first, second, spacing):
    """From each surface voxel of the first mask to the nearest one of the second, in mm."""
    own, other = (surface(mask) * np.asarray(spacing) for mask in (first, second))
    return np.array([np.sqrt(((other - point) ** 2).sum(1)).min() for point in own])


@pytest.mark.parametrize("spacing", [SPACING, (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("tolerance", [1.0, 3.0])
def test_scores_of_a_case(spacing, tolerance):
    prediction, truth = maps()
    scores = organ_scores(prediction, truth, 4, spacing, tolerance)
    for organ in (1, 4):
        found, wanted = prediction == organ, truth == organ
        dice = 2 * (found & wanted).sum() / (found.sum() + wanted.sum())
        there, back = distances(found, wanted, spacing), distances(wanted, found, spacing)
        near = ((there <= tolerance).sum() + (back <= tolerance).sum()) / (len(there) + len(back))
        hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
        assert scores["dice"][organ - 1] == pytest.approx(dice, abs=1e-12)
        assert scores["surface_dice"][organ - 1] == pytest.approx(near, abs=1e-6)
        assert scores["hd95_mm"][organ - 1] == pytest.approx(hd95, abs=1e-4)
        assert 0 < dice < 1 and hd95 > 0


def test_missed_and_absent_organs():
    prediction, truth = maps()
    scores = organ_scores(prediction, truth, 4, SPACING)
    assert (scores["dice"][1], scores["surface_dice"][1]) == (0, 0)
    assert np.isnan(scores["hd95_mm"][1])
    assert np.isnan([scores[name][2] for name in ("dice", "surface_dice", "hd95_mm")]).all()
    assert scores["missed"].tolist() == [False, True, False, False]
    assert scores["voxels"].tolist() == [int((truth == organ).sum()) for organ in range(1, 5)]
    assert scores["false_voxels"].tolist() == [0, 0, int((prediction == 3).sum()), 0]
    with pytest.raises(ValueError, match="differ in shape"):
        organ_scores(prediction[:-1], truth, 4, SPACING)


@pytest.mark.filterwarnings("error")
def test_a_perfect_prediction():
    _, truth = maps()
    scores = organ_scores(truth, truth, 4, SPACING)
    assert scores["dice"].tolist()[:2] == [1, 1]
    assert scores["surface_dice"].tolist()[:2] == [1, 1]
    assert scores["hd95_mm"].tolist()[:2] == [0, 0]


def case(dice, hd95=None, false=0):
    dice = np.asarray(dice, float)
    known = np.isfinite(dice)
    return {
        "dice": dice,
        "surface_dice": dice / 2,
        "hd95_mm": np.where(dice > 0, 10 - dice, np.nan) if hd95 is None else np.asarray(hd95, float),
        "voxels": known * 7,
        "missed": dice == 0,
        "false_voxels": np.where(known, 0, false),
    }


def test_means_over_cases_then_organs():
    nan = np.nan
    cases = [case([0.5, nan, 0.9], false=3), case([0.7, nan, 0.0]), case([0.9, nan, nan])]
    values = organ_metrics(cases, ["a", "a", "b"], ["x", "y", "z"], bootstrap=400)
    assert values["dice"] == {"x": pytest.approx(0.7), "y": None, "z": pytest.approx(0.45)}
    assert values["mean_dice"] == pytest.approx((0.7 + 0.45) / 2)
    assert values["mean_surface_dice"] == pytest.approx((0.35 + 0.225) / 2)
    # the missed organ has no distance
    assert values["hd95_mm"] == {"x": pytest.approx(9.3), "y": None, "z": pytest.approx(9.1)}
    assert values["missed"] == {"x": 0, "y": 0, "z": 1}
    assert values["false_alarms"] == {"x": 0, "y": 1, "z": 0}
    assert values["cases_with"] == {"x": 3, "y": 0, "z": 2}
    assert (values["cases"], values["patients"]) == (3, 2)
    # patients are drawn whole: x is the mean of (a, a), (a, b) or (b, b)
    low, high = values["intervals"]["dice"]["x"]
    assert (low, high) == (pytest.approx(0.6), pytest.approx(0.9))
    assert values["intervals"]["dice"]["y"] is None
    assert "intervals" not in organ_metrics(cases, ["a", "a", "b"], ["x", "y", "z"], bootstrap=0)
    with pytest.raises(ValueError, match="at least one case"):
        organ_metrics([], [], ["x"])


def test_validation_metric_equals_organ_metrics():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (5, 1, 4, 6, 5))
    truth[0][truth[0] == 3] = 0
    logits = torch.from_numpy(rng.normal(size=(5, 4, 4, 6, 5)))
    metric = OrganDice(4)
    engine = Engine(lambda engine, batch: batch)
    metric.attach(engine, "val_dice")
    batches = [{"pred": logits[i : i + 2], "label": torch.from_numpy(truth[i : i + 2]).float()} for i in (0, 2, 4)]
    found = engine.run(batches).metrics["val_dice"]
    cases = [organ_scores(logits[i].argmax(0).numpy(), truth[i, 0], 3, (1, 1, 1)) for i in range(5)]
    wanted = organ_metrics(cases, list(range(5)), ["x", "y", "z"], bootstrap=0)["mean_dice"]
    assert found == pytest.approx(wanted, abs=1e-12)
    metric.reset()
    with pytest.raises(NotComputableError):
        metric.compute()
