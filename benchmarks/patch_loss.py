# SPDX-License-Identifier: Apache-2.0
"""The distillation loss over patch tokens in chunks of rows, beside the direct one: memory, time, and equal gradients.

Run from the repository's root: `python -m benchmarks.patch_loss --json results/patch_loss.json`. DINO's 65,536
prototypes, bottleneck features of 256, and as many patch tokens as some images have; forward and backward. The direct
loss holds tokens x prototypes; "checkpointed" recomputes chunks of it by `torch.utils.checkpoint`.
"""

from __future__ import annotations

from typing import Any

import fire
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks import measure
from unimedi_components.losses.distillation import distillation_loss

MAX_MEMORY, MAX_TIME, MAX_DIFFERENCE = 0.15, 1.0, 1e-5
_TEMPS = (0.1, 0.04)


class _Rows(nn.Module):
    """Student's features and prototypes, whose gradients are asked for, and the teacher's."""

    def __init__(self, tokens: int, prototypes: int, width: int) -> None:
        super().__init__()
        student, teacher, *weights = (torch.randn(n, width) for n in (tokens, tokens, prototypes, prototypes))
        self.student, self.weights = nn.Parameter(F.normalize(student)), nn.Parameter(F.normalize(weights[0]))
        self.register_buffer("teacher", F.normalize(teacher + student))
        self.register_buffer("teacher_weights", F.normalize(weights[0] + 0.1 * weights[1]))
        self.register_buffer("center", 0.1 * torch.randn(prototypes))

    def direct(self, rows: slice = slice(None)) -> Tensor:
        """Sum over rows."""
        targets = ((self.teacher[rows] @ self.teacher_weights.T - self.center) / _TEMPS[1]).softmax(-1)
        return -(targets * (self.student[rows] @ self.weights.T / _TEMPS[0]).log_softmax(-1)).sum()

    def checkpointed(self, size: int) -> Tensor:
        """The same, whose chunks are computed once more in the backward."""
        starts = range(0, len(self.student), size)
        parts = [checkpoint(self.direct, slice(start, start + size), use_reentrant=False) for start in starts]
        return torch.stack(parts).sum()

    def chunked(self, size: int) -> Tensor:
        """The package's mean over rows."""
        sides = (self.student, self.teacher, self.weights, self.teacher_weights)
        return distillation_loss(*sides, self.center[None], *_TEMPS, chunk_size=size, groups=(len(self.student),))


def patch_loss(device: str = "cpu", json: str | None = None, quick: bool = False, rounds: int = 5) -> dict[str, Any]:
    """Measure the losses.

    Args:
        device: "cpu" or "cuda".
        json: file for the result.
        quick: small sizes and a single round.
        rounds: turns of each.
    """
    place = measure.set_up(device, "highest")
    gpu = place.type == "cuda"
    prototypes, width = (512, 16) if quick else (65536, 256)
    chunks = (64,) if quick else (128, 1024) if gpu else (128, 512)
    rows: list[dict[str, Any]] = []
    bars: dict[str, Any] = {}
    for tokens in (256,) if quick else (1576, 10128) if gpu else (900, 3546):
        data = _Rows(tokens, prototypes, width).to(place)
        losses: dict[str, Any] = {"direct": lambda data=data: data.direct() / len(data.student)}
        for size in chunks:
            losses[f"chunks of {size}"] = lambda data=data, size=size: data.chunked(size)
        losses[f"checkpointed {chunks[-1]}"] = lambda data=data: data.checkpointed(chunks[-1]) / len(data.student)
        runs = {name: (data, measure.step(data, loss)) for name, loss in losses.items()}
        found = {}
        for name, (_, run) in runs.items():
            run()
            assert data.student.grad is not None and data.weights.grad is not None
            found[name] = (data.student.grad.clone(), data.weights.grad.clone())
        sizes = measure.peaks(runs, place)
        times = measure.by_turns({name: run for name, (_, run) in runs.items()}, place, 1 if quick else rounds)
        for name in runs:
            pairs = zip(found[name], found["direct"], strict=True)
            difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
            over = {"time_over_direct": measure.ratio(times, name, "direct"), "gradient_difference": difference}
            row = {"tokens": tokens, "name": name, "seconds": times[name], "bytes": sizes[name], **over}
            rows.append({**row, "bytes_over_direct": sizes[name] / sizes["direct"]})
            if name.startswith("chunks"):
                bars[f"{tokens} tokens, {name}: gradients"] = measure.at_most(difference, MAX_DIFFERENCE)
        # the loss's own size of chunks on a CPU, the larger one where launches cost
        name = f"chunks of {chunks[-1 if gpu else 0]}"
        bars[f"{tokens} tokens, {name}: time"] = measure.at_most(measure.ratio(times, name, "direct"), MAX_TIME)
        bars[f"{tokens} tokens, {name}: memory"] = measure.at_most(sizes[name] / sizes["direct"], MAX_MEMORY)
    return measure.report("patch_loss", place, json, rows, bars, quick, prototypes=prototypes, width=width)


if __name__ == "__main__":
    fire.Fire(patch_loss, serialize=lambda _: None)
