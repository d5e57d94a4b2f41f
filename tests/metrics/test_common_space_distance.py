# SPDX-License-Identifier: Apache-2.0
"""The centroid distance by hand, against a loop, and under weights against repeated rows."""

import numpy as np
import pytest

from unimedi_components.metrics.bootstrap import PatientResamples
from unimedi_components.metrics.common_space import centred, centroid_distance, unit_rows


def loop_distance(xray, ct, xray_labels, ct_labels):
    found = []
    for x_has, c_has in zip(xray_labels.T, ct_labels.T, strict=True):
        x = np.stack([row / np.linalg.norm(row) for row, has in zip(xray, x_has, strict=True) if has == 1])
        c = np.stack([row / np.linalg.norm(row) for row, has in zip(ct, c_has, strict=True) if has == 1])
        spreads = [sum(np.sum((row - p.mean(0)) ** 2) for row in p) / (len(p) - 1) for p in (x, c)]
        found.append(np.sqrt(np.sum((x.mean(0) - c.mean(0)) ** 2)) / np.sqrt(np.mean(spreads)))
    return found


def loop_spreads(xray, ct, xray_labels, ct_labels):
    """Variance and number of either dimension's rows, by finding."""
    found = []
    for x_has, c_has in zip(xray_labels.T, ct_labels.T, strict=True):
        parts = [(rows / np.linalg.norm(rows, axis=1)[:, None])[has == 1] for rows, has in ((xray, x_has), (ct, c_has))]
        found.append([(part.var(0, ddof=1).sum(), len(part)) for part in parts])
    return found


def test_by_hand():
    """X-rays at (1, 0) and (0, 1), volumes at (-1, 0) and (0, -1): gap sqrt(2), variance 1 on both sides."""
    xray, ct = np.asarray([[2.0, 0.0], [0.0, 3.0]]), np.asarray([[-1.0, 0.0], [0.0, -5.0]])
    have = np.ones((2, 1), int)
    assert centroid_distance(xray, ct, have, have) == pytest.approx(np.sqrt(2.0))


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    xray, ct = rng.normal(size=(30, 6)), rng.normal(size=(20, 6)) + 1.0
    labels = [(rng.random((n, 3)) < 0.5).astype(int) for n in (30, 20)]
    return xray, ct, *labels


def test_equals_a_loop(case):
    np.testing.assert_allclose(centroid_distance(*case)[0], loop_distance(*case))


def test_resamples_scatter_about_the_value():
    rng = np.random.default_rng(3)
    xray, ct = rng.normal(size=(60, 32)) + 0.4, rng.normal(size=(60, 32)) + 0.5
    have = np.ones((60, 1), int)
    value = centroid_distance(xray, ct, have, have)[0, 0]
    weights = [PatientResamples(range(60), seed=seed).weights(range(60)) for seed in (0, 1)]
    found = centroid_distance(xray, ct, have, have, *weights)[:, 0]
    assert np.sqrt((found**2).mean()) == pytest.approx(value, rel=0.03)


def test_weights_count_a_row_as_often(case):
    xray, ct, xray_labels, ct_labels = case
    rng = np.random.default_rng(1)
    weights = [rng.integers(0, 3, size=(4, n)).astype(float) for n in (30, 20)]
    found = centroid_distance(*case, *weights)
    for r in range(4):
        x, c = (np.repeat(np.arange(w.shape[1]), w[r].astype(int)) for w in weights)
        plain = np.asarray(loop_distance(xray[x], ct[c], xray_labels[x], ct_labels[c]))
        spreads = loop_spreads(xray[x], ct[c], xray_labels[x], ct_labels[c])
        scatter = [(s / n + t / m) / ((s + t) / 2) for (s, n), (t, m) in spreads]
        np.testing.assert_allclose(found[r], np.sqrt(np.maximum(plain**2 - scatter, 0)))


def test_two_samples_of_one_distribution_are_as_far_apart_as_said():
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(2, 400, 40, 16)) + 0.5
    have = np.ones((40, 1), int)
    squares = [centroid_distance(a, b, have, have)[0, 0] ** 2 for a, b in zip(*rows, strict=True)]
    assert np.mean(squares) == pytest.approx(1 / 40 + 1 / 40, rel=0.05)


def test_what_is_not_defined(case):
    xray, ct, xray_labels, ct_labels = case
    ct_labels[:, 1] = 0
    xray_labels[:, 2] = 0
    xray_labels[4, 2] = 1
    assert np.isnan(centroid_distance(xray, ct, xray_labels, ct_labels)[0]).tolist() == [False, True, True]
    same = np.ones((5, 3))
    assert np.isnan(centroid_distance(same, -same, np.ones((5, 1)), np.ones((5, 1)))).all()


def test_unit_and_centred_rows():
    np.testing.assert_allclose(unit_rows([[3.0, 4.0], [0.0, 0.0]]), [[0.6, 0.8], [0.0, 0.0]])
    np.testing.assert_allclose(centred([[1.0, 2.0], [3.0, 6.0]]), [[-1.0, -2.0], [1.0, 2.0]])
