# SPDX-License-Identifier: Apache-2.0
"""Weights in: files read without running code, and loaded strictly with one message."""

import argparse
import logging
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimedi_components.errors import CheckpointError
from unimedi_components.networks.embed import resample_pos_embed_2d, resample_pos_embed_3d
from unimedi_components.networks.foreign import Family, adapt_vit_state, layers_of_state, vit_state
from unimedi_components.networks.sizes import SHAPES, SIZES, check_size, encoder_sizes, sizes_of_state
from unimedi_components.networks.unified_vit import UnifiedViT

logger = logging.getLogger(__name__)

NESTED = ("state_dict", "model", "teacher", "student", "network")
#: A file of code, by torch's message: what it is, and how its weights alone are saved by who trusts it.
CODE = (
    (
        r"TorchScript archive",
        "a TorchScript program",
        "torch.save(torch.jit.load(FILE, 'cpu').state_dict(), 'weights.pt')",
    ),
    (
        r"GLOBAL (?:__main__ )?(\S+)",
        "pickled code",
        "c = torch.load(FILE, 'cpu', weights_only=False); c = c if isinstance(c, dict) else c.state_dict(); "
        "torch.save(next((c[k] for k in ('state_dict', 'model', 'teacher') if k in c), c), 'weights.pt')",
    ),
)


def create_encoder(
    weights: str | Path | None = None, size: str | Mapping[str, Any] | None = None, **kwargs: Any
) -> UnifiedViT:
    """An encoder of a named size, initialised from weights where given.

    Where `model.json` lies beside the weights, the grids of its position tables count unless `kwargs` or a dict name
    others, to which the tables are resampled. Weights without a card whose shapes are those of a known ViT replace the
    size "tiny", which no other project has. Raises CheckpointError: the weights are missing, do not fit, or are of
    another size than the config asks for; both are named; ConfigError: no such size or argument.

    Args:
        weights: what `load_weights` reads; None or "none" is random initialisation.
        size: a name in `SIZES`, or a dict of arguments of `UnifiedViT`; None leaves the class's own.
    """
    from unimedi_components.networks.pretrained import CARD, read_card

    sizes = encoder_sizes(size, **kwargs)
    if weights is None or str(weights).lower() == "none":
        return UnifiedViT(**sizes)
    source, explicit = str(weights), {**(size if isinstance(size, Mapping) else {}), **kwargs}
    path = Path(source)
    if path.is_file() and path.with_name(CARD).is_file():
        own = read_card(path)["encoder"]
        check_size(own, sizes, source)
        encoder = UnifiedViT(**{**own, **{name: value for name, value in explicit.items() if name not in SHAPES}})
        return load_weights(encoder, weights)
    state, family = vit_state(read_state_dict(source), source)
    if family is not None:
        if re.search(r"quick_?gelu", source, re.IGNORECASE):
            family = replace(family, act_layer="quick_gelu")  # files with timm's names do not tell, their names do
        sizes = {**layers_of_state(state, family), **sizes}
        if sizes.get("pre_norm"):
            logger.warning(
                "%s: a CLIP's MLPs are taken to have %s; --network_def#encoder#act_layer", source, sizes["act_layer"]
            )
    if (sizes_in_file := sizes_of_state(state)) is not None:
        width, depth = sizes_in_file["embed_dim"], sizes_in_file["depth"]
        if size == "tiny" and not set(explicit) & set(SHAPES) and width != SIZES["tiny"]["embed_dim"]:
            sizes = {**sizes, **sizes_in_file}
            logger.warning("%s: %d wide, %d blocks; the encoder gets its size", source, width, depth)
        else:
            check_size(sizes_in_file, sizes, source, ("embed_dim", "depth"))
    return _load(UnifiedViT(**sizes), state, family, source)


def load_weights(encoder: UnifiedViT, source: str | Path) -> UnifiedViT:
    """Fill an encoder from this project's `model.pt` or from a ViT that `foreign` knows.

    Raises CheckpointError: file or model not found, not a state dict, what `UnifiedViT` cannot compute, or tensors that
    do not fit; the message lists them.

    Args:
        encoder: network to fill, in place; the epsilon of its norms stays its own.
        source: a local file (.pt, .pth, .safetensors), `timm:<model name>` (extra `[timm]`) or
            `hf:<owner>/<repo>/<file>`. The last two reach the network, as they name a remote model.
    """
    return _load(encoder, *vit_state(read_state_dict(source), str(source)), str(source))


