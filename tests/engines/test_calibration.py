# SPDX-License-Identifier: Apache-2.0
"""Calibration of the projection: whole images of each modality get zero mean and unit variance, at the very end."""

from types import SimpleNamespace

import pytest
import torch

from tests.common import randomised
from unimedi_components.engines.calibration import CalibrateProjection, calibrate_projection
from unimedi_components.networks import ReportEncoder, UnifiedViT, UniMedI
from unimedi_components.networks.heads import ProjectionHead


@pytest.mark.parametrize("norm", ["batch_per_modality", "batch"])
def test_features_of_each_modality_become_standard(norm):
    torch.manual_seed(0)
    head = ProjectionHead(6, 16, 5, norm).eval()
    features = torch.cat([torch.randn(50, 6) * 3 + 1, torch.randn(70, 6) - 4])
    modality = torch.tensor([0] * 50 + [1] * 70)
    calibrate_projection(head, features, modality)
    embed = head(features, modality).detach()
    parts = [embed] if norm == "batch" else [embed[:50], embed[50:]]
    for part in parts:
        torch.testing.assert_close(part.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
        torch.testing.assert_close(part.var(0), torch.ones(5), atol=1e-3, rtol=0)


def test_statistics_equal_one_training_pass_over_all_rows():
    torch.manual_seed(0)
    head, other = ProjectionHead(6, 16, 5).eval(), ProjectionHead(6, 16, 5).eval()
    other.load_state_dict(head.state_dict())
    features, modality = torch.randn(40, 6) + 2, torch.arange(40) % 2
    calibrate_projection(head, features, modality)
    for norm in (other.input_norm, other.hidden_norm, other.output_norm):
        norm.momentum = 1.0
        # one by one: in training a norm passes on what the batch's biased variance makes of it
        with torch.no_grad():
            norm.train()
            other(features, modality)
            norm.eval()
    for (name, own), (_, reference) in zip(head.named_buffers(), other.named_buffers(), strict=True):
        if "tracked" not in name:
            torch.testing.assert_close(own, reference, atol=1e-5, rtol=1e-4)


def test_a_modality_without_rows_keeps_its_statistics():
    torch.manual_seed(0)
    head = ProjectionHead(6, 16, 5).eval()
    calibrate_projection(head, torch.randn(9, 6) + 2, torch.zeros(9, dtype=torch.int64))
    assert torch.equal(head.input_norm.running_mean[1], torch.zeros(6))
    assert head.input_norm.running_mean[0].min() > 0.5


class Items:
    """Six X-rays, one unreadable, and three volumes; features are their first values."""

    dims = (2, 2, 2, 2, 2, 2, 3, 3, 3)

    def __getitem__(self, index):
        if index == 1:
            return ("skipped", "reason")
        return {"image": torch.full((1, 4, 4) if index < 6 else (1, 2, 4, 4), float(index))}


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.image_projection = ProjectionHead(3, 8, 2)
        self.modes = []

    def encode_image(self, image):
        self.modes.append(self.training)
        return SimpleNamespace(cls=image.flatten(1)[:, :3])


def test_the_handler_runs_in_the_last_epoch_alone_on_whole_images():
    network = Network().train()
    handler = CalibrateProjection(network, Items(), samples=(6, 6), batch_size=4)
    handler(SimpleNamespace(state=SimpleNamespace(epoch=1, max_epochs=2)))
    assert network.modes == [] and torch.equal(network.image_projection.input_norm.running_mean, torch.zeros(2, 3))
    handler(SimpleNamespace(state=SimpleNamespace(epoch=2, max_epochs=2)))
    assert network.modes == [False] * 3 and network.training
    # the mean of 0, 2, 3, 4, 5 and of 6, 7, 8
    expected = torch.tensor([[2.8] * 3, [7.0] * 3])
    torch.testing.assert_close(network.image_projection.input_norm.running_mean, expected)


def test_samples_are_spread_over_the_set():
    network = Network()
    CalibrateProjection(network, Items(), samples=(3, 0))(SimpleNamespace(state=SimpleNamespace(epoch=1, max_epochs=1)))
    # X-rays 0, 2 and 4
    torch.testing.assert_close(network.image_projection.input_norm.running_mean[0], torch.tensor([2.0] * 3))
    assert torch.equal(network.image_projection.input_norm.running_mean[1], torch.zeros(3))


def test_the_profile_is_that_of_the_student_on_whole_volumes():
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "patch_size_3d": (4, 8, 8), "embed_dim": 16, "depth": 1, "num_heads": 2}
    encoder = randomised(UnifiedViT(16, (16, 16, 16), **sizes), 0.2)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 30, "num_attention_heads": 2}
    heads = ProjectionHead(16, 24, 8), ProjectionHead(16, 24, 8)
    network = UniMedI(
        encoder, ReportEncoder(config=text), *heads, self_distillation=False, num_slices=1, profile_power=0.5
    )
    volumes = torch.randn(5, 1, 16, 16, 16)
    items = [{"image": volume} for volume in volumes]
    data = type("Volumes", (), {"dims": (3,) * 5, "__getitem__": lambda _, index: items[index]})()
    CalibrateProjection(network, data, samples=(5, 5), batch_size=2)(
        SimpleNamespace(state=SimpleNamespace(epoch=2, max_epochs=2))
    )
    with torch.no_grad():
        attention = encoder(volumes, return_attention=True).attention
    expected = attention.view(5, 4, 4).mean((0, 2))
    torch.testing.assert_close(network.slab_profile, expected / expected.mean(), atol=1e-5, rtol=1e-5)
    assert network.slab_profile.std() > 1e-4
