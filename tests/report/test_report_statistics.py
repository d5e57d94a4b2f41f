# SPDX-License-Identifier: Apache-2.0
"""Intervals over seeds against scipy, and the verdicts on differences between variants."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from unimedi_components.report.statistics import compare, summarise, t_interval


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_interval_is_students(count: int) -> None:
    values = np.random.default_rng(count).normal(0.8, 0.01, count)
    expected = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    assert t_interval(values.tolist()) == pytest.approx(expected, rel=1e-3)


def test_one_seed_has_no_interval() -> None:
    assert t_interval([0.5]) is None
    found = summarise({4: 0.5}, [[0.4, 0.6]])
    assert found == {"mean": 0.5, "sd": None, "interval": None, "patients": [0.4, 0.6], "values": {"4": 0.5}}


def test_summary_over_seeds() -> None:
    found = summarise({0: 0.6, 1: 0.7, 2: 0.8}, [[0.5, 0.7], None, [0.7, 0.9]])
    assert found["mean"] == pytest.approx(0.7)
    assert found["sd"] == pytest.approx(0.1)
    # 0.7 -+ 4.303 * 0.1 / sqrt(3)
    assert found["interval"] == pytest.approx([0.4516, 0.9484], abs=1e-4)
    assert found["patients"] == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize(
    ("higher", "lower", "verdict"),
    [
        ({0: 0.70, 1: 0.71, 2: 0.72}, {0: 0.60, 1: 0.61, 2: 0.63}, "holds"),
        ({0: 0.60, 1: 0.61, 2: 0.63}, {0: 0.70, 1: 0.71, 2: 0.72}, "fails"),
        ({0: 0.70, 1: 0.60, 2: 0.72}, {0: 0.60, 1: 0.65, 2: 0.63}, "undecided"),
        ({0: 0.70}, {0: 0.60}, "undecided"),
        ({0: 0.70, 1: 0.70}, {2: 0.60}, "not measured"),
    ],
)
def test_verdicts_pair_by_seed(higher: dict[int, float], lower: dict[int, float], verdict: str) -> None:
    variants = {"a": {"key": summarise(higher)}, "b": {"key": summarise(lower)}}
    assert compare(variants, "key", "a", "b").verdict == verdict


def test_a_variant_that_was_not_run() -> None:
    assert compare({}, "key", "a", "b").verdict == "not measured"
