# SPDX-License-Identifier: Apache-2.0
"""UnifiedUNETR against MONAI's UNETR with the same weights, its strides, windows, deep supervision and files."""

import json
import math

import pytest
import torch
from monai.networks.nets import UNETR
from torch.nn import functional as F

from unimedi_components.networks import UnifiedViT, load_network, network_card
from unimedi_components.networks.token_upsampling import upsampling_strides
from unimedi_components.networks.unetr import UnifiedUNETR, resize_positions_3d

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": 2}


def encoder_of(patch=(4, 12, 12), vol=(8, 24, 24), depth=4, seed=0):
    torch.manual_seed(seed)
    return UnifiedViT(**SIZES, vol_size=vol, patch_size_3d=patch, depth=depth)


def volume(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def small(**options):
    encoder = encoder_of()
    return UnifiedUNETR(encoder, 5, **{"hidden_states": (1, 2), "feature_size": 4, **options})


@pytest.mark.parametrize(
    ("patch", "strides"),
    [
        ((4, 16, 16), [(2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)]),
        ((1, 16, 16), [(1, 2, 2)] * 4),
        ((2, 16, 16), [(2, 2, 2), (1, 2, 2), (1, 2, 2), (1, 2, 2)]),
        ((4, 12, 12), [(2, 3, 3), (2, 2, 2), (1, 2, 2)]),
        ((16, 16, 16), [(2, 2, 2)] * 4),
        ((8, 6, 10), [(2, 3, 5), (2, 2, 2), (2, 1, 1)]),
    ],
)
def test_strides_multiply_to_the_patch(patch, strides):
    assert upsampling_strides(patch) == strides
    assert tuple(math.prod(axis) for axis in zip(*strides, strict=True)) == patch
    # the network they build gives a voxel for a voxel
    size = tuple(2 * side for side in patch)
    encoder = encoder_of(patch, size, depth=len(strides))
    network = UnifiedUNETR(encoder, 3, hidden_states=range(len(strides) - 1), feature_size=4).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 1, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize("res_block", [True, False])
def test_decoder_equals_monais_unetr(res_block):
    """The same tokens and image through both decoders with the same weights, with MONAI's cubic patches."""
    torch.manual_seed(0)
    size = (32, 48, 32)
    peer = UNETR(1, 6, size, feature_size=4, hidden_size=24, mlp_dim=48, num_heads=2, res_block=res_block).eval()
    encoder = encoder_of((16, 16, 16), size, depth=12)
    ours = UnifiedUNETR(encoder, 6, hidden_states=(3, 6, 9), feature_size=4, res_block=res_block).eval()
    taken = set()
    names = {"encoder1": "stem", "out": "out"}
    names |= {f"decoder{5 - level}": f"stages.{level}" for level in range(4)}
    state = ours.state_dict()
    for name, value in peer.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "vit":
            continue
        if part in names:
            own = f"{names[part]}.{rest}"
        else:
            # skips run from the coarsest (MONAI's encoder4) to the finest (encoder2)
            level = 4 - int(part[-1])
            first, _, after = rest.partition(".")
            if first == "transp_conv_init":
                own = f"skips.{level}.layers.0.0.{after}"
            else:
                layer, _, inner = after.partition(".")
                own = f"skips.{level}.layers.{int(layer) + 1}.{inner}"
        assert state[own].shape == value.shape
        state[own] = value
        taken.add(own)
    assert taken == {name for name in state if not name.startswith("encoder.")}
    ours.load_state_dict(state)
    image = volume((2, 1, *size))
    with torch.no_grad():
        output = encoder(image, hidden_states=(3, 6, 9))
        hidden = [torch.zeros(2, 12, 24)] * 12
        for index, tokens in zip((3, 6, 9), output.hidden_states, strict=True):
            hidden[index] = tokens[:, 1:]
        peer.vit.forward = lambda x: (output.patches, hidden)
        assert torch.allclose(ours(image), peer(image), atol=1e-5)


def test_position_table_follows_other_sizes():
    """The paper's crop, 48 x 224 x 224 in patches of (4, 16, 16): 2,352 tokens with their own positions."""
    encoder = encoder_of((4, 16, 16), (32, 128, 128), depth=1)
    image = volume((1, 1, 48, 224, 224))
    with torch.no_grad():
        before = encoder(image).patches
        resized = resize_positions_3d(encoder, (48, 224, 224))
        after = resized(image).patches
    assert before.shape == (1, 2352, 24)
    assert torch.allclose(before, after, atol=1e-5)
    assert resized.pos_embed_3d.shape == (1, 2352, 24)
    assert resized.hparams["vol_size"] == (48, 224, 224)
    assert resized.depth_embed.shape == (1, 12, 24)


def test_vol_size_of_the_task_is_kept_in_the_files(tmp_path):
    network = small(vol_size=(16, 36, 24), deep_supervision=True, residual_scores=True, background_prior=0.9)
    card = network_card(network, "segmentation", list("abcde"), {"organs": {}})
    torch.save(network.state_dict(), tmp_path / "model.pt")
    (tmp_path / "model.json").write_text(json.dumps(card))
    again = load_network(tmp_path / "model.pt", kind="unetr")
    image = volume((1, 1, 16, 36, 24))
    with torch.no_grad():
        assert torch.equal(again(image), network.eval()(image))
        # others than the size of training are taken too
        assert again(image[..., :12]).shape == (1, 5, 16, 36, 12)
    assert again.encoder.vol_size == (16, 36, 24)
    assert again.card["label_names"] == list("abcde")


@pytest.mark.parametrize("normalize", [True, False])
def test_tokens_of_hidden_states_are_normalized(normalize):
    network = small(normalize_states=normalize).eval()
    seen = {}
    for level, skip in enumerate(network.skips):
        skip.register_forward_pre_hook(lambda module, inputs, level=level: seen.update({level: inputs[0]}))
    image = volume((2, 1, 8, 24, 24))
    with torch.no_grad():
        network(image)
        states = network.encoder(image, hidden_states=(1, 2)).hidden_states
    # the deepest hidden state meets the coarsest stage; tokens lie on a grid of 2 x 2 x 2
    for level, state in zip((1, 0), states, strict=True):
        tokens = state[:, 1:]
        if normalize:
            centred = tokens - tokens.mean(-1, keepdim=True)
            tokens = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        assert torch.allclose(seen[level], tokens.transpose(1, 2).reshape(2, 24, 2, 2, 2), atol=1e-5)


def test_deep_supervision_in_training_alone():
    network = small(deep_supervision=True)
    image = volume((1, 1, 8, 24, 24))
    scores = network.train()(image)
    assert [tuple(part.shape[2:]) for part in scores] == [(8, 24, 24), (8, 12, 12), (4, 6, 6)]
    assert isinstance(network.eval()(image), torch.Tensor)
    # the finest is what evaluation gives: instance norm knows no modes
    assert torch.allclose(scores[0], network(image), atol=1e-5)


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_residual_scores_add_up_from_the_tokens_to_the_voxels(deep_supervision):
    network = small(residual_scores=True, deep_supervision=deep_supervision)
    image, seen = volume((1, 1, 8, 24, 24)), []
    outs = [*network.coarse_outs, network.out]
    hooks = [out.register_forward_hook(lambda module, inputs, result: seen.append((inputs[0], result))) for out in outs]
    returned = network.train()(image)
    for hook in hooks:
        hook.remove()
    tokens = network.encoder(image).patches.transpose(1, 2).reshape(1, 24, 2, 2, 2)
    assert torch.allclose(seen[0][0], tokens, atol=1e-5)
    kernel, bias = outs[0].conv.conv.weight[..., 0, 0, 0], outs[0].conv.conv.bias
    total = torch.einsum("cd,bdzyx->bczyx", kernel, tokens) + bias[:, None, None, None]
    sums = [total]
    for _, own in seen[1:]:
        total = own + F.interpolate(total, size=own.shape[2:], mode="trilinear", align_corners=False)
        sums.append(total)
    assert [tuple(part.shape[2:]) for part in sums] == [(2, 2, 2), (4, 6, 6), (8, 12, 12), (8, 24, 24)]
    returned = returned if deep_supervision else [returned]
    assert len(returned) == (4 if deep_supervision else 1)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(returned, sums[::-1], strict=False))
    assert torch.allclose(network.eval()(image), sums[-1], atol=1e-5)


