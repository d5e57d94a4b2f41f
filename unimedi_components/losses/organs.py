# SPDX-License-Identifier: Apache-2.0
"""Loss of the CT segmentation bundle: Dice plus cross-entropy (S7.2).

Letters: B batch, C classes with the background.
"""

from collections.abc import Sequence

import torch
from monai.losses import DiceLoss
from torch import Tensor, nn
from torch.nn import functional as F


class OrganLoss(nn.Module):
    """Soft Dice plus cross-entropy of softmax classes: MONAI's `DiceCELoss`, whose voxels may be weighted by class.

    With `class_balance` p, the cross-entropy of an image weighs a voxel of a class that fills the share f of the image
    by f^-p, and divides by the sum of the weights. 0 is the plain mean. At 0.5 organs of a few voxels are learned in
    hundreds of steps instead of thousands. Raises ValueError: an exponent outside 0 to 1, or a negative weight.

    Args:
        class_balance: the exponent p, from 0 (plain, the paper's loss) to 1 (each class as much as any other).
        include_background: whether the background counts in the Dice term.
        coarse_weight: of the next coarser scores where a network returns several (deep supervision), halved at each
            further one; their labels are the nearest voxels'.

    Attributes:
        last: the two terms of the newest call, "dice" and "ce", of the finest scores.

    Example:
        >>> round(float(OrganLoss()(torch.zeros(1, 2, 2, 2, 2), torch.ones(1, 1, 2, 2, 2))), 4)
        1.0265
    """

    def __init__(
        self, class_balance: float = 0.0, include_background: bool = False, coarse_weight: float = 0.5
    ) -> None:
        super().__init__()
        if not 0 <= class_balance <= 1:
            raise ValueError(f"class_balance must lie between 0 and 1, not {class_balance!r}")
        if coarse_weight < 0:
            raise ValueError(f"coarse_weight must not be negative, not {coarse_weight!r}")
        self.class_balance, self.coarse_weight = class_balance, coarse_weight
        self.dice = DiceLoss(include_background=include_background, to_onehot_y=True, softmax=True)
        self.last: dict[str, Tensor] = {}

    def forward(self, logits: Tensor | Sequence[Tensor], label: Tensor) -> Tensor:
        """Scalar loss.

        Args:
            logits: (B, C, D, H, W), or several, the finest first and each on its own grid.
            label: 0 to C - 1, (B, 1, D, H, W).
        """
        if isinstance(logits, Tensor):
            dice, entropy = self._terms(logits, label)
            self.last = {"dice": dice.detach(), "ce": entropy.detach()}
            return dice + entropy
        loss = self(logits[0], label)
        for level, coarse in enumerate(logits[1:]):
            nearest = F.interpolate(label.float(), size=coarse.shape[2:], mode="nearest-exact")
            loss = loss + self.coarse_weight * 0.5**level * sum(self._terms(coarse, nearest))
        return loss

    def _terms(self, logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        logits, target = logits.float(), label[:, 0].long()
        dice = self.dice(logits, target[:, None])
        entropy = F.cross_entropy(logits, target, reduction="none")
        if self.class_balance:
            weight = self._weights(target, logits.shape[1])
            entropy = (weight * entropy).flatten(1).sum(1) / weight.flatten(1).sum(1)
        return dice, entropy.mean()

    def _weights(self, target: Tensor, classes: int) -> Tensor:
        """Weight of each voxel, (B, D, H, W)."""
        # `bincount` would ask the GPU for the largest label of every image
        flat = target.flatten(1)
        counts = torch.zeros(len(flat), classes, device=flat.device)
        counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float32))
        share = counts.clamp(min=1) / target[0].numel()
        return (share**-self.class_balance).gather(1, flat).view_as(target)
