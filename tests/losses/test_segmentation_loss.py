# SPDX-License-Identifier: Apache-2.0
"""Focal plus Dice loss against loops over pixels."""

import math

import pytest
import torch

from unimedi_components.losses.segmentation import FocalDiceLoss


def batch(images=3, classes=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, 4, 5, generator=generator) * 2
    label = (torch.rand(images, classes, 4, 5, generator=generator) < 0.3).float()
    label[0] = 0
    return logits, label


def by_hand(logits, label, alpha=10.0, gamma=2.0, dice="linear", whole_batch=True, smooth=1.0):
    focal, overlap, total = [], {}, {}
    for image in range(logits.shape[0]):
        for kind in range(logits.shape[1]):
            key = kind if whole_batch else (image, kind)
            for row in range(logits.shape[2]):
                for column in range(logits.shape[3]):
                    p = 1 / (1 + math.exp(-float(logits[image, kind, row, column])))
                    t = float(label[image, kind, row, column])
                    right = p if t == 1 else 1 - p
                    focal.append(-((1 - right) ** gamma) * math.log(right))
                    overlap[key] = overlap.get(key, 0.0) + p * t
                    total[key] = total.get(key, 0.0) + p + t
    scores = [(2 * overlap[key] + smooth) / (total[key] + smooth) for key in overlap]
    losses = [1 - score if dice == "linear" else -math.log(score) for score in scores]
    return alpha * sum(focal) / len(focal) + sum(losses) / len(losses)


@pytest.mark.parametrize("dice", ["linear", "log"])
@pytest.mark.parametrize("whole_batch", [True, False])
@pytest.mark.parametrize("classes", [1, 2])
def test_loss_by_loops(dice, whole_batch, classes):
    logits, label = batch(classes=classes)
    expected = by_hand(logits, label, dice=dice, whole_batch=whole_batch)
    assert float(FocalDiceLoss(dice=dice, batch=whole_batch)(logits, label)) == pytest.approx(expected, rel=1e-5)


def test_weights_exponent_and_smoothing():
    logits, label = batch()
    found = FocalDiceLoss(alpha=3, gamma=1.5, smooth=0.1)(logits, label)
    assert float(found) == pytest.approx(by_hand(logits, label, 3, 1.5, smooth=0.1), rel=1e-5)
    assert float(FocalDiceLoss(alpha=0, smooth=1e-5)(100 * (2 * label - 1), label)) == pytest.approx(0, abs=1e-6)


def test_auxiliary_predictions_count_by_their_weight():
    logits, label = batch()
    others = [batch(seed=1)[0], batch(seed=2)[0]]
    expected = by_hand(logits, label) + 0.4 * sum(by_hand(other, label) for other in others)
    assert float(FocalDiceLoss()([logits, *others], label)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dice", ["linear", "log"])
@pytest.mark.parametrize("whole_batch", [True, False])
def test_sums_of_parts_give_the_loss_of_the_whole(dice, whole_batch):
    logits, label = batch(images=5, classes=2)
    loss = FocalDiceLoss(dice=dice, batch=whole_batch)
    sums = sum(loss.sums(logits[i:j], label[i:j]) for i, j in ((0, 1), (1, 4), (4, 5)))
    assert float(loss.from_sums(sums)) == pytest.approx(float(loss(logits, label)), rel=1e-5)


def test_the_loss_learns_from_half_precision_and_whole_numbers():
    logits, label = batch()
    low = logits.bfloat16().requires_grad_()
    found = FocalDiceLoss()(low, label.to(torch.uint8))
    assert found.dtype == torch.float32
    found.backward()
    assert float(low.grad.abs().sum()) > 0
    assert float(found) == pytest.approx(by_hand(low.detach().float(), label), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dice": "square"}, "dice must be one of linear, log, not 'square'"),
        ({"alpha": -1}, "must not be negative"),
        ({"smooth": 0}, "smooth must be above 0"),
    ],
)
def test_arguments_without_meaning(options, message):
    with pytest.raises(ValueError, match=message):
        FocalDiceLoss(**options)


def test_label_of_another_shape():
    logits, label = batch()
    with pytest.raises(ValueError, match=r"logits \(3, 1, 4, 5\) and label \(3, 4, 5\) differ in shape"):
        FocalDiceLoss()(logits, label[:, 0])
