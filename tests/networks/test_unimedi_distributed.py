# SPDX-License-Identifier: Apache-2.0
"""The whole step, UniMedI and its loss, on two gloo processes with unequal shares against one with the joint batch.

The file is also the program that each rank runs: `python test_unimedi_distributed.py RANK FOLDER`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.common import on_two_ranks, randomised
from unimedi_components import distributed
from unimedi_components.losses import UniMediLoss
from unimedi_components.networks import DINOHead, ProjectionHead, ReportEncoder, UnifiedViT, UniMedI

# X-rays and volumes of the joint batch that each rank takes; a rank may lack a dimension.
SHARES = {"both": (((0, 1), (0,)), ((2,), (1, 2, 3))), "one dimension each": (((0, 1, 2), ()), ((), (0, 1, 2, 3)))}
JOINT = ((0, 1, 2), (0, 1, 2, 3))


def step(share: tuple, mask_mode: str, accumulation: int = 1) -> dict[str, torch.Tensor]:
    """Loss, gradients and buffers of one step on a share of the batch."""
    torch.manual_seed(0)
    text = {"hidden_size": 12, "num_hidden_layers": 1, "vocab_size": 20, "num_attention_heads": 2}
    text |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"patch_size": 8, "patch_size_3d": (2, 8, 8), "embed_dim": 12, "depth": 2, "num_heads": 2}
    network = UniMedI(
        UnifiedViT(16, (8, 16, 16), **sizes, grad_checkpointing=accumulation > 1),
        ReportEncoder(config=text),
        ProjectionHead(12, 16, 6),
        ProjectionHead(12, 16, 6),
        DINOHead(12, 10, 14, 5),
        num_slices=2,
        mask_mode=mask_mode,
        accumulation=accumulation,
    ).double()
    randomised(network.encoder)
    loss_function = UniMediLoss(out_dim=10, chunk_size=7).double()
    images, volumes = torch.randn(3, 1, 16, 16).double(), torch.randn(4, 1, 8, 16, 16).double()
    tokens = torch.randint(5, 20, (7, 6))
    two_d, three_d = (list(part) for part in share)
    rows = [*two_d, *(3 + index for index in three_d)]
    batch = {"input_ids": tokens[rows], "attention_mask": torch.ones(len(rows), 6, dtype=torch.long)}
    batch |= {"image2d": images[two_d]} if two_d else {}
    batch |= {"image3d": volumes[three_d]} if three_d else {}
    wrapped = nn.parallel.DistributedDataParallel(network) if distributed.is_distributed() else network
    loss = loss_function(wrapped(batch))
    loss.backward()
    found = {"loss": loss.detach(), **{f"part {k}": v for k, v in loss_function.last.items()}}
    found |= {f"gradient {n}": p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    buffers = [*network.named_buffers(), *loss_function.named_buffers()]
    return found | {f"buffer {n}": b.clone() for n, b in buffers}


@pytest.mark.parametrize("mask_mode", ["mask_token", "drop"])
@pytest.mark.parametrize("case", list(SHARES))
def test_two_processes_equal_one(case, mask_mode, tmp_path):
    expected = step(JOINT, mask_mode)
    for rank, found in enumerate(on_two_ranks(__file__, tmp_path, case, mask_mode)):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(found[name], value, atol=1e-8), f"{name} on rank {rank}"


def main(rank: int, folder: Path, case: str, mask_mode: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    # the one process accumulates nothing
    accumulation = 2 if mask_mode == "drop" else 1
    torch.save(step(SHARES[case][rank], mask_mode, accumulation), folder / f"{rank}.pt")
    dist.barrier()
    distributed.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
