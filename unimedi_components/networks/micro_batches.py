# SPDX-License-Identifier: Apache-2.0
"""An encoder's pass over a large batch in the memory of a small one (GradCache, Gao et al., arXiv 2101.06983)."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unimedi_components.networks.output import EncoderOutput

T = TypeVar("T", Tensor, EncoderOutput)


def in_micro_batches(run: Callable[..., T], parts: int, *inputs: Tensor, **options: Any) -> T:
    """Run an encoder on consecutive parts of a batch and join the outputs.

    Of each part the outputs alone are kept. The backward runs a part once more, in the same random state and under the
    same autocast, and goes through it before the next one. What follows (heads, their batch statistics, losses over all
    pairs) sees the whole batch in one graph with one backward, so that the gradients are the whole batch's, also behind
    `DistributedDataParallel`. It costs one more forward pass.

    Args:
        run: an encoder whose rows do not depend on each other.
        inputs: tensors of B rows.
        options: keyword arguments of `run`; tensors among them have B rows too.
    """
    batch = len(inputs[0])
    size = -(-batch // parts)
    if parts == 1 or batch <= 1:
        return run(*inputs, **options)
    recompute: Any = partial(checkpoint, run, use_reentrant=False) if torch.is_grad_enabled() else run
    found = []
    for start in range(0, batch, size):
        rows = slice(start, start + size)
        some = [tensor[rows] for tensor in inputs]
        more = {name: value[rows] if isinstance(value, Tensor) else value for name, value in options.items()}
        found.append(recompute(*some, **more))
    return _join(found)


def _join(parts: list[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    attention = None if parts[0].attention is None else torch.cat([part.attention for part in parts])
    return EncoderOutput(torch.cat([p.cls for p in parts]), torch.cat([p.patches for p in parts]), attention)
