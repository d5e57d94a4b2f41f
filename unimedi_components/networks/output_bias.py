# SPDX-License-Identifier: Apache-2.0
"""Biases that a new network's output starts from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["prefer_background"]


def prefer_background(outs: Sequence[nn.Module], share: float, together: bool = False) -> None:
    """Set the biases of output layers so that equal features give the background this share (Lin et al., 2017).

    Args:
        outs: MONAI's `UnetOutBlock`s of two or more classes, the background first; changed in place.
        share: between 0 and 1.
        together: the scores of all layers are added up, so that the first one's bias serves all and the others' is 0.

    Raises:
        ValueError: another share.
    """
    if not 0 < share < 1:
        raise ValueError(f"background_prior must lie between 0 and 1, not {share!r}")
    for index, out in enumerate(outs):
        bias: Any = out.conv.conv.bias  # type: ignore[union-attr]
        with torch.no_grad():
            if together and index:
                bias.zero_()
                continue
            bias.fill_(math.log((1 - share) / (len(bias) - 1)))
            bias[0] = math.log(share)
