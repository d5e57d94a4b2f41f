# SPDX-License-Identifier: Apache-2.0
"""Parameter groups of the optimizer, the learning-rate schedule, and the type of mixed precision."""

from __future__ import annotations

from typing import Any

import torch
from monai.optimizers import WarmupCosineSchedule
from torch import nn

from unimedi_components.distributed import unwrap
from unimedi_components.errors import ConfigError

__all__ = ["amp_dtype", "build_optimizer", "use_amp", "warmup_cosine"]

NO_DECAY = (
    "cls_token",
    "mask_token",
    "pos_embed",
    "pos_embed_3d",
    "segment_embed",
    "depth_embed",
    "log_temperature",
)


_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def use_amp(amp: bool | str, device: torch.device | str) -> bool:
    """Whether a config's `amp` asks for mixed precision here: "auto" does on a GPU, the name of a type always."""
    on_gpu = torch.cuda.is_available() and str(device) != "cpu"
    return on_gpu if amp == "auto" else bool(amp)


def amp_dtype(amp: bool | str | torch.dtype = "auto") -> torch.dtype:
    """The type of autocast: bfloat16 where the GPU computes in it, else float16, whose gradients need scaling.

    Args:
        amp: "auto", True or False, which name none, "bfloat16" or "float16".

    Raises:
        ConfigError: another name.
    """
    key = "auto" if isinstance(amp, bool) else str(amp).removeprefix("torch.")
    if key == "auto":
        # without a GPU nothing is cast, and the answer does not matter
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        key = "bfloat16" if native else "float16"
    if key not in _HALF:
        raise ConfigError(f"amp is {amp!r}; use one of auto, True, False, {', '.join(_HALF)}")
    return _HALF[key]


def build_optimizer(network: nn.Module, lr: float, weight_decay: float, **kwargs: Any) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone: not on biases, norms, tokens, position tables and temperature.

    A learnable temperature is clamped after every step, as in CLIP.

    Args:
        network: its trainable parameters are optimised; the teacher has none.
        lr: peak learning rate.
        weight_decay: of the decayed group.
        kwargs: further arguments of `torch.optim.AdamW`, such as `betas` or `fused`.
    """
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            flat = parameter.ndim < 2 or name.rsplit(".", 1)[-1] in NO_DECAY
            (rest if flat else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, **kwargs)
    clamp = getattr(unwrap(network), "clamp_temperature", None)
    if clamp is not None:
        optimizer.register_step_post_hook(lambda *_: clamp())
    return optimizer


def warmup_cosine(
    optimizer: torch.optim.Optimizer,
    steps_per_epoch: int,
    epochs: float,
    warmup_epochs: float,
    start_lr: float = 1e-8,
    end_lr: float = 1e-8,
) -> WarmupCosineSchedule:
    """Linear warm-up from `start_lr`, then a cosine to `end_lr`, per optimizer step (section 4.1.2; MGCA's schedule).

    Args:
        optimizer: its learning rate is the peak.
        steps_per_epoch: optimizer steps in an epoch.
        epochs: length of the whole schedule.
        warmup_epochs: length of the warm-up.
        start_lr: learning rate of the first step.
        end_lr: floor of the cosine.

    Raises:
        ValueError: a warm-up as long as the run or longer.
    """
    if warmup_epochs >= epochs:
        raise ValueError(f"warmup_epochs {warmup_epochs} leaves nothing of {epochs} epochs; lower it or train longer")
    peak = optimizer.param_groups[0]["lr"]
    return WarmupCosineSchedule(
        optimizer,
        warmup_steps=round(warmup_epochs * steps_per_epoch),
        t_total=round(epochs * steps_per_epoch),
        end_lr=end_lr,
        warmup_multiplier=start_lr / peak,
    )
