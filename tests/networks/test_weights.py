# SPDX-License-Identifier: Apache-2.0
"""Loading weights: strict with one message, and 2D ViTs fitted to both tokenizers."""

import pytest
import torch
from torch.nn import functional as F

from tests.common import SIZES
from unimedi_components.errors import CheckpointError
from unimedi_components.networks import UnifiedViT, create_encoder, load_weights


def timm_like_state(channels=3, grid=4, patch=8):
    """Random weights under timm's names, head included, as `vit_*` models have them."""
    generator = torch.Generator().manual_seed(0)
    encoder = UnifiedViT(**SIZES)
    ours = ("mask_token", "segment_embed", "depth_embed", "pos_embed_3d", "patch_embed_3d")
    state = {
        n: torch.randn(v.shape, generator=generator) for n, v in encoder.state_dict().items() if not n.startswith(ours)
    }
    state["patch_embed.proj.weight"] = torch.randn(24, channels, patch, patch, generator=generator)
    state["pos_embed"] = torch.randn(1, 1 + grid * grid, 24, generator=generator)
    return {**state, "head.weight": torch.randn(10, 24), "head.bias": torch.randn(10)}


def test_rgb_kernel_is_summed_and_inflated(tmp_path):
    state = timm_like_state()
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "vit.pth")
    encoder = create_encoder(str(tmp_path / "vit.pth"), **SIZES)
    image = torch.randn(2, 1, 32, 32)
    rgb = F.conv2d(image.repeat(1, 3, 1, 1), state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8)
    assert torch.allclose(encoder.patch_embed(image), rgb.flatten(2).transpose(1, 2), atol=1e-4)
    # A volume that is the same image at every depth gives the image's tokens in every slab.
    tokens = encoder.patch_embed_3d(image.unsqueeze(2).repeat(1, 1, 8, 1, 1))
    assert torch.allclose(tokens[:, :16], encoder.patch_embed(image), atol=1e-4)
    assert torch.allclose(tokens[:, 16:], encoder.patch_embed(image), atol=1e-4)
    assert torch.equal(encoder.pos_embed, state["pos_embed"])
    assert torch.equal(encoder.pos_embed_3d[:, :16], state["pos_embed"][:, 1:])
    assert torch.equal(encoder.pos_embed_3d[:, 16:], state["pos_embed"][:, 1:])
    assert torch.equal(encoder.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])


def test_position_table_and_kernel_of_another_size_are_resampled(tmp_path):
    state = timm_like_state(grid=7, patch=4)
    state["pos_embed"][:, 1:] = 2.0
    torch.save(state, tmp_path / "vit.pth")
    fitted = create_encoder(tmp_path / "vit.pth", **SIZES)
    assert torch.allclose(fitted.pos_embed[:, 1:], torch.full((1, 16, 24), 2.0), atol=1e-5)
    # a constant image looks the same in patches of 4 and of 8, alone and at every depth
    image = torch.ones(1, 1, 32, 32)
    token = state["patch_embed.proj.weight"].sum((1, 2, 3)) + state["patch_embed.proj.bias"]
    assert torch.allclose(fitted.patch_embed(image), token.expand(1, 16, -1), atol=1e-4)
    volume = image.unsqueeze(2).repeat(1, 1, 8, 1, 1)
    assert torch.allclose(fitted.patch_embed_3d(volume), token.expand(1, 32, -1), atol=1e-4)


def test_own_weights_load_strictly_and_round_trip(tmp_path):
    torch.manual_seed(0)
    first = UnifiedViT(**SIZES)
    torch.save(first.state_dict(), tmp_path / "model.pt")
    second = UnifiedViT(**SIZES)
    second.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    third = create_encoder(str(tmp_path / "model.pt"), **SIZES)
    volume = torch.randn(1, 1, 8, 32, 32)
    assert torch.equal(first(volume).cls, second(volume).cls)
    assert torch.equal(first(volume).cls, third(volume).cls)
    larger = create_encoder(str(tmp_path / "model.pt"), **{**SIZES, "vol_size": (16, 48, 48), "img_size": 64})
    assert larger.pos_embed.shape == (1, 65, 24)
    assert larger.pos_embed_3d.shape == (1, 4 * 36, 24)
    assert torch.allclose(larger.depth_embed, torch.zeros(1, 4, 24))


def test_one_message_names_what_did_not_match(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(UnifiedViT(**SIZES).state_dict(), path)
    with pytest.raises(CheckpointError) as error:
        create_encoder(str(path), **{**SIZES, "depth": 3, "mlp_ratio": 2.0})
    message = str(error.value)
    # 12 tensors outside the blocks and 12 in each of three; 3 of each block have another MLP width.
    assert message.startswith(f"{path}: 30 of 48 tensors fit UnifiedViT")
    assert "missing: blocks.2.norm1.weight" in message
    assert "other shape: blocks.0.mlp.fc1.weight: (96, 24) in the file, (48, 24) in the network" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pt", None, "no such weights file"),
        ("broken.pt", b"not a checkpoint", "cannot be read as weights"),
        ("list.pt", [1, 2], "holds no state dict"),
        ("other.pt", {"conv.weight": torch.zeros(3)}, "has no patch_embed.proj.weight"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as error:
        load_weights(UnifiedViT(**SIZES), path)
    assert name in str(error.value)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    torch.save({"cls_token": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        load_weights(UnifiedViT(**SIZES), tmp_path / "trap.pt")
    assert not (tmp_path / "trapped").exists()
