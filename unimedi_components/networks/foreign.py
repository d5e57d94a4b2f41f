# SPDX-License-Identifier: Apache-2.0
"""ViT weights of other projects: what their parameters are called, and how they fit `UnifiedViT` exactly.

With the features of the source's own forward load timm, DeiT, DeiT-3, MAE, DINO, iBOT, DINOv2, MGCA's Lightning
checkpoints, CLEAR and BiomedCLIP (all of them timm's names, behind any prefix), Hugging Face's ViT, ViTMAE and Dinov2
(RAD-DINO), with registers or without, DINOv3 by Meta's, timm's and Hugging Face's names, torchvision's ViT, and the
towers of OpenAI's CLIP, open_clip and Hugging Face's CLIP. What would load only nearly is `REFUSED`.
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unimedi_components.errors import CheckpointError
from unimedi_components.networks.embed import resample_patch_embed, resample_pos_embed_2d
from unimedi_components.networks.unified_vit import UnifiedViT

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """One way of naming a ViT's parameters.

    Args:
        anchor: pattern of the name that its files are known by; what stands before it is a wrapper's prefix.
        rules: patterns and what they become, applied to each name in this order; the result has timm's names.
        left_out: beginnings of timm names that are no part of an encoder.
        antialias: whether its own forward resamples position tables with antialiasing.
        rope: whether it has rotary positions and no table, as DINOv3.
    """

    anchor: str
    rules: tuple[tuple[str, str], ...]
    left_out: tuple[str, ...]
    norm_eps: float = 1e-6
    antialias: bool = True
    act_layer: str = "gelu"
    rope: bool = False


_HUGGING_FACE = Family(
    r"embeddings\.patch_embeddings\.(projection\.)?weight",
    (
        (r"^embeddings\.", ""),
        (r"^patch_embeddings\.(projection\.)?", "patch_embed.proj."),
        (r"^position_embeddings$", "pos_embed"),
        (r"^(encoder\.|model\.)?layers?\.", "blocks."),
        (r"\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.", r".attn.\2."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.mlp\.up_proj\.", ".mlp.fc1."),
        (r"\.mlp\.down_proj\.", ".mlp.fc2."),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
        (r"^layernorm\.", "norm."),
    ),
    ("pooler.", "mask_token"),
    norm_eps=1e-12,
    antialias=False,
)
#: In the order in which they are tried.
FAMILIES = (
    Family(
        r"patch_embed\.proj\.weight",
        (
            (r"^blocks\.\d+\.(?=\d)", "blocks."),  # DINOv2 in training keeps its blocks in chunks
            (r"\.gamma_(\d)$", r".ls\1.gamma"),
            (r"\.attn\.([qv])_bias$", r".attn.\1.bias"),
            (r"^rope_embed\.periods$", "rope_periods"),
        ),
        ("head.", "head_dist.", "pre_logits.", "decoder", "mask_token", "masked_embed"),
    ),
    replace(_HUGGING_FACE, anchor=r"encoder\.layer\.0\.layer_scale1\.lambda1", norm_eps=1e-6),  # Dinov2
    _HUGGING_FACE,
    Family(
        r"conv_proj\.weight",
        (
            (r"^class_token$", "cls_token"),
            (r"^conv_proj\.", "patch_embed.proj."),
            (r"^encoder\.pos_embedding$", "pos_embed"),
            (r"^encoder\.layers\.encoder_layer_", "blocks."),
            (r"^encoder\.ln\.", "norm."),
            (r"\.ln_(\d)\.", r".norm\1."),
            (r"\.self_attention\.in_proj_", ".attn.qkv."),
            (r"\.self_attention\.out_proj\.", ".attn.proj."),
            (r"\.mlp\.(linear_1|0)\.", ".mlp.fc1."),
            (r"\.mlp\.(linear_2|3)\.", ".mlp.fc2."),
        ),
        ("heads.",),
    ),
    Family(  # Hugging Face's CLIP
        r"embeddings\.class_embedding",
        (
            (r"^embeddings\.class_embedding$", "cls_token"),
            (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
            (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
            (r"^pre_layrnorm\.", "norm_pre."),
            (r"^post_layernorm\.", "norm."),
            (r"^encoder\.layers\.", "blocks."),
            (r"\.layer_norm(\d)\.", r".norm\1."),
            (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
            (r"\.self_attn\.out_proj\.", ".attn.proj."),
        ),
        ("embeddings.position_ids",),
        norm_eps=1e-5,
        antialias=False,
        act_layer="quick_gelu",
    ),
    Family(
        r"class_embedding",
        (
            (r"^class_embedding$", "cls_token"),
            (r"^positional_embedding$", "pos_embed"),
            (r"^conv1\.", "patch_embed.proj."),
            (r"^ln_pre\.", "norm_pre."),
            (r"^ln_post\.", "norm."),
            (r"^transformer\.resblocks\.", "blocks."),
            (r"\.ln_(\d)\.", r".norm\1."),
            (r"\.ls_(\d)\.", r".ls\1."),
            (r"\.attn\.in_proj_", ".attn.qkv."),
            (r"\.attn\.out_proj\.", ".attn.proj."),
            (r"\.mlp\.c_fc\.", ".mlp.fc1."),
            (r"\.mlp\.c_proj\.", ".mlp.fc2."),
        ),
        ("proj",),
        norm_eps=1e-5,
    ),
)
#: Patterns of names that stand for what `UnifiedViT` cannot compute, and what it is.
REFUSED = (
    (r"^(dist_token|distillation_token)$", "a distillation token"),
    (r"rope|relative_position|rel_pos", "rotary or relative positions"),
    (r"\.attn\.[qk]_norm\.", "norms of queries and keys"),
    (r"\.mlp\.(w12|w1|w2|w3|fc1_[gx]|weights_in|gate_proj)\.", "a gated MLP"),
    (r"^fc_norm\.", "a norm of averaged patches in place of the CLS token's"),
)
#: In the state of OpenAI's own files, whose MLPs are otherwise those of open_clip.
_OPENAI = {"input_resolution", "context_length", "vocab_size"}
_ADDED_HERE = ("mask_token", "segment_embed", "depth_embed", "rope_periods")


def vit_state(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], Family | None]:
    """The ViT in a state dict, with timm's names and no wrapper's prefix, and how the file named it.

    Separate projections of queries, keys and values become one, and LayerScale's factors are multiplied into the layer
    before them: both are the same function. Where student and teacher lie in one file, this project's file gives the
    student and any other the teacher. Raises CheckpointError: no ViT, several, or one that computes what `UnifiedViT`
    does not; one line says what. Returns parameters, and their family; None for those of a `UnifiedViT`, which are left
    as they are.
    """
    found, family = _only_vit(state, source)
    if "patch_embed_3d.proj.weight" in found:
        return found, None
    return _timm_names(found, family, source)


def _only_vit(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], Family]:
    for family in FAMILIES:
        matches = [re.fullmatch(rf"(|.*\.){family.anchor}", name) for name in state]
        prefixes = sorted({match[1] for match in matches if match})
        if not prefixes:
            continue
        teachers = [prefix for prefix in prefixes if "teacher." in prefix]
        chosen = [prefix for prefix in prefixes if prefix in ("", "encoder.")] or teachers or prefixes
        if len(chosen) > 1:
            raise CheckpointError(
                f"{source}: holds {len(chosen)} ViTs ({', '.join(chosen)}); save the one that you want"
            )
        if chosen == teachers != prefixes:
            logger.warning("%s: holds a student and its teacher; the teacher's weights are taken", source)
        if {name.rpartition(".")[2] for name in state} >= _OPENAI:
            family = replace(family, act_layer="quick_gelu")
        return {n.removeprefix(chosen[0]): v for n, v in state.items() if n.startswith(chosen[0])}, family
    raise CheckpointError(
        f"{source}: has no patch_embed.proj.weight; expected a ViT named as by timm, Hugging Face, torchvision or CLIP"
    )


def _timm_names(state: Mapping[str, Tensor], family: Family, source: str) -> tuple[dict[str, Tensor], Family]:
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, replacement in family.rules:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"^(register|storage)_tokens$", "reg_token", name)
        if name.startswith(family.left_out):
            continue
        for pattern, what in REFUSED:
            if re.search(pattern, name) and not (name == "rope_periods" and "pos_embed" not in state):
                raise CheckpointError(f"{source}: has {what}, which UnifiedViT has not; give weights of a ViT without")
        result[name] = value.float()
    if "cls_token" in result and "pos_embed" not in result:
        if "reg_token" not in result:
            raise CheckpointError(
                f"{source}: has neither a position table nor DINOv3's registers; give weights with one"
            )
        if not result["reg_token"].numel():
            del result["reg_token"]
        family = replace(family, norm_eps=1e-5, rope=True)
        result["pos_embed"] = result["cls_token"].new_zeros(1, 2, result["cls_token"].shape[-1])
    try:
        for name in [name for name in result if re.search(r"\.attn\.q\.(weight|bias)$", name)]:
            if name.endswith("bias"):  # DINOv3 has none of keys
                result.setdefault(name.replace(".q.", ".k."), torch.zeros_like(result[name]))
            result[name.replace(".q.", ".qkv.")] = torch.cat([result.pop(name.replace(".q.", f".{x}.")) for x in "qkv"])
        for name in [name for name in result if name.endswith(".attn.qkv.bias_mask")]:
            mask, bias = result.pop(name), name.removesuffix("_mask")
            result[bias] = torch.where(mask == 0, 0, result[bias])
        for name in [name for name in result if re.search(r"\.ls[12]\.gamma$", name)]:
            gamma, layer = result.pop(name), "attn.proj" if name.endswith("ls1.gamma") else "mlp.fc2"
            layer = name[: -len("ls1.gamma")] + layer
            result[f"{layer}.weight"] = gamma[:, None] * result[f"{layer}.weight"]
            result[f"{layer}.bias"] = gamma * result[f"{layer}.bias"]
        width, _, _, _ = result["patch_embed.proj.weight"].shape
        result.setdefault("patch_embed.proj.bias", torch.zeros(width))
        result["cls_token"], table = result["cls_token"].reshape(1, 1, width), result["pos_embed"].reshape(1, -1, width)
    except KeyError as error:
        raise CheckpointError(f"{source}: has no {error.args[0]}; give the whole of a ViT with a CLS token") from error
    except (IndexError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{source}: its tensors are of no ViT ({error}); give a plain ViT's weights") from error
    if math.isqrt(table.shape[1]) ** 2 == table.shape[1]:
        # DeiT-3 and others give the CLS token no position
        table = torch.cat([torch.zeros(1, 1, width), table], 1)
    if math.isqrt(table.shape[1] - 1) ** 2 != table.shape[1] - 1:
        raise CheckpointError(f"{source}: {table.shape[1]} positions are no CLS token and a square of patches")
    return {**result, "pos_embed": table}, family


def layers_of_state(state: Mapping[str, Tensor], family: Family) -> dict[str, Any]:
    """Arguments of `UnifiedViT` by a state dict of `vit_state`: biases, MLPs, norms, activation, registers."""
    found: dict[str, Any] = {"norm_eps": family.norm_eps, "qkv_bias": "blocks.0.attn.qkv.bias" in state}
    if family.rope:
        found["rope"] = True
    if "blocks.0.mlp.fc1.weight" in state:
        hidden, width = state["blocks.0.mlp.fc1.weight"].shape
        found["mlp_ratio"] = hidden / width
    if "norm_pre.weight" in state:  # CLIP's, by whatever names
        found |= {"norm_eps": 1e-5, "pre_norm": True, "act_layer": family.act_layer}
    return {**found, **({"reg_tokens": state["reg_token"].shape[1]} if "reg_token" in state else {})}


def adapt_vit_state(state: Mapping[str, Tensor], encoder: UnifiedViT, antialias: bool = True) -> dict[str, Tensor]:
    """A 2D ViT's state dict made to fit `UnifiedViT`.

    The RGB kernel is summed over its channels, which equals feeding the grey image three times; kernels of another size
    are resampled by FlexiViT's pseudo-inverse; the T_3D kernel is the T_2D kernel spread over the patch depth
    (inflation, divided by the depth); both position tables are resampled from the 2D one, the 3D table repeating it at
    every depth.

    Images reach this project's networks in [-1, 1], which is a mean and deviation of 0.5. A ViT that was trained with
    ImageNet's sees its grey levels moved by up to 0.2 of their range and at 0.45 times its contrast: what fine-tuning
    adapts to; its own features take `(image / 2 + 0.5 - mean) / std`, channel by channel, with `in_chans=3`.

    Args:
        encoder: the network that gives the sizes; its own values fill what a 2D ViT does not have.
        antialias: of the resampling of position tables.
    """
    own, kernel, table = encoder.state_dict(), state["patch_embed.proj.weight"], state["pos_embed"]
    if encoder.patch_embed.proj.in_channels == 1 and kernel.shape[1] != 1:
        kernel = kernel.sum(1, keepdim=True)
    side, pd = math.isqrt(table.shape[1] - 1), encoder.patch_depth
    plane, flat = (
        resample_pos_embed_2d(table[:, 1:], (side, side), grid, antialias)
        for grid in (encoder.grid_3d[1:], encoder.grid_2d)
    )
    kernel_3d = resample_patch_embed(kernel, encoder.patch_embed_3d.patch_size[1:])
    return {
        **{name: own[name] for name in _ADDED_HERE if name in own},
        **state,
        "patch_embed.proj.weight": resample_patch_embed(kernel, encoder.patch_embed.patch_size),
        "pos_embed": torch.cat([table[:, :1], flat], 1),
        "patch_embed_3d.proj.weight": kernel_3d.unsqueeze(2).repeat(1, 1, pd, 1, 1) / pd,
        "patch_embed_3d.proj.bias": state["patch_embed.proj.bias"],
        "pos_embed_3d": plane.repeat(1, encoder.grid_3d[0], 1),
    }
