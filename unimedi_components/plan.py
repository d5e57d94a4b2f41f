# SPDX-License-Identifier: Apache-2.0
"""What a training needs before it runs: parameters, FLOPs, memory, hours, from the sizes in its config.

Pre-training is counted by hand: matrix products (a multiply-add is two FLOPs), and the tensors that autograd keeps.
Rows are patch tokens that the self-distillation compares. Of a task, torch counts a step, see `plan_task`.
"""

import math
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import nn
from transformers import AutoConfig

from unimedi_components.command_options import whole_number
from unimedi_components.engines.muon import hidden_matrices
from unimedi_components.errors import ConfigError
from unimedi_components.networks import DINOHead, ProjectionHead, ReportEncoder, UnifiedViT, UniMedI, encoder_sizes
from unimedi_components.networks.masking import MODALITIES
from unimedi_components.selection import Grid, kept_counts

#: Name -> memory in GiB, and peak of dense products in TFLOP/s: half precision, float32, TF32 (data sheets, SXM).
GPUS = {
    "v100-32": (32, 125, 15.7, 15.7),  # has no TF32
    "a100-40": (40, 312, 19.5, 156),
    "a100-80": (80, 312, 19.5, 156),
    "h100-80": (80, 989, 67, 494),
}
_WITHOUT_BFLOAT16 = ("v100-32",)
Config = dict[str, Any]
GIB = 2**30
# of the card's memory; the rest is left to CUDA, cuDNN and fragments
_USABLE = 0.9
_IDS = {
    "batch_2d": "train#sampler#batch_2d",
    "batch_3d": "train#sampler#batch_3d",
    "text_tokens": "preprocessing#max_length",
    "epochs": "train#trainer#max_epochs",
    "amp": "amp",
    "loss": "loss_def",
    "xray": "preprocessing#xray",
    "ct": "preprocessing#ct",
}
_BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 28996}


@dataclass(frozen=True)
class StepCost:
    """One training step of one rank.

    Args:
        activations: bytes that autograd keeps between forward and backward.
        passing: bytes of what is largest for a moment beside them.
        float32: FLOPs that are computed in float32 though the rest is in half precision.
    """

    flops: float
    activations: float
    passing: float
    float32: float = 0.0


@dataclass(frozen=True)
class _Stack:
    """A transformer's blocks: FLOPs of a forward pass over N tokens, and bytes that they keep for the backward."""

    width: int
    hidden: int
    depth: int
    heads: int
    half: int
    post_norm: bool = False

    def flops(self, tokens: int) -> float:
        d, h = self.width, self.hidden
        return self.depth * (2.0 * tokens * (4 * d * d + 2 * d * h) + 4.0 * tokens**2 * d)

    def block_bytes(self, tokens: int) -> float:
        # inputs of the norms in float32; q, k, v, attention's output, inputs of qkv and fc1; MLP before and after GELU
        casts = 2 if self.post_norm and self.half < 4 else 0  # q, k and v are three linear layers: a cast for each
        values = 2 * self.width * 4 + (6 + casts) * self.width * self.half + 2 * self.hidden * self.half
        return tokens * (values + 4 * self.heads + 16)


