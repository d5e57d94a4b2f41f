# SPDX-License-Identifier: Apache-2.0
"""Probes that are trained on some images and score others."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from unimedi_components.retrieval.probe import transfer_scores


def test_scores_are_those_of_a_regression_on_the_training_images_alone() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.normal(3, 2, (60, 5)), rng.normal(size=(40, 5))
    labels = np.stack([train[:, 0] > 3, train[:, 1] + rng.normal(size=60) > 3], axis=1).astype(int)
    found = transfer_scores(train, labels, test, strengths=(0.1,))
    scaler = StandardScaler().fit(train)
    for column in (0, 1):
        model = LogisticRegression(C=0.1, max_iter=2000).fit(scaler.transform(train), labels[:, column])
        expected = model.decision_function(scaler.transform(test))
        assert found[:, column] == pytest.approx(expected, abs=1e-6)


def test_a_finding_that_all_or_none_have_scores_chance() -> None:
    train, test = np.eye(4), np.eye(4)[::-1]
    found = transfer_scores(train, np.array([[0, 1], [0, 1], [0, 1], [0, 1]]), test)
    assert found.tolist() == [[0.0, 0.0]] * 4
    assert roc_auc_score([0, 1, 0, 1], found[:, 0]) == 0.5
