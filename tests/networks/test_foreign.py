# SPDX-License-Identifier: Apache-2.0
"""Weights of other projects: files with their names and shapes, and the features of their own forward."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from unimedi_components.errors import CheckpointError
from unimedi_components.networks import UnifiedViT, create_encoder
from unimedi_components.networks.embed import resample_patch_embed
from unimedi_components.networks.weights import load_weights

WIDTH, DEPTH, HEADS, PATCH, SIDE = 24, 2, 3, 8, 32
SIZES: dict[str, Any] = {
    **{"img_size": SIDE, "vol_size": (8, SIDE, SIDE), "patch_size": PATCH, "patch_size_3d": (4, PATCH, PATCH)},
    **{"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 2.0, "in_chans": 3},
}
State = dict[str, Tensor]


def randomise(state: State, seed: int = 0) -> State:
    """Values none of which is at its default, scales such as trained weights have them."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) * 0.2 for name, value in state.items()}


def timm_state(channels: int = 3, patch: int = PATCH, grid: int = SIDE // PATCH) -> State:
    """timm's names, written out."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + grid**2, WIDTH),
        "patch_embed.proj.weight": (WIDTH, channels, patch, patch),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    for i in range(DEPTH):
        for name, out, into in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", 2 * WIDTH, WIDTH),
            ("mlp.fc2", WIDTH, 2 * WIDTH),
        ):
            shapes |= {f"blocks.{i}.{name}.weight": (out, into), f"blocks.{i}.{name}.bias": (out,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (WIDTH,), f"blocks.{i}.{name}.bias": (WIDTH,)}
    return randomise({name: torch.empty(shape) for name, shape in shapes.items()})


def plain_vit(state: State, image: Tensor) -> Tensor:
    """Tokens (B, 1 + P, D) of a ViT with timm's names, LayerScale and positions without a CLS entry, step by step."""

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    kernel = state["patch_embed.proj.weight"]
    x = F.conv2d(image, kernel, state["patch_embed.proj.bias"], stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    cls, positions = state["cls_token"].expand(len(x), -1, -1), state["pos_embed"]
    first = positions.new_zeros(1, 1 if positions.shape[1] == x.shape[1] else 0, WIDTH)
    x = torch.cat([cls, x], 1) + torch.cat([first, positions], 1)
    for i in range(DEPTH):
        block = f"blocks.{i}"
        one = torch.ones(WIDTH)
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv)
        mixed = ((q @ k.transpose(-2, -1)) * (WIDTH // HEADS) ** -0.5).softmax(-1) @ v
        mixed = linear(mixed.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x = x + state.get(f"{block}.ls1.gamma", one) * mixed
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + state.get(f"{block}.ls2.gamma", one) * linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "norm")


def layer_scales(name: str = "ls{}.gamma") -> State:
    scales = {f"blocks.{i}.{name.format(k)}": torch.zeros(WIDTH) for i in range(DEPTH) for k in (1, 2)}
    return randomise(scales, seed=1)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def heads_beside(*names: str) -> State:
    return {name: torch.zeros(3, 5) for name in names}


def mgca() -> dict[str, Any]:
    beside = heads_beside("img_encoder_q.global_embed.weight", "text_encoder_q.model.embeddings.word_embeddings.weight")
    state = {**prefixed(timm_state(), "img_encoder_q.model."), **beside}
    return {"epoch": 49, "state_dict": state, "hyper_parameters": {"emb_dim": 128}, "callbacks": {}}


def mae() -> dict[str, Any]:
    beside = {"mask_token": torch.zeros(1, 1, 5), **heads_beside("decoder_pos_embed", "decoder_blocks.0.norm1.weight")}
    return {"model": {**timm_state(), **beside}, "args": argparse.Namespace(norm_pix_loss=True), "epoch": 799}


def dino() -> dict[str, Any]:
    student = prefixed({n: v + 1 for n, v in timm_state().items()}, "module.backbone.")
    teacher = {**prefixed(timm_state(), "backbone."), **heads_beside("head.mlp.0.weight", "head.last_layer.weight_g")}
    return {"student": student, "teacher": teacher, "epoch": 9, "args": argparse.Namespace(arch="vit_small")}


def dinov2_in_training() -> dict[str, Any]:
    teacher = {**timm_state(), **layer_scales()}
    chunked = {re.sub(r"^blocks\.(\d)", r"blocks.\1.\1", name): value for name, value in teacher.items()}
    student = {name: value + 1 for name, value in chunked.items()}
    return {"model": {**prefixed(student, "student.backbone."), **prefixed(chunked, "teacher.backbone.")}}


def clear() -> dict[str, Any]:
    dinov2 = {**timm_state(), **layer_scales(), "mask_token": torch.zeros(1, WIDTH)}
    text = heads_beside("transformer.resblocks.0.ln_1.weight", "positional_embedding", "visual.projection.weight")
    return {**prefixed(dinov2, "visual.backbone."), **text}


def deit3() -> dict[str, Any]:
    return {"model": {**timm_state(), **layer_scales("gamma_{}"), "pos_embed": timm_state()["pos_embed"][:, 1:]}}


@pytest.mark.parametrize(
    ("write", "reference"),
    [
        (lambda: {**timm_state(), **heads_beside("head.weight", "head.bias")}, timm_state),
        (lambda: prefixed(timm_state(), "visual.trunk."), timm_state),
        (mgca, timm_state),
        (mae, timm_state),
        (dino, timm_state),
        (lambda: {"teacher": prefixed(timm_state(), "backbone.")}, timm_state),
        (lambda: {**timm_state(), **layer_scales()}, lambda: {**timm_state(), **layer_scales()}),
        (dinov2_in_training, lambda: {**timm_state(), **layer_scales()}),
        (clear, lambda: {**timm_state(), **layer_scales()}),
        (deit3, lambda: {**timm_state(), **layer_scales(), "pos_embed": timm_state()["pos_embed"][:, 1:]}),
    ],
    ids=[
        "timm",
        "BiomedCLIP",
        "MGCA",
        "MAE",
        "DINO",
        "DINO's teacher",
        "DINOv2",
        "DINOv2 in training",
        "CLEAR",
        "DeiT-3",
    ],
)
def test_features_are_those_of_a_vit_with_timm_names(
    write: Callable[[], dict[str, Any]], reference: Callable[[], State], tmp_path: Path
) -> None:
    torch.save(write(), tmp_path / "weights.pth")
    image = torch.randn(2, 3, SIDE, SIDE)
    close(create_encoder(tmp_path / "weights.pth", **SIZES), image, plain_vit(reference(), image))


@torch.no_grad()
def close(encoder: UnifiedViT, image: Tensor, tokens: Tensor) -> None:
    output = encoder.eval()(image)
    torch.testing.assert_close(torch.cat([output.cls.unsqueeze(1), output.patches], 1), tokens, atol=1e-5, rtol=0)


HF: dict[str, Any] = {
    **{"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "image_size": SIDE},
    **{"intermediate_size": 2 * WIDTH, "patch_size": PATCH},
}


def saved(model: Any, folder: Path) -> Any:
    model.load_state_dict(randomise(model.state_dict()))
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("size", [SIDE, 48])
@pytest.mark.parametrize("name", ["ViT", "Dinov2", "Dinov2WithRegisters"])
def test_features_are_those_of_transformers(name: str, size: int, tmp_path: Path) -> None:
    options = {**HF, **({"mlp_ratio": 2} if name.startswith("Dinov2") else {})}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options))
    saved(model, tmp_path)
    image = torch.randn(2, 3, size, size)
    encoder = create_encoder(tmp_path / "model.safetensors", **{**SIZES, "img_size": size})
    assert encoder.hparams["norm_eps"] == (1e-12 if name == "ViT" else 1e-6)
    with torch.no_grad():
        tokens = model(image, **({"interpolate_pos_encoding": True} if name == "ViT" else {})).last_hidden_state
    registers = 4 if name == "Dinov2WithRegisters" else 0
    assert encoder.hparams.get("reg_tokens", 0) == registers
    tokens = torch.cat([tokens[:, :1], tokens[:, 1 + registers :]], 1)
    close(encoder, image, tokens)
    # names as transformers 5 has them in memory, behind a wrapper
    save_file(prefixed(model.state_dict(), "vit."), tmp_path / "memory.safetensors")
    close(create_encoder(tmp_path / "memory.safetensors", **{**SIZES, "img_size": size}), image, tokens)


DINOV3: dict[str, Any] = {**SIZES, "embed_dim": 48}  # heads of 16 channels: four periods


def dinov3(folder: Path) -> Any:
    sizes = {**HF, "hidden_size": 48, "intermediate_size": 96, "num_register_tokens": 2}
    return saved(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**sizes)), folder)


