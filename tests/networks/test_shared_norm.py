# SPDX-License-Identifier: Apache-2.0
"""SharedBatchNorm2d on two gloo processes with unequal batches against nn.BatchNorm2d on the joint one.

Run as a program it is one of the two processes.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.common import on_two_ranks
from unimedi_components import distributed
from unimedi_components.networks.shared_norm import SharedBatchNorm2d

SHARES = (slice(0, 4), slice(4, 6))


def made():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 2, 5, generator=generator) * 3 + 40
    return x, torch.randn(x.shape, generator=generator), torch.randn(3, generator=generator)


def step(norm, rows, ranks):
    """Output, gradients and buffers of two steps of the objective mean over ranks of the ranks' losses."""
    x, weights, scale = made()
    with torch.no_grad():
        norm.weight.copy_(scale)
    x = x[rows].requires_grad_()
    for _ in range(2):
        norm.zero_grad()
        x.grad = None
        out = norm(x)
        # the mean over ranks of the ranks' losses is then the sum over all images
        (ranks * (out**2 * weights[rows]).sum()).backward()
    found = {
        "out": out.detach(),
        "x": x.grad / ranks,
        "weight": norm.weight.grad / ranks,
        "bias": norm.bias.grad / ranks,
    }
    return found | {name: buffer.clone() for name, buffer in norm.named_buffers()}


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_process_is_torch_s(momentum):
    ours, theirs = (step(norm(3, momentum=momentum), slice(None), 1) for norm in (SharedBatchNorm2d, nn.BatchNorm2d))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_two_processes_equal_one(tmp_path):
    expected = step(nn.BatchNorm2d(3), slice(None), 1)
    parts = on_two_ranks(__file__, tmp_path)
    for name, value in expected.items():
        if name in ("out", "x"):
            found = torch.cat([part[name] for part in parts])
        elif name in ("weight", "bias"):
            # DistributedDataParallel averages what each rank has of its own images
            found = sum(part[name] for part in parts)
        else:
            assert torch.equal(parts[0][name], parts[1][name])
            found = parts[0][name]
        assert torch.allclose(found, value, rtol=1e-4, atol=1e-4), name


def main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    torch.save(step(SharedBatchNorm2d(3), SHARES[rank], 2), folder / f"{rank}.pt")
    dist.barrier()
    distributed.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
