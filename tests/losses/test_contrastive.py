# SPDX-License-Identifier: Apache-2.0
"""The contrastive loss against a loop over pairs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unimedi_components.losses import contrastive_loss

ROWS, WIDTH = 7, 5
MODALITY = torch.tensor([0, 0, 0, 1, 1, 0, 1])


def reference(image: Tensor, text: Tensor, scale: Tensor, same_kind: bool) -> Tensor:
    """CLIP's loss, one pair at a time; `same_kind` keeps only candidates of the row's modality."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b in ((image, text), (text, image)):
        for i in range(len(a)):
            terms = []
            for j in range(len(b)):
                if same_kind and MODALITY[i] != MODALITY[j]:
                    continue
                cosine = (a[i] * b[j]).sum() / (a[i].square().sum().sqrt() * b[j].square().sum().sqrt())
                terms.append((scale * cosine).exp())
                if i == j:
                    own = scale * cosine
            # of one modality alone, both modalities count the same: four rows of the one, three of the other
            share = 1 / (2 * [4, 3][MODALITY[i]]) if same_kind else 1 / len(image)
            total = total + share * (torch.stack(terms).sum().log() - own)
    return total / 2


@pytest.mark.parametrize("same_kind", [False, True])
def test_value_and_gradients_equal_the_loop(same_kind: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]
    scale = torch.tensor(1 / 0.07, dtype=torch.float64)
    results = []
    for use in ("loss", "loop"):
        inputs = [v.clone().requires_grad_() for v in (*values, scale)]
        if use == "loss":
            loss = contrastive_loss(*inputs, modality=MODALITY, within_modality=same_kind)
        else:
            loss = reference(*inputs, same_kind)
        loss.backward()
        results.append([loss.detach(), *(v.grad for v in inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_known_value() -> None:
    image = torch.eye(4)
    loss = contrastive_loss(image, image, 2.0)
    assert loss.item() == pytest.approx(math.log(math.exp(2) + 3) - 2, abs=1e-6)


def test_computed_in_fp32_under_autocast() -> None:
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randn(ROWS, WIDTH, generator=generator) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(image, text, 14.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(contrastive_loss(image, text, 14.0).item(), abs=1e-6)


def test_only_pair_of_its_modality_costs_nothing() -> None:
    image, text = torch.randn(2, 3), torch.randn(2, 3)
    loss = contrastive_loss(image, text, 10.0, modality=torch.tensor([0, 1]), within_modality=True)
    assert loss.item() == 0.0


def test_no_rows_is_a_connected_zero() -> None:
    image = torch.zeros(0, 3, requires_grad=True)
    loss = contrastive_loss(image, torch.zeros(0, 3), 10.0)
    loss.backward()
    assert loss.item() == 0.0
    assert image.grad is not None


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="differ"):
        contrastive_loss(torch.zeros(2, 3), torch.zeros(3, 3), 1.0)
    with pytest.raises(ValueError, match="pass modality"):
        contrastive_loss(torch.zeros(2, 3), torch.zeros(2, 3), 1.0, within_modality=True)
