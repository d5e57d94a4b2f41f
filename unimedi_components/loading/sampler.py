# SPDX-License-Identifier: Apache-2.0
"""Batches of X-rays and CT volumes in one step, at a fixed ratio and the same on every machine."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
from torch.utils.data import Sampler

from unimedi_components.distributed import rank as current_rank
from unimedi_components.distributed import world_size
from unimedi_components.errors import ConfigError, DataError

T = TypeVar("T")


def rank_share(items: Sequence[T]) -> list[T]:
    """This rank's part of the items, every N-th one over N ranks, so that each item is on one rank alone.

    For validation: ranks may get one item more than others, which the metrics allow.

    Raises:
        DataError: fewer items than ranks.
    """
    if len(items) < world_size():
        raise DataError(f"{len(items)} items cannot be shared by {world_size()} ranks; use fewer, or a larger split")
    return list(items[current_rank() :: world_size()])


class MixedBatchSampler(Sampler[list[int]]):
    """Batches of `batch_2d` 2D indices followed by `batch_3d` 3D indices; a pure function of (seed, epoch).

    An epoch is one pass over one dimension's items; the other's are drawn in reshuffled passes of their own, so no item
    is seen twice before all were seen once, and no batch (over all replicas) holds an item twice. A set that is smaller
    than its batch gives what it has; a dimension without items, or with a batch of 0, is left out.

    The paper gives a batch of 144 over 8 GPUs (section 4.1) and no ratio; 12 + 6 per GPU is ours.

    Args:
        dims: 2 or 3 for every item of the data set.
        num_replicas: number of ranks; None asks `torch.distributed`. Replicas get disjoint batches of equal sizes.
        drop_last: leave out the pass's last, incomplete batch; otherwise it is shared out evenly, and only
            items that cannot be shared evenly over the replicas are left out.
        epoch_over: whose pass is an epoch: "2d", "3d" or "longest" (in steps). Without items of that
            dimension, the other one's.
        mode: "mixed" for both dimensions in every batch, "alternate" for batches of one dimension by turns.

    Raises:
        ConfigError: an option is none of those named here.
        DataError: there is nothing to draw from, or fewer items of a dimension than replicas.
    """

    def __init__(
        self,
        dims: Sequence[int],
        batch_2d: int = 12,
        batch_3d: int = 6,
        seed: int = 0,
        shuffle: bool = True,
        num_replicas: int | None = None,
        rank: int | None = None,
        drop_last: bool = True,
        epoch_over: str = "2d",
        mode: str = "mixed",
    ) -> None:
        if mode not in ("mixed", "alternate") or epoch_over not in ("2d", "3d", "longest"):
            raise ConfigError(
                f"mode {mode!r} must be 'mixed' or 'alternate', "
                f"epoch_over {epoch_over!r} must be '2d', '3d' or 'longest'"
            )
        self.num_replicas = world_size() if num_replicas is None else num_replicas
        self.rank = current_rank() if rank is None else rank
        if not 0 <= self.rank < self.num_replicas:
            raise ConfigError(f"rank {self.rank} is not one of {self.num_replicas} replicas")
        self.seed, self.shuffle, self.drop_last, self.mode = seed, shuffle, drop_last, mode
        self.epoch = 0
        self.indices = {dim: np.flatnonzero(np.asarray(dims) == dim) for dim in (2, 3)}
        self.sizes: dict[int, int] = {}
        for dim, batch in ((2, batch_2d), (3, batch_3d)):
            n = len(self.indices[dim])
            if n == 0 or batch <= 0:
                continue
            if n < self.num_replicas:
                raise DataError(f"{n} {dim}D items cannot be shared by {self.num_replicas} replicas; use fewer")
            self.sizes[dim] = min(batch, n // self.num_replicas)
        if not self.sizes:
            raise DataError(
                f"no items to draw batches from: {len(self.indices[2])} 2D items at batch_2d={batch_2d}, "
                f"{len(self.indices[3])} 3D items at batch_3d={batch_3d}"
            )
        steps = {dim: self._steps_of_pass(dim) for dim in self.sizes}
        longest = max(steps, key=lambda dim: (steps[dim], -dim))
        wanted = {"2d": 2, "3d": 3, "longest": longest}[epoch_over]
        self.primary = wanted if wanted in self.sizes else longest
        self.steps = steps[self.primary]

    def _steps_of_pass(self, dim: int) -> int:
        n, batch = len(self.indices[dim]), self.sizes[dim] * self.num_replicas
        rest = (n % batch) // self.num_replicas
        return n // batch + (0 if self.drop_last or rest == 0 else 1)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of a whole epoch, equal on all replicas."""
        return self.steps * (len(self.sizes) if self.mode == "alternate" else 1)

    def __iter__(self) -> Iterator[list[int]]:
        drawn = {dim: self._draw(dim, self.epoch) for dim in self.sizes}
        if self.mode == "alternate":
            yield from (drawn[dim][step] for step in range(self.steps) for dim in drawn)
        else:
            yield from ([i for dim in drawn for i in drawn[dim][step]] for step in range(self.steps))

    def _draw(self, dim: int, epoch: int) -> list[list[int]]:
        """This replica's part of every step."""
        batch, n = self.sizes[dim] * self.num_replicas, len(self.indices[dim])
        order = np.empty(0, dtype=np.int64)
        passes = 0
        wanted = n if dim == self.primary else batch * self.steps
        while len(order) < wanted:
            rng = np.random.default_rng([self.seed, epoch, dim, passes])
            order = self._append_pass(order, rng.permutation(n) if self.shuffle else np.arange(n), batch)
            passes += 1
        steps = []
        for step in range(self.steps):
            joint = order[step * batch : min((step + 1) * batch, wanted)]
            share = len(joint) // self.num_replicas
            mine = joint[self.rank * share : (self.rank + 1) * share]
            steps.append(self.indices[dim][mine].tolist())
        return steps

    @staticmethod
    def _append_pass(order: np.ndarray, following: np.ndarray, batch: int) -> np.ndarray:
        """Join two passes such that the batch across the seam holds no item twice."""
        begun = order[len(order) - len(order) % batch :]
        need = batch - len(begun)
        if len(begun):
            fresh = np.flatnonzero(~np.isin(following, begun))[:need]
            following = np.concatenate([following[fresh], np.delete(following, fresh)])
        return np.concatenate([order, following])
