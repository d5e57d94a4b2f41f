# SPDX-License-Identifier: Apache-2.0
"""Bootstrap intervals over patients, all cases of a patient together, and values that are kept with theirs.

Letters: N cases, C yes-or-no questions, K decisions, R resamples.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from unimedi_components.arrays import Array

LEVEL = 0.95
# Weights of resamples held at a time; bounds the memory, changes no value.
_CHUNK = 2**21


def resample_patients(count: int, resamples: int, rng: np.random.Generator) -> Array:
    """How often each of `count` patients is drawn when `count` are drawn with replacement: (resamples, count)."""
    draws = (rng.integers(count, size=count) for _ in range(resamples))
    return np.stack([np.bincount(draw, minlength=count) for draw in draws])


class PatientResamples:
    """Resamples of patients, drawn once for many values, so that differences of values are paired."""

    def __init__(self, patients: Iterable[Hashable], resamples: int = 1000, seed: int = 0) -> None:
        self._column = {patient: column for column, patient in enumerate(dict.fromkeys(patients))}
        rng = np.random.default_rng(seed)
        self._drawn = resample_patients(len(self._column), resamples, rng).astype(np.float64)

    def weights(self, patients: Sequence[Hashable]) -> Array:
        """How often the patient of each of N cases is drawn, (R, N); a KeyError for a patient that is not known."""
        return self._drawn[:, [self._column[patient] for patient in patients]]

    def mean(self, rows: npt.ArrayLike, patients: Sequence[Hashable]) -> Array:
        """Mean over the drawn cases of one number for each, (R,); NaN where no case is drawn."""
        return weighted_mean(self.weights(patients), np.asarray(rows, float), np.ones(len(patients)))


def weighted_mean(weights: Array, values: Array, counts: Array) -> Array:
    """Means (R,) or (R, C) of N cases' values under each row of their weights (R, N); NaN where no case counts.

    ``counts``: which of the values, (N,) or (N, C), count.
    """
    total = weights @ counts
    means = np.full(total.shape, np.nan)
    return np.divide(weights @ np.where(counts, values, 0), total, out=means, where=total > 0)


def resampled_auroc(scores: Array, truth: Array, weights: Array) -> Array:
    """AUROC under each row of case weights, ties counted half: scikit-learn's with `sample_weight`, in one pass, (R,).

    ``truth``: 1, 0 or -1 (does not count), (N,). NaN where weights (R, N) leave no positive or no negative case.
    """
    known = np.flatnonzero(truth >= 0)
    order = known[np.argsort(scores[known], kind="stable")]
    ranked = scores[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]])[: len(ranked)])
    parts = []
    for value in (1, 0):
        part = weights[:, order] * (truth[order] == value)
        parts.append(part if len(starts) == len(order) else np.add.reduceat(part, starts, axis=1))
    positive, negative = parts
    below = np.cumsum(negative, axis=1) - negative / 2
    pairs = positive.sum(1) * negative.sum(1)
    wins = np.einsum("rn,rn->r", positive, below)
    return np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def patient_intervals(
    names: Sequence[str],
    scores: Array,
    truth: Array,
    right: Array,
    known: Array,
    patients: Array,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Central 95% percentile intervals over resamples of the patients.

    Args:
        truth: 1, 0 or -1 (does not count), (N, C).
        right: whether a decision is right, bool (N, K).
        known: whether it counts, bool (N, K); accuracy is the mean over the decisions of their shares of right ones.
        patients: index of each case's patient, 0 to P - 1, (N,).

    Returns:
        "macro_auroc", "accuracy": [low, high], "auroc": the same by name; None where a value is not defined or
        cannot vary. Resamples in which a value is not defined are left out of its interval ("resamples_used" counts
        the others); the macro AUROC needs every finding that it is the mean of.
    """
    defined = [c for c, column in enumerate(truth.T) if (column == 0).any() and (column == 1).any()]
    asked = known.any(0)
    counts, hits = (part[:, asked].astype(np.float64) for part in (known, right & known))

    def statistics(weights: Array) -> dict[str, Array]:
        columns = [resampled_auroc(scores[:, c], truth[:, c], weights) for c in defined]
        share = weighted_mean(weights, hits, counts)
        macro = np.stack(columns, axis=1).mean(1) if defined else np.full(len(weights), np.nan)
        by_name = dict(zip([names[c] for c in defined], columns, strict=True))
        return {"macro_auroc": macro, "accuracy": share.mean(1), **{f"auroc {name}": by_name[name] for name in by_name}}

    found = resampled(statistics, patients, resamples, seed, len(scores))

    def named(values: Mapping[str, Any], missing: Any) -> dict[str, Any]:
        auroc = {name: values.get(f"auroc {name}", missing) for name in names}
        return {"macro_auroc": values["macro_auroc"], "accuracy": values["accuracy"], "auroc": auroc}

    limits = {"level": LEVEL, "resamples": resamples, **named(interval_table(found, patients), None)}
    return {**limits, "resamples_used": named(resamples_used(found), 0)}


