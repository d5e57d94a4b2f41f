# SPDX-License-Identifier: Apache-2.0
"""A value of a whole evaluator run from sums over all batches and ranks, in whatever batches the images come."""

from collections.abc import Sequence

import torch
from ignite.exceptions import NotComputableError
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from monai.handlers import from_engine
from torch import Tensor


class SummedMetric(Metric):
    """Adds up `terms` of each batch's "pred" and "label", float64 (n,), and gives the `value` of their sum.

    Args:
        size: n. Where all of its counts, which come first, are 0 after a run, the value raises NotComputableError.
        what: one of what is counted.
    """

    def __init__(self, size: int, what: str = "image") -> None:
        self.size, self.what = size, what
        super().__init__(from_engine(["pred", "label"]))

    def terms(self, logits: Tensor, label: Tensor) -> Tensor:
        raise NotImplementedError

    def value(self, sums: Tensor) -> Tensor:
        raise NotImplementedError

    @reinit__is_reduced
    def reset(self) -> None:
        self._sums = torch.zeros(self.size, dtype=torch.float64)

    @reinit__is_reduced
    def update(self, output: Sequence[Tensor]) -> None:
        self._sums = self._sums + self.terms(output[0].detach(), output[1]).cpu()

    @sync_all_reduce("_sums")
    def compute(self) -> float:
        if not bool(self._sums.any()):
            raise NotComputableError(f"no {self.what} was evaluated")
        return float(self.value(self._sums))