@torch.no_grad()
def test_features_are_those_of_dinov3(tmp_path: Path) -> None:
    model = dinov3(tmp_path)
    image = torch.randn(2, 3, SIDE, 48)
    tokens = model(image).last_hidden_state
    tokens = torch.cat([tokens[:, :1], tokens[:, 3:]], 1)
    encoder = create_encoder(tmp_path / "model.safetensors", **DINOV3)
    assert encoder.hparams["rope"] and encoder.hparams["norm_eps"] == 1e-5 and encoder.hparams["reg_tokens"] == 2
    close(encoder, image, tokens)
    # the same weights by the names of Meta's files, which mask a bias of the keys and carry their periods
    names = {
        **{r"^embeddings\.register": "storage", r"^embeddings\.": "", r"^patch_embeddings": "patch_embed.proj"},
        **{r"^model\.layer": "blocks", r"attention\.o_proj": "attn.proj", r"layer_scale(\d).lambda1": r"ls\1.gamma"},
        **{r"up_proj": "fc1", r"down_proj": "fc2"},
    }
    state: State = {}
    for name, value in model.state_dict().items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        state[name] = value
    for i in range(DEPTH):
        for kind in ("weight", "bias"):
            q, v = (state.pop(f"blocks.{i}.attention.{x}_proj.{kind}") for x in "qv")
            k = state.pop(f"blocks.{i}.attention.k_proj.{kind}", torch.full_like(q, torch.nan))
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([q, k, v])
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(3, 48).index_fill(0, torch.tensor(1), 0).flatten()
    state["rope_embed.periods"] = 100 ** (torch.arange(4) / 4)
    torch.save(state, tmp_path / "dinov3.pth")
    close(create_encoder(tmp_path / "dinov3.pth", **DINOV3), image, tokens)
    # and by timm's
    for i in range(DEPTH):
        del state[f"blocks.{i}.attn.qkv.bias_mask"]
        bias = state.pop(f"blocks.{i}.attn.qkv.bias").chunk(3)
        state |= {f"blocks.{i}.attn.q_bias": bias[0], f"blocks.{i}.attn.v_bias": bias[2]}
        state |= {f"blocks.{i}.gamma_{k}": state.pop(f"blocks.{i}.ls{k}.gamma") for k in (1, 2)}
    state["reg_token"] = state.pop("storage_tokens")
    del state["rope_embed.periods"], state["mask_token"]
    torch.save(state, tmp_path / "timm.pth")
    close(create_encoder(tmp_path / "timm.pth", **DINOV3), image, tokens)
    with pytest.raises(CheckpointError, match=r"has rotary positions; build the network with .*rope True"):
        load_weights(UnifiedViT(**DINOV3, reg_tokens=2), tmp_path / "timm.pth")


