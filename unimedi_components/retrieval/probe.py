# SPDX-License-Identifier: Apache-2.0
"""Linear probe of frozen features: one logistic regression per finding, cross-validated, macro AUROC.

Letters: N rows, D width of the features, F findings, R resamples.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import sklearn
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from unimedi_components.arrays import Array
from unimedi_components.metrics.bootstrap import resampled_auroc

#: Inverse strengths of the L2 penalty that a probe chooses from.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_UNCHOSEN = 1e-1


class LogisticProbe:
    """Logistic regression on standardised features with an L2 penalty chosen by cross-validation of the training rows.

    The criterion is the mean over the inner folds of AUROC, or of accuracy where there are more than two classes; among
    equals the strongest penalty wins. Too few patients of a class for two inner folds leave C at 0.1.

    Args:
        strengths: values of C to choose from, ascending; of a single one nothing is chosen.
        folds: inner folds; a patient's rows stay in one.
    """

    def __init__(self, strengths: Sequence[float] = STRENGTHS, folds: int = 3, seed: int = 0) -> None:
        self.strengths, self.folds, self.seed = tuple(strengths), folds, seed
        self.c = self.strengths[0]
        self._scaler = StandardScaler()
        self._axes: Array | None = None

    # the fits are too small to share among threads, which would wait for each other
    @threadpool_limits.wrap(limits=1)
    def fit(self, x: Array, y: Array, groups: Array | None = None) -> Self:
        """Fit to features (N, D), classes (N,) and patients (N,); None: every row is a patient of its own."""
        keys = np.arange(len(x)) if groups is None else groups
        rows = self._scaler.fit_transform(x)
        if rows.shape[1] > len(rows):
            # the penalty knows no axes: in those of the rows the same solution takes N in place of D numbers
            self._axes = np.linalg.svd(rows, full_matrices=False)[2].T
            rows = rows @ self._axes
        # thousands of small fits, whose input was checked before
        with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
            self.c = self._choose(rows, y, keys)
            self._model = LogisticRegression(C=self.c, max_iter=2000).fit(rows, y)
        return self

    def decision(self, x: Array) -> Array:
        """Decision values, (N,) for two classes, (N, C) for more."""
        return self._model.decision_function(self._prepared(x))

    def probabilities(self, x: Array) -> Array:
        """Probabilities of the classes that the training rows have, in ascending order, (N, C)."""
        return self._model.predict_proba(self._prepared(x))

    @property
    def classes(self) -> Array:
        """The classes that the training rows have, (C,)."""
        return self._model.classes_

    def _prepared(self, x: Array) -> Array:
        rows = self._scaler.transform(x)
        return rows if self._axes is None else rows @ self._axes

    def _choose(self, rows: Array, y: Array, groups: Array) -> float:
        if len(self.strengths) == 1:
            return self.strengths[0]
        classes = np.unique(y)
        folds = min(self.folds, *(len(np.unique(groups[y == value])) for value in classes))
        scores = []
        for train, test in _split(rows, y, groups, folds, self.seed) if folds > 1 else ():
            if len(np.unique(y[train])) < len(classes) or len(np.unique(y[test])) < 2:
                continue
            # each fit starts from the one before, with less penalty
            model = LogisticRegression(max_iter=2000, warm_start=True)
            fits = (model.set_params(C=c).fit(rows[train], y[train]) for c in self.strengths)
            scores.append([_score(y[test], fit.decision_function(rows[test]), fit.classes_) for fit in fits])
        return self.strengths[int(np.argmax(np.mean(scores, axis=0)))] if scores else _UNCHOSEN


def _split(x: Array, y: Array, groups: Array, folds: int, seed: int) -> Any:
    return StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(x, y, groups)


def _score(truth: Array, decision: Array, classes: Array) -> float:
    if decision.ndim > 1:
        return float((classes[decision.argmax(1)] == truth).mean())
    return float(resampled_auroc(decision, (truth == classes[1]).astype(int), np.ones((1, len(truth))))[0])


@dataclass(frozen=True)
class Fold:
    """What a probe says of the rows of a fold it was not fitted on: indices, decision values, truth, (n,) each."""

    rows: Array
    scores: Array
    truth: Array

    def auroc(self, weights: Array) -> Array:
        """AUROC under weights (R, N) of all rows, (R,); NaN where a class has no weight."""
        return resampled_auroc(self.scores, self.truth, weights[:, self.rows])


@dataclass(frozen=True)
class ProbeResult:
    """AUROC of a linear probe.

    Args:
        macro: mean over the findings; None if none could be probed.
        per_finding: mean over the folds, by finding.
        folds: decision values of the folds' held-out rows, by finding.
    """

    macro: float | None
    per_finding: dict[str, float]
    skipped: dict[str, str]
    folds: dict[str, list[Fold]] = field(default_factory=dict, compare=False, repr=False)

    def resampled(self, weights: Array) -> Array:
        """The macro AUROC, (R,), in resamples of the cases, the fitted probes staying as they are.

        The held-out decision values of each fold are resampled within it, as values of different folds are not
        comparable; a fold that has one class left in a resample does not count there. NaN where a finding has no fold
        left. ``weights``: how often each row is drawn, (R, N).
        """
        means = []
        for folds in self.folds.values():
            values = np.stack([fold.auroc(weights) for fold in folds])
            count = np.isfinite(values).sum(0)
            total = np.nansum(values, axis=0)
            means.append(np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0))
        return np.mean(means, axis=0) if means else np.full(len(weights), np.nan)


def linear_probe(
    features: npt.ArrayLike,
    labels: npt.ArrayLike,
    names: Sequence[str],
    groups: Sequence[Hashable] | None = None,
    folds: int = 5,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> ProbeResult:
    """Probe features for each finding by stratified cross-validation.

    Features are standardised on the training folds, and C is chosen within them, so that features of any kind and
    width, pixels too, are probed alike. The AUROC of a finding is the mean of the folds' AUROCs: decision values of
    different folds come from different models, and pooling them into one curve biases it downwards.

    Args:
        features: (N, D).
        labels: 0 or 1 for each finding, (N, F); other values mean "not known" and leave the row out for that finding.
        groups: patients, (N,); a patient's rows stay in one fold.
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(labels)
    if x.ndim != 2 or y.shape != (len(x), len(names)):
        raise ValueError(f"features {x.shape} and labels {y.shape} do not fit {len(names)} findings")
    if not np.isfinite(x).all():
        raise ValueError("the features are not finite; the network diverged")
    keys = np.arange(len(x)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    found: dict[str, list[Fold]] = {}
    skipped: dict[str, str] = {}
    for name, column in zip(names, y.T, strict=True):
        known = np.flatnonzero(np.isin(column, (0, 1)))
        parts = _probe_one(x, column, keys, known, folds, strengths, seed)
        if isinstance(parts, str):
            skipped[name] = parts
        else:
            found[name] = parts
    once = np.ones((1, len(x)))
    scores = {name: float(np.mean([fold.auroc(once)[0] for fold in parts])) for name, parts in found.items()}
    return ProbeResult(float(np.mean(list(scores.values()))) if scores else None, scores, skipped, found)


def _probe_one(
    x: Array, y: Array, groups: Array, known: Array, folds: int, strengths: Sequence[float], seed: int
) -> list[Fold] | str:
    for value, what in ((1, "with"), (0, "without")):
        count = len(np.unique(groups[known][y[known] == value]))
        if count < folds:
            return f"{count} patients {what} it, {folds} folds need {folds}"
    parts = []
    for train, test in _split(x[known], y[known], groups[known], folds, seed):
        fit, held = known[train], known[test]
        # Grouping may leave a fold of a rare finding with one class, for which there is no AUROC.
        if len(np.unique(y[fit])) == 2 and len(np.unique(y[held])) == 2:
            probe = LogisticProbe(strengths, seed=seed).fit(x[fit], y[fit], groups[fit])
            parts.append(Fold(held, probe.decision(x[held]), y[held]))
    return parts or "no fold holds patients with and without it"