def step_cost(
    network: UniMedI, batch_2d: int, batch_3d: int, text_tokens: int, *, rounds: int = 3, amp: bool = True
) -> StepCost:
    """Cost of one step of `UniMedI` with its loss on one rank.

    Args:
        network: on any device, also "meta".
        text_tokens: tokens of a report, padding included.
        rounds: `sinkhorn_rounds` of the loss; 0 for targets "center".
        amp: mixed precision: matrix products and what they keep are of 2 bytes a value.
    """
    encoder: Any = network.encoder
    half = 2 if amp else 4
    hidden = encoder.blocks[0].mlp.fc1.out_features
    stack = _Stack(encoder.embed_dim, hidden, len(encoder.blocks), encoder.num_heads, half)
    parts, checkpointing = network.accumulation, encoder.grad_checkpointing
    flops = kept = passing = 0.0
    rows = 0
    recomputed = int(parts > 1) + int(checkpointing)
    slices = network.num_slices if network.pseudo_pairs else 0
    values_2d, values_3d = (embed.proj.weight[0].numel() for embed in (encoder.patch_embed, encoder.patch_embed_3d))
    inputs: tuple[tuple[int, list[Grid], int], ...] = (
        (batch_2d, [(1, *encoder.grid_2d)], values_2d),
        (batch_3d, [encoder.grid_3d, *([(slices, *encoder.grid_2d)] if slices else [])], values_3d),
    )
    for name, (images, grids, values) in zip(MODALITIES, inputs, strict=True):
        first = math.prod(grids[0])
        patches = sum(math.prod(grid) for grid in grids)
        embed = 2.0 * stack.width * (first * values + (patches - first) * values_2d)
        if len(grids) > 1 and network.selector != "random":
            flops += images * (stack.flops(1 + first) + 2.0 * stack.width * first * values)
        passes = [patches]
        if network.self_distillation:
            shown = sum(kept_counts(grids, network.mask_ratio, block=network.mask_block))
            seen = shown if network.mask_mode == "drop" else patches
            compared = {"all": seen, "visible": shown, "masked": patches - shown}[network.patch_loss_on]
            rows += images * compared
            flops += images * (stack.flops(1 + patches) + embed)
            passes = [seen, *([patches] if network.vl_on_full in (True, name) else [])]
        some = -(-images // parts)  # images whose activations are there at the same time
        for tokens in passes:
            flops += images * ((3 + recomputed) * stack.flops(1 + tokens) + (2 + int(parts > 1)) * embed)
            one = stack.block_bytes(1 + tokens)
            blocks = stack.depth * (4.0 * stack.width * (1 + tokens) if checkpointing else one)
            # of the tokens: the final norm's input, and the images that the tokenizer keeps
            inner = blocks + 4.0 * stack.width * (1 + tokens) + half * (first * values + (patches - first) * values_2d)
            if parts == 1:
                kept += images * inner
                passing = max(passing, images * one)
            else:  # a part is recomputed at a time; what lasts is its images and outputs
                kept += images * 4.0 * (stack.width * (1 + tokens) + first * values)
                passing = max(passing, some * (inner + one))
        passing = max(passing, some * stack.block_bytes(1 + patches))
    report_flops, report_bytes = _report_cost(network.report_encoder.model, text_tokens, half, parts > 1)
    flops += (batch_2d + batch_3d) * report_flops
    if parts == 1:
        kept += (batch_2d + batch_3d) * report_bytes
    passing = max(passing, -(-(batch_2d + batch_3d) // parts) * report_bytes if parts > 1 else 0.0)
    more_flops, more_bytes = _head_cost(network, batch_2d + batch_3d, rows, rounds, half)
    return StepCost(flops + more_flops, kept + more_bytes, passing)


def _report_cost(model: Any, tokens: int, half: int, recomputed: bool) -> tuple[float, float]:
    """FLOPs, and bytes kept, of the report encoder's passes over one report."""
    config = model.config
    sizes = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size)
    layers = next((list(module) for module in model.modules() if isinstance(module, nn.ModuleList)), [])
    trained = sum(any(p.requires_grad for p in layer.parameters()) for layer in layers)
    stack = _Stack(*sizes, len(layers), config.num_attention_heads, half, post_norm=True)
    backward = (2 + int(recomputed)) * trained / max(len(layers), 1)
    masks = 2 * stack.width * (getattr(config, "hidden_dropout_prob", 0) > 0)
    layer = stack.block_bytes(tokens) + tokens * masks
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        layer = 4.0 * stack.width * tokens
    return stack.flops(tokens) * (1 + backward), trained * layer + 8.0 * stack.width * tokens


def _head_cost(network: UniMedI, batch: int, rows: int, rounds: int, half: int) -> tuple[float, float]:
    """FLOPs, and bytes kept, of the projections and of the self-distillation over `rows` patch tokens."""
    flops = kept = 0.0
    for head in (network.image_projection, network.text_projection):
        for out, into in _matrices(head):
            flops += 3 * 2.0 * batch * out * into
            kept += batch * (16 + half) * (out + into)
    if network.dino_head is not None:
        matrices = _matrices(network.dino_head.mlp)
        bottleneck, hidden = matrices[-1][0], sum(out for out, _ in matrices[:-1])
        rows += batch
        flops += 4 * 2.0 * rows * sum(out * into for out, into in matrices)
        flops += (4 + rounds) * 2.0 * rows * bottleneck * network.dino_head.hparams["out_dim"]
        # inputs of the linear layers, the last in float32 as those of GELUs; of the bottleneck: centring, unit norm,
        # gradients of the loss
        into = sum(into for _, into in matrices[:-1])
        kept += rows * (half * into + 4.0 * (hidden + matrices[-1][1]) + 16.0 * bottleneck)
    return flops, kept


def _matrices(module: nn.Module) -> list[tuple[int, int]]:
    return [(layer.out_features, layer.in_features) for layer in module.modules() if isinstance(layer, nn.Linear)]


def state_bytes(network: nn.Module, amp: bool = True, muon: bool = False) -> float:
    """Bytes that are there in every step: weights, gradients, autocast's halved weights and the optimizer's state.

    AdamW keeps two moments, Muon one of its matrices.
    """
    sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, grad in sizes if grad)
    moments = 2 * trained - (sum(matrix.numel() for matrix in hidden_matrices(network)) if muon else 0)
    return 4.0 * (total + trained + moments) + (2.0 * trained if amp else 0.0)


def network_of_config(config: Config) -> UniMedI:
    """The network of a pre-training config that `check_config` gave, without any memory, on the device "meta".

    A report encoder whose config is not at hand counts as a BERT-base. Raises ConfigError: no pre-training config.
    """
    parts = _plain(config, "@network_def") if "network_def" in config else {}
    if "report_encoder" not in parts:
        raise ConfigError("plan reads the configs of pre-training, and this network has no report_encoder")
    sizes = {name: value for name, value in parts.pop("encoder").items() if name != "weights"}
    text = parts.pop("report_encoder")
    with torch.device("meta"):
        encoder = UnifiedViT(**encoder_sizes(sizes.pop("size", None), **sizes))
        report = ReportEncoder(**_report_config(text))
        for name, width in (("image_projection", encoder.embed_dim), ("text_projection", report.width)):
            parts[name] = ProjectionHead(**{**parts[name], "in_dim": width})
        if parts.get("dino_head") is not None:
            parts["dino_head"] = DINOHead(**{**parts["dino_head"], "in_dim": encoder.embed_dim})
        return UniMedI(encoder, report, **{**parts, "compile": False})


def _plain(config: Config, value: Any) -> Any:
    """A value with what its references lead to; expressions stay text."""
    if isinstance(value, str) and value.startswith("@"):
        return _plain(config, ConfigParser(config)[value[1:]])
    if isinstance(value, dict):
        return {key: _plain(config, part) for key, part in value.items() if key != "_target_"}
    return [_plain(config, part) for part in value] if isinstance(value, list) else value


def _report_config(text: dict[str, Any]) -> dict[str, Any]:
    config = text.get("config")
    if config is None:
        try:
            config = AutoConfig.from_pretrained(text["name_or_path"], local_files_only=True).to_dict()
        except (OSError, ValueError):
            config = _BERT_BASE
    # the vocabulary is that of the reports, which are not read here
    vocabulary = config.get("vocab_size")
    config = {**config, "vocab_size": vocabulary if isinstance(vocabulary, int) else 1000}
    return {**{name: value for name, value in text.items() if name != "name_or_path"}, "config": config}


@dataclass(frozen=True)
class Needs:
    """A run, as `describe` prints it.

    Args:
        cost: of a step of one rank with so many times the smallest batch.
        shown: a batch in words.
        cache: bytes, and of what.
        data: where the number of images comes from.
        once: FLOPs before the first step, of all ranks together.
    """

    network: nn.Module
    amp: bool
    cost: Callable[[int], StepCost]
    times: int
    shown: Callable[[int], str]
    steps: int
    schedule: str
    cache: tuple[float, str]
    data: str
    once: float = 0.0


def describe(
    config: Config, *, gpu: str, gpus: int = 8, share: float = 0.4, xrays: int | None = None, cts: int | None = None
) -> str:
    """The lines that the command `plan` prints; arguments as there.

    Raises:
        ConfigError: an unknown GPU, a number out of its range, or no config of a training.
    """
    if gpu not in GPUS:
        raise ConfigError(f"--gpu {gpu!r} is unknown; use one of {', '.join(GPUS)}")
    for name, value in (("gpus", gpus), ("xrays", xrays), ("cts", cts)):
        if value is not None:
            whole_number(name, value, 1)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ConfigError(f"--share must be in (0, 1], got {share!r}")
    if "report_encoder" in config.get("network_def", {}):
        needs = _pretraining_needs(config, gpus, xrays, cts)
    else:
        from unimedi_components.plan_task import task_needs

        needs = task_needs(config, gpus, xrays, cts, torch.float16 if gpu in _WITHOUT_BFLOAT16 else torch.bfloat16)
    memory, *peaks, tf32 = GPUS[gpu]
    peak = peaks[0] if needs.amp else peaks[1]
    muon = ConfigParser(config).get_parsed_content("optimizer#muon_lr", default=None) is not None
    fixed, step = state_bytes(needs.network, needs.amp, muon), needs.cost(needs.times)
    used = (fixed + step.activations + step.passing) / GIB

    def fits(times: int) -> bool:
        larger = needs.cost(times)
        return fixed + larger.activations + larger.passing <= _USABLE * memory * GIB

    too_large = 1
    while fits(too_large):
        too_large *= 2
    # how many of the batches below it fit
    largest = bisect(range(1, too_large), False, key=lambda times: not fits(times))
    # cuDNN convolves float32 in TF32, unless torch is told otherwise
    seconds = (step.flops - step.float32 + needs.once / (gpus * needs.steps)) / peak + step.float32 / tf32
    hours = needs.steps * seconds / (1e12 * share) / 3600
    slower = f" and {tf32} in {'TF32' if tf32 > peaks[1] else 'float32'}" if step.float32 else ""
    count = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in needs.network.named_children()}
    trained = sum(p.numel() for p in needs.network.parameters() if p.requires_grad) / 1e6
    kind = "half precision" if needs.amp else "float32"
    room = ["--network_def#accumulation"] * isinstance(needs.network, UniMedI)
    if any(parameter.requires_grad for parameter in needs.network.get_submodule("encoder").parameters()):
        room.append("--network_def#encoder#grad_checkpointing True")
    once = f"; features are made once, {needs.once / 1e12:.1f} TFLOP" if needs.once else ""
    decoder = f", {step.float32 / step.flops:.0%} of it convolutions in float32" if step.float32 else ""
    lines = {
        "parameters": f"{trained:.1f} M trained; " + ", ".join(f"{n} {m:.1f} M" for n, m in count.items()),
        "a step": f"{needs.shown(needs.times)} on each of {gpus} ranks: {step.flops / 1e12:.2f} TFLOP each"
        f"{decoder}{once}",
        "memory a rank": f"{used:.1f} of {memory} GiB ({gpu}): {fixed / GIB:.1f} of weights, gradients, optimizer, "
        f"{step.activations / GIB:.1f} of activations, {step.passing / GIB:.1f} in passing",
        "largest batch": f"{needs.shown(largest) if largest else 'none fits'} a rank, in {_USABLE:.0%} of the memory"
        + (f"; {' and '.join(room)} make{'s' * (len(room) == 1)} room" if room else ""),
        "hours": f"{hours:.1f}: {needs.steps} steps, {needs.schedule}, at {share:.0%} of {peak} TFLOP/s "
        f"in {kind}{slower} (assumed), without waiting for data or other ranks",
        "data": needs.data,
        "cache": f"{needs.cache[0] / GIB:.0f} GiB of {needs.cache[1]}",
    }
    return "\n".join(f"{name:<15}{text}" for name, text in lines.items())


