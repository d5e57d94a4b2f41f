# SPDX-License-Identifier: Apache-2.0
"""Linear probe of frozen features: one logistic regression per finding, cross-validated, macro AUROC."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

__all__ = ["ProbeResult", "linear_probe", "transfer_scores"]


@dataclass(frozen=True)
class ProbeResult:
    """AUROC of a linear probe.

    Args:
        macro: mean over the findings; None if none could be probed.
        per_finding: mean over the folds, by finding.
        skipped: findings that could not be probed, each with the reason.
    """

    macro: float | None
    per_finding: dict[str, float]
    skipped: dict[str, str]


def linear_probe(
    features: npt.ArrayLike,
    labels: npt.ArrayLike,
    names: Sequence[str],
    groups: Sequence[Hashable] | None = None,
    folds: int = 5,
    c: float = 0.1,
    seed: int = 0,
) -> ProbeResult:
    """Probe frozen features for each finding by stratified cross-validation.

    Features are standardised on the training folds. The AUROC of a finding is the mean of the folds' AUROCs:
    decision values of different folds come from different models, and pooling them into one curve biases it
    downwards.

    Args:
        features: (N, D).
        labels: 0 or 1 for each finding, (N, F); other values mean "not known" and leave the row out for that
            finding.
        names: the F findings.
        groups: patients, (N,); a patient's rows stay in one fold.
        folds: folds; a finding needs this many patients with and without it.
        c: inverse strength of the L2 penalty, fixed rather than tuned. With some 200 rows and 100 to 768
            standardised features, results vary little between 0.01 and 0.3 and fall above.
        seed: of the shuffle into folds.

    Returns:
        `ProbeResult`; equal input gives equal output.

    Raises:
        ValueError: shapes that do not fit together, or features that are not finite.
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(labels)
    if x.ndim != 2 or y.shape != (len(x), len(names)):
        raise ValueError(f"features {x.shape} and labels {y.shape} do not fit {len(names)} findings")
    if not np.isfinite(x).all():
        raise ValueError("the features are not finite; the network diverged")
    keys = np.arange(len(x)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    scores: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for name, column in zip(names, y.T, strict=True):
        known = np.isin(column, (0, 1))
        score = _probe_one(x[known], column[known], keys[known], folds, c, seed)
        if isinstance(score, str):
            skipped[name] = score
        else:
            scores[name] = score
    return ProbeResult(float(np.mean(list(scores.values()))) if scores else None, scores, skipped)


def _probe_one(
    x: npt.NDArray[np.float64],
    y: npt.NDArray[np.int64],
    groups: npt.NDArray[np.int64],
    folds: int,
    c: float,
    seed: int,
) -> float | str:
    for value, what in ((1, "with"), (0, "without")):
        count = len(np.unique(groups[y == value]))
        if count < folds:
            return f"{count} patients {what} it, {folds} folds need {folds}"
    scores = []
    for train, test in StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(x, y, groups):
        # Grouping may leave a fold of a rare finding with one class, for which there is no AUROC.
        if len(np.unique(y[train])) == 2 and len(np.unique(y[test])) == 2:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)).fit(x[train], y[train])
            scores.append(roc_auc_score(y[test], model.decision_function(x[test])))
    return float(np.mean(scores)) if scores else "no fold holds patients with and without it"


def transfer_scores(
    train: npt.ArrayLike, labels: npt.ArrayLike, test: npt.ArrayLike, c: float = 0.1
) -> npt.NDArray[np.float64]:
    """Decision values on other images of probes trained on these, one logistic regression per finding.

    Args:
        train: features to train on, (N, D); they alone set the standardisation.
        labels: 0 or 1 for each finding, (N, F).
        test: features to score, (M, D).
        c: inverse strength of the L2 penalty, as in `linear_probe`.

    Returns:
        (M, F); a finding that the N images all have or all lack scores 0 everywhere, an AUROC of 0.5.
    """
    x, y, x_test = np.asarray(train, np.float64), np.asarray(labels), np.asarray(test, np.float64)
    scores = np.zeros((len(x_test), y.shape[1]))
    for column in range(y.shape[1]):
        if len(np.unique(y[:, column])) == 2:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)).fit(x, y[:, column])
            scores[:, column] = model.decision_function(x_test)
    return scores