def resampled(
    statistics: Callable[[Array], Mapping[str, Array]], patients: Array, resamples: int, seed: int, width: int
) -> dict[str, Array]:
    """Values under resamples of the patients, all cases of a patient together.

    Args:
        statistics: from weights of the cases (r, N), of some of the resamples, to values (r,) by name.
        patients: index of each case's patient, 0 to P - 1, (N,).
        width: numbers that a resample takes, such as N; bounds how many are held at a time.

    Returns:
        (R,) by name.
    """
    rng, count = np.random.default_rng(seed), int(patients.max()) + 1
    step, parts = max(1, _CHUNK // max(1, width)), []
    for start in range(0, resamples, step):
        drawn = resample_patients(count, min(step, resamples - start), rng)
        parts.append(statistics(drawn.astype(np.float64)[:, patients]))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def interval_table(values: Mapping[str, Array], patients: Array) -> dict[str, list[float] | None]:
    """Intervals of what `resampled` gives; None where a value is not defined, or cannot vary with a single patient."""
    alone = int(patients.max()) < 1
    return {name: None if alone else percentile_interval(row) for name, row in values.items()}


def resamples_used(values: Mapping[str, Array]) -> dict[str, int]:
    """In how many resamples a value is defined."""
    return {name: int(np.isfinite(row).sum()) for name, row in values.items()}


def patient_index(patients: Iterable[Hashable]) -> Array:
    """Index of each case's patient, 0 to P - 1, in the order of their names: (N,)."""
    return np.unique(np.asarray([str(patient) for patient in patients]), return_inverse=True)[1].reshape(-1)


def percentile_interval(values: Array) -> list[float] | None:
    """Central `LEVEL` percentile interval of a statistic's resamples; None where fewer than two are defined."""
    defined = values[np.isfinite(values)]
    if len(defined) < 2:
        return None
    tail = 50 * (1 - LEVEL)
    return [float(limit) for limit in np.percentile(defined, [tail, 100 - tail])]


class Measures:
    """Values by key, each with its 95% interval where it is made of cases of known patients.

    ``resamples``: of the patients of all cases; None gives no intervals.
    """

    def __init__(self, resamples: PatientResamples | None = None) -> None:
        self.resamples = resamples
        self.values: dict[str, Any] = {}
        self.intervals: dict[str, list[float]] = {}

    def add(self, key: str, value: Any, resampled: Array | None = None) -> None:
        """Keep a value; `resampled` is the same in each resample, (R,), NaN where it is not defined."""
        self.values[key] = value
        interval = None if resampled is None else percentile_interval(resampled)
        if interval is not None:
            self.intervals[key] = interval

    def mean(self, key: str, rows: npt.ArrayLike, patients: Sequence[Hashable] | None = None) -> None:
        """Keep the mean of one number for each of N cases; without cases, nothing.

        Candidates of a search are no cases: they stay the same in every resample.
        """
        array = np.asarray(rows, dtype=np.float64)
        if not len(array):
            return
        wanted = self.resamples is not None and patients is not None
        self.add(key, float(array.mean()), self.resamples.mean(array, patients) if wanted else None)  # type: ignore[union-attr,arg-type]

    def per_finding(self, key: str, rows: npt.ArrayLike, findings: Sequence[Sequence[str]]) -> None:
        """Keep under KEY_per_finding the means over the cases that have each finding, in the order of their names."""
        array = np.asarray(rows, dtype=np.float64)
        names = sorted({name for case in findings for name in case})
        having = {name: [name in case for case in findings] for name in names}
        if names:
            self.values[f"{key}_per_finding"] = {name: float(array[mask].mean()) for name, mask in having.items()}

    def content(self) -> dict[str, Any]:
        return {**self.values, **({"intervals": dict(self.intervals)} if self.intervals else {})}


def others_mean(scores: Array, patients: Sequence[Hashable]) -> Array:
    """Expectation of each case's score under the output of a case of another patient, all equally likely: (N,).

    ``scores``: of case i under the output of case j, (N, N). NaN for a case without a case of another patient.
    """
    key = patient_index(patients)
    other = key[:, None] != key[None]
    count = other.sum(1)
    return np.divide((scores * other).sum(1), count, out=np.full(len(key), np.nan), where=count > 0)
