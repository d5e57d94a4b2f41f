# SPDX-License-Identifier: Apache-2.0
"""Slice precision on hand-worked cases, and its chance level against every possible choice."""

from fractions import Fraction
from itertools import combinations, permutations

import numpy as np
import pytest
import torch

from unimedi_components import selection
from unimedi_components.errors import DataError
from unimedi_components.metrics.bootstrap import Measures, PatientResamples
from unimedi_components.retrieval.slices import is_focal, lesion_mask, slice_metrics, slice_score


def loop_mask(lesions, n, depth):
    """Exact fractions of the extent, written out."""
    covered = []
    for s in range(depth):
        low, high = Fraction(s * n, depth), Fraction((s + 1) * n, depth)
        covered.append(sum(max(Fraction(0), min(high, r + 1) - max(low, Fraction(r))) for r in lesions))
    half = Fraction(n, 2 * depth)
    if any(c >= half for c in covered):
        return [c >= half for c in covered]
    return [c == max(covered) and c > 0 for c in covered]


def test_lesion_mask_by_hand():
    assert np.flatnonzero(lesion_mask([3, 4], 8, 8)).tolist() == [3, 4]
    # two slices of the file for each of the input: one of two is half
    assert np.flatnonzero(lesion_mask([3, 6, 7], 8, 4)).tolist() == [1, 3]
    # the input is the finer one
    assert np.flatnonzero(lesion_mask([1], 4, 8)).tolist() == [2, 3]
    # 1.5 slices of the file each: slice 1 fills a third of the first and of the second
    assert np.flatnonzero(lesion_mask([1], 6, 4)).tolist() == [0, 1]
    assert np.flatnonzero(lesion_mask([1, 2], 6, 4)).tolist() == [1]
    assert lesion_mask([], 6, 4).tolist() == [False] * 4


def test_lesion_mask_keeps_thin_lesions_of_deep_volumes():
    # 10 slices of the file each: 3 of them never reach half, most of them lie in the input's slice 2
    assert np.flatnonzero(lesion_mask([19, 20, 21], 300, 30)).tolist() == [2]
    assert np.flatnonzero(lesion_mask([19, 20], 300, 30)).tolist() == [1, 2]


@pytest.mark.parametrize(("n", "depth"), [(48, 32), (31, 32), (7, 16), (300, 32), (32, 32), (45, 8)])
def test_lesion_mask_equals_fractions(n, depth):
    rng = np.random.default_rng(n)
    for size in (0, 1, 2, 5):
        lesions = rng.choice(n, size, replace=False).tolist()
        assert lesion_mask(lesions, n, depth).tolist() == loop_mask(lesions, n, depth)


def test_score_by_hand():
    # slabs of 4, centres 2, 6, 10, 14; lesion slices 5 to 10 of 16 lie in slabs 1 and 2
    score = slice_score([2, 6], [5, 6, 7, 8, 9, 10], 16, 16, 4)
    assert score.precision == 0.5
    assert score.precision_chance == 0.5
    assert score.recall == 0.5
    assert score.recall_chance == 0.5
    assert score.hit == 1.0
    assert score.hit_chance == pytest.approx(1 - 1 / 6)


def all_choices(slabs, patch_depth, k, expand):
    """Every choice that random slab scores lead to, equally likely, through the selector itself."""
    for order in permutations(range(slabs)):
        scores = torch.tensor([order], dtype=torch.float32)
        yield selection.select_slices(scores, k, patch_depth, expand=expand)[0].tolist()


@pytest.mark.parametrize(
    ("expand", "k"), [("centre", 1), ("centre", 3), ("repeat", 2), ("repeat", 4), ("repeat", 6), ("repeat", 15)]
)
@pytest.mark.parametrize("lesions", [[6], [0, 1, 2], [3, 4, 9, 10, 11], list(range(20))])
def test_chance_equals_brute_force(expand, k, lesions):
    scores = [slice_score(chosen, lesions, 20, 20, 4, expand) for chosen in all_choices(5, 4, k, expand)]
    for name in ("precision", "recall", "hit"):
        mean = np.mean([getattr(score, name) for score in scores])
        assert getattr(scores[0], f"{name}_chance") == pytest.approx(mean), name


def test_centre_choices_are_all_combinations():
    chosen = {tuple(c) for c in all_choices(4, 4, 2, "centre")}
    assert chosen == set(combinations((2, 6, 10, 14), 2))


def test_focal_studies_fill_at_most_a_third():
    assert is_focal([0], 48)
    assert is_focal(range(16), 48)
    assert not is_focal(range(17), 48)
    assert not is_focal([], 48)


