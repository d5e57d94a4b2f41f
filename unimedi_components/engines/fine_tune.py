# SPDX-License-Identifier: Apache-2.0
"""Optimizer and schedule of full fine-tuning, where a pre-trained encoder learns more slowly than its new decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from unimedi_components.engines.optim import build_optimizer

__all__ = ["choose_recipe", "fine_tuning_optimizer", "warmup_poly"]


def fine_tuning_optimizer(
    network: nn.Module, lr: float, weight_decay: float, encoder_lr: float | None = None, **kwargs: Any
) -> torch.optim.AdamW:
    """AdamW as `build_optimizer`, with a learning rate of its own for the encoder.

    Args:
        network: a task's network with an `encoder`, or its distributed wrapper.
        lr: of the decoder.
        weight_decay: of matrices and kernels; biases, norms, tokens and position tables have none.
        encoder_lr: of the encoder; None takes `lr`.
        kwargs: further arguments of `torch.optim.AdamW`.
    """
    optimizer = build_optimizer(network, lr, weight_decay, **kwargs)
    own: Any = getattr(network, "module", network)
    slow = {id(parameter) for parameter in own.encoder.parameters()}
    if encoder_lr is None or not any(id(p) in slow for group in optimizer.param_groups for p in group["params"]):
        return optimizer
    groups = []
    for group in optimizer.param_groups:
        for inside, rate in ((False, lr), (True, encoder_lr)):
            chosen = [parameter for parameter in group["params"] if (id(parameter) in slow) == inside]
            if chosen:
                groups.append({"params": chosen, "weight_decay": group["weight_decay"], "lr": rate})
    return torch.optim.AdamW(groups, lr=lr, **kwargs)


def warmup_poly(
    optimizer: torch.optim.Optimizer, total_iters: int, power: float = 0.9, warmup_iters: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then polynomial decay to zero (nnU-Net's and UniMiSS's schedule), per optimizer step.

    Args:
        optimizer: its learning rates are the peaks.
        total_iters: steps of the whole run.
        power: of the decay; 0 keeps the peak.
        warmup_iters: steps of the warm-up; at most half of the run.
    """
    warmup = min(warmup_iters, total_iters // 2)

    def factor(step: int) -> float:
        rise = (step + 1) / (warmup + 1) if step < warmup else 1.0
        return rise * max(0.0, 1 - step / max(1, total_iters)) ** power

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def choose_recipe(freeze_encoder: bool, probe: Mapping[str, Any], fine_tune: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schedule of a probe where the encoder is frozen, else that of fine-tuning."""
    return probe if freeze_encoder else fine_tune
