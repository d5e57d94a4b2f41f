# SPDX-License-Identifier: Apache-2.0
"""Targets of a run's teacher on held images, against the passes written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from unimedi_components.errors import CheckpointError
from unimedi_components.losses import UniMediLoss
from unimedi_components.networks import DINOHead, ProjectionHead, ReportEncoder, UnifiedViT, UniMedI
from unimedi_components.networks.pretrained import Pretrained, make_card
from unimedi_components.retrieval import self_distillation
from unimedi_components.retrieval.self_distillation import load_teacher, self_distillation_metrics

TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 30, "num_attention_heads": 2}


@pytest.fixture
def run(tmp_path: Path) -> tuple[UniMedI, UniMediLoss, Pretrained]:
    """A network with its loss, and what a checkpoint of their run gives."""
    torch.manual_seed(0)
    encoder = UnifiedViT(32, (16, 16, 16), patch_size=8, patch_size_3d=(4, 8, 8), embed_dim=16, depth=2, num_heads=2)
    heads = ProjectionHead(16, 24, 8), ProjectionHead(16, 24, 8)
    dino = DINOHead(16, 20, 24, 12, center_kinds=5)
    network = UniMedI(encoder, ReportEncoder(config=TEXT), *heads, dino, num_slices=2).eval()
    loss = UniMediLoss(out_dim=20)
    with torch.no_grad():
        for tensor in (*network.teacher.parameters(), loss.center_cls, loss.center_patch):
            tensor.add_(torch.randn_like(tensor) * 0.1)
        network.teacher_head.center.running_mean.normal_()
    loss.set_epoch(7)
    torch.save({"network": network.state_dict(), "loss": loss.state_dict()}, tmp_path / "last.pt")
    return network, loss, Pretrained(network, None, make_card(network, {}), tmp_path / "model.pt")


def test_targets_are_softmax_of_centered_logits(run: Any) -> None:
    network, loss, pretrained = run
    teacher = load_teacher(pretrained)
    volume = torch.randn(3, 1, 16, 16, 16)
    with torch.no_grad():
        attention = network.teacher(volume, return_attention=True).attention.view(3, 4, 4).mean(-1)
        best = attention.argsort(1, descending=True)[:, :2].sort(1).values * 4 + 2
        out = network.teacher(volume, *network.take_slices(volume, best))
        head = network.teacher_head
        for tokens, kind, center in ((out.cls, 1, loss.center_cls[1]), (out.patches[:, 5], 3, loss.center_patch[1])):
            rows = F.normalize(head.mlp(tokens) - head.center.running_mean[kind], dim=1)
            temperature = 0.04 + 0.03 * 7 / 29
            expected = torch.softmax((rows @ head.prototypes.T - center) / temperature, 1)
            found = teacher.targets(volume)[0] if kind == 1 else teacher.targets(volume)[1][:, 5]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert teacher.targets(volume)[1].shape == (3, 16, 20)
        assert teacher.targets(torch.randn(2, 1, 32, 32))[1].shape == (2, 16, 20)


def test_keys_and_collapse(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, pretrained = run
    eye = torch.eye(4)

    class Constant:
        def targets(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            cls = eye if image.ndim == 4 else eye[:1].expand(4, 4)
            return cls, eye.expand(4, 4, 4)

    batches = [{"image": torch.zeros(4, 1, 8, 8)}, {"image": torch.zeros(4, 1, 8, 8, 8)}]
    monkeypatch.setattr(self_distillation, "load_teacher", lambda pretrained: Constant())
    monkeypatch.setattr(self_distillation, "make_dataset", lambda *args: None)
    monkeypatch.setattr(self_distillation, "ImageLoader", lambda *args, **options: batches)
    found = self_distillation_metrics(pretrained, [], ".")
    assert found["sd_cls_information_2d"] == pytest.approx(math.log(4)) and found["sd_cls_information_3d"] == 0
    assert found["sd_patch_information_2d"] == pytest.approx(0, abs=1e-9)
    assert found["sd_patch_information_any_position_3d"] == pytest.approx(math.log(4))
    assert found["sd_cls_prototypes_2d"] == pytest.approx(4) and found["sd_collapsed"] is True
    monkeypatch.setattr(self_distillation, "ImageLoader", lambda *args, **options: batches[:1])
    assert self_distillation_metrics(pretrained, [], ".")["sd_collapsed"] is False


def test_without_last_pt_or_of_another_network(run: Any) -> None:
    _, loss, pretrained = run
    path = pretrained.path.with_name("last.pt")
    torch.save({"network": {}, "loss": loss.state_dict()}, path)
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        load_teacher(pretrained)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read as a training state"):
        load_teacher(pretrained)
    path.unlink()
    assert load_teacher(pretrained) is None and self_distillation_metrics(pretrained, [], ".") == {}