def test_metrics_average_the_focal_studies(kept_by):
    truths = [
        {"lesion_slices": [5, 6], "n_slices": 16},
        {"lesion_slices": list(range(12)), "n_slices": 16},
        None,
        {"lesion_slices": [], "n_slices": 16},
        {"lesion_slices": [14], "n_slices": 16},
    ]
    found = kept_by(slice_metrics, [[2, 6], [2, 6], [2, 6], [2, 6], [2, 6]], truths, 16, 4)
    assert found["slice_studies"] == 2
    assert found["slice_studies_known"] == 4
    assert found["slice_precision"] == pytest.approx((0.5 + 0.0) / 2)
    assert found["slice_precision_chance"] == pytest.approx(0.25)
    assert found["slice_recall"] == pytest.approx((1.0 + 0.0) / 2)
    assert found["slice_hit"] == 0.5
    assert kept_by(slice_metrics, [[2]], [None], 16, 4) == {"slice_studies": 0, "slice_studies_known": 0}


def test_baselines_by_hand():
    """Lesions at slab 1, 1, 1 and 3 of four; the networks choose 1 and 2, 1 and 2, 0 and 3, 0 and 3."""
    truths = [
        {"lesion_slices": [5, 6, 7], "n_slices": 16, "findings": [{"name": "nodule"}]},
        {"lesion_slices": [5, 6, 7], "n_slices": 16, "findings": [{"name": "nodule"}, {"name": "edema"}]},
        {"lesion_slices": [6], "n_slices": 16, "findings": [{"name": "nodule"}]},
        {"lesion_slices": [14, 15], "n_slices": 16, "findings": [{"name": "edema"}]},
    ]
    selected = [[6, 10], [6, 10], [2, 14], [2, 14]]
    kept = Measures(PatientResamples("abcd", seed=0))
    slice_metrics(kept, selected, truths, 16, 4, "centre", "abcd", [2.0, 2.0, 3.0, 2.0])
    found = kept.content()
    # slices 6 and 10, 6 and 10, 2 and 14, 2 and 14 against slices 6, 6, 6, 14
    assert found["slice_precision"] == pytest.approx((0.5 + 0.5 + 0.0 + 0.5) / 4)
    assert found["slice_precision_permuted"] == pytest.approx((1 / 6 + 1 / 6 + 1 / 3 + 1 / 6) / 4)
    assert found["slice_precision_oracle"] == 0.5
    assert found["slice_precision_chance"] == 0.25
    # every patient is a fold: three or two of the others have a lesion at slab 1, and a tie goes to the lowest slab
    assert found["slice_precision_fixed"] == pytest.approx((0.5 + 0.5 + 0.5 + 0.0) / 4)
    assert found["slice_precision_per_finding"] == {"edema": pytest.approx(0.5), "nodule": pytest.approx(1 / 3)}
    assert found["slice_precision_oracle_per_finding"] == {"edema": 0.5, "nodule": 0.5}
    # the third study's nearest slice is 2, four slices of 3 mm away; the others meet a lesion slice
    assert found["slice_distance_mm"] == pytest.approx(12.0 / 4)
    assert found["slice_distance_mm_oracle"] == 0.0
    # mean over the others of 0, 6, 6 | 0, 6, 6 | 0, 0, 12 | 8, 8, 0 mm
    assert found["slice_distance_mm_permuted"] == pytest.approx((4 + 4 + 4 + 16 / 3) / 4)
    assert found["slice_distance_mm_fixed"] == pytest.approx((0 + 0 + 0 + 16.0) / 4)
    assert {"slice_precision", "slice_precision_fixed", "slice_distance_mm"} <= found["intervals"].keys()
    assert 0 <= found["intervals"]["slice_precision"][0] <= found["slice_precision"]


def test_the_selection_of_the_own_patient_is_no_permuted_one(kept_by):
    truth = {"lesion_slices": [5, 6], "n_slices": 16}
    found = kept_by(slice_metrics, [[6, 10], [6, 10], [2, 14]], [truth] * 3, 16, 4, patients="aab")
    # the first two have the third's, which misses; the third has theirs
    assert found["slice_precision_permuted"] == pytest.approx((0 + 0 + 0.5) / 3)
    alone = kept_by(slice_metrics, [[6, 10], [2, 14]], [truth] * 2, 16, 4, patients="aa")
    assert not {"slice_precision_permuted", "slice_precision_fixed"} & alone.keys()


def test_bad_truth_is_named():
    with pytest.raises(DataError, match="lesion slices 3 to 16 lie outside a volume of 16"):
        lesion_mask([3, 16], 16, 8)
    with pytest.raises(DataError, match="without lesion slices"):
        slice_score([2], [], 16, 16, 4)
