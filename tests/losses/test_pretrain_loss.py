# SPDX-License-Identifier: Apache-2.0
"""The composite loss: sum, centers, temperature schedule, what is left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from unimedi_components.errors import ConfigError
from unimedi_components.losses import UniMediLoss, balanced_center, contrastive_loss, distillation_loss
from unimedi_components.networks.output import UniMediOutput

K, WIDTH = 12, 5


def make_output(patches: int = 9) -> UniMediOutput:
    generator = torch.Generator().manual_seed(0)

    def unit(rows: int) -> torch.Tensor:
        return F.normalize(torch.randn(rows, WIDTH, generator=generator), dim=1)

    return UniMediOutput(
        image_embed=torch.randn(4, 3, generator=generator).requires_grad_(),
        text_embed=torch.randn(4, 3, generator=generator),
        logit_scale=torch.tensor(14.0),
        modality=torch.tensor([0, 0, 1, 1]),
        student_cls=unit(4).requires_grad_(),
        teacher_cls=unit(4),
        student_patches=unit(patches).requires_grad_(),
        teacher_patches=unit(patches),
        patch_weight=torch.rand(patches, generator=generator),
        student_prototypes=unit(K),
        teacher_prototypes=unit(K),
    )


def test_weighted_sum_of_its_parts() -> None:
    out = make_output()
    loss = UniMediLoss(vl_weight=0.5, icl_weight=2.0, pcl_weight=3.0, out_dim=K, chunk_size=4, targets="center")
    total = loss(out, {"ignored": None})
    heads = (out.student_prototypes, out.teacher_prototypes, torch.zeros(K), 0.1, 0.04)
    vl = contrastive_loss(out.image_embed, out.text_embed, out.logit_scale)
    icl = distillation_loss(out.student_cls, out.teacher_cls, *heads)
    pcl = distillation_loss(out.student_patches, out.teacher_patches, *heads, weight=out.patch_weight)
    torch.testing.assert_close(total, 0.5 * vl + 2 * icl + 3 * pcl)
    for name, value in (("vl", vl), ("icl", icl), ("pcl", pcl)):
        torch.testing.assert_close(loss.last[name], value.detach())
        assert not loss.last[name].requires_grad


def test_each_center_follows_its_own_tokens_after_the_loss() -> None:
    out = make_output()
    loss = UniMediLoss(out_dim=K, center_momentum=0.8, targets="center")
    first = loss(out)
    cls_mean = (out.teacher_cls @ out.teacher_prototypes.T).mean(0)
    # patches weigh in the center what they weigh in the loss
    patch_mean = out.patch_weight @ (out.teacher_patches @ out.teacher_prototypes.T) / out.patch_weight.sum()
    torch.testing.assert_close(loss.center_cls, 0.2 * cls_mean[None])
    torch.testing.assert_close(loss.center_patch, 0.2 * patch_mean[None])
    second = loss(out)
    assert second.item() != first.item()
    torch.testing.assert_close(loss.center_cls, 0.36 * cls_mean[None])


def test_sinkhorn_balances_each_kind_of_token_and_follows_it_with_a_running_center() -> None:
    out = replace(make_output(), cls_groups=(1, 3), patch_groups=(2, 0, 7))
    loss = UniMediLoss(out_dim=K, center_momentum=0.8, vl_weight=0.0, pcl_weight=0.0)
    total = loss(out)
    centers = [
        balanced_center(torch.zeros(K), part, out.teacher_prototypes, 0.04) for part in out.teacher_cls.split((1, 3))
    ]
    expected = distillation_loss(
        out.student_cls,
        out.teacher_cls,
        out.student_prototypes,
        out.teacher_prototypes,
        torch.stack(centers),
        0.1,
        0.04,
        groups=(1, 3),
    )
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(loss.center_cls, 0.2 * torch.stack(centers))
    # no token of slot 1 (volumes): its center stays
    assert loss.center_patch[1].abs().max() < 1e-6 < loss.center_patch[2].abs().max()
    found = loss.targets_of(out.teacher_cls[1:], out.teacher_prototypes, group=1)
    logits = out.teacher_cls[1:] @ out.teacher_prototypes.T - loss.center_cls[1]
    torch.testing.assert_close(found, torch.softmax(logits / 0.04, 1))


def test_evaluation_leaves_the_centers() -> None:
    loss = UniMediLoss(out_dim=K).eval()
    loss(make_output())
    assert loss.center_cls.abs().sum() == 0 and loss.center_patch.abs().sum() == 0
    assert set(loss.state_dict()) == {"center_cls", "center_patch", "_extra_state"}


def test_without_self_distillation_only_the_contrastive_loss() -> None:
    out = replace(make_output(), student_cls=None, teacher_cls=None)
    loss = UniMediLoss(out_dim=K)
    torch.testing.assert_close(loss(out), contrastive_loss(out.image_embed, out.text_embed, out.logit_scale))
    assert set(loss.last) == {"vl"}


def test_without_patches_the_patch_loss_is_zero() -> None:
    out = replace(make_output(), student_patches=None, teacher_patches=None, patch_weight=None)
    loss = UniMediLoss(out_dim=K)
    loss(out).backward()
    assert loss.last["pcl"].item() == 0.0
    assert loss.center_patch.abs().sum() == 0 and loss.center_cls.abs().sum() > 0


def test_within_modality_reaches_the_contrastive_loss() -> None:
    out = make_output()
    loss = UniMediLoss(out_dim=K, within_modality=True)
    loss(out)
    expected = contrastive_loss(
        out.image_embed, out.text_embed, out.logit_scale, modality=out.modality, within_modality=True
    )
    torch.testing.assert_close(loss.last["vl"], expected.detach())


def test_teacher_temperature_follows_dino() -> None:
    loss = UniMediLoss(out_dim=K)
    schedule = np.concatenate([np.linspace(0.04, 0.07, 30), np.full(20, 0.07)])
    for epoch, expected in enumerate(schedule):
        loss.set_epoch(epoch)
        assert loss.teacher_temp == pytest.approx(expected, abs=1e-12)
    constant = UniMediLoss(out_dim=K, teacher_temp_warmup_epochs=0)
    assert constant.teacher_temp == 0.07


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match=r"out_dim 5.*12 prototypes"):
        UniMediLoss(out_dim=5)(make_output())
    with pytest.raises(ConfigError, match="weights"):
        UniMediLoss(pcl_weight=-1)
    with pytest.raises(ConfigError, match="above 0"):
        UniMediLoss(teacher_temp=0)
    with pytest.raises(ConfigError, match="center_momentum"):
        UniMediLoss(center_momentum=1.5)
    with pytest.raises(ConfigError, match="chunk_size"):
        UniMediLoss(chunk_size=0)
