# SPDX-License-Identifier: Apache-2.0
"""What self-distillation's targets say about an image: entropies and mutual information, in nats.

The teacher gives every sample a distribution over K prototypes. A falling loss does not show whether these
distributions differ between samples: where all samples get the same one, the student learns a constant. What they
tell apart is the mutual information of sample and prototype, H(mean distribution) - mean H(distribution).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Information:
    """What targets carry, in nats.

    Args:
        information: their difference, the mutual information of sample and prototype; at most log of the samples.
        given_position: the same within each position, averaged over the positions: what is left once it is known where
            a patch lies. Equal to `information` for a single position.
    """

    entropy: float
    marginal_entropy: float
    information: float
    given_position: float

    @property
    def prototypes(self) -> float:
        """Prototypes in use: exp of the marginal entropy."""
        return math.exp(self.marginal_entropy)


class TargetInformation:
    """Adds up targets batch by batch, so that no samples x positions x prototypes array is held."""

    def __init__(self) -> None:
        self.count = 0
        self._total: Tensor | None = None
        self._entropy: Tensor | None = None

    @torch.no_grad()
    def add(self, targets: Tensor) -> None:
        """Add the distributions of further samples, (N, K), or (N, P, K) at the same P positions; rows sum to 1."""
        rows = targets[:, None] if targets.ndim == 2 else targets
        total = rows.sum(0, dtype=torch.float64)
        self._total = total if self._total is None else self._total + total
        # stays on the device: reading it would make the GPU wait at every step
        entropy = torch.special.entr(rows.double()).sum()
        self._entropy = entropy if self._entropy is None else self._entropy + entropy
        self.count += len(rows)

    def result(self) -> Information:
        """The values over all samples added. Raises ValueError: none was added."""
        if self._total is None or self._entropy is None:
            raise ValueError("no targets were added")
        mean = self._total / self.count
        entropy = float(self._entropy) / self.count / len(mean)
        marginal = float(torch.special.entr(mean.mean(0)).sum())
        local = float(torch.special.entr(mean).sum(1).mean())
        return Information(entropy, marginal, marginal - entropy, local - entropy)
