# SPDX-License-Identifier: Apache-2.0
"""The loss of detectors: a weighted sum of what the detector returns in training."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class DetectionLoss(nn.Module):
    """Weighted sum of a detector's losses; the detector has matched boxes to targets already.

    Raises ValueError: when called with losses of other names.

    Example:
        >>> losses = {"classification": torch.tensor(1.0), "box_regression": torch.tensor(3.0)}
        >>> DetectionLoss(box_regression=2.0)(losses)
        tensor(7.)
    """

    def __init__(self, classification: float = 1.0, box_regression: float = 1.0) -> None:
        super().__init__()
        self.weights = {"classification": classification, "box_regression": box_regression}

    def forward(self, losses: Mapping[str, Tensor], targets: Any = None) -> Tensor:
        """Sum the scalars that `ViTDet` returns in training; the targets, which MONAI's trainer gives, are not read."""
        if set(losses) != set(self.weights):
            raise ValueError(f"losses {sorted(losses)} where {sorted(self.weights)} were expected")
        return torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()