def _pretraining_needs(config: Config, gpus: int, xrays: int | None, cts: int | None) -> Needs:
    left_out = [f"--{name}" for name, count in (("xrays", xrays), ("cts", cts)) if count is None]
    assumed = f"assumed: give {' and '.join(left_out)}" if left_out else "as given"
    xrays, cts = xrays or 300_000, cts or 10_000
    network = network_of_config(config)
    at = {name: _plain(config, f"@{id_}") for name, id_ in _IDS.items()}
    batches, amp = (at["batch_2d"], at["batch_3d"]), at["amp"] is not False
    rounds = 0 if at["loss"].get("targets") == "center" else at["loss"].get("sinkhorn_rounds", 3)
    times = math.gcd(*batches)
    unit = [batch // times for batch in batches]

    def cost(times: int) -> StepCost:
        two_d, three_d = (times * part for part in unit)
        return step_cost(network, two_d, three_d, at["text_tokens"], rounds=rounds, amp=amp)

    images, batch = (xrays, batches[0]) if batches[0] else (cts, batches[1])
    epochs, steps = at["epochs"], max(1, images // (batch * gpus))
    side, volume = round(at["xray"]["size"] * 256 / 224), math.prod(at["ct"]["spatial_size"])
    return Needs(
        network=network,
        amp=amp,
        cost=cost,
        times=times,
        shown=lambda times: f"{times * unit[0]} X-rays + {times * unit[1]} CTs",
        steps=epochs * steps,
        schedule=f"{epochs} epochs of {steps} ({images} images)",
        cache=(float(xrays * side**2 + cts * volume), f"{xrays} X-rays and {cts} CTs"),  # a byte a value
        data=f"{xrays} X-rays and {cts} CTs to train on, {assumed}",
    )
