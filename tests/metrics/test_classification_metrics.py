# SPDX-License-Identifier: Apache-2.0
"""Classification metrics against numbers worked out by hand, and the bootstrap against a slow loop."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from unimedi_components.metrics.bootstrap import resample_patients, resampled_auroc
from unimedi_components.metrics.classification import classification_metrics

# Of the nine pairs of a positive and a negative case, 0.9 wins 3, 0.8 wins 2 and ties 1, 0.3 wins 1: 6.5.
SCORES = np.array([0.9, 0.8, 0.8, 0.6, 0.3, 0.2])
LABELS = np.array([1, 0, 1, 0, 1, 0])

CLASSES = np.array([[0.7, 0.2, 0.1], [0.35, 0.55, 0.1], [0.1, 0.6, 0.3], [0.25, 0.3, 0.45], [0.3, 0.48, 0.22]])
CLASS_LABELS = np.array([0, 0, 1, 2, 2])


def test_binary_by_hand():
    found = classification_metrics(SCORES, LABELS, "binary", ["healthy", "ill"], bootstrap=0, bins=2)
    assert found["auroc"] == {"ill": pytest.approx(6.5 / 9)}
    assert found["macro_auroc"] == pytest.approx(6.5 / 9)
    assert found["accuracy"] == 0.5
    # of the healthy 0.2 is right; of the ill 0.9 and 0.8
    assert found["confusion_matrix"] == [[1, 2], [1, 2]]
    assert found["confusion_axes"] == "rows true, columns predicted"
    # (0.2 + 0.3) / 2 against 1/2, and (0.9 + 0.8 + 0.8 + 0.6) / 4 against 2/4
    assert found["expected_calibration_error"] == pytest.approx(0.25 * 2 / 6 + 0.275 * 4 / 6, abs=1e-6)
    assert (found["cases"], found["patients"], found["positives"], found["uncertain"]) == (6, 6, {"ill": 3}, 0)
    assert found["skipped"] == {}
    assert "intervals" not in found
    column = classification_metrics(SCORES[:, None], LABELS[:, None], "binary", ["healthy", "ill"], bootstrap=0, bins=2)
    assert column == found


def test_multiclass_by_hand():
    found = classification_metrics(CLASSES, CLASS_LABELS, "multiclass", ["a", "b", "c"], bootstrap=0, bins=2)
    # of class c, 0.45 wins over 0.1, 0.1 and 0.3, and 0.22 over two of them
    assert found["auroc"] == pytest.approx({"a": 1.0, "b": 1.0, "c": 5 / 6})
    assert found["macro_auroc"] == pytest.approx(17 / 18)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["confusion_matrix"] == [[1, 1, 0], [0, 1, 0], [0, 1, 1]]
    # 0.45 (right) and 0.48 below one half, 0.7 (right), 0.55 and 0.6 (right) above
    expected = abs(0.465 - 1 / 2) * 2 / 5 + abs(1.85 / 3 - 2 / 3) * 3 / 5
    assert found["expected_calibration_error"] == pytest.approx(expected, abs=1e-6)
    assert found["positives"] == {"a": 2, "b": 1, "c": 2}
    assert "accuracy_per_finding" not in found


def multilabel_table():
    """The binary table with two uncertain cases, a finding that never occurs, and one that nobody knows."""
    known = np.array([*LABELS, -1, -1])
    scores = np.array([*SCORES, 1.0, 0.0])
    labels = np.stack([known, np.array([0] * 7 + [-1]), np.full(8, -1)], axis=1)
    return np.stack([scores, np.full(8, 0.4), np.full(8, 0.4)], axis=1), labels


def test_uncertain_labels_do_not_count():
    probabilities, labels = multilabel_table()
    names = ["seen", "never", "unknown"]
    found = classification_metrics(probabilities, labels, "multilabel", names, bootstrap=50, bins=2)
    assert found["auroc"] == {"seen": pytest.approx(6.5 / 9), "never": None, "unknown": None}
    assert found["macro_auroc"] == pytest.approx(6.5 / 9)
    assert found["skipped"] == {"never": "no positive case", "unknown": "no positive case"}
    assert found["accuracy_per_finding"] == {"seen": 0.5, "never": 1.0, "unknown": None}
    assert found["accuracy"] == 0.75
    assert found["confusion_matrix"] == {"seen": [[1, 2], [1, 2]], "never": [[7, 0], [0, 0]], "unknown": [[0, 0]] * 2}
    assert found["expected_calibration_error_per_finding"] == {
        "seen": pytest.approx(1.6 / 6, abs=1e-6),
        "never": pytest.approx(0.4, abs=1e-6),
        "unknown": None,
    }
    assert found["expected_calibration_error"] == pytest.approx((1.6 / 6 + 0.4) / 2, abs=1e-6)
    # the last case is uncertain throughout
    assert (found["cases"], found["uncertain"]) == (7, {"seen": 2, "never": 1, "unknown": 8})
    assert found["positives"] == {"seen": 3, "never": 0, "unknown": 0}
    assert found["intervals"]["auroc"]["never"] is None
    assert found["intervals"]["resamples_used"]["auroc"]["unknown"] == 0
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_uncertain_binary_cases_are_left_out():
    found = classification_metrics([*SCORES, 1.0], [*LABELS, -1], "binary", ["no", "yes"], bootstrap=0)
    assert (found["macro_auroc"], found["cases"], found["uncertain"]) == (pytest.approx(6.5 / 9), 6, 1)


def test_one_class_alone():
    found = classification_metrics(CLASSES[:2], [0, 0], "multiclass", ["a", "b", "c"], bootstrap=20)
    assert (found["macro_auroc"], found["intervals"]["macro_auroc"]) == (None, None)
    assert found["skipped"] == {"a": "no negative case", "b": "no positive case", "c": "no positive case"}
    assert found["accuracy"] == 0.5
    assert found["intervals"]["accuracy"] == [0.0, 1.0]


def slow_intervals(probabilities, labels, task, patients, resamples, seed):
    """Every resample written out as a list of cases, and measured by scikit-learn."""
    names, index = np.unique(patients, return_inverse=True)
    times = resample_patients(len(names), resamples, np.random.default_rng(seed))
    rows = {"macro": [], "accuracy": [], **{c: [] for c in range(probabilities.shape[1])}}
    for drawn in times:
        cases = [case for case in range(len(index)) for _ in range(drawn[index[case]])]
        values, right = [], []
        for c in range(probabilities.shape[1]):
            truth = (labels == c).astype(int) if task == "multiclass" else labels.reshape(len(labels), -1)[:, c]
            kept = [case for case in cases if truth[case] != -1]
            if len({int(truth[case]) for case in kept}) == 2:
                values.append(roc_auc_score(truth[kept], probabilities[kept, c]))
                rows[c].append(values[-1])
            right.append(np.mean((probabilities[kept, c] >= 0.5) == truth[kept]))
        if len(values) == probabilities.shape[1]:
            rows["macro"].append(np.mean(values))
        by_class = np.mean(probabilities[cases].argmax(1) == labels[cases]) if task == "multiclass" else None
        rows["accuracy"].append(np.mean(right) if by_class is None else by_class)
    return {key: ([np.quantile(v, 0.025), np.quantile(v, 0.975)], len(v)) for key, v in rows.items()}


@pytest.mark.parametrize("task", ["binary", "multilabel", "multiclass"])
@pytest.mark.parametrize("rare", [False, True])
def test_bootstrap_equals_a_slow_loop(task, rare, monkeypatch):
    rng = np.random.default_rng(3)
    n, count = 40, 1 if task == "binary" else 3
    patients = [f"p{i}" for i in rng.integers(0, 15, n)]
    labels = rng.integers(0, 3, n) if task == "multiclass" else (rng.random((n, count)) < 0.4).astype(int)
    if task == "multilabel":
        labels[rng.random(labels.shape) < 0.2] = -1
        labels[:, 0] = labels[:, 0].clip(0)
    if rare:
        # one patient alone has it, so that about a third of the resamples lack it
        own = np.array(patients) == "p3"
        labels = np.where(own, 2, labels % 2) if task == "multiclass" else np.where(own[:, None], 1, 0) + 0 * labels
    # few distinct values: many ties
    probabilities = rng.dirichlet(np.ones(3), n).round(1) if task == "multiclass" else rng.random((n, count)).round(1)
    names = ["no", "yes"] if task == "binary" else ["x", "y", "z"]
    # resamples in several parts
    monkeypatch.setattr("unimedi_components.metrics.bootstrap._CHUNK", 7 * n)
    flat = labels.reshape(-1) if task == "binary" else labels
    found = classification_metrics(probabilities, flat, task, names, patients, bootstrap=60, seed=5)["intervals"]
    expected = slow_intervals(probabilities, labels, task, patients, 60, 5)
    used = found["resamples_used"]
    assert (found["macro_auroc"], used["macro_auroc"]) == (pytest.approx(expected["macro"][0]), expected["macro"][1])
    assert (found["accuracy"], used["accuracy"]) == (pytest.approx(expected["accuracy"][0]), 60)
    for c, name in enumerate(names[-count:]):
        assert (found["auroc"][name], used["auroc"][name]) == (pytest.approx(expected[c][0]), expected[c][1])
    assert (used["macro_auroc"] < 60) == rare
    assert (found["level"], found["resamples"]) == (0.95, 60)


def test_weighted_auroc_equals_sklearn():
    rng = np.random.default_rng(0)
    truth, weights = rng.integers(-1, 2, 200), rng.integers(0, 4, (20, 200)).astype(float)
    for scores in (rng.random(200), rng.random(200).round(1), np.zeros(200)):
        known = truth >= 0
        expected = [roc_auc_score(truth[known], scores[known], sample_weight=row[known]) for row in weights]
        assert resampled_auroc(scores, truth, weights) == pytest.approx(expected)
    weights[0, truth == 1] = 0
    assert np.isnan(resampled_auroc(scores, truth, weights)).tolist() == [True] + [False] * 19


def test_all_images_of_a_patient_are_drawn_together():
    """Showing every image three times adds no information, and must not narrow the interval."""
    rng = np.random.default_rng(1)
    labels = (rng.random((50, 2)) < 0.4).astype(int)
    probabilities = 0.7 * rng.random((50, 2)) + 0.3 * labels
    patients = np.arange(50)
    once = classification_metrics(probabilities, labels, "multilabel", "ab", patients)
    tripled = [np.repeat(rows, 3, axis=0) for rows in (probabilities, labels, patients)]
    thrice = classification_metrics(*tripled[:2], "multilabel", "ab", tripled[2])
    assert (thrice["cases"], thrice["patients"]) == (150, 50)
    assert thrice["intervals"]["auroc"]["a"] == pytest.approx(once["intervals"]["auroc"]["a"])
    assert thrice["intervals"]["accuracy"] == pytest.approx(once["intervals"]["accuracy"])
    alone = classification_metrics(*tripled[:2], "multilabel", "ab")
    assert np.ptp(alone["intervals"]["macro_auroc"]) < 0.75 * np.ptp(thrice["intervals"]["macro_auroc"])
    low, high = once["intervals"]["macro_auroc"]
    assert low < once["macro_auroc"] < high


def test_the_seed_decides():
    probabilities, labels = np.random.default_rng(2).random((30, 1)), np.arange(30) % 2
    first, again, other = (
        classification_metrics(probabilities, labels, "binary", ["no", "yes"], bootstrap=100, seed=seed)
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first["intervals"]["accuracy"] != other["intervals"]["accuracy"]
    assert first["macro_auroc"] == other["macro_auroc"]


def test_one_patient_gives_no_interval():
    found = classification_metrics(SCORES, LABELS, "binary", ["no", "yes"], ["p"] * 6, bootstrap=10)
    assert (found["patients"], found["intervals"]["macro_auroc"], found["intervals"]["accuracy"]) == (1, None, None)


@pytest.mark.parametrize(
    ("probabilities", "labels", "task", "names", "patients", "message"),
    [
        (SCORES, LABELS, "regression", ["a", "b"], None, "task must be one of"),
        (SCORES, LABELS[:5], "binary", ["a", "b"], None, r"\(6,\) and labels \(5,\) do not fit the binary"),
        (SCORES, LABELS, "binary", ["a"], None, "do not fit the binary"),
        (CLASSES, CLASS_LABELS, "multilabel", "abc", None, r"\(5, 3\) and labels \(5,\) do not fit the multilabel"),
        (CLASSES, CLASS_LABELS, "multiclass", "abcd", None, "do not fit the multiclass"),
        (CLASSES, CLASS_LABELS + 1, "multiclass", "abc", None, r"from -1 \(uncertain\) to 2"),
        (SCORES, LABELS * 0.5, "binary", "ab", None, r"from -1 \(uncertain\) to 1"),
        (SCORES * np.nan, LABELS, "binary", "ab", None, "not finite"),
        (SCORES, LABELS, "binary", "ab", ["p"], "6 cases but 1 patients"),
        (SCORES, LABELS * 0 - 1, "binary", "ab", None, "no case has a label that counts"),
        (SCORES[:0], LABELS[:0], "binary", "ab", None, "no case has a label that counts"),
    ],
)
def test_bad_input_is_named(probabilities, labels, task, names, patients, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(probabilities, labels, task, names, patients)
