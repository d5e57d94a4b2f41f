# SPDX-License-Identifier: Apache-2.0
"""Whitening start of the tokenizers: zero mean and unit covariance on the images it was computed from."""

import torch

from unimedi_components.engines.whitening import WhitenTokenizers, whiten_patch_embed
from unimedi_components.networks import UnifiedViT
from unimedi_components.networks.embed import PatchEmbed


def test_tokens_of_the_images_become_white():
    torch.manual_seed(0)
    mixing = torch.randn(1, 64, 64)
    images = (torch.randn(40, 16, 64) @ mixing + 3.0).view(40, 4, 4, 8, 8).permute(0, 1, 3, 2, 4)
    images = images.reshape(40, 1, 32, 32)
    embed = PatchEmbed((8, 8), 1, 24).double()
    whiten_patch_embed(embed, images.double(), eps=0.0)
    tokens = embed(images.double()).flatten(0, 1)
    assert torch.allclose(tokens.mean(0), torch.zeros(24).double(), atol=1e-9)
    assert torch.allclose(torch.cov(tokens.T), torch.eye(24).double(), atol=1e-6)


def test_the_leading_directions_are_kept_and_damped_by_eps():
    torch.manual_seed(0)
    scales = torch.tensor([4.0, 2.0, 1.0, 0.5])
    patches = torch.randn(50_000, 4) * scales
    images = patches.view(-1, 1, 2, 2)
    embed = PatchEmbed((2, 2), 1, 2)
    whiten_patch_embed(embed, images, eps=0.1)
    variances = scales.square()
    expected = 1 / (variances + 0.1 * variances.mean()).sqrt()
    kernel = embed.proj.weight.detach().view(2, 4).abs()
    assert torch.allclose(kernel, torch.diag(expected)[:2], atol=0.01)


def test_volumes_and_patches_smaller_than_the_width():
    torch.manual_seed(0)
    embed = PatchEmbed((1, 2, 2), 1, 6).double()
    before = embed.proj.weight.clone()
    volumes = torch.randn(30, 1, 4, 8, 8, dtype=torch.float64)
    whiten_patch_embed(embed, volumes, eps=0.0)
    tokens = embed(volumes).flatten(0, 1)[:, :4]
    assert torch.allclose(torch.cov(tokens.T), torch.eye(4).double(), atol=1e-8)
    assert torch.equal(embed.proj.weight[4:], before[4:])


class Items:
    """A data set of three X-rays, one unreadable, and two volumes."""

    dims = (2, 2, 2, 3, 3)

    def __getitem__(self, index):
        torch.manual_seed(index)
        if index == 1:
            return ("skipped", "reason")
        return {"image": torch.randn(1, 16, 16) if index < 3 else torch.randn(1, 4, 16, 16)}


class Holder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = UnifiedViT(
            16, (4, 16, 16), patch_size=8, patch_size_3d=(2, 8, 8), embed_dim=8, depth=1, num_heads=1
        )
        self.teacher = UnifiedViT(
            16, (4, 16, 16), patch_size=8, patch_size_3d=(2, 8, 8), embed_dim=8, depth=1, num_heads=1
        )


def test_positions_are_scaled_in_student_and_teacher_but_not_that_of_cls():
    holder = Holder()
    before = {name: value.clone() for name, value in holder.encoder.state_dict().items()}
    WhitenTokenizers(holder, Items(), position_std=0.3)(None)
    table, volume = holder.encoder.pos_embed, holder.encoder.pos_embed_3d
    assert torch.equal(table[:, :1], before["pos_embed"][:, :1])
    for found, start in ((table[:, 1:], before["pos_embed"][:, 1:]), (volume, before["pos_embed_3d"])):
        assert torch.allclose(found, start * 0.3 / start.std()) and abs(float(found.std()) - 0.3) < 1e-6
    assert torch.equal(holder.teacher.pos_embed, table) and torch.equal(holder.teacher.pos_embed_3d, volume)


def test_handler_sets_student_and_teacher_alike():
    holder, items = Holder(), Items()
    expected = PatchEmbed((8, 8), 1, 8)
    whiten_patch_embed(expected, torch.stack([items[0]["image"], items[2]["image"]]))
    WhitenTokenizers(holder, items)(None)
    assert torch.equal(holder.encoder.patch_embed.proj.weight, expected.proj.weight)
    for name, value in holder.teacher.state_dict().items():
        assert torch.equal(value, holder.encoder.state_dict()[name]), name
