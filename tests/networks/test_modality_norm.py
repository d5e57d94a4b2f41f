# SPDX-License-Identifier: Apache-2.0
"""Normalisation per modality against torch's batch normalisation of each modality alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unimedi_components.networks.modality_norm import ModalityBatchNorm1d

MODALITY = torch.tensor([0, 1, 1, 0, 0, 1, 0, 0])


def features(rows: int = 8, width: int = 3) -> torch.Tensor:
    return 2 * torch.randn(rows, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 5


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kinds", [1, 2])
def test_one_modality_equals_torch(affine: bool, kinds: int) -> None:
    ours = ModalityBatchNorm1d(3, num_modalities=kinds, affine=affine).double()
    theirs = nn.BatchNorm1d(3, affine=affine).double()
    if affine:
        for norm in (ours, theirs):
            nn.init.constant_(norm.weight, 1.7)
            nn.init.constant_(norm.bias, -0.3)
    coefficients = torch.arange(24, dtype=torch.float64).reshape(8, 3)
    which = torch.full((8,), kinds - 1)
    for step in range(2):
        x, y = ((features() * (step + 1)).requires_grad_() for _ in range(2))
        out, expected = ours(x, which), theirs(y)
        torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
        (out * coefficients).sum().backward()
        (expected * coefficients).sum().backward()
        torch.testing.assert_close(x.grad, y.grad, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(ours.running_mean[-1], theirs.running_mean)
    torch.testing.assert_close(ours.running_var[-1], theirs.running_var)
    assert ours.num_batches_tracked[-1] == theirs.num_batches_tracked == 2
    if affine:
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(features(), which), theirs(features()), atol=1e-10, rtol=1e-10)


def test_two_modalities_are_normalised_apart() -> None:
    norm = ModalityBatchNorm1d(3, affine=False).double()
    x = features()
    x[MODALITY == 1] += 100
    out = norm(x, MODALITY)
    for kind in (0, 1):
        alone = nn.BatchNorm1d(3, affine=False).double()
        torch.testing.assert_close(out[kind == MODALITY], alone(x[kind == MODALITY]), atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(norm.running_mean[kind], alone.running_mean)
        torch.testing.assert_close(norm.running_var[kind], alone.running_var)


def test_gradient_numerically() -> None:
    norm = ModalityBatchNorm1d(3).double()
    x = features().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: norm(v, MODALITY), (x,))


def test_large_offset_keeps_its_precision_in_fp32() -> None:
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) + 1e3
    exact = nn.BatchNorm1d(3).double()(x.double())
    torch.testing.assert_close(ModalityBatchNorm1d(3, 1)(x).double(), exact, atol=5e-4, rtol=0)


def test_single_row_uses_running_statistics() -> None:
    norm = ModalityBatchNorm1d(3, affine=False, eps=0).double()
    norm.running_mean[1], norm.running_var[1] = 2.0, 4.0
    x = features().requires_grad_()
    which = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1])
    out = norm(x, which)
    torch.testing.assert_close(out[7], (x[7] - 2) / 2)
    assert norm.running_mean[1].tolist() == [2.0] * 3 and norm.running_var[1].tolist() == [4.0] * 3
    assert norm.num_batches_tracked.tolist() == [1, 0]
    out.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_no_rows() -> None:
    norm = ModalityBatchNorm1d(3)
    x = torch.zeros(0, 3, requires_grad=True)
    out = norm(x, torch.zeros(0, dtype=torch.int64))
    out.sum().backward()
    assert out.shape == (0, 3)
    assert torch.equal(norm.running_var, torch.ones(2, 3))


def test_half_precision_keeps_its_type_and_fp32_statistics() -> None:
    norm = ModalityBatchNorm1d(3, num_modalities=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = norm(features().bfloat16())
    assert out.dtype == torch.bfloat16
    reference = nn.BatchNorm1d(3)
    reference(features().bfloat16().float())
    torch.testing.assert_close(norm.running_mean[0], reference.running_mean)
    torch.testing.assert_close(norm.running_var[0], reference.running_var)


def test_modality_is_required() -> None:
    with pytest.raises(ValueError, match="each of the 8 rows"):
        ModalityBatchNorm1d(3)(features().float())
