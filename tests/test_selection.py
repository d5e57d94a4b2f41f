# SPDX-License-Identifier: Apache-2.0
"""Eq. 2, slice selection and attention-guided masking against hand-worked numbers and slow references."""

import math

import pytest
import torch

from unimedi_components.selection import (
    cls_attention,
    keep_tokens,
    random_scores,
    relative_scores,
    select_slices,
    slab_to_slices,
    slice_scores,
)


def explicit_cls_attention(q, k, include_cls_key):
    """One layer of Eq. 1 with loops over batch and heads."""
    batch, heads, tokens, channels = k.shape
    first = 0 if include_cls_key else 1
    result = torch.zeros(batch, tokens - 1, dtype=k.dtype)
    for b in range(batch):
        for h in range(heads):
            logits = [float(q[b, h] @ k[b, h, n]) / math.sqrt(channels) for n in range(first, tokens)]
            top = max(logits)
            weights = [math.exp(value - top) for value in logits]
            row = [w / sum(weights) for w in weights]
            result[b] += torch.tensor(row[1 - first :], dtype=k.dtype) / heads
    return result


@pytest.mark.parametrize("include_cls_key", [False, True])
def test_cls_attention_equals_the_explicit_softmax(include_cls_key):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 8, dtype=torch.float64, generator=generator) * 3
    k = torch.randn(2, 3, 11, 8, dtype=torch.float64, generator=generator) * 3
    ours = cls_attention(q, k, include_cls_key=include_cls_key)
    assert torch.allclose(ours, explicit_cls_attention(q, k, include_cls_key), atol=1e-12)
    assert torch.all(ours.sum(1) < 1) if include_cls_key else torch.allclose(ours.sum(1), torch.ones(2).double())


def test_cls_attention_in_half_precision_is_computed_in_float32():
    q, k = torch.randn(1, 2, 8), torch.randn(1, 2, 5, 8)
    ours = cls_attention(q.bfloat16(), k.bfloat16())
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, cls_attention(q.bfloat16().float(), k.bfloat16().float()), atol=4e-3)


def test_slice_scores_are_means_over_a_slab():
    attention = torch.tensor([[1.0, 2, 3, 4, 10, 20, 30, 40]])
    assert slice_scores(attention, (2, 2, 2)).tolist() == [[2.5, 25.0]]
    assert slice_scores(attention, (4, 1, 2)).tolist() == [[1.5, 3.5, 15.0, 35.0]]
    with pytest.raises(ValueError, match="3x2x2 does not hold 8 attention values"):
        slice_scores(attention, (3, 2, 2))


def test_select_slices_takes_centres_of_the_best_slabs_in_order():
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.8], [0.4, 0.3, 0.2, 0.1]])
    assert select_slices(scores, 2, 4).tolist() == [[6, 14], [2, 6]]
    assert select_slices(scores, 2, 1).tolist() == [[1, 3], [0, 1]]
    assert slab_to_slices(torch.arange(3), 4).tolist() == [2, 6, 10]


def test_select_slices_repeat_gives_runs_of_neighbours():
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.8]])
    assert select_slices(scores, 4, 4, expand="repeat").tolist() == [[4, 5, 6, 7]]
    assert select_slices(scores, 6, 4, expand="repeat").tolist() == [[4, 5, 6, 7, 12, 13]]


@pytest.mark.parametrize(
    ("k", "expand", "message"),
    [
        (5, "centre", "k=5 slices: the volume has 4 slabs"),
        (0, "centre", "k=0"),
        (17, "repeat", "16 slices to choose from"),
        (1, "middle", "'centre' or 'repeat'"),
    ],
)
def test_select_slices_refuses_what_cannot_be_chosen(k, expand, message):
    with pytest.raises(ValueError, match=message):
        select_slices(torch.rand(1, 4), k, 4, expand=expand)


def test_random_scores_choose_every_slab_equally_often():
    scores = random_scores(4000, 8, torch.device("cpu"), torch.Generator().manual_seed(0))
    chosen = select_slices(scores, 2, 1)
    counts = torch.bincount(chosen.flatten(), minlength=8)
    assert counts.sum() == 8000
    assert (counts - 1000).abs().max() < 120  # four standard deviations of a binomial count


def test_keep_tokens_keeps_the_most_attended_of_each_segment():
    # Volume grid 1x1x4, two slices of 1x2: the weak second segment still keeps its own half.
    attention = torch.tensor([[0.4, 0.1, 0.3, 0.2, 0.01, 0.02, 0.04, 0.03]])
    kept = keep_tokens(attention, [(1, 1, 4), (2, 1, 2)], 0.5)
    assert kept.tolist() == [[0, 2, 6, 7]]
    assert keep_tokens(attention, [(1, 1, 4), (2, 1, 2)], 0.75).tolist() == [[0, 6]]
    assert keep_tokens(attention, [(2, 2, 2)], 0.0).tolist() == [list(range(8))]


def test_keep_tokens_in_blocks_keeps_whole_blocks():
    attention = torch.zeros(1, 16)
    attention[0, 5] = 1.0  # row 1, column 1 of a 4x4 grid: block (0, 0)
    attention[0, 15] = 0.5  # block (1, 1)
    kept = keep_tokens(attention, [(1, 4, 4)], 0.5, block=2)
    assert kept.tolist() == [[0, 1, 4, 5, 10, 11, 14, 15]]
    with pytest.raises(ValueError, match="block 2 does not divide the token grid 3x3"):
        keep_tokens(torch.rand(1, 9), [(1, 3, 3)], 0.5, block=2)


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_keep_tokens_refuses_ratios_out_of_range(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        keep_tokens(torch.rand(1, 4), [(1, 2, 2)], ratio)


def test_relative_scores_by_hand() -> None:
    scores = torch.tensor([[0.2, 0.4, 0.4, 0.2], [0.1, 0.1, 0.6, 0.4]])
    profile = torch.tensor([1.0, 4.0, 1.0, 0.25])
    assert torch.equal(relative_scores(scores, profile, 0.0), scores)
    half = torch.tensor([[0.2, 0.2, 0.4, 0.4], [0.1, 0.05, 0.6, 0.8]])
    assert torch.allclose(relative_scores(scores, profile, 0.5), half)
    # two slabs are the middles of pairs of the four
    coarse = relative_scores(scores[:, :2], profile, 1.0)
    assert torch.allclose(coarse, scores[:, :2] / torch.tensor([2.5, 0.625]))
