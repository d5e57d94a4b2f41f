# SPDX-License-Identifier: Apache-2.0
"""Collectives that carry gradients, for losses and statistics over all ranks.

Without an initialised process group each function returns its input, at no cost. Gradients follow one convention: the
objective is the mean over ranks of the ranks' losses, which is what `DistributedDataParallel` optimises by averaging
gradients, so a loss that is equal on every rank yields the one-process gradient of the joint batch.
"""

import os
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unimedi_components.errors import ConfigError

T = TypeVar("T")

# the first rank may prepare a data set for hours
_LONGEST_WAIT = timedelta(days=2)
_waiting: dist.ProcessGroup | None = None


def is_distributed() -> bool:
    """Whether a process group with more than one rank is initialised."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """Index of this process, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_device() -> torch.device:
    """The GPU of this process under torchrun, by LOCAL_RANK; the CPU where there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def start(device: torch.device | str) -> None:
    """Join the process group that torchrun describes: NCCL for a GPU, gloo for the CPU.

    A second group, of gloo and with a long timeout, is for `wait_for_ranks`: NCCL gives up after 10 minutes, which says
    that a rank hangs in a training step, but nothing while the first one prepares data.

    Raises:
        ConfigError: the process was not started by torchrun.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"training on several devices needs torchrun ({missing[0]} is not set): "
            "torchrun --standalone --nproc_per_node=N -m monai.bundle run --config_file ..."
        )
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    global _waiting
    _waiting = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)


def stop() -> None:
    """Leave the process groups of `start`, together with the other ranks.

    A thread of gloo asks for Python's lock to free the last tensor that it sent; where Python ends meanwhile, the
    process is aborted. So the ranks wait for each other, and the threads get the lock, before Python may end.
    """
    global _waiting
    wait_for_ranks()
    time.sleep(0.1)
    _waiting = None
    dist.destroy_process_group()


def wait_for_ranks() -> None:
    """Wait until every rank is here, however long one of them has work of its own; costs no GPU time."""
    if is_distributed():
        dist.barrier(group=_waiting)


def unwrap(network: nn.Module) -> Any:
    """The network behind `DistributedDataParallel`, or the network itself."""
    return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network


def gather_objects(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks."""
    if not is_distributed():
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def first_rank_first(make: Callable[[], T]) -> T:
    """Call `make` on rank 0, then on the others, which find ready what it wrote; returns its result on each."""
    if not is_distributed():
        return make()
    result: list[Any] = [make()] if rank() == 0 else []
    wait_for_ranks()
    return result[0] if result else make()


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give every rank the values of rank 0, in place, once they are there."""
    if is_distributed():
        wait_for_ranks()
        for tensor in tensors:
            dist.broadcast(tensor.data, 0)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of `x`, of one shape on all ranks, without gradient; `x` itself is left as it is."""
    x = x.detach()
    if not is_distributed():
        return x
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce_sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return all_reduce_sum(grad)


def all_reduce_sum_with_grad(x: Tensor) -> Tensor:
    """Sum of `x`, of one shape on all ranks, over them; its backward sums the ranks' gradients.

    `x` must require a gradient on all ranks or on none, because the backward is a collective too.
    """
    return _AllReduceSum.apply(x) if is_distributed() else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        longest = max(sizes)
        padded = x.new_zeros((longest, *x.shape[1:]))
        padded[: x.shape[0]] = x
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        start = sum(ctx.sizes[: rank()])
        return all_reduce_sum(grad)[start : start + ctx.sizes[rank()]], None


def gather_with_grad(x: Tensor, equal_sizes: bool = False) -> Tensor:
    """Rows of all ranks in rank order; the gradient of each row is summed over the ranks that used it.

    `x` must require a gradient on all ranks or on none, because the backward is a collective too.

    Args:
        x: (N, ...); N may differ between ranks and may be 0, the other dimensions may not.
        equal_sizes: N is known to be the same on all ranks, which saves the exchange of sizes.

    Returns:
        (sum of N over ranks, ...).
    """
    if not is_distributed():
        return x
    if equal_sizes:
        sizes = [x.shape[0]] * world_size()
    else:
        counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world_size())]
        dist.all_gather(counts, torch.tensor([x.shape[0]], dtype=torch.int64, device=x.device))
        sizes = [int(size) for size in torch.cat(counts).tolist()]
    return _Gather.apply(x, sizes)
