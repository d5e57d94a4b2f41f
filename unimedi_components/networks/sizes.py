# SPDX-License-Identifier: Apache-2.0
"""Named sizes of the vision encoder: `--size tiny | vit_s16 | vit_b16`, or arguments of `UnifiedViT` as a dict."""

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from unimedi_components.errors import CheckpointError, ConfigError
from unimedi_components.networks.unified_vit import UnifiedViT

_VIT_16 = {"img_size": 224, "vol_size": (32, 128, 128), "patch_size": 16, "patch_size_3d": (4, 16, 16), "depth": 12}
#: Size -> arguments of `UnifiedViT`: the embedded default, ViT-S/16, and the paper's ViT-B/16.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        **{"img_size": 64, "vol_size": (32, 48, 48), "patch_size": 16, "patch_size_3d": (4, 12, 12)},
        **{"embed_dim": 128, "depth": 5, "num_heads": 4},
    },
    "vit_s16": {**_VIT_16, "embed_dim": 384, "num_heads": 6},
    "vit_b16": {**_VIT_16, "embed_dim": 768, "num_heads": 12},
}
#: What decides on the shapes of weights, or on what heads they are cut into; position tables fit any grid.
SHAPES = ("patch_size", "patch_size_3d", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")
_PARAMETERS = inspect.signature(UnifiedViT).parameters
_DEFAULTS = {n: list(p.default) if isinstance(p.default, tuple) else p.default for n, p in _PARAMETERS.items()}
#: Heads of the ViTs that others train, by width and depth: weights do not tell.
_HEADS = {(192, 12): 3, (384, 12): 6, (768, 12): 12, (1024, 24): 16, (1280, 32): 16}


def encoder_sizes(size: str | Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Arguments of `UnifiedViT`. Raises ConfigError: no such size, or no such argument; the nearest name is given.

    ``size``: a name in `SIZES`, a dict of arguments, or None for the class's own defaults.
    """
    if size is not None and not isinstance(size, Mapping):
        if size not in SIZES:
            fault = f"is unknown. {_hint(size, SIZES)}" if isinstance(size, str) else "is no size. "
            example = "\"{'embed_dim': 192, 'depth': 12, 'num_heads': 3}\""
            raise ConfigError(f"--size {size!r} {fault}Sizes: {', '.join(SIZES)}, or a dict such as {example}")
        size = SIZES[size]
    sizes = {**(size or {}), **changes}
    for name in sizes:
        if name not in _PARAMETERS:
            hint = _hint(str(name), _PARAMETERS)
            raise ConfigError(f"the encoder has no argument {name!r}. {hint}It takes {', '.join(_PARAMETERS)}")
    return sizes


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def size_name(sizes: Mapping[str, Any]) -> str:
    """The name of the size that has these shapes, or ""."""
    for name, named in SIZES.items():
        if not _differing(sizes, named) and all(key in sizes for key in named if key in SHAPES):
            return name
    return ""


def check_size(sizes: Mapping[str, Any], wanted: Mapping[str, Any], source: str, names: Sequence[str] = SHAPES) -> None:
    """Compare the sizes that weights were trained with with those that the config asks for.

    Raises CheckpointError: they differ in more than the grids of the position tables; both are named.

    Args:
        sizes: of the weights' card, all arguments.
        wanted: of the config; what it does not name may be anything.
    """
    differing = [name for name in _differing(sizes, wanted) if name in names]
    if not differing:
        return
    own, asked = size_name(sizes), size_name(wanted)
    here, there = (", ".join(f"{name} {_plain(part[name])}" for name in differing) for part in (sizes, wanted))
    kept = {name: _plain(sizes[name]) for name in SHAPES if name in sizes and _plain(sizes[name]) != _DEFAULTS[name]}
    remedy = f"--size {own}" if own else f'--size "{kept}"'
    alone = "" if asked else " and no sizes besides in network_def#encoder"
    kinds = [f"size {name}" if name else "a size of its own" for name in (own, asked)]
    raise CheckpointError(
        f"{source}: its encoder is of {kinds[0]} ({here}), the config asks for {kinds[1]} ({there}). Give "
        f"{remedy}{alone}, or weights of the config's size with --encoder_weights"
    )


def sizes_of_state(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Sizes of a ViT by its weights; None where they do not tell how many heads it has.

    Patches are among them where there is a 3D tokenizer: the kernel of a 2D ViT is resampled to any.
    """
    blocks = [int(name.split(".")[1]) for name in state if name.startswith("blocks.") and name.split(".")[1].isdigit()]
    if not blocks or "cls_token" not in state or "patch_embed.proj.weight" not in state:
        return None
    width, depth = state["cls_token"].shape[-1], 1 + max(blocks)
    sizes: dict[str, Any] = {"embed_dim": width, "depth": depth}
    if "patch_embed_3d.proj.weight" in state:
        sizes["patch_size"] = tuple(state["patch_embed.proj.weight"].shape[2:])
        sizes["patch_size_3d"] = tuple(state["patch_embed_3d.proj.weight"].shape[2:])
    named = [size["num_heads"] for size in SIZES.values() if (size["embed_dim"], size["depth"]) == (width, depth)]
    heads = next(iter(named), _HEADS.get((width, depth)))
    if heads is None:
        return None
    hidden = state.get("blocks.0.mlp.fc1.weight")
    ratio = {} if hidden is None else {"mlp_ratio": hidden.shape[0] / width}
    return {**sizes, **ratio, "num_heads": heads, "qkv_bias": "blocks.0.attn.qkv.bias" in state}


def _differing(sizes: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return [name for name in SHAPES if name in wanted and name in sizes and _plain(sizes[name]) != _plain(wanted[name])]


def _plain(value: Any) -> Any:
    """A patch size as it is written in a config: one number where all are equal in the plane."""
    if isinstance(value, (list, tuple)):
        return value[0] if len(value) == 2 and value[0] == value[1] else list(value)
    return value