def _load(encoder: UnifiedViT, state: dict[str, Tensor], family: Family | None, source: str) -> UnifiedViT:
    if family is None:
        state = _fit_tables(state, encoder)
    elif (width := state["pos_embed"].shape[-1]) != encoder.embed_dim:
        raise CheckpointError(
            f"{source}: tokens are {width} wide, the network's embed_dim is {encoder.embed_dim}; give the "
            f"weights' size with {_size_option(width)}"
        )
    elif family.rope and encoder.rope_periods is None:
        raise CheckpointError(f"{source}: has rotary positions; build the network with --network_def#encoder#rope True")
    else:
        # of models with registers every forward resamples with antialiasing
        state = adapt_vit_state(state, encoder, family.antialias or "reg_token" in state)
    load_strict(encoder, state, source)
    return encoder


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load every tensor or none, with one message that names what did not match.

    Raises CheckpointError: missing or unexpected tensors, or other shapes.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name}: {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the network"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        fits = len(own) - len(missing) - len(shapes)
        parts = [f"{source}: {fits} of {len(own)} tensors fit {type(module).__name__}"]
        for title, names in (("missing", missing), ("unexpected", unexpected), ("other shape", shapes)):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                parts.append(f"{title}: {', '.join(names[:5])}{more}")
        parts.append("build the network with the sizes that the weights were trained with, or name other weights")
        raise CheckpointError("; ".join(parts))
    module.load_state_dict(dict(state))


def read_state_dict(source: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a file, `timm:` or `hf:`, without running code.

    Of a checkpoint that holds a student and its teacher (DINO, iBOT) it is the teacher's, which a log line says. Raises
    CheckpointError: nothing there, a file of code, or not a mapping of names to tensors.
    """
    text = str(source)
    if text.startswith("timm:"):
        return _from_timm(text.removeprefix("timm:"))
    path = _from_hub(text.removeprefix("hf:")) if text.startswith("hf:") else Path(text)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file; train the pretrain bundle first or give another path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            # DINO and MAE save their arguments too; a Namespace is no more than a dict
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of TorchScript, whose error says the same
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds for a broken file
        raise CheckpointError(f"{path}: cannot be read as weights ({_unreadable(path, str(error), error)}") from error
    while isinstance(content, Mapping) and (key := _wrapper(content)) is not None:
        if key == "teacher" and "student" in content:
            logger.warning("%s: holds a student and its teacher; the teacher's weights are taken", path)
        content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds no state dict (a mapping of parameter names to tensors)")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _wrapper(content: Mapping[str, Any]) -> str | None:
    """The key that weights lie under: one of `NESTED`, or whatever a mapping without tensors calls its only ones."""
    inner = [key for key, value in content.items() if isinstance(value, Mapping)]
    named = [key for key in NESTED if key in inner]
    if named or any(isinstance(value, Tensor) for value in content.values()):
        return next(iter(named), None)
    held = [key for key in inner if _holds_weights(content[key])]
    return held[0] if len(held) == 1 else None


def _holds_weights(part: Any) -> bool:
    """Tensors under names, at any depth; an optimizer's lie under numbers."""
    names = part.items() if isinstance(part, Mapping) else ()
    return any(isinstance(value, Tensor) or _holds_weights(value) for name, value in names if isinstance(name, str))


def _unreadable(path: Path, message: str, error: Exception) -> str:
    """Why, and what to do."""
    for pattern, what, command in CODE:
        if match := re.search(pattern, message):
            named = f"{what}, {match[1]}" if match.lastindex else what
            run = f'python -c "import torch; {command.replace("FILE", repr(str(path)))}"'
            return f"{named}, which is not run); if you trust it, save its weights alone: {run}"
    if "weights_only" in message:  # torch's advice would run what is in the file
        return "neither torch.save nor safetensors wrote it); download or train it again"
    return f"{(message.splitlines() or [type(error).__name__])[0]}); download or train it again"


def _size_option(width: int) -> str:
    """How to ask for a width: by name, as the overlays of the paper's recipes do, or as a dict."""
    named = [name for name, size in SIZES.items() if size["embed_dim"] == width]
    if named:
        return f"--size {named[0]}" + (", as overlays such as chexpert.json do" if named[0] == "vit_b16" else "")
    return f"--size \"{{'embed_dim': {width}, 'depth': ..., 'num_heads': ...}}\""


def _fit_tables(state: dict[str, Tensor], encoder: UnifiedViT) -> dict[str, Tensor]:
    """Resample this project's own position tables where the encoder was built for another grid (same patches)."""
    result = dict(state)
    if not {"pos_embed", "pos_embed_3d", "depth_embed"} <= state.keys():
        return result  # what is missing is named where it is loaded
    rows = state["depth_embed"].shape[1]
    if state["pos_embed"].shape != encoder.pos_embed.shape:
        side = math.isqrt(state["pos_embed"].shape[1] - 1)
        if side * side == state["pos_embed"].shape[1] - 1:
            patches = resample_pos_embed_2d(state["pos_embed"][:, 1:], (side, side), encoder.grid_2d)
            result["pos_embed"] = torch.cat([state["pos_embed"][:, :1], patches], 1)
    if state["pos_embed_3d"].shape != encoder.pos_embed_3d.shape:
        plane = state["pos_embed_3d"].shape[1] // rows
        side = math.isqrt(plane)
        if side * side == plane:
            result["pos_embed_3d"] = resample_pos_embed_3d(state["pos_embed_3d"], (rows, side, side), encoder.grid_3d)
    if rows != encoder.grid_3d[0]:
        table = F.interpolate(state["depth_embed"].transpose(1, 2), size=encoder.grid_3d[0], mode="linear")
        result["depth_embed"] = table.transpose(1, 2)
    return result


def _from_timm(name: str) -> dict[str, Tensor]:
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise CheckpointError(
            f"timm:{name}: timm cannot be imported ({error}); install the extra: pip install 'unimedi-components[timm]'"
        ) from error
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # timm and its hub client raise many kinds
        raise CheckpointError(f"timm:{name}: cannot be loaded ({error}); check the name and the network") from error
    # what no name of its parameters tells
    rotary = getattr(model, "rope", None) is not None and getattr(model, "pos_embed", None) is not None
    after = any(type(block).__name__.endswith("PostNorm") for block in getattr(model, "blocks", ()))
    if rotary or after:
        what = "rotary positions beside its table" if rotary else "norms after its layers"
        raise CheckpointError(f"timm:{name}: has {what}, which UnifiedViT has not; give weights of a ViT without")
    return model.state_dict()


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    owner, _, rest = name.partition("/")
    repo, _, file = rest.partition("/")
    if not file:
        raise CheckpointError(f"hf:{name}: expected hf:<owner>/<repo>/<file>")
    try:
        return Path(hf_hub_download(f"{owner}/{repo}", file))
    except Exception as error:  # the hub client raises many kinds
        raise CheckpointError(f"hf:{name}: cannot be downloaded ({error}); check the name and the network") from error
