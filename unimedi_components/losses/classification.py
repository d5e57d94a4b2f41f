# SPDX-License-Identifier: Apache-2.0
"""Loss of the classification bundles: cross-entropy over classes, or binary cross-entropy per finding."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TASKS = ("binary", "multilabel", "multiclass")
UNCERTAIN = -1


class ClassificationLoss(nn.Module):
    """Mean cross-entropy (multiclass) or binary cross-entropy (multilabel, binary).

    ``task``: "multiclass" (logits (B, C), labels (B,)), "multilabel" (logits and labels (B, C)) or "binary" (logits (B,
    1), labels (B,)). A multilabel or binary label of -1 is uncertain and does not count.

    Example:
        >>> loss = ClassificationLoss("multilabel")(torch.zeros(1, 3), torch.tensor([[1, 0, -1]]))
        >>> round(float(loss), 4)
        0.6931
    """

    def __init__(self, task: str) -> None:
        super().__init__()
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
        self.task = task

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Scalar loss of logits and labels; 0 (with a gradient of 0) where nothing counts."""
        if self.task == "multiclass":
            losses = F.cross_entropy(logits.float(), label.long(), reduction="none")
            return losses.sum() / max(len(losses), 1)
        label = label.reshape(logits.shape)
        known = label != UNCERTAIN
        target = torch.where(known, label, 0).to(torch.float32)
        losses = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
        return (losses * known).sum() / known.sum().clamp(min=1)


def probabilities(logits: Tensor, task: str) -> Tensor:
    """Logits (B, C) to probabilities (B, C): softmax over classes, or a sigmoid per finding."""
    return logits.softmax(1) if task == "multiclass" else logits.sigmoid()
