# SPDX-License-Identifier: Apache-2.0
"""Muon against singular values and a loop over matrices, and AdamW beside it against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from unimedi_components.engines import build_optimizer
from unimedi_components.engines.muon import MuonAdamW, orthogonalize


@pytest.mark.parametrize("shape", [(2, 24, 7), (3, 7, 24), (1, 9, 9)])
def test_singular_vectors_stay_and_values_follow_the_quintic(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.square().sum(1, keepdim=True).sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    assert torch.allclose(orthogonalize(matrices), u @ torch.diag_embed(s) @ vh, atol=1e-12)
    assert s.min() > 0.3 and s.max() < 1.3


def test_a_matrix_without_gradient_signal_stays() -> None:
    assert torch.equal(orthogonalize(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


def _muon(weight: Tensor, gradients: list[Tensor], lr: float, weight_decay: float) -> Tensor:
    """One matrix after another, as the paper writes it."""
    buffer = torch.zeros_like(weight)
    for gradient in gradients:
        buffer = 0.95 * buffer + 0.05 * gradient
        update = orthogonalize((0.95 * buffer + 0.05 * gradient)[None])[0]
        weight = weight - lr * weight_decay * weight
        weight = weight - lr * 0.2 * max(weight.shape) ** 0.5 * update
    return weight


def test_steps_against_a_loop_and_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)).double()
    start = copy.deepcopy(model)
    optimizer = build_optimizer(model, lr=0.02, weight_decay=0.1, muon_lr=0.05, betas=(0.9, 0.95))
    flat = [p for p in start.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(flat, lr=0.02, weight_decay=0.0, betas=(0.9, 0.95))
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for _ in range(3):
        for (name, parameter), twin in zip(model.named_parameters(), start.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            twin.grad = parameter.grad.clone()
            seen[name].append(parameter.grad.clone())
        optimizer.step()
        adamw.step()
    for (name, parameter), twin in zip(model.named_parameters(), start.parameters(), strict=True):
        right = _muon(twin.detach(), seen[name], 0.05, 0.1) if parameter.ndim == 2 else twin
        assert torch.allclose(parameter, right, atol=1e-12), name


def test_a_saved_state_goes_on_to_the_bit() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(3, 5), torch.randn(3)]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient * parameter.detach().sum()
        optimizer.step()

    model = nn.Linear(5, 3)
    optimizer = build_optimizer(model, lr=0.02, weight_decay=0.1, muon_lr=0.05, fused=True)
    step(model, optimizer)
    twin = copy.deepcopy(model)
    resumed = build_optimizer(twin, lr=1.0, weight_decay=0.0, muon_lr=1.0, fused=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        step(model, optimizer)
        step(twin, resumed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_the_scaler_skips_a_step_that_is_not_finite() -> None:
    model = nn.Linear(5, 3)
    optimizer = build_optimizer(model, lr=0.02, weight_decay=0.1, muon_lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(model(torch.full((1, 5), float("inf"))).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0


def test_the_closure_is_called_with_gradients() -> None:
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, lr=0.02, weight_decay=0.0, muon_lr=0.05)
    assert isinstance(optimizer, MuonAdamW)

    def closure() -> float:
        loss = model(torch.ones(1, 2)).square().sum()
        loss.backward()
        return loss.item()

    start = model.weight.detach().clone()
    assert optimizer.step(closure) > 0
    assert not torch.equal(model.weight, start)
