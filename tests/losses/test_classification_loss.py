# SPDX-License-Identifier: Apache-2.0
"""ClassificationLoss and probabilities against their formulas, written as loops."""

import math

import pytest
import torch

from unimedi_components.losses import ClassificationLoss, probabilities

LOGITS = [[2.0, -1.0, 0.5], [0.0, 3.0, -2.0], [-0.5, 0.25, 1.5], [4.0, 4.0, -4.0]]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def cross_entropy(logit, label):
    return -math.log(sigmoid(logit)) if label else -math.log(1 - sigmoid(logit))


def test_multiclass_is_the_mean_negative_log_softmax():
    labels = [0, 1, 1, 2]
    terms = [math.log(sum(map(math.exp, row))) - row[label] for row, label in zip(LOGITS, labels, strict=True)]
    found = ClassificationLoss("multiclass")(torch.tensor(LOGITS), torch.tensor(labels))
    assert float(found) == pytest.approx(sum(terms) / 4, rel=1e-6)


def test_multilabel_leaves_out_what_is_uncertain():
    labels = [[1, 0, -1], [0, -1, -1], [1, 1, 0], [-1, -1, -1]]
    terms = [
        cross_entropy(logit, label)
        for logits, row in zip(LOGITS, labels, strict=True)
        for logit, label in zip(logits, row, strict=True)
        if label != -1
    ]
    logits = torch.tensor(LOGITS, requires_grad=True)
    found = ClassificationLoss("multilabel")(logits, torch.tensor(labels))
    assert len(terms) == 6
    assert float(found) == pytest.approx(sum(terms) / 6, rel=1e-6)
    found.backward()
    expected = [
        [0.0 if label == -1 else (sigmoid(logit) - label) / 6 for logit, label in zip(logits, row, strict=True)]
        for logits, row in zip(LOGITS, labels, strict=True)
    ]
    assert torch.allclose(logits.grad, torch.tensor(expected), atol=1e-7)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_binary_takes_labels_with_and_without_an_axis(shape):
    logits, labels = [[0.7], [-1.2], [3.0], [0.1]], [1, 0, -1, 0]
    terms = [cross_entropy(0.7, 1), cross_entropy(-1.2, 0), cross_entropy(0.1, 0)]
    found = ClassificationLoss("binary")(torch.tensor(logits), torch.tensor(labels).view(shape))
    assert float(found) == pytest.approx(sum(terms) / 3, rel=1e-6)


@pytest.mark.parametrize(
    ("task", "logits", "label"),
    [
        ("multiclass", torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
        ("multilabel", torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64)),
        ("multilabel", torch.ones(2, 3), torch.full((2, 3), -1)),
        ("binary", torch.ones(2, 1), torch.tensor([-1, -1])),
    ],
)
def test_where_nothing_counts_the_loss_is_zero_with_a_gradient_of_zero(task, logits, label):
    logits = logits.clone().requires_grad_()
    found = ClassificationLoss(task)(logits, label)
    assert float(found) == 0
    found.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_half_precision_is_computed_in_full_and_large_logits_stay_finite():
    logits = torch.tensor([[200.0, -200.0]], dtype=torch.bfloat16)
    found = ClassificationLoss("multilabel")(logits, torch.tensor([[0, 1]]))
    assert found.dtype == torch.float32
    assert float(found) == 200
    assert float(ClassificationLoss("multiclass")(logits, torch.tensor([1]))) == 400


def test_uncertain_is_no_class():
    with pytest.raises(IndexError):
        ClassificationLoss("multiclass")(torch.zeros(1, 3), torch.tensor([-1]))


def test_unknown_task():
    with pytest.raises(ValueError, match="task must be one of binary, multilabel, multiclass, not 'regression'"):
        ClassificationLoss("regression")


def test_probabilities():
    logits = torch.tensor(LOGITS)
    softmax = probabilities(logits, "multiclass")
    for row, given in zip(softmax.tolist(), LOGITS, strict=True):
        total = sum(map(math.exp, given))
        assert row == pytest.approx([math.exp(value) / total for value in given], rel=1e-5)
    expected = [[sigmoid(value) for value in row] for row in LOGITS]
    assert torch.allclose(probabilities(logits, "multilabel"), torch.tensor(expected), atol=1e-6)
    assert torch.allclose(probabilities(logits[:, :1], "binary"), torch.tensor(expected)[:, :1], atol=1e-6)
