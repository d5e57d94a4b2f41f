# SPDX-License-Identifier: Apache-2.0
"""Two gloo processes with unequal shares of a batch against one process with the joint batch.

The file is also the program that each rank runs: `python test_distributed.py RANK FOLDER`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from unimedi_components import distributed
from unimedi_components.losses import UniMediLoss, contrastive_loss, distillation_loss
from unimedi_components.networks.heads import DINOHead, ProjectionHead
from unimedi_components.networks.modality_norm import ModalityBatchNorm1d
from unimedi_components.networks.output import UniMediOutput

ROWS, IN, K = 9, 6, 10
# The modality of each row; the first rank takes 3 rows, the second 6.
MODALITY = torch.tensor([0, 0, 1, 0, 1, 1, 0, 1, 1])
SHARES = (slice(0, 3), slice(3, 9))
EVERYTHING = slice(None)
Result = dict[str, Tensor]


class Toy(nn.Module):
    """The least network with everything that the losses reach."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(IN, 8), nn.Linear(IN, 8)
        self.image_head = ProjectionHead(8, hidden_dim=12, out_dim=5)
        self.text_head = ProjectionHead(8, hidden_dim=12, out_dim=5)
        self.dino = DINOHead(8, out_dim=K, hidden_dim=12, bottleneck_dim=4)
        self.log_temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor, text: Tensor, modality: Tensor) -> UniMediOutput:
        cls = self.image(image)
        teacher = self.dino(torch.tanh(cls)).detach()
        # Rows of the first modality bring two patches each, of the second three: the ranks' numbers differ.
        patches = cls.repeat_interleave(2 + modality, dim=0)
        weight = 1 / (2.0 + modality.repeat_interleave(2 + modality).to(cls.dtype))
        return UniMediOutput(
            image_embed=self.image_head(cls, modality),
            text_embed=self.text_head(self.text(text), modality),
            logit_scale=self.log_temperature.exp(),
            modality=modality,
            student_cls=self.dino(cls),
            teacher_cls=teacher,
            student_patches=self.dino(patches),
            teacher_patches=teacher.repeat_interleave(2 + modality, dim=0),
            patch_weight=weight,
            student_prototypes=self.dino.prototypes,
            teacher_prototypes=self.dino.prototypes.detach(),
        )


def wrap(module: nn.Module) -> nn.Module:
    """DDP in a process group; it must outlive the backward, whose hooks it holds."""
    return nn.parallel.DistributedDataParallel(module) if distributed.is_distributed() else module


def make_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randn(ROWS, IN, generator=generator, dtype=torch.float64) for _ in range(2))
    return image + 4 * MODALITY[:, None], text


def outcome(module: nn.Module, loss: Tensor) -> Result:
    loss.backward()
    found = {"loss": loss.detach()}
    for name, p in module.named_parameters():
        assert p.grad is not None or not p.requires_grad, name
        if p.grad is not None:
            found["grad " + name] = p.grad.clone()
    return found | {"buffer " + name: b.clone() for name, b in module.named_buffers()}


def contrastive(share: slice, within_modality: bool) -> Result:
    module = nn.ModuleDict({"image": nn.Linear(IN, 5), "text": nn.Linear(IN, 5)}).double()

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers = module

        def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            return self.towers["image"](image), self.towers["text"](text)

    towers = Towers()
    image, text = (x[share] for x in make_data())
    wrapped = wrap(towers)
    embeds = wrapped(image, text)
    loss = contrastive_loss(*embeds, 14.0, modality=MODALITY[share], within_modality=within_modality)
    return outcome(towers, loss)


def distillation(share: slice, weighted: bool) -> Result:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = DINOHead(IN, K, hidden_dim=7, bottleneck_dim=4).double()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.head(x), self.head.prototypes

    head = Head()
    x = make_data()[0]
    teacher = F.normalize(x[:, :4], dim=1)[share]
    prototypes = F.normalize(torch.arange(4.0 * K, dtype=torch.float64).sin().reshape(K, 4), dim=1)
    weight = torch.linspace(0, 3, ROWS, dtype=torch.float64)[share] if weighted else None
    center = torch.linspace(-0.1, 0.1, K, dtype=torch.float64)
    wrapped = wrap(head)
    student, own = wrapped(x[share])
    loss = distillation_loss(student, teacher, own, prototypes, center, 0.1, 0.05, weight=weight, chunk_size=2)
    return outcome(head, loss)


def normalisation(share: slice, modality: Tensor) -> Result:
    norm = nn.Sequential(nn.Linear(IN, IN).double())
    norm.add_module("norm", ModalityBatchNorm1d(IN).double())

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = norm

        def forward(self, x: Tensor, kind: Tensor) -> Tensor:
            return self.chain[1](self.chain[0](x), kind)

    chain = Chain()
    coefficients = torch.arange(ROWS * IN, dtype=torch.float64).cos().reshape(ROWS, IN)
    wrapped = wrap(chain)
    out = wrapped(make_data()[0][share], modality[share])
    # Gradients are averaged over ranks, so a sum over all rows is each rank's own times their number.
    local = (out * coefficients[share]).sum() * distributed.world_size()
    found = outcome(chain, local)
    found["loss"] = distributed.all_reduce_sum(found["loss"]) / distributed.world_size()
    return found


