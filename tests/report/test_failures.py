# SPDX-License-Identifier: Apache-2.0
"""Failures of a network whose embeddings and selections are written down by hand."""

from __future__ import annotations

import torch

from benchmarks.failures import lowest_retrievals, missed_studies
from unimedi_components.retrieval.features import Features

REPORTS = ["effusion", "nodule", "edema", "normal"]


def features() -> Features:
    text = torch.eye(4)
    # the first image looks most like the last report, and least like its own
    image = torch.tensor([[0.0, 0.1, 0.2, 1.0], [0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]])
    items = [{"id": f"study{i}", "report": report} for i, report in enumerate(REPORTS)]
    selected = torch.tensor([[1, 3], [5, 7], [0, 2], [6, 7]])
    return Features(items, image, text, torch.zeros(4, 2), torch.zeros(4, 3), selected, torch.zeros(4, 4))


def test_lowest_retrievals() -> None:
    found = lowest_retrievals(features(), 2)
    assert found == [
        {"id": "study0", "rank": 4, "of": 4, "report": "effusion", "found": "normal"},
        {"id": "study2", "rank": 2, "of": 4, "report": "edema", "found": "nodule"},
    ]


def test_missed_studies() -> None:
    studies = {
        # slices 2 and 3 of 16 are slice 1 of 8, which is selected
        "study0": {"lesion_slices": [2, 3], "n_slices": 16},
        # slice 4 of 8 is not
        "study1": {"lesion_slices": [4], "n_slices": 8},
        # more than a third: not focal
        "study2": {"lesion_slices": [4, 5, 6, 7], "n_slices": 8},
        # no lesion
        "study3": {"lesion_slices": [], "n_slices": 8},
    }
    assert missed_studies(features(), studies, depth=8) == ([1], 2)


def test_the_rows_that_are_drawn() -> None:
    found = features().take([2, 0])
    assert [item["id"] for item in found.items] == ["study2", "study0"]
    assert found.selected is not None
    assert found.selected.tolist() == [[0, 2], [1, 3]]
    assert found.image_embed.tolist() == features().image_embed[[2, 0]].tolist()
    assert (found.slice_attention, found.root) == (None, features().root)
