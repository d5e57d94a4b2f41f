# SPDX-License-Identifier: Apache-2.0
"""UnifiedViT against a plain ViT written out with explicit attention, and Eq. 1 over all layers and heads."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.common import SIZES, randomised
from unimedi_components.networks import UnifiedViT

SMALL = {**SIZES, "depth": 3, "num_heads": 3}


def encoder_of(dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    return randomised(UnifiedViT(**{**SMALL, **kwargs}).to(dtype)).eval()


def plain_vit(state, tokens, depth, heads, eps=1e-6):
    """timm's ViT blocks on embedded tokens (B, N, D), written out; returns normed tokens and Eq. 1's v."""
    total = 0.0
    x = tokens
    for layer in range(depth):
        p = f"blocks.{layer}."
        h = F.layer_norm(x, x.shape[-1:], state[p + "norm1.weight"], state[p + "norm1.bias"], eps)
        qkv = h @ state[p + "attn.qkv.weight"].T + state[p + "attn.qkv.bias"]
        q, k, v = qkv.chunk(3, dim=-1)
        size = x.shape[-1] // heads
        outs = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
            outs.append(logits.softmax(-1) @ v[..., part])
            total = total + logits[:, 0, 1:].softmax(-1)
        x = x + torch.cat(outs, -1) @ state[p + "attn.proj.weight"].T + state[p + "attn.proj.bias"]
        h = F.layer_norm(x, x.shape[-1:], state[p + "norm2.weight"], state[p + "norm2.bias"], eps)
        h = F.gelu(h @ state[p + "mlp.fc1.weight"].T + state[p + "mlp.fc1.bias"])
        x = x + h @ state[p + "mlp.fc2.weight"].T + state[p + "mlp.fc2.bias"]
    x = F.layer_norm(x, x.shape[-1:], state["norm.weight"], state["norm.bias"], eps)
    return x, total / (depth * heads)


def embed_2d(state, image, patch):
    x = F.conv2d(image, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    cls = state["cls_token"].expand(len(x), -1, -1)
    return torch.cat([cls, x], 1) + state["pos_embed"]


def embed_3d(state, volume, patch):
    x = F.conv3d(volume, state["patch_embed_3d.proj.weight"], state["patch_embed_3d.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2) + state["pos_embed_3d"] + state["segment_embed"][:, :1]
    cls = (state["cls_token"] + state["pos_embed"][:, :1]).expand(len(x), -1, -1)
    return torch.cat([cls, x], 1)


def test_images_equal_the_plain_vit_and_eq1():
    encoder = encoder_of()
    state = encoder.state_dict()
    image = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    out = encoder(image, return_attention=True)
    tokens, v = plain_vit(state, embed_2d(state, image, 8), 3, 3)
    assert torch.allclose(out.cls, tokens[:, 0], atol=1e-10)
    assert torch.allclose(out.patches, tokens[:, 1:], atol=1e-10)
    assert (out.attention - v).abs().max() < 1e-6
    assert torch.allclose(out.attention.sum(1), torch.ones(2).double())


def test_volumes_equal_the_plain_vit_and_eq1():
    encoder = encoder_of()
    state = encoder.state_dict()
    volume = torch.randn(2, 1, 8, 32, 32, dtype=torch.float64)
    out = encoder(volume, return_attention=True)
    tokens, v = plain_vit(state, embed_3d(state, volume, (4, 8, 8)), 3, 3)
    assert torch.allclose(out.patches, tokens[:, 1:], atol=1e-10)
    assert (out.attention - v).abs().max() < 1e-6


def test_volume_with_slices_equals_the_plain_vit_on_concatenated_tokens():
    encoder = encoder_of()
    state = encoder.state_dict()
    volume = torch.randn(2, 1, 8, 32, 32, dtype=torch.float64)
    slices = torch.randn(2, 2, 1, 32, 32, dtype=torch.float64)
    position = torch.tensor([[0.25, 0.75], [0.25, 0.5]], dtype=torch.float64)
    tokens = [embed_3d(state, volume, (4, 8, 8))]
    # Two slabs with centres at 0.25 and 0.75: halfway between them both rows count half.
    table = state["depth_embed"][0]
    rows = [[table[0], table[1]], [table[0], (table[0] + table[1]) / 2]]
    for k in range(2):
        part = embed_2d(state, slices[:, k], 8)[:, 1:]
        depth = torch.stack([rows[0][k], rows[1][k]])[:, None]
        tokens.append(part + depth + state["segment_embed"][:, 1:])
    expected, v = plain_vit(state, torch.cat(tokens, 1), 3, 3)
    out = encoder(volume, slices, position, return_attention=True)
    assert torch.allclose(out.cls, expected[:, 0], atol=1e-10)
    assert torch.allclose(out.patches, expected[:, 1:], atol=1e-10)
    assert (out.attention - v).abs().max() < 1e-6


def test_vit_b_with_timm_names_equals_the_plain_implementation():
    torch.manual_seed(1)
    encoder = UnifiedViT().eval()
    assert sum(p.numel() for p in encoder.blocks.parameters()) == 85_054_464  # timm's vit_base blocks
    state = encoder.state_dict()
    image = torch.randn(1, 1, 224, 224)
    with torch.no_grad():
        out = encoder(image)
        tokens, _ = plain_vit(state, embed_2d(state, image, 16), 12, 12)
    assert (out.cls - tokens[:, 0]).abs().max() < 1e-5
    assert (out.patches - tokens[:, 1:]).abs().max() < 1e-5


def test_a_new_network_treats_a_slice_as_the_2d_image_it_is():
    torch.manual_seed(0)
    encoder = UnifiedViT(**SMALL)
    assert not encoder.segment_embed.any()
    assert not encoder.depth_embed.any()
    image = torch.randn(1, 1, 32, 32)
    tokens, place = encoder._tokenize(torch.randn(1, 1, 8, 32, 32), image[:, None], torch.tensor([[0.3]]))
    alone, alone_place = encoder._tokenize(image, None, None)
    assert torch.equal((tokens + place)[:, -16:], alone + alone_place)


def test_kept_tokens_are_the_same_as_attending_among_them_alone():
    encoder = encoder_of()
    state = encoder.state_dict()
    image = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    keep = torch.tensor([[0, 5, 7], [1, 2, 15]])
    tokens = embed_2d(state, image, 8)
    kept = torch.cat([tokens[:, :1], torch.stack([tokens[b, 1 + keep[b]] for b in range(2)])], 1)
    expected, _ = plain_vit(state, kept, 3, 3)
    assert torch.allclose(encoder(image, keep=keep).patches, expected[:, 1:], atol=1e-10)


def test_masked_tokens_keep_their_place_and_lose_their_content():
    encoder = encoder_of()
    image, other = torch.randn(2, 1, 1, 32, 32, dtype=torch.float64).unbind()
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    changed = image.clone()
    changed[:, :, 8:16, 8:16] = other[:, :, 8:16, 8:16]  # patch 5 of the 4x4 grid
    assert torch.equal(encoder(image, mask=mask).patches, encoder(changed, mask=mask).patches)
    assert not torch.allclose(encoder(image).patches, encoder(changed).patches)
    state = encoder.state_dict()
    tokens = embed_2d(state, image, 8)
    tokens[:, 6] = state["mask_token"][0, 0] + state["pos_embed"][0, 6]
    expected, _ = plain_vit(state, tokens, 3, 3)
    assert torch.allclose(encoder(image, mask=mask).patches, expected[:, 1:], atol=1e-10)


def test_hidden_states_and_gradient_checkpointing():
    encoder = encoder_of()
    image = torch.randn(1, 1, 32, 32, dtype=torch.float64)
    out = encoder(image, hidden_states=[0, 2])
    normed = F.layer_norm(out.hidden_states[1], (24,), encoder.norm.weight, encoder.norm.bias, 1e-6)
    assert len(out.hidden_states) == 2
    assert torch.equal(normed[:, 1:], out.patches)
    encoder.train()
    out = encoder(image, return_attention=True)
    (out.cls.sum() + out.attention.square().sum()).backward()
    plain = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    encoder.grad_checkpointing = True
    out = encoder(image, return_attention=True)
    (out.cls.sum() + out.attention.square().sum()).backward()
    for name, parameter in encoder.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, plain[name], atol=1e-12), name


def test_position_tables_fit_other_grids():
    encoder = encoder_of(torch.float32)
    assert encoder(torch.randn(1, 1, 48, 64)).patches.shape == (1, 48, 24)
    assert encoder(torch.randn(1, 1, 16, 40, 48)).patches.shape == (1, 4 * 5 * 6, 24)
    with torch.no_grad():  # a constant table stays constant on every grid
        encoder.pos_embed.fill_(0.5)
        encoder.pos_embed_3d.fill_(-0.25)
        encoder.segment_embed.zero_()
    _, place = encoder._tokenize(torch.randn(1, 1, 48, 64), None, None)
    assert torch.allclose(place, torch.full_like(place, 0.5), atol=1e-6)
    _, place = encoder._tokenize(torch.randn(1, 1, 16, 40, 48), None, None)
    assert torch.allclose(place, torch.full_like(place, -0.25), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 30, 32), r"30x32 cannot be cut into patches of 8x8.*nearest: 32x32"),
        ((1, 1, 6, 32, 32), r"6x32x32 cannot be cut into patches of 4x8x8"),
        ((1, 3, 32, 32), "reads 1 channel"),
        ((1, 32, 32), r"expected images \(B, C, H, W\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        UnifiedViT(**SMALL)(torch.zeros(shape))


def test_sizes_that_cannot_be_built_are_refused():
    with pytest.raises(ValueError, match="224x224 cannot be cut into patches of 15x15"):
        UnifiedViT(224, patch_size=15)
    for size in ("embed_dim", "depth", "num_heads"):
        with pytest.raises(ValueError, match=f"{size} 0.* must be at least 1"):
            UnifiedViT(**{**SMALL, size: 0})
    with pytest.raises(ValueError, match="embed_dim 24 is not a multiple of num_heads 5"):
        UnifiedViT(**{**SMALL, "num_heads": 5})
    with pytest.raises(ValueError, match="slices need slice_position"):
        UnifiedViT(**SMALL)(torch.zeros(1, 1, 8, 32, 32), torch.zeros(1, 1, 1, 32, 32))