@torch.no_grad()
def test_rotary_positions_are_those_of_the_kept_tokens_and_of_every_slab(tmp_path: Path) -> None:
    dinov3(tmp_path)
    encoder = create_encoder(tmp_path / "model.safetensors", **DINOV3).eval()
    whole = encoder(image := torch.randn(2, 3, SIDE, SIDE))
    order = torch.randperm(16).expand(2, -1)
    shuffled = encoder(image, keep=order)
    torch.testing.assert_close(shuffled.cls, whole.cls)
    torch.testing.assert_close(shuffled.patches, whole.patches[:, order[0]])
    encoder.pos_embed_3d.zero_()
    volume = image[:1].unsqueeze(2).repeat(1, 1, 8, 1, 1)
    low, high = encoder(volume).patches[0].unflatten(0, (2, 16))
    torch.testing.assert_close(low, high)
    # a place is no more than a turn: the plane upside down is another plane
    assert (encoder(volume.flip(3)).cls - encoder(volume).cls).abs().max() > 0.01


def test_features_are_those_of_transformers_mae(tmp_path: Path) -> None:
    config = transformers.ViTMAEConfig(**HF, decoder_hidden_size=16, decoder_num_hidden_layers=1, mask_ratio=0.0)
    model = saved(transformers.ViTMAEForPreTraining(config), tmp_path)
    image = torch.randn(2, 3, SIDE, SIDE)
    encoder = create_encoder(tmp_path / "model.safetensors", **SIZES)
    with torch.no_grad():
        # MAE shuffles its patches even when it masks none
        tokens = model.vit(image, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
    close(encoder, image, tokens)


class TorchViT(nn.Module):
    """torchvision's `VisionTransformer`: its names, and its forward over `nn.MultiheadAttention`."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.conv_proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.encoder = nn.Module()
        self.encoder.pos_embedding = nn.Parameter(torch.zeros(1, 1 + (SIDE // PATCH) ** 2, WIDTH))
        self.encoder.layers = nn.Sequential()
        for i in range(DEPTH):
            block = nn.Module()
            block.ln_1, block.ln_2 = nn.LayerNorm(WIDTH, eps), nn.LayerNorm(WIDTH, eps)
            block.self_attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
            block.mlp = nn.Sequential(
                nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(0), nn.Linear(2 * WIDTH, WIDTH)
            )
            self.encoder.layers.add_module(f"encoder_layer_{i}", block)
        self.encoder.ln = nn.LayerNorm(WIDTH, eps)
        self.heads = nn.Sequential()
        self.heads.add_module("head", nn.Linear(WIDTH, 5))

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_proj(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.encoder.pos_embedding
        for block in self.encoder.layers:
            y = block.ln_1(x)
            x = x + block.self_attention(y, y, y, need_weights=False)[0]
            x = x + block.mlp(block.ln_2(x))
        return self.encoder.ln(x)


@pytest.mark.parametrize("published", [False, True])
def test_features_are_those_of_torchvision(published: bool, tmp_path: Path) -> None:
    model = TorchViT()
    model.load_state_dict(randomise(model.state_dict()))
    state = model.state_dict()
    if published:
        # the files have names older than the code
        state = {n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v for n, v in state.items()}
    torch.save(state, tmp_path / "vit.pth")
    image = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        close(create_encoder(tmp_path / "vit.pth", **SIZES), image, model.eval()(image))


def clip_state(model: TorchViT) -> State:
    """open_clip's names of a vision tower without `ln_pre`, beside a text tower."""
    names = {
        r"^class_token": "class_embedding",
        r"^conv_proj": "conv1",
        r"^encoder\.pos_embedding": "positional_embedding",
        r"^encoder\.layers\.encoder_layer_": "transformer.resblocks.",
        r"\.self_attention\.": ".attn.",
        r"\.mlp\.0\.": ".mlp.c_fc.",
        r"\.mlp\.3\.": ".mlp.c_proj.",
        r"^encoder\.ln\.": "ln_post.",
    }
    state = {}
    for name, value in model.state_dict().items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        if not name.startswith("heads"):
            state[f"visual.{name}"] = value
    state["visual.class_embedding"] = state["visual.class_embedding"].flatten()
    state["visual.positional_embedding"] = state["visual.positional_embedding"][0]
    del state["visual.conv1.bias"]
    beside = heads_beside("visual.proj", "positional_embedding", "transformer.resblocks.0.ln_1.weight", "ln_final.bias")
    return {**state, **beside}


def test_features_are_those_of_open_clip_without_ln_pre(tmp_path: Path) -> None:
    model = TorchViT(eps=1e-5)
    model.load_state_dict(randomise(model.state_dict()))
    assert model.conv_proj.bias is not None
    nn.init.zeros_(model.conv_proj.bias)
    torch.save(clip_state(model), tmp_path / "open_clip_pytorch_model.bin")
    image = torch.randn(2, 3, SIDE, SIDE)
    encoder = create_encoder(tmp_path / "open_clip_pytorch_model.bin", **SIZES)
    with torch.no_grad():
        # timm's names put the norm after all tokens; the CLS token alone is CLIP's feature
        close(encoder, image, model.eval()(image))


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_features_are_those_of_clip(act: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF, hidden_act=act))
    saved(model, tmp_path)
    image = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        pooled = model(image).pooler_output
    # what Hugging Face's files do not say is taken to be its default, and said
    with caplog.at_level(logging.WARNING, "unimedi_components"):
        options = {} if act == "quick_gelu" else {"act_layer": act}
        encoder = create_encoder(tmp_path / "model.safetensors", **SIZES, **options).eval()
    assert f"a CLIP's MLPs are taken to have {act}" in caplog.text
    assert encoder.hparams["pre_norm"] is True and encoder.hparams["norm_eps"] == 1e-5
    # OpenAI's and open_clip's names of the same weights
    names = {
        **{r"^vision_model\.": "", r"^embeddings\.(class_embedding)": r"\1", r"^embeddings\.patch_embedding": "conv1"},
        **{r"^embeddings\.position_embedding\.weight": "positional_embedding", r"^pre_layrnorm": "ln_pre"},
        **{r"^post_layernorm": "ln_post", r"^encoder\.layers": "transformer.resblocks", r"layer_norm(\d)": r"ln_\1"},
        **{r"self_attn\.out_proj": "attn.out_proj", r"mlp\.fc1": "mlp.c_fc", r"mlp\.fc2": "mlp.c_proj"},
    }
    state: State = {}
    for name, value in model.state_dict().items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        state[f"visual.{name}"] = value
    for kind in ("weight", "bias"):
        for i in range(DEPTH):
            block = f"visual.transformer.resblocks.{i}"
            parts = [state.pop(f"{block}.self_attn.{x}_proj.{kind}") for x in "qkv"]
            state[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
    if act == "quick_gelu":
        state |= {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save({"state_dict": prefixed(state, "module."), "epoch": 3}, tmp_path / "clip.pt")
    for network in (encoder, create_encoder(tmp_path / "clip.pt", **SIZES).eval()):
        with torch.no_grad():
            torch.testing.assert_close(network(image).cls, pooled, atol=1e-5, rtol=0)


OPTIMIZER = {"state": {7: {"exp_avg": torch.ones(1)}}, "param_groups": []}


@pytest.mark.parametrize(
    "wrap",
    [{"state_dict_ema": None}, {"model": {"state_dict": None}}, {"backbone": None, "optimizer_state": OPTIMIZER}],
)
def test_weights_are_found_below_whatever_they_are_called(wrap: dict[str, Any], tmp_path: Path) -> None:
    def filled(part: dict[str, Any]) -> dict[str, Any]:
        return {k: timm_state() if v is None else filled(v) if isinstance(v, dict) else v for k, v in part.items()}

    torch.save({**filled(wrap), "epoch": 1}, tmp_path / "weights.pth")
    image = torch.randn(2, 3, SIDE, SIDE)
    # width of the MLPs and biases are the file's, where nothing names them
    sizes = {name: value for name, value in SIZES.items() if name != "mlp_ratio"}
    close(create_encoder(tmp_path / "weights.pth", **sizes), image, plain_vit(timm_state(), image))


def test_registers_and_the_norm_before_the_blocks_stay_with_volumes(tmp_path: Path) -> None:
    encoder = UnifiedViT(**{**SIZES, "in_chans": 1}, reg_tokens=3, pre_norm=True, act_layer="quick_gelu").eval()
    volume, slices = torch.randn(2, 1, 8, SIDE, SIDE), torch.randn(2, 2, 1, SIDE, SIDE)
    seen: list[Tensor] = []
    encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    output = encoder(volume, slices, torch.rand(2, 2), return_attention=True, hidden_states=(0, 1))
    assert seen[0].shape[1] == 1 + 3 + 32 + 32 and output.patches.shape[1] == 64
    torch.testing.assert_close(seen[0].mean(-1), torch.zeros(2, 68), atol=1e-5, rtol=0)
    assert output.attention is not None and all(states.shape[1] == 65 for states in output.hidden_states)
    torch.testing.assert_close(output.attention.sum(1), torch.ones(2))
    encoder.save_pretrained(tmp_path)
    again = UnifiedViT.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(volume).cls, encoder(volume).cls)


#: timm models at a few sizes, and what is said of those that cannot be represented.
TIMM = {
    "vit_base_patch16_224": {},
    "deit3_base_patch16_224": {"init_values": 0.5},
    "vit_base_patch14_dinov2": {"init_values": 0.5},
    "vit_base_patch14_reg4_dinov2": {"init_values": 0.5},
    "deit_base_distilled_patch16_224": {"what": "a distillation token"},
    "vit_base_patch16_clip_224": {},
    "vit_base_patch16_clip_quickgelu_224": {},
    "vit_small_patch16_dinov3": {},
    "vit_small_patch16_dinov3_qkvb": {},
    "vit_base_patch16_siglip_224": {"what": "has no cls_token"},
}


@pytest.mark.parametrize("name", TIMM)
def test_features_are_those_of_timm(name: str, tmp_path: Path) -> None:
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"the extra [timm] is not installed, or its torchvision does not load: {error}")
    options = {**{"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "img_size": SIDE}, **TIMM[name]}
    what = options.pop("what", None)
    model = timm.create_model(name, patch_size=PATCH, **options).eval()
    state = randomise(model.state_dict())
    model.load_state_dict(state)
    if what is not None:
        assert what in refused(state, tmp_path)
        return
    torch.save(state, tmp_path / f"{name}.pt")
    image = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        tokens = model.forward_features(image)
    tokens = torch.cat([tokens[:, :1], tokens[:, model.num_prefix_tokens :]], 1)
    close(create_encoder(tmp_path / f"{name}.pt", **{**SIZES, "mlp_ratio": 4.0}), image, tokens)


@pytest.mark.parametrize("name", ["vit_small_patch16_rope_ape_224", "eva02_enormous_patch14_clip_224"])
def test_timm_s_models_whose_names_hide_what_they_compute(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class BlockPostNorm(nn.Module):
        pass

    rope, block = (nn.Identity(), nn.Module()) if "rope" in name else (None, BlockPostNorm())
    model = SimpleNamespace(rope=rope, pos_embed=torch.zeros(1), blocks=[block])
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=lambda name, pretrained: model))
    what = "rotary positions beside its table" if "rope" in name else "norms after its layers"
    with pytest.raises(CheckpointError, match=f"timm:{name}: has {what}, which UnifiedViT has not"):
        load_weights(UnifiedViT(**SIZES), f"timm:{name}")


def test_features_are_those_of_torchvision_s_own_code(tmp_path: Path) -> None:
    try:
        from torchvision.models import VisionTransformer
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision is not installed or does not load: {error}")
    model = VisionTransformer(SIDE, PATCH, DEPTH, HEADS, WIDTH, 2 * WIDTH).eval()
    model.load_state_dict(randomise(model.state_dict()))
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    image, plain = torch.randn(2, 3, SIDE, SIDE), TorchViT().eval()
    plain.heads = nn.Sequential()
    plain.load_state_dict({name: v for name, v in model.state_dict().items() if not name.startswith("heads")})
    model.heads = nn.Identity()
    with torch.no_grad():
        tokens = plain(image)
        torch.testing.assert_close(tokens[:, 0], model(image))
    close(create_encoder(tmp_path / "vit.pth", **SIZES), image, tokens)


def test_a_grey_image_gives_the_features_of_three_equal_channels(tmp_path: Path) -> None:
    torch.save(timm_state(), tmp_path / "vit.pth")
    grey = torch.randn(2, 1, SIDE, SIDE)
    encoder = create_encoder(tmp_path / "vit.pth", **{**SIZES, "in_chans": 1})
    close(encoder, grey, plain_vit(timm_state(), grey.expand(-1, 3, -1, -1)))


def test_a_larger_patch_makes_the_tokens_of_the_smaller_one() -> None:
    kernel, small = torch.randn(6, 3, 14, 14), torch.randn(5, 3, 14, 14)
    large = F.interpolate(small, size=(16, 16), mode="bicubic", antialias=True)
    tokens = torch.einsum("dchw,bchw->bd", resample_patch_embed(kernel, (16, 16)), large)
    torch.testing.assert_close(tokens, torch.einsum("dchw,bchw->bd", kernel, small), atol=1e-3, rtol=1e-4)
    # for smaller patches it is the best of all kernels: none in its neighbourhood has a smaller error
    resize = F.interpolate(torch.eye(64).view(-1, 1, 8, 8), size=(6, 6), mode="bicubic", antialias=True).flatten(1)
    kernel = torch.randn(1, 1, 8, 8)
    best = torch.linalg.lstsq(resize.double(), kernel.flatten().double()[:, None]).solution
    torch.testing.assert_close(resample_patch_embed(kernel, (6, 6)).flatten().double(), best[:, 0], atol=1e-4, rtol=0)


def test_dinov2_with_patches_of_14_starts_an_encoder_of_patches_of_16(tmp_path: Path) -> None:
    state = {**timm_state(patch=14, grid=37), **layer_scales()}
    torch.save(state, tmp_path / "dinov2.pth")
    encoder = create_encoder(
        tmp_path / "dinov2.pth", **{**SIZES, "img_size": 224, "patch_size": 16, "vol_size": (8, 48, 48), "in_chans": 1}
    )
    assert encoder.pos_embed.shape == (1, 1 + 14 * 14, WIDTH)
    kernel = state["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(encoder.patch_embed.proj.weight.data, resample_patch_embed(kernel, (16, 16)))
    qkv, proj = "blocks.1.attn.qkv.weight", "blocks.1.attn.proj.weight"
    torch.testing.assert_close(encoder.state_dict()[qkv], state[qkv])
    torch.testing.assert_close(encoder.state_dict()[proj], state["blocks.1.ls1.gamma"][:, None] * state[proj])


def refused(state: dict[str, Any], folder: Path) -> str:
    torch.save(state, folder / "weights.pt")
    with pytest.raises(CheckpointError) as caught:
        create_encoder(folder / "weights.pt", **SIZES)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'weights.pt'}: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("added", "what"),
    [
        ({"dist_token": (1, 1, WIDTH), "pos_embed": (1, 18, WIDTH)}, "a distillation token"),
        ({"rope_embed.periods": (2,)}, "rotary or relative positions"),
        ({"blocks.0.attn.q_norm.weight": (8,)}, "norms of queries and keys"),
        ({"blocks.0.mlp.w12.weight": (2, 2)}, "a gated MLP"),
        ({"fc_norm.weight": (WIDTH,)}, "a norm of averaged patches"),
    ],
)
def test_what_cannot_be_represented_is_refused(added: dict[str, tuple[int, ...]], what: str, tmp_path: Path) -> None:
    state = {**timm_state(), **{name: torch.zeros(shape) for name, shape in added.items()}}
    assert f": has {what}" in refused(state, tmp_path)


