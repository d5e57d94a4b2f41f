# SPDX-License-Identifier: Apache-2.0
"""Loss of the X-ray segmentation bundle: ten times the focal loss plus the Dice loss (S7.2)."""

from collections.abc import Sequence

import torch
from monai.losses import DiceLoss, FocalLoss
from torch import Tensor, nn

DICE = ("linear", "log")


class FocalDiceLoss(nn.Module):
    """alpha * focal + Dice, on logits of independent classes.

    The focal loss is the mean over pixels of -(1 - p_t)^gamma log p_t, p_t being the probability of the pixel's true
    value. Dice is (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth) over all images of the batch together, as in
    MGCA's code, so that images without a mask count too; its loss is 1 - Dice ("linear", what the paper writes) or
    -log(Dice) ("log", what MGCA's code does). Raises ValueError: a negative weight or exponent, no smoothing, or an
    unknown `dice`. ``batch``: one Dice over all images of a batch; False takes the mean of each image's own.
    ``auxiliary_weight``: of each further prediction where the network returns several (SETR's heads).

    Example:
        >>> round(float(FocalDiceLoss()(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))), 4)
        2.0186
    """

    def __init__(
        self,
        alpha: float = 10.0,
        gamma: float = 2.0,
        *,
        dice: str = "linear",
        batch: bool = True,
        smooth: float = 1.0,
        auxiliary_weight: float = 0.4,
    ) -> None:
        super().__init__()
        if alpha < 0 or gamma < 0 or auxiliary_weight < 0 or smooth <= 0:
            raise ValueError(
                "alpha, gamma and auxiliary_weight must not be negative and smooth must be above 0, not "
                f"{alpha}, {gamma}, {auxiliary_weight} and {smooth}"
            )
        if dice not in DICE:
            raise ValueError(f"dice must be one of {', '.join(DICE)}, not {dice!r}")
        self.alpha, self.auxiliary_weight = alpha, auxiliary_weight
        self.dice, self.batch, self.smooth = dice, batch, smooth
        self.focal = FocalLoss(gamma=gamma)
        self.soft_dice = DiceLoss(sigmoid=True, batch=batch, smooth_nr=smooth, smooth_dr=smooth, reduction="none")

    def forward(self, logits: Tensor | Sequence[Tensor], label: Tensor) -> Tensor:
        """Scalar loss of logits (B, C, H, W), or several (the main prediction first), and labels of 0 and 1.

        Raises ValueError: logits and label differ in shape.
        """
        if not isinstance(logits, Tensor):
            main, *others = (self(prediction, label) for prediction in logits)
            return main + self.auxiliary_weight * sum(others)
        if logits.shape != label.shape:
            raise ValueError(f"logits {tuple(logits.shape)} and label {tuple(label.shape)} differ in shape")
        logits, target = logits.float(), label.to(torch.float32)
        missing = self.soft_dice(logits, target)
        return self.alpha * self.focal(logits, target) + self._of_missing(missing).mean()

    def _of_missing(self, missing: Tensor) -> Tensor:
        return -torch.log1p(-missing) if self.dice == "log" else missing

    @torch.no_grad()
    def sums(self, logits: Tensor, label: Tensor) -> Tensor:
        """What adds up over batches and ranks to the loss of all their images, for `from_sums`.

        Returns float64 (4 + 3 C,): pixels, sum of focal losses, images times C, sum of their Dice losses, and of each
        class the sums of p t, of p and of t.
        """
        logits, target = logits.double(), label.double()
        probability = logits.sigmoid()
        per_class = torch.stack([(probability * target), probability, target]).sum((1, 3, 4)).T
        overlap, total = (probability * target).sum((2, 3)), (probability + target).sum((2, 3))
        missing = 1 - (2 * overlap + self.smooth) / (total + self.smooth)
        focal = self.focal(logits, target) * logits.numel()
        pixels, images = (torch.full_like(focal, tensor.numel()) for tensor in (logits, missing))
        head = torch.stack([pixels, focal, images, self._of_missing(missing).sum()])
        return torch.cat([head, per_class.flatten()])

    def from_sums(self, sums: Tensor) -> Tensor:
        """The loss that one batch of all images would have."""
        pixels, focal, images, missing = sums[:4]
        overlap, predicted, true = sums[4:].view(-1, 3).T
        dice = missing / images
        if self.batch:
            dice = self._of_missing(1 - (2 * overlap + self.smooth) / (predicted + true + self.smooth)).mean()
        return self.alpha * focal / pixels + dice
