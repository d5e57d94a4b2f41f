# SPDX-License-Identifier: Apache-2.0
"""Other ways to choose slices against every choice that the selector can make."""

from itertools import permutations

import numpy as np
import pytest
import torch

from unimedi_components import selection
from unimedi_components.metrics.slice_choice import (
    best_choice,
    expected_minimum,
    fixed_choices,
    lesion_distance,
    reachable,
)

WAYS = [("centre", 1), ("centre", 2), ("repeat", 2), ("repeat", 4), ("repeat", 6), ("repeat", 15)]


def all_choices(k, expand, slabs=5, patch_depth=4):
    """Every order of the slabs, equally likely, through the selector itself."""
    for order in permutations(range(slabs)):
        scores = torch.tensor([order], dtype=torch.float32)
        yield selection.select_slices(scores, k, patch_depth, expand=expand)[0].numpy()


@pytest.mark.parametrize(("expand", "k"), WAYS)
@pytest.mark.parametrize("seed", range(4))
def test_best_choice_and_expected_minimum_equal_brute_force(expand, k, seed):
    mask = np.random.default_rng(seed).random(20) < (0.1, 0.3, 0.5, 0.8)[seed]
    mask[7] = True
    choices = list(all_choices(k, expand))
    best = best_choice(mask, k, 4, expand)
    assert any(np.array_equal(best, choice) for choice in choices)
    assert mask[best].sum() == max(mask[choice].sum() for choice in choices)
    away = lesion_distance(mask) * 2.5
    assert expected_minimum(away, k, 4, expand) == pytest.approx(np.mean([away[c].min() for c in choices]))
    assert reachable(20, k, 4, expand).tolist() == sorted({int(s) for choice in choices for s in choice})


def test_lesion_distance_by_hand():
    assert lesion_distance(np.asarray([0, 0, 1, 1, 0, 0, 0, 1], bool)).tolist() == [2, 1, 0, 0, 1, 2, 1, 0]


@pytest.mark.parametrize("expand", ["centre", "repeat"])
def test_fixed_choices_are_learned_on_other_patients(expand):
    """Two folds: what the patients of the one show most often is chosen for the other's."""
    patients = ["a", "b", "b", "a", "c", "d"]
    masks = np.random.default_rng(0).random((6, 12)) < 0.3
    found = fixed_choices(masks, patients, 2, 3, expand, folds=2, seed=1)
    fold = dict(zip("abcd", np.random.default_rng(1).permutation(4) % 2, strict=True))
    for i, patient in enumerate(patients):
        others = masks[[fold[p] != fold[patient] for p in patients]]
        low, high = (1, 2) if expand == "centre" else (0, 3)
        seen = [others[:, 3 * s + low : 3 * s + high].mean() for s in range(4)]
        first, second = sorted(range(4), key=lambda s: -seen[s])[:2]
        expected = sorted((3 * first + 1, 3 * second + 1)) if expand == "centre" else [3 * first, 3 * first + 1]
        assert found[i].tolist() == expected
    assert fixed_choices(masks[:2], ["a", "a"], 2, 3) is None


def test_fixed_choices_find_a_common_place_and_no_other_truth():
    """Lesions at one place for all: chosen. Each patient's own place: never learned."""
    masks = np.zeros((10, 40), bool)
    masks[:, [6, 7, 18]] = True
    found = fixed_choices(masks, range(10), 2, 4)
    assert found.tolist() == [[6, 18]] * 10
    own = np.eye(10, dtype=bool).repeat(4, axis=1)
    found = fixed_choices(own, range(10), 2, 4)
    assert own[np.arange(10)[:, None], found].sum() == 0