def test_a_vit_without_any_positions_is_refused(tmp_path: Path) -> None:
    state = {name: value for name, value in timm_state().items() if name != "pos_embed"}
    assert "has neither a position table nor DINOv3's registers" in refused(state, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cls_token": None}, "has no cls_token"),
        ({"pos_embed": torch.zeros(1, 19, WIDTH)}, "19 positions are no CLS token and a square of patches"),
        ({"cls_token": torch.zeros(1, 1, 5)}, "its tensors are of no ViT"),
        ({"blocks.0.ls1.gamma": torch.ones(7)}, "its tensors are of no ViT"),
        ({"blocks.0.ls1.gamma": torch.tensor(1.0)}, "its tensors are of no ViT"),
        ({"patch_embed.proj.weight": torch.ones(WIDTH, 192)}, "its tensors are of no ViT"),
        ({"patch_embed_3d.proj.weight": torch.ones(1)}, "missing: mask_token"),
        ({"blocks.0.extra.weight": torch.ones(7)}, "unexpected: blocks.0.extra.weight"),
        (
            {"teacher.a.patch_embed.proj.weight": torch.ones(WIDTH, 3, 8, 8), "patch_embed.proj.weight": None},
            "has no cls_token",
        ),
    ],
)
def test_damaged_weights_are_one_error(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    state = {name: value for name, value in {**timm_state(), **change}.items() if value is not None}
    assert message in refused(state, tmp_path)


def test_two_vits_in_one_file_are_refused_by_name(tmp_path: Path) -> None:
    state = {**prefixed(timm_state(), "image."), **prefixed(timm_state(), "sketch.")}
    assert "holds 2 ViTs (image., sketch.)" in refused(state, tmp_path)


def test_one_line_says_that_the_teacher_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for content in (dino(), dinov2_in_training()):
        torch.save(content, tmp_path / "full.pth")
        caplog.clear()
        with caplog.at_level(logging.WARNING, "unimedi_components"):
            create_encoder(tmp_path / "full.pth", **SIZES)
        said = f"{tmp_path / 'full.pth'}: holds a student and its teacher; the teacher's weights are taken"
        assert [record.getMessage() for record in caplog.records] == [said]


class Trap:
    """Pickled code."""


def test_files_of_code_are_refused_with_the_remedy(tmp_path: Path) -> None:
    message = refused({"state_dict": timm_state(), "hyper_parameters": Trap()}, tmp_path)
    assert "Trap, which is not run); if you trust it, save its weights alone: python -c " in message
    command = message.split('python -c "')[1].removesuffix('"')
    place = {"__name__": "remedy"}
    exec(command.replace("'weights.pt'", repr(str(tmp_path / "clean.pt"))), place)
    create_encoder(tmp_path / "clean.pt", **SIZES)

    (tmp_path / "page.pth").write_text("<html>404 not found</html>")
    with pytest.raises(
        CheckpointError, match=r"read as weights \(neither torch.save nor safetensors wrote it\); download"
    ):
        create_encoder(tmp_path / "page.pth", **SIZES)

    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    with pytest.raises(CheckpointError, match=r"a TorchScript program, which is not run\); if you trust it") as caught:
        create_encoder(tmp_path / "program.pt", **SIZES)
    assert "\n" not in str(caught.value) and "torch.jit.load(" in str(caught.value)
