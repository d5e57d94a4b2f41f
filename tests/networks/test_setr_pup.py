# SPDX-License-Identifier: Apache-2.0
"""SETR-PUP against its stages written out, upsampling by an explicit sum, and batch statistics over ranks."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.common import randomised
from unimedi_components.networks import UnifiedViT
from unimedi_components.networks.cards import load_network, network_card
from unimedi_components.networks.setr_pup import SETRPUP
from unimedi_components.networks.shared_norm import SharedBatchNorm2d

SIZES = {"img_size": 16, "vol_size": (8, 16, 16), "patch_size_3d": (2, 8, 8), "embed_dim": 12, "depth": 3}
WIDTHS = {4: (6, 4), 6: (6, 4), 8: (6, 5, 4), 12: (6, 5, 4), 16: (6, 5, 4, 3)}


def encoder_of(patch=8, **sizes):
    torch.manual_seed(0)
    size = {6: 12, 12: 24, 9: 18}.get(patch, 16)
    return randomised(UnifiedViT(**{**SIZES, "img_size": size, "num_heads": 2, "patch_size": patch, **sizes}))


def network_of(patch=8, **options):
    encoder = encoder_of(patch)
    torch.manual_seed(1)
    network = SETRPUP(encoder, widths=WIDTHS[patch], **options)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.running_mean, module.weight, module.bias):
                    tensor.add_(torch.randn_like(tensor) * 0.3)
                module.running_var.uniform_(0.5, 2)
    return network


def images(rows, columns, count=2, seed=3):
    return torch.randn(count, 1, rows, columns, generator=torch.Generator().manual_seed(seed))


def upsampled(x, factor, corners):
    """Bilinear upsampling of (B, C, h, w), one output pixel after the other."""
    x = x.numpy()
    height, width = x.shape[2] * factor[0], x.shape[3] * factor[1]
    out = np.zeros((*x.shape[:2], height, width), np.float64)
    places = []
    for size, times in zip(x.shape[2:], factor, strict=True):
        if corners:
            step = 0 if size * times == 1 else (size - 1) / (size * times - 1)
            places.append([i * step for i in range(size * times)])
        else:
            places.append([min(max((i + 0.5) / times - 0.5, 0), size - 1) for i in range(size * times)])
    for i, y in enumerate(places[0]):
        for j, z in enumerate(places[1]):
            for row, a in ((math.floor(y), 1 - y % 1), (min(math.floor(y) + 1, x.shape[2] - 1), y % 1)):
                for column, b in ((math.floor(z), 1 - z % 1), (min(math.floor(z) + 1, x.shape[3] - 1), z % 1)):
                    out[:, :, i, j] += a * b * x[:, :, row, column]
    return torch.from_numpy(out).float()


def normed(x, axes, eps):
    return (x - x.mean(axes, keepdim=True)) / (x.var(axes, keepdim=True, unbiased=False) + eps).sqrt()


@pytest.mark.parametrize("variant", ["mgca", "original"])
@pytest.mark.parametrize("grid", [(2, 2), (3, 2)])
def test_logits_stage_by_stage(variant, grid):
    network, image = network_of(variant=variant).eval(), images(8 * grid[0], 8 * grid[1])
    with torch.no_grad():
        tokens = encoder_of().eval()(image).patches
        if variant == "mgca":
            tokens = tokens @ network.tokens.weight.T + network.tokens.bias
        else:
            tokens = normed(tokens, -1, 1e-6)
        x = tokens.reshape(2, *grid, 12).permute(0, 3, 1, 2)
        for stage in network.stages:
            conv, norm = stage[0], stage[1]
            x = F.conv2d(x, conv.weight, padding=1)
            scale = norm.weight / (norm.running_var + 1e-5).sqrt()
            x = (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
            x = upsampled(x.clamp(min=0), (2, 2), variant == "mgca")
        expected = F.conv2d(x, network.head.weight, network.head.bias, padding=1 if variant == "mgca" else 0)
        assert expected.shape == (2, 1, *image.shape[2:])
        assert torch.allclose(network(image), expected, atol=1e-5)


def test_paper_s_decoder():
    encoder = encoder_of(16)
    assert SETRPUP(encoder).hparams["widths"] == [512, 256, 128, 64]
    assert SETRPUP(encoder, variant="original").hparams["widths"] == [256] * 4
    decoder = {name: tuple(p.shape) for name, p in SETRPUP(encoder).named_parameters() if "encoder" not in name}
    assert decoder["tokens.weight"] == (12, 12)
    assert [decoder[f"stages.{i}.0.weight"] for i in range(4)] == [
        (512, 12, 3, 3), (256, 512, 3, 3), (128, 256, 3, 3), (64, 128, 3, 3)
    ]  # fmt: skip
    assert decoder["head.weight"] == (1, 64, 3, 3)
    assert isinstance(SETRPUP(encoder, variant="original").head, nn.Conv2d)
    assert SETRPUP(encoder, variant="original").head.kernel_size == (1, 1)


@pytest.mark.parametrize("patch", [4, 6, 8, 12, 16])
def test_sizes_that_are_products_of_two_and_three(patch):
    network = network_of(patch).eval()
    assert network(images(2 * patch, 3 * patch)).shape == (2, 1, 2 * patch, 3 * patch)
    assert np.prod([stage[3].scale_factor for stage in network.stages], 0).tolist() == [patch, patch]


def test_patches_of_unequal_sides():
    stages = SETRPUP(encoder_of(8, patch_size=(12, 16), img_size=48)).stages
    assert [stage[3].scale_factor for stage in stages] == [(3, 2), (2, 2), (2, 2), (1, 2)]
    encoder = encoder_of(8, patch_size=(4, 8))
    assert SETRPUP(encoder, 2, widths=(4, 4, 4)).eval()(images(8, 24)).shape == (2, 2, 8, 24)


@pytest.mark.parametrize("auxiliary", [(0, 1), (1, 0)])
def test_auxiliary_heads_read_their_own_blocks_in_training_alone(auxiliary):
    network = network_of(variant="original", auxiliary=auxiliary)
    image = images(16, 24)
    assert isinstance(network.eval()(image), torch.Tensor)
    main, *others = network.train()(image)
    assert main.shape == (2, 1, 16, 24) and len(others) == 2
    for block, head, found in zip(auxiliary, network.auxiliary, others, strict=True):
        with torch.no_grad():
            state = encoder_of().eval()(image, hidden_states=[block]).hidden_states[0][:, 1:]
            tokens = normed(state, -1, 1e-6)
            x = normed(head.stage[0](tokens.reshape(2, 2, 3, 12).permute(0, 3, 1, 2)), (0, 2, 3), 1e-5)
            x = (x * head.stage[1].weight[:, None, None] + head.stage[1].bias[:, None, None]).clamp(min=0)
            expected = upsampled(head.head(x), (8, 8), False)
        assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"variant": "original", "auxiliary": (1,)}])
def test_a_frozen_encoder_stays_as_it_is(options):
    network = network_of(**options).train()
    assert not any(module.training for module in network.encoder.modules())
    found = network(images(16, 16))
    sum(part.square().sum() for part in (found if isinstance(found, list) else [found])).backward()
    named = dict(network.named_parameters())
    assert {name for name, p in named.items() if p.requires_grad} == {n for n in named if not n.startswith("encoder.")}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in named.values() if p.requires_grad)


def test_fine_tuning_reaches_every_parameter_that_may_learn():
    """DDP hangs at a parameter that requires a gradient and gets none."""
    network = network_of(freeze_encoder=False).train()
    assert all(module.training for module in network.modules())
    network(images(16, 16)).square().sum().backward()
    named = dict(network.named_parameters())
    learning = {name for name, parameter in named.items() if parameter.requires_grad}
    assert {name for name, parameter in named.items() if parameter.grad is not None} == learning
    unused = {"mask_token", "patch_embed_3d.proj.weight", "patch_embed_3d.proj.bias", "pos_embed_3d", "segment_embed"}
    assert set(named) - learning == {f"encoder.{name}" for name in unused | {"depth_embed"}}


@pytest.mark.parametrize("options", [{}, {"variant": "original", "auxiliary": (1,)}])
def test_script_for_ckpt_export(options):
    network = network_of(**options).eval()
    script = torch.jit.script(network)
    for count in (1, 2, 3):
        image = images(16, 16, count)
        assert torch.allclose(script(image), network(image), atol=1e-6)


def test_a_network_through_its_files(tmp_path):
    network = network_of(12, num_classes=2, variant="original", auxiliary=(2,), freeze_encoder=False).eval()
    torch.save(network.state_dict(), tmp_path / "model.pt")
    card = network_card(network, "segmentation", ["background", "a", "b"], {"film": {"size": 24}})
    (tmp_path / "model.json").write_text(json.dumps(card))
    loaded = load_network(tmp_path / "model.pt", kind="setr_pup")
    assert loaded.hparams == network.hparams and loaded.card == card
    assert torch.equal(loaded(images(24, 24)), network(images(24, 24)))


@pytest.mark.parametrize(
    ("patch", "options", "message"),
    [
        (8, {"num_classes": 0}, "num_classes must be at least 1, not 0"),
        (8, {"variant": "mla"}, "variant must be one of mgca, original, not 'mla'"),
        (8, {"widths": (4, 4)}, r"widths \[4, 4\]: a patch of \(8, 8\) pixels needs 3 stages, so give 3 positive"),
        (8, {"widths": (4, 4, 0)}, "give 3 positive numbers"),
        (8, {"auxiliary": (1,)}, "auxiliary heads belong to variant 'original'; variant 'mgca' has none"),
        (8, {"auxiliary": (3,), "variant": "original"}, r"auxiliary \[3\] must name different blocks from 0 to 2"),
        (8, {"auxiliary": (1, 1), "variant": "original"}, r"auxiliary \[1, 1\] must name different blocks"),
        (14, {}, "stages of 2 and 3, so a patch of 14 pixels cannot be decoded"),
    ],
)
def test_arguments_without_meaning(patch, options, message):
    encoder = encoder_of(patch, img_size=28) if patch == 14 else encoder_of(patch)
    with pytest.raises(ValueError, match=message):
        SETRPUP(encoder, **options)


def test_images_that_it_cannot_read():
    network = network_of().eval()
    with pytest.raises(ValueError, match=r"expected X-rays \(B, 1, H, W\), got \(1, 1, 8, 16, 16\)"):
        network(torch.zeros(1, 1, 8, 16, 16))
    with pytest.raises(ValueError, match="17"):
        network(torch.zeros(1, 1, 17, 16))


def test_batch_norm_on_one_rank_is_torch_s():
    torch.manual_seed(0)
    ours, theirs, x = SharedBatchNorm2d(3), nn.BatchNorm2d(3), torch.randn(4, 3, 2, 5)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
