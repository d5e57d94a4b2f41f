# SPDX-License-Identifier: Apache-2.0
"""Resamples of patients against a loop that draws them one by one, and what `Measures` keeps."""

import numpy as np
import pytest

from unimedi_components.metrics.bootstrap import (
    Measures,
    PatientResamples,
    others_mean,
    percentile_interval,
    resample_patients,
)

PATIENTS = ["a", "b", "a", "c", "b", "a"]
ROWS = np.asarray([1.0, 0.0, 0.5, 1.0, 0.0, 0.25])


def loop_means(rows, patients, resamples, seed):
    """Every case of a drawn patient, as often as the patient is drawn."""
    names = list(dict.fromkeys(patients))
    means = []
    for counts in resample_patients(len(names), resamples, np.random.default_rng(seed)):
        drawn = [row for row, p in zip(rows, patients, strict=True) for _ in range(counts[names.index(p)])]
        means.append(np.mean(drawn))
    return np.asarray(means)


def test_means_equal_a_loop():
    draws = PatientResamples(PATIENTS, resamples=50, seed=3)
    np.testing.assert_allclose(draws.mean(ROWS, PATIENTS), loop_means(ROWS, PATIENTS, 50, 3))


def test_cases_of_some_patients_share_the_draws_of_all():
    draws = PatientResamples(PATIENTS, resamples=200, seed=0)
    weights = draws.weights(["c", "a"])
    assert weights.shape == (200, 2)
    np.testing.assert_array_equal(weights, draws.weights(PATIENTS)[:, [3, 0]])
    alone = draws.mean([0.5], ["c"])
    assert set(alone[np.isfinite(alone)]) == {0.5}
    assert np.isnan(alone).any()  # resamples without the patient
    with pytest.raises(KeyError):
        draws.weights(["elsewhere"])


def test_a_difference_is_paired():
    """Two values that differ by a constant have a difference without spread."""
    draws = PatientResamples(range(40))
    rows = np.random.default_rng(0).random(40)
    low, high = percentile_interval(draws.mean(rows + 0.25, range(40)) - draws.mean(rows, range(40)))
    assert low == pytest.approx(0.25)
    assert high == pytest.approx(0.25)


def test_the_interval_of_a_mean_has_the_width_of_its_error():
    rows = np.random.default_rng(1).normal(size=400)
    kept = Measures(PatientResamples(range(400)))
    kept.mean("x", rows, list(range(400)))
    low, high = kept.intervals["x"]
    assert kept.values["x"] == pytest.approx(rows.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * rows.std() / 20, rel=0.1)


def test_what_is_kept():
    kept = Measures(PatientResamples(PATIENTS))
    kept.mean("with", ROWS, PATIENTS)
    kept.mean("without", ROWS)
    kept.mean("nothing", [])
    kept.add("given", 3, np.asarray([1.0, 2.0, np.nan]))
    kept.add("undefined", None, np.asarray([np.nan]))
    kept.per_finding("with", ROWS, [["x"], ["x", "y"], [], ["y"], [], []])
    assert kept.values["with_per_finding"] == {"x": 0.5, "y": 0.5}
    content = kept.content()
    assert set(content) == {"with", "without", "given", "undefined", "with_per_finding", "intervals"}
    assert set(content["intervals"]) == {"with", "given"}
    plain = Measures()
    plain.mean("x", ROWS, PATIENTS)
    assert plain.content() == {"x": pytest.approx(2.75 / 6)}


def test_others_mean_equals_a_loop():
    scores = np.random.default_rng(2).random((6, 6))
    expected = [np.mean([scores[i, j] for j in range(6) if PATIENTS[j] != PATIENTS[i]]) for i in range(6)]
    np.testing.assert_allclose(others_mean(scores, PATIENTS), expected)
    assert np.isnan(others_mean(scores[:1, :1], ["a"])).all()
