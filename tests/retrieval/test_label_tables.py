# SPDX-License-Identifier: Apache-2.0
"""Labels of several data sets as one table."""

from __future__ import annotations

import pytest

from unimedi_components.errors import DataError
from unimedi_components.retrieval.label_tables import label_table


def test_one_data_set():
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