def composite(share: slice) -> Result:
    network, loss = Toy().double(), UniMediLoss(out_dim=K, chunk_size=4).double()
    wrapped = wrap(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    found: Result = {}
    for step in range(3):
        optimizer.zero_grad()
        image, text = (x[share] for x in make_data())
        value = loss(wrapped(image, text, MODALITY[share]))
        parts = outcome(network, value) | loss.last | {"center " + k: v.clone() for k, v in loss.named_buffers()}
        found |= {f"{step} {name}": tensor for name, tensor in parts.items()}
        optimizer.step()
    return found


LONE = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 0])
SPLIT = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1])
CASES: dict[str, Callable[[slice], Result]] = {
    "contrastive": lambda share: contrastive(share, within_modality=False),
    "contrastive within modality": lambda share: contrastive(share, within_modality=True),
    "distillation": lambda share: distillation(share, weighted=False),
    "distillation weighted": lambda share: distillation(share, weighted=True),
    "normalisation": lambda share: normalisation(share, MODALITY),
    "normalisation, one modality per rank": lambda share: normalisation(share, SPLIT),
    "normalisation, a single row": lambda share: normalisation(share, LONE),
    "composite": composite,
}
# The second rank has nothing at all of these.
EMPTY = ("contrastive", "distillation", "distillation weighted", "normalisation")


def run(case: str, share: slice) -> Result:
    torch.manual_seed(0)
    return CASES[case](share)


def collectives() -> Result:
    """Gathers and sums of known numbers: rank 0 brings 2 rows, rank 1 brings 3."""
    own = distributed.rank()
    x = (torch.arange(4.0 + 2 * own).reshape(-1, 2) + 10 * own).requires_grad_()
    gathered = distributed.gather_with_grad(x)
    # Each rank weighs the rows differently; a row's gradient is the sum over ranks.
    (gathered * (own + 1)).sum().backward()
    y = torch.tensor([1.0 + own], requires_grad=True)
    total = distributed.all_reduce_sum_with_grad(y)
    (total * (own + 1)).sum().backward()
    stacked = distributed.gather_with_grad(torch.full((1, 2), float(own)), equal_sizes=True)
    empty = distributed.gather_with_grad(torch.ones(own, 2))
    assert x.grad is not None and y.grad is not None
    return {
        "gathered": gathered.detach(),
        "x.grad": x.grad,
        "total": total.detach(),
        "y.grad": y.grad,
        "stacked": stacked,
        "empty": empty,
        "plain": distributed.all_reduce_sum(y),
        "world": torch.tensor([distributed.world_size(), own]),
    }


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {case: run(case, SHARES[rank]) for case in CASES}
    results |= {"empty " + case: run(case, (EVERYTHING, slice(0, 0))[rank]) for case in EMPTY}
    results["collectives"] = collectives()
    if rank == 0:
        # the other rank must not end before this one has written what it was busy with
        time.sleep(0.5)
    torch.save(results, folder / f"rank{rank}.pt")
    distributed.stop()
    assert (folder / "rank0.pt").exists() and not dist.is_initialized()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Result]]:
    folder = tmp_path_factory.mktemp("gloo")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__]
    started = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(errors)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", [*CASES, *("empty " + case for case in EMPTY)])
def test_two_processes_equal_one(case: str, ranks: list[dict[str, Result]]) -> None:
    expected = run(case.removeprefix("empty "), EVERYTHING)
    for found in (ranks[0][case], ranks[1][case]):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-8, rtol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_collectives(ranks: list[dict[str, Result]]) -> None:
    rows = [[0.0, 1.0], [2.0, 3.0], [10.0, 11.0], [12.0, 13.0], [14.0, 15.0]]
    for rank in range(2):
        found = ranks[rank]["collectives"]
        assert found["gathered"].tolist() == rows
        assert found["x.grad"].tolist() == [[3.0, 3.0]] * (2 + rank)
        assert found["total"].tolist() == found["plain"].tolist() == [3.0]
        assert found["y.grad"].tolist() == [3.0]
        assert found["stacked"].tolist() == [[0.0, 0.0], [1.0, 1.0]]
        assert found["empty"].tolist() == [[1.0, 1.0]]
        assert found["world"].tolist() == [2, rank]


def test_one_process_is_left_alone() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert not distributed.is_distributed()
    assert (distributed.world_size(), distributed.rank()) == (1, 0)
    assert distributed.gather_with_grad(x) is x
    assert distributed.all_reduce_sum_with_grad(x) is x
    assert torch.equal(distributed.all_reduce_sum(x), x) and not distributed.all_reduce_sum(x).requires_grad


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
