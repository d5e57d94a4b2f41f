# SPDX-License-Identifier: Apache-2.0
"""The linear probe on features with a known signal, and its handling of findings that cannot be probed."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler

from benchmarks.cells import transfer_scores
from unimedi_components.metrics.bootstrap import PatientResamples
from unimedi_components.retrieval.probe import STRENGTHS, LogisticProbe, linear_probe


@pytest.fixture
def labels():
    return (np.random.default_rng(0).random((200, 3)) < 0.3).astype(int)


def test_separable_and_random_features(labels):
    rng = np.random.default_rng(1)
    features = rng.normal(size=(200, 20))
    assert linear_probe(features, labels, "abc").macro == pytest.approx(0.5, abs=0.07)
    features[:, :2] += 8 * labels[:, :2]
    result = linear_probe(features * [1e-3, *[100.0] * 19], labels, "abc")  # scales are taken out
    assert result.per_finding["a"] > 0.99
    assert result.per_finding["b"] > 0.99
    assert result.macro == pytest.approx(np.mean(list(result.per_finding.values())))


def test_equals_a_loop_over_folds(labels):
    features = np.random.default_rng(2).normal(size=(200, 5)) + 0.5 * labels[:, :1]
    expected = []
    y = labels[:, 0]
    for train, test in StratifiedGroupKFold(5, shuffle=True, random_state=7).split(features, y, np.arange(200)):
        mean, std = features[train].mean(0), features[train].std(0)
        model = LogisticRegression(C=0.1, tol=1e-8, max_iter=9999).fit((features[train] - mean) / std, y[train])
        values = ((features[test] - mean) / std) @ model.coef_[0]
        expected.append(roc_auc_score(y[test], values))
    found = linear_probe(features, labels[:, :1], "a", strengths=(0.1,), seed=7)
    assert found.macro == pytest.approx(np.mean(expected), abs=2e-3)


def loop_choice(x, y, groups, seed):
    """C with the best mean AUROC over three inner folds, each fit from scratch."""
    scores = []
    for c in STRENGTHS:
        values = []
        for train, test in StratifiedGroupKFold(3, shuffle=True, random_state=seed).split(x, y, groups):
            model = LogisticRegression(C=c, tol=1e-8, max_iter=9999).fit(x[train], y[train])
            values.append(roc_auc_score(y[test], model.decision_function(x[test])))
        scores.append(np.mean(values))
    return STRENGTHS[int(np.argmax(scores))]


@pytest.mark.parametrize(("seed", "signal", "expected"), [(2, 0.35, 1e-4), (0, 0.6, 1e-1)])
def test_the_penalty_is_chosen_within_the_training_rows(seed, signal, expected):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(60), 2)
    y = (rng.random(120) < 0.4).astype(int)
    x = rng.normal(size=(120, 40)) + signal * y[:, None] * (np.arange(40) < 4)
    x = (x - x.mean(0)) / x.std(0)
    chosen = loop_choice(x, y, groups, 5)
    probe = LogisticProbe(seed=5).fit(x, y, groups)
    assert probe.c == chosen == expected
    exact = LogisticRegression(C=chosen, tol=1e-8, max_iter=9999).fit(x, y)
    np.testing.assert_allclose(probe.decision(x), exact.decision_function(x), atol=2e-3)
    np.testing.assert_allclose(probe.probabilities(x), exact.predict_proba(x), atol=2e-3)


def test_wide_features_in_the_axes_of_the_rows_give_the_same_probe():
    rng = np.random.default_rng(1)
    x, other = rng.normal(size=(60, 300)), rng.normal(size=(20, 300))
    y = (x[:, :3].sum(1) > 0).astype(int)
    mean, std = x.mean(0), x.std(0)
    exact = LogisticRegression(C=0.01, tol=1e-8, max_iter=9999).fit((x - mean) / std, y)
    probe = LogisticProbe((0.01,)).fit(x, y)
    np.testing.assert_allclose(probe.decision(other), exact.decision_function((other - mean) / std), atol=1e-3)


def test_more_than_two_classes_and_too_few_rows_to_choose():
    rng = np.random.default_rng(2)
    y = np.repeat([0, 1, 2], 30)
    x = rng.normal(size=(90, 5)) + 3 * np.eye(3, 5)[y]
    probe = LogisticProbe().fit(x, y)
    assert probe.classes.tolist() == [0, 1, 2]
    assert (probe.probabilities(x).argmax(1) == y).mean() > 0.85
    assert LogisticProbe().fit(x[[0, 30, 31]], y[[0, 30, 31]]).c == 0.1


def test_resampled_macro_equals_a_loop_over_folds(labels):
    rng = np.random.default_rng(3)
    patients = [f"p{i // 2}" for i in range(200)]
    features = rng.normal(size=(200, 6)) + labels[:, :1]
    result = linear_probe(features, labels[:, :2], "ab", patients)
    weights = PatientResamples(patients, resamples=5, seed=1).weights(patients)
    expected = []
    for row in weights:
        means = []
        for folds in result.folds.values():
            scores = [
                roc_auc_score(fold.truth, fold.scores, sample_weight=row[fold.rows])
                for fold in folds
                if len(set(fold.truth[row[fold.rows] > 0])) == 2
            ]
            means.append(np.mean(scores))
        expected.append(np.mean(means))
    np.testing.assert_allclose(result.resampled(weights), expected)
    assert result.resampled(np.ones((1, 200)))[0] == pytest.approx(result.macro)
    held = np.concatenate([fold.rows for fold in result.folds["a"]])
    assert sorted(held.tolist()) == list(range(200))


def test_same_input_same_output(labels):
    features = np.random.default_rng(3).normal(size=(200, 5))
    assert linear_probe(features, labels, "abc") == linear_probe(features, labels, "abc")


def test_patients_stay_together():
    """Features that name the patient, labels at random by patient: mixing patients would excel."""
    rng = np.random.default_rng(4)
    patients = np.repeat(np.arange(60), 4)
    signature = rng.normal(size=(60, 120))[patients]
    y = (rng.random(60) < 0.5).astype(int)[patients, None]
    assert linear_probe(signature, y, "a").macro > 0.95
    assert linear_probe(signature, y, "a", groups=[f"p{p}" for p in patients]).macro < 0.65


def test_rare_constant_and_unknown_findings_are_listed(labels):
    features = np.random.default_rng(5).normal(size=(200, 4))
    y = np.concatenate([labels, labels[:, :1]], axis=1)
    y[:, 1] = 0
    y[:, 2] = np.arange(200) < 3
    y[:, 3] = np.where(np.arange(200) < 100, y[:, 3], -1)
    result = linear_probe(features, y, ["kept", "never", "rare", "half known"])
    assert set(result.per_finding) == {"kept", "half known"}
    assert result.skipped == {
        "never": "0 patients with it, 5 folds need 5",
        "rare": "3 patients with it, 5 folds need 5",
    }
    half = linear_probe(features[:100], labels[:100, :1], "a").macro
    assert result.per_finding["half known"] == pytest.approx(half)
    nothing = linear_probe(features, np.zeros((200, 1)), ["never"])
    assert nothing.macro is None


def test_bad_input_is_named(labels):
    with pytest.raises(ValueError, match="do not fit 2 findings"):
        linear_probe(np.zeros((200, 4)), labels, "ab")
    with pytest.raises(ValueError, match="not finite"):
        linear_probe(np.full((200, 4), np.nan), labels, "abc")


def test_transferred_scores_are_those_of_a_regression_on_the_training_images_alone():
    rng = np.random.default_rng(0)
    train, test = rng.normal(3, 2, (60, 5)), rng.normal(size=(40, 5))
    labels = np.stack([train[:, 0] > 3, train[:, 1] + rng.normal(size=60) > 3], axis=1).astype(int)
    found = transfer_scores(train, labels, test, strengths=(0.1,))
    scaler = StandardScaler().fit(train)
    for column in (0, 1):
        model = LogisticRegression(C=0.1, max_iter=2000).fit(scaler.transform(train), labels[:, column])
        expected = model.decision_function(scaler.transform(test))
        assert found[:, column] == pytest.approx(expected, abs=1e-6)


def test_a_finding_that_all_or_none_have_scores_chance():
    train, test = np.eye(4), np.eye(4)[::-1]
    found = transfer_scores(train, np.array([[0, 1], [0, 1], [0, 1], [0, 1]]), test)
    assert found.tolist() == [[0.0, 0.0]] * 4
    assert roc_auc_score([0, 1, 0, 1], found[:, 0]) == 0.5
