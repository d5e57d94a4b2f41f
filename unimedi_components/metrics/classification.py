# SPDX-License-Identifier: Apache-2.0
"""Metrics of classifiers: AUROC, accuracy, confusion, calibration, with bootstrap intervals over patients.

Letters: N cases, C classes or findings.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ignite.exceptions import NotComputableError
from ignite.metrics import EpochMetric, Loss
from monai.metrics import CalibrationErrorMetric
from sklearn.metrics import accuracy_score, confusion_matrix, roc_auc_score
from torch import Tensor

from unimedi_components.arrays import Array
from unimedi_components.distributed import gather_objects
from unimedi_components.losses.classification import TASKS, UNCERTAIN, ClassificationLoss
from unimedi_components.metrics.bootstrap import patient_intervals

THRESHOLD = 0.5


@dataclass(frozen=True)
class _Cases:
    """What is measured: C yes-or-no questions for AUROC, and K decisions (1, or C for multilabel) for the rest.

    Args:
        scores: (N, C).
        truth: 1, 0 or -1 (does not count), (N, C).
        decided, target: predicted and true classes, (N, K).
        known: which decisions count, bool (N, K).
        confidence, right: probability of what was decided on and whether it is so, (N, K), for calibration.
        patients: index of each case's patient.
    """

    names: list[str]
    scores: Array
    truth: Array
    decided: Array
    target: Array
    known: Array
    confidence: Array
    right: Array
    patients: Array


def classification_metrics(
    probabilities: npt.ArrayLike,
    labels: npt.ArrayLike,
    task: str,
    label_names: Sequence[str],
    patients: Sequence[Hashable] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    bins: int = 15,
) -> dict[str, Any]:
    """Measure a classifier's probabilities against the labels.

    Raises ValueError: an unknown task, shapes or labels that do not fit, values that are not finite, or no case that
    counts.

    Args:
        probabilities: (N, C); binary: (N,) or (N, 1), of the positive class.
        labels: multiclass and binary (N,), multilabel (N, C); -1 is uncertain and does not count, and a case
            without any other label is left out.
        label_names: the C classes or findings; binary: the negative and the positive class.
        patients: of the N cases; None: every case is a patient of its own.
        bootstrap: resamples of the patients; 0 gives no intervals.
        bins: equal bins of the probability for the calibration error.

    Returns:
        plain values for JSON. "auroc" by finding or class (one against the rest; binary: the positive class) and their
        mean "macro_auroc", None where only one class occurs, with the reason under "skipped". "accuracy" of the
        likeliest class, or at 0.5 (multilabel: mean over findings, also "accuracy_per_finding"). "confusion_matrix",
        rows true and columns predicted (multilabel: absent and present, by finding). "expected_calibration_error" of
        the likeliest class, or of the positive one (multilabel: mean over findings, also "..._per_finding").
        "intervals": [low, high] of the same keys, 95% percentiles over resamples of the patients, each with all of its
        cases; resamples where a value is not defined are left out, and "resamples_used" counts the others. "cases",
        "patients", "positives" (by finding or class) and "uncertain" (multilabel: by finding) are counts.
    """
    cases, uncertain = _prepare(probabilities, labels, task, label_names, patients)
    found = [_auroc(score, truth) for score, truth in zip(cases.scores.T, cases.truth.T, strict=True)]
    auroc = {name: None if isinstance(v, str) else v for name, v in zip(cases.names, found, strict=True)}
    values = [value for value in auroc.values() if value is not None]
    result: dict[str, Any] = {
        "task": task,
        "label_names": list(label_names),
        "cases": len(cases.scores),
        "patients": int(cases.patients.max()) + 1,
        "positives": dict(zip(cases.names, (cases.truth == 1).sum(0).tolist(), strict=True)),
        "uncertain": uncertain,
        "macro_auroc": float(np.mean(values)) if values else None,
        "auroc": auroc,
        **_decision_metrics(cases, task, bins),
        "skipped": {name: v for name, v in zip(cases.names, found, strict=True) if isinstance(v, str)},
    }
    if bootstrap > 0:
        right = cases.decided == cases.target
        result["intervals"] = patient_intervals(
            cases.names, cases.scores, cases.truth, right, cases.known, cases.patients, bootstrap, seed
        )
    return result


def predicted_labels(probabilities: Array, task: str) -> Array:
    """The likeliest class (N,) for "multiclass", otherwise 1 for probabilities (N, C) of at least 0.5, else 0."""
    return probabilities.argmax(1) if task == "multiclass" else (probabilities >= THRESHOLD).astype(np.int64)


def _prepare(
    probabilities: npt.ArrayLike,
    labels: npt.ArrayLike,
    task: str,
    label_names: Sequence[str],
    patients: Sequence[Hashable] | None,
) -> tuple[_Cases, dict[str, int] | int]:
    scores, label = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    _check(scores, label, task, label_names)
    scores = scores.reshape(len(scores), 1 if task == "binary" else len(label_names))
    label = label.astype(np.int64).reshape(len(scores), len(label_names) if task == "multilabel" else 1)
    keys = np.arange(len(scores)) if patients is None else np.asarray([str(patient) for patient in patients])
    if len(keys) != len(scores):
        raise ValueError(f"{len(scores)} cases but {len(keys)} patients; give one for each")
    names = [str(name) for name in (label_names[1:] if task == "binary" else label_names)]
    missing = (label == UNCERTAIN).sum(0)
    counted = (label != UNCERTAIN).any(1)
    if not counted.any():
        raise ValueError("no case has a label that counts")
    scores, label, keys = scores[counted], label[counted], keys[counted]
    decided = predicted_labels(scores, task).reshape(label.shape)
    multiclass = task == "multiclass"
    truth = (label == np.arange(len(names))).astype(np.int64) if multiclass else label
    uncertain = dict(zip(names, missing.tolist(), strict=True)) if task == "multilabel" else int(missing[0])
    cases = _Cases(
        names=names,
        scores=scores,
        truth=truth,
        decided=decided,
        target=label,
        known=label != UNCERTAIN,
        confidence=scores.max(1, keepdims=True) if multiclass else scores,
        right=decided == label if multiclass else label == 1,
        patients=np.unique(keys, return_inverse=True)[1].reshape(-1),
    )
    return cases, uncertain


def _check(scores: Array, label: Array, task: str, label_names: Sequence[str]) -> None:
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
    n, count = len(scores) if scores.ndim else 0, len(label_names)
    fits = [(n,), (n, 1)] if task == "binary" else [(n, count)]
    wanted = [(n, count)] if task == "multilabel" else [(n,), (n, 1)]
    if scores.shape not in fits or label.shape not in wanted or (task == "binary" and count != 2):
        raise ValueError(
            f"probabilities {scores.shape} and labels {label.shape} do not fit the {task} task {list(label_names)}"
        )
    if not np.isfinite(scores).all():
        raise ValueError("the probabilities are not finite; the network diverged")
    highest = count - 1 if task == "multiclass" else 1
    if not np.isin(label, np.arange(UNCERTAIN, highest + 1)).all():
        raise ValueError(f"labels of a {task} task must be whole numbers from -1 (uncertain) to {highest}")


def _auroc(score: Array, truth: Array) -> float | str:
    """AUROC over the cases that count, or why there is none."""
    known = truth != UNCERTAIN
    for value, what in ((1, "positive"), (0, "negative")):
        if not (truth == value).any():
            return f"no {what} case"
    return float(roc_auc_score(truth[known], score[known]))


def _decision_metrics(cases: _Cases, task: str, bins: int) -> dict[str, Any]:
    accuracy: list[float | None] = []
    error: list[float | None] = []
    matrices = []
    classes = np.arange(len(cases.names) if task == "multiclass" else 2)
    for column, known in enumerate(cases.known.T):
        target, decided = cases.target[known, column], cases.decided[known, column]
        accuracy.append(float(accuracy_score(target, decided)) if known.any() else None)
        error.append(_calibration_error(cases.confidence[known, column], cases.right[known, column], bins))
        empty = np.zeros((len(classes), len(classes)), dtype=int)
        matrices.append((confusion_matrix(target, decided, labels=classes) if known.any() else empty).tolist())
    result: dict[str, Any] = {"accuracy": _mean(accuracy), "expected_calibration_error": _mean(error)}
    if task == "multilabel":
        for key, values in (("accuracy", accuracy), ("expected_calibration_error", error)):
            result[f"{key}_per_finding"] = dict(zip(cases.names, values, strict=True))
        result["confusion_matrix"] = dict(zip(cases.names, matrices, strict=True))
    else:
        result["confusion_matrix"] = matrices[0]
    return {**result, "confusion_axes": "rows true, columns predicted", "calibration_bins": bins}


def _mean(values: Sequence[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return float(np.mean(kept)) if kept else None


def _calibration_error(confidence: Array, right: Array, bins: int) -> float | None:
    if not len(confidence):
        return None
    metric = CalibrationErrorMetric(num_bins=bins, calibration_reduction="expected")
    rows = (torch.from_numpy(np.asarray(part, dtype=np.float32))[None, None] for part in (confidence, right))
    # not `aggregate`, which waits for the other ranks: one rank alone evaluates
    return float(metric(*rows))  # type: ignore[arg-type]


def _logits_and_label(output: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    return output["pred"].float(), output["label"]


class ClassificationScore(EpochMetric):
    """Macro AUROC (multilabel, binary) or accuracy (multiclass) over all batches and ranks of an evaluator run.

    NaN where it is not defined: only one class occurs, or the logits are not finite. Ranks may hold different
    numbers of cases, or none. The engine's output holds logits "pred" (B, C) and labels "label" (with `decollate` off).
    """

    def __init__(self, task: str) -> None:
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
        # A first batch of one class would warn about the function.
        super().__init__(partial(_score, task=task), _logits_and_label, check_compute_fn=False)

    def compute(self) -> float:
        """The score, equal on all ranks. Raises NotComputableError: no case came in."""
        # Objects, since tensors of ranks with different numbers of cases cannot be gathered.
        parts: list[Any] = gather_objects((self._predictions, self._targets))
        logits, labels = ([rows for part in parts for rows in part[i]] for i in range(2))
        if not logits:
            raise NotComputableError("ClassificationScore saw no case; is the validation split empty?")
        return self.compute_fn(torch.cat(logits), torch.cat(labels))


def _score(logits: Tensor, label: Tensor, task: str) -> float:
    if not logits.isfinite().all():
        return float("nan")
    if task == "multiclass":
        return float((logits.argmax(1) == label).double().mean())
    columns = zip(logits.reshape(len(logits), -1).numpy().T, label.reshape(len(label), -1).numpy().T, strict=True)
    values = [value for score, truth in columns if not isinstance(value := _auroc(score, truth), str)]
    return float(np.mean(values)) if values else float("nan")


class ClassificationLossMetric(Loss):
    """Mean `ClassificationLoss` over all labels that count, of all batches and ranks of an evaluator run."""

    def __init__(self, task: str) -> None:
        # The loss is a mean over labels that count: uncertain ones must not weigh a batch.
        loss = ClassificationLoss(task)
        super().__init__(loss, _logits_and_label, batch_size=lambda label: int((label != UNCERTAIN).sum()))
