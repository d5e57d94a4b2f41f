# SPDX-License-Identifier: Apache-2.0
"""OrganLoss against MONAI's DiceCELoss and against sums over voxels."""

import pytest
import torch
from monai.losses import DiceCELoss
from torch.nn import functional as F

from unimedi_components.losses.organs import OrganLoss


def scores_and_labels(count=2, classes=4, size=(4, 6, 6)):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, classes, *size, generator=generator)
    label = torch.randint(0, classes, (count, 1, *size), generator=generator).float()
    # classes of very different size, one image without the last class
    label[label == 2] = torch.where(torch.rand((label == 2).sum(), generator=generator) < 0.9, 0.0, 2.0)
    label[1][label[1] == 3] = 0
    return logits, label


@pytest.mark.parametrize("background", [True, False])
def test_equals_monai_without_balance(background):
    logits, label = scores_and_labels()
    peer = DiceCELoss(to_onehot_y=True, softmax=True, include_background=background)
    loss = OrganLoss(include_background=background)
    assert float(loss(logits, label)) == pytest.approx(float(peer(logits, label)), abs=1e-6)
    assert float(loss.last["dice"] + loss.last["ce"]) == pytest.approx(float(peer(logits, label)), abs=1e-6)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_balance_weighs_voxels_by_the_share_of_their_class(power):
    logits, label = scores_and_labels()
    loss = OrganLoss(power)
    loss(logits, label)
    parts = []
    for image, target in zip(logits, label[:, 0].long(), strict=True):
        total = weights = 0.0
        for place in torch.cartesian_prod(*map(torch.arange, target.shape)):
            kind = target[tuple(place)]
            weight = float((target == kind).float().mean()) ** -power
            total += weight * float(-image[(slice(None), *place)].log_softmax(0)[kind])
            weights += weight
        parts.append(total / weights)
    assert float(loss.last["ce"]) == pytest.approx(sum(parts) / 2, abs=1e-5)


def test_coarser_scores_are_added_with_halved_weights():
    logits, label = scores_and_labels()
    coarse = [F.avg_pool3d(logits, factor) for factor in (2, (4, 6, 6))]
    loss = OrganLoss(0.5, coarse_weight=0.3)
    wanted = loss(logits, label)
    for weight, part in zip((0.3, 0.15), coarse, strict=True):
        wanted = wanted + weight * loss(part, F.interpolate(label, part.shape[2:], mode="nearest-exact"))
    assert torch.allclose(loss([logits, *coarse], label), wanted)
    loss([logits, *coarse], label)
    alone = OrganLoss(0.5)
    alone(logits, label)
    assert loss.last == alone.last


def test_gradient_is_finite_where_an_organ_is_absent():
    logits, label = scores_and_labels()
    logits.requires_grad_()
    OrganLoss(0.5)(logits, torch.zeros_like(label)).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(("options", "match"), [((1.5,), "class_balance"), ((0, False, -1), "coarse_weight")])
def test_errors(options, match):
    with pytest.raises(ValueError, match=match):
        OrganLoss(*options)
