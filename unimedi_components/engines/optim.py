# SPDX-License-Identifier: Apache-2.0
"""Parameter groups of the optimizer, schedules of the learning rate, and the type of mixed precision."""

import functools
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from monai.optimizers import WarmupCosineSchedule
from torch import nn

from unimedi_components.command_options import whole_number
from unimedi_components.distributed import rank, unwrap
from unimedi_components.engines.muon import MuonAdamW, hidden_matrices
from unimedi_components.errors import ConfigError

NO_DECAY = (
    "cls_token",
    "mask_token",
    "reg_token",
    "pos_embed",
    "pos_embed_3d",
    "segment_embed",
    "depth_embed",
    "log_temperature",
)

LR_RULES = {"none": lambda ratio: 1.0, "linear": float, "sqrt": math.sqrt}
logger = logging.getLogger(__name__)

_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def use_amp(amp: bool | str, device: torch.device | str) -> bool:
    """Whether a config's `amp` gives mixed precision here: on a GPU, where alone MONAI's engines cast, unless False."""
    on_gpu = torch.cuda.is_available() and str(device) != "cpu"
    if amp and amp != "auto" and not on_gpu:
        _say_float32(str(amp), str(device))
    return on_gpu and bool(amp)


@functools.cache
def _say_float32(amp: str, device: str) -> None:
    logger.warning("amp %s: mixed precision needs a GPU; on %s all is computed in float32", amp, device)


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


def scaled_lr(lr: float, sampler: Any, lr_batch: int, rule: str = "none") -> float:
    """Learning rate of a run's batch, from that of another; where they differ, a line of the log says what was done.

    Args:
        lr: learning rate for `lr_batch` images a step.
        sampler: `MixedBatchSampler`, which knows the images in a step.
        lr_batch: images in a step, over all ranks, that `lr` was chosen for.
        rule: "none" keeps it, "linear" follows the batch (Goyal et al., arXiv 1706.02677), "sqrt" its root, as suits
            Adam (Malladi et al., arXiv 2205.10287).

    Raises:
        ConfigError: an unknown rule.
    """
    if rule not in LR_RULES:
        raise ConfigError(f"lr_rule is {rule!r}; use one of {', '.join(LR_RULES)}")
    batch, ranks = sum(sampler.sizes.values()), sampler.num_replicas
    images = batch * ranks
    scaled = lr * LR_RULES[rule](images / lr_batch)
    if images != lr_batch and rank() == 0:
        each = f" ({batch} on each of {ranks} ranks)" if ranks > 1 else ""
        text = "a step has %d images%s, the learning rate %g is for %d: lr_rule %r %s %g"
        logger.warning(text, images, each, lr, lr_batch, rule, "leaves it at" if scaled == lr else "makes it", scaled)
    return scaled


def build_optimizer(
    network: nn.Module,
    lr: float,
    weight_decay: float,
    sampler: Any = None,
    lr_batch: int | None = None,
    lr_rule: str = "none",
    encoder_lr: float | None = None,
    muon_lr: float | None = None,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices alone: not on biases, norms, tokens, position tables and temperature.

    A learnable temperature is clamped after every step, as in CLIP.

    Args:
        network: its trainable parameters are optimised; the teacher has none.
        sampler, lr_batch, lr_rule: see `scaled_lr`; without `lr_batch` the learning rate stays as it is.
        encoder_lr: of a task's `encoder`, which pre-training has taught and which learns more slowly than its new
            decoder; None takes `lr`.
        muon_lr: peak learning rate of `MuonAdamW` for `hidden_matrices`, scaled as `lr` is; None is AdamW for all.
        kwargs: further arguments of `torch.optim.AdamW`, such as `betas` or `fused`.
    """
    scale = 1.0 if lr_batch is None else scaled_lr(lr, sampler, lr_batch, lr_rule) / lr
    lr *= scale
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            flat = parameter.ndim < 2 or name.rsplit(".", 1)[-1] in NO_DECAY
            (rest if flat else decay).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    slow = set() if encoder_lr is None else {*map(id, unwrap(network).encoder.parameters())}
    if any(id(parameter) in slow for parameter in (*decay, *rest)):
        split = [
            {**group, "params": [p for p in group["params"] if (id(p) in slow) == inside], "lr": rate}
            for group in groups
            for inside, rate in ((False, lr), (True, encoder_lr))
        ]
        groups = [group for group in split if group["params"]]
    optimizer: torch.optim.Optimizer
    if muon_lr is None:
        optimizer = torch.optim.AdamW(groups, lr=lr, **kwargs)
    else:
        matrices = hidden_matrices(network)
        inside = {*map(id, matrices)}
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in inside]
        groups.append({"params": matrices, "lr": muon_lr * scale, "weight_decay": weight_decay, "muon": True})
        optimizer = MuonAdamW(groups, lr=lr, **kwargs)
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


def warmup_poly(
    optimizer: torch.optim.Optimizer, total_iters: int, power: float = 0.9, warmup_iters: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then polynomial decay to zero (nnU-Net's and UniMiSS's schedule), per optimizer step.

    Args:
        power: of the decay; 0 keeps the peak.
        warmup_iters: steps of the warm-up; at most half of the run.
    """
    warmup = min(warmup_iters, total_iters // 2)

    def factor(step: int) -> float:
        rise = (step + 1) / (warmup + 1) if step < warmup else 1.0
        return rise * max(0.0, 1 - step / max(1, total_iters)) ** power

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def total_steps(iterations: int, epochs: int, steps_per_epoch: int) -> int:
    """Steps of a run: `iterations` where they end within its last epoch, else those of whole epochs.

    So a run stops in the middle of an epoch only if its epochs come from the iterations.

    Raises:
        ConfigError: `iterations` is no whole number of at least 1.
    """
    whole_number("iterations", iterations, 1)
    whole = epochs * steps_per_epoch
    return iterations if whole - steps_per_epoch < iterations else whole


def choose_recipe(freeze_encoder: bool, probe: Mapping[str, Any], fine_tune: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schedule of a probe where the encoder is frozen, else that of fine-tuning."""
    return probe if freeze_encoder else fine_tune