def test_residual_scores_start_from_one_background_prior():
    network = small(background_prior=0.9, residual_scores=True)
    outs = [*network.coarse_outs, network.out]
    assert outs[0].conv.conv.bias.softmax(0).tolist() == pytest.approx([0.9, 0.025, 0.025, 0.025, 0.025], abs=1e-6)
    assert not any(out.conv.conv.bias.any() for out in outs[1:])


def test_background_prior():
    network = small(background_prior=0.9, deep_supervision=True)
    for out in (network.out, *network.coarse_outs):
        share = out.conv.conv.bias.softmax(0)
        assert share.tolist() == pytest.approx([0.9, 0.025, 0.025, 0.025, 0.025], abs=1e-6)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("freeze", [True, False])
def test_every_parameter_that_may_learn_gets_a_gradient(freeze, residual):
    """DDP hangs at a parameter that requires a gradient and gets none."""
    network = small(freeze_encoder=freeze, deep_supervision=True, residual_scores=residual).train()
    assert network.encoder.training is not freeze
    sum(part.square().sum() for part in network(volume((2, 1, 8, 24, 24)))).backward()
    wanted = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert wanted == {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    inside = {name for name in wanted if name.startswith("encoder.")}
    if freeze:
        assert not inside
    else:
        unused = {"mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias", "depth_embed"}
        assert inside == {f"encoder.{name}" for name, _ in network.encoder.named_parameters() if name not in unused}


@pytest.mark.parametrize("residual", [True, False])
def test_torchscript_equals_eager_for_any_number_of_volumes(residual):
    network = small(residual_scores=residual).eval()
    script = torch.jit.script(network)
    for count in (1, 3):
        image = volume((count, 1, 8, 24, 24))
        with torch.no_grad():
            assert torch.allclose(script(image), network(image), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"hidden_states": (1,)}, "decoded in 3 stages, which take 2 different blocks"),
        ({"hidden_states": (2, 1)}, "rising order, of 0 to 3"),
        ({"hidden_states": (1, 4)}, "of 0 to 3"),
        ({"background_prior": 1.0}, "background_prior"),
        ({"vol_size": (8, 20, 24)}, "cannot be cut into patches"),
    ],
)
def test_errors(options, match):
    with pytest.raises(ValueError, match=match):
        small(**options)


def test_needs_volumes_and_classes():
    with pytest.raises(ValueError, match="expected volumes"):
        small()(torch.zeros(1, 1, 24, 24))
    with pytest.raises(ValueError, match="at least 2"):
        UnifiedUNETR(encoder_of(), 1, hidden_states=(1, 2))
    with pytest.raises(ValueError, match="one voxel"):
        upsampling_strides((1, 1, 1))
