# SPDX-License-Identifier: Apache-2.0
"""Search by class against the same written as loops over sorted lists, and labels of several data sets as one table."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unimedi_components.errors import DataError
from unimedi_components.retrieval.class_search import class_precision, label_table, same_findings_precision
from unimedi_components.retrieval.recall import precision_at_k

NAMES = ("effusion", "nodule", "edema")


@pytest.fixture
def rows():
    rng = np.random.default_rng(3)
    query, candidates = (torch.from_numpy(rng.normal(size=(n, 5))) for n in (9, 14))
    mine = rng.choice([1, 0, -1, -2], (9, 3))
    theirs = rng.choice([1, 0, -1, -2], (14, 3))
    theirs[:, 2] = 0
    return query, candidates, mine, theirs


def by_hand(query, candidates, mine, theirs, column, k, patients=None, others=None):
    """Mean precision and chance over the queries with a finding."""
    values, chances = [], []
    for i, q in enumerate(query.numpy()):
        if mine[i, column] != 1:
            continue
        ranked = []
        for j, c in enumerate(candidates.numpy()):
            if theirs[j, column] != -1 and (patients is None or patients[i] != others[j]):
                ranked.append((-(q @ c) / np.linalg.norm(q) / np.linalg.norm(c), theirs[j, column] == 1))
        ranked.sort()
        values.append(sum(right for _, right in ranked[:k]) / k)
        chances.append(sum(right for _, right in ranked) / len(ranked))
    return np.mean(values), np.mean(chances)


def test_precision_by_finding_equals_loops(rows):
    found = class_precision(*rows, NAMES, ks=(2, 5))
    # nobody has the third finding
    assert list(found["by_finding"]) == ["effusion", "nodule"]
    for column, name in enumerate(NAMES[:2]):
        for k in (2, 5):
            value, chance = by_hand(*rows, column, k)
            assert found["by_finding"][name][f"precision_at_{k}"] == pytest.approx(value)
            assert found["by_finding"][name][f"precision_at_{k}_chance"] == pytest.approx(chance)
        assert found["by_finding"][name]["queries"] == (rows[2][:, column] == 1).sum()
        assert found["by_finding"][name]["candidates"] == (rows[3][:, column] == 1).sum()
    parts = [found["by_finding"][name]["precision_at_5"] for name in NAMES[:2]]
    assert found["precision_at_5"] == pytest.approx(np.mean(parts))


def test_candidates_of_the_querys_patient_are_left_out(rows):
    patients, others = list("aabbccdde"), list("abcdexabcdexab")
    found = class_precision(*rows, NAMES, patients, others, ks=(3, 14))
    for column, name in enumerate(NAMES[:2]):
        value, chance = by_hand(*rows, column, 3, patients, others)
        assert found["by_finding"][name]["precision_at_3"] == pytest.approx(value)
        assert found["by_finding"][name]["precision_at_3_chance"] == pytest.approx(chance)
        # fewer than 14 are left
        assert "precision_at_14" not in found["by_finding"][name]
    with pytest.raises(ValueError, match="9 queries and 14 candidates, but 8 and 14 groups"):
        class_precision(*rows, NAMES, patients[:-1], others)


def test_same_findings_means_all_of_them():
    query = torch.eye(3)
    mine = np.asarray([[1, 0], [0, -2], [1, 1]])
    candidates = torch.tensor([[1.0, 0.1, 0.0], [0.9, 0.0, 0.1], [0.1, 1.0, 0.0], [0.0, 0.8, 0.3]])
    theirs = np.asarray([[1, 1], [1, -1], [1, 0], [0, 0]])
    # the first query's right ones are candidates 1 and 2, the second's 3, the third's 0
    found = same_findings_precision(query, candidates, mine, theirs, ks=(2,))
    assert found["precision_at_2"] == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    assert found["precision_at_2_chance"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)
    assert same_findings_precision(query[:1], candidates, np.asarray([[0, 1]]), theirs) == {}


def test_excluded_candidates_are_neither_found_nor_right():
    query, candidates = torch.eye(2), torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    correct = torch.tensor([[True, False, True], [False, False, True]])
    excluded = torch.tensor([[True, False, False], [False, False, False]])
    assert precision_at_k(query, candidates, correct, 1, excluded)[0].mean() == pytest.approx((0 + 1) / 2)
    assert precision_at_k(query, candidates, correct, 2, excluded)[0].mean() == pytest.approx((0.5 + 0.5) / 2)
    with pytest.raises(ValueError, match="fewer than 3 candidates"):
        precision_at_k(query, candidates, correct, 3, excluded)


def test_labels_of_one_data_set():
    items = [{"id": "a", "patient": "1", "label": [1, -1]}, {"id": "b", "patient": "2"}]
    names, table = label_table(items, {"label_names": ["edema", "nodule"]})
    assert names == ["edema", "nodule"] and table.tolist() == [[1, -1], [-2, -2]]


def test_classes_become_findings():
    items = [{"id": str(label), "patient": "1", "label": label} for label in (2, 0, -1)]
    names, table = label_table(items, {"label_names": ["normal", "pneumonia", "COVID-19"]})
    assert names == ["normal", "pneumonia", "COVID-19"]
    assert table.tolist() == [[0, 0, 1], [1, 0, 0], [-1, -1, -1]]


def test_sources_keep_their_names_apart():
    items = [
        {"id": "c", "patient": "bimcv-1", "label": [0, 1]},
        {"id": "a", "patient": "mimic_cxr-1", "label": [1, -2, 0]},
        {"id": "d", "patient": "other-1", "label": [1]},
    ]
    meta = {"label_names": {"mimic_cxr": ["edema", "fracture", "nodule"], "bimcv": ["nodule", "normal"]}}
    names, table = label_table(items, meta)
    assert names == ["nodule", "normal", "edema", "fracture"]
    assert table.tolist() == [[0, 1, -2, -2], [0, -2, 1, -2], [-2, -2, -2, -2]]
    assert label_table(items[1:2], meta)[0] == ["edema", "fracture", "nodule"]
    assert label_table(items, {})[1].shape == (3, 0)


def test_labels_that_do_not_fit():
    with pytest.raises(DataError, match="x: 1 labels for 2 label names"):
        label_table([{"id": "x", "patient": "1", "label": [1]}], {"label_names": ["a", "b"]})
    with pytest.raises(DataError, match="x: label 2 is no index of 2 classes"):
        label_table([{"id": "x", "patient": "1", "label": 2}], {"label_names": ["a", "b"]})
