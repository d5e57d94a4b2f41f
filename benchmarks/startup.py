# SPDX-License-Identifier: Apache-2.0
"""What comes before the first images: imports, the network, and the first step.

Run from the repository's root: `python -m benchmarks.startup --json results/startup.json`. Imports are CPU time of new
interpreters by turns, ours against torch, MONAI and transformers alone, which it stands on. The network is built and
brought to the device; the first step is beside the steady ones of the same batch, by the wall clock.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from typing import Any

import fire
import torch

from benchmarks import measure, recipe
from unimedi_components.losses import UniMediLoss

MAX_IMPORT, MAX_COMMAND, MAX_FIRST = 1.25, 0.25, 5.0
IMPORTS = {
    "torch, monai, transformers": "import torch, monai.bundle, monai.engines, monai.handlers, transformers.models.bert",
    "what a training imports": "from unimedi_components import engines, losses, networks",
    "python -m unimedi_components --help": None,
}


def startup(
    device: str = "cpu", json: str | None = None, quick: bool = False, rounds: int = 3, size: str | None = None
) -> dict[str, Any]:
    """Measure the start.

    Args:
        device: "cpu" or "cuda".
        json: file for the result.
        quick: small sizes and a single round.
        rounds: fresh interpreters of each kind.
        size: of the network; "vit_b16" or "vit_s16".
    """
    place = measure.set_up(device)
    size = "quick" if quick else size or "vit_b16"
    times: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(1 if quick else rounds):
        for name, code in IMPORTS.items():
            times[name].append(_interpreter(["-m", "unimedi_components", "--help"] if code is None else ["-c", code]))
    rows: list[dict[str, Any]] = [{"name": name, "seconds": seconds} for name, seconds in times.items()]
    base, training, command = IMPORTS
    begun = time.perf_counter()
    network = recipe.network(size)
    rows.append({"name": "network, built", "wall_seconds": time.perf_counter() - begun})
    begun = time.perf_counter()
    network.to(place)
    batch = recipe.batch(size, 2, 2, place)
    head: Any = network.dino_head
    loss = UniMediLoss(out_dim=head.hparams["out_dim"]).to(place)
    _wait(place)
    rows.append({"name": "network and batch, to the device", "wall_seconds": time.perf_counter() - begun})
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    step = measure.step(network, lambda: loss(network(batch)), dtype)
    seconds = []
    for _ in range(3):
        _wait(place)
        begun, cpu = time.perf_counter(), time.process_time()
        step()
        _wait(place)
        seconds.append(time.perf_counter() - begun if place.type == "cuda" else time.process_time() - cpu)
    rows.append({"name": "steps, the first one first", "seconds": seconds})
    bars = {
        "imports of a training, over their base": measure.at_most(measure.ratio(times, training, base), MAX_IMPORT),
        "--help, over the base": measure.at_most(measure.ratio(times, command, base), MAX_COMMAND),
        "first step over the next": measure.at_most(seconds[0] / min(seconds[1:]), MAX_FIRST),
    }
    return measure.report("startup", place, json, rows, bars, quick, size=size)


def _interpreter(words: list[str]) -> float:
    """CPU seconds of a fresh interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


if __name__ == "__main__":
    fire.Fire(startup, serialize=lambda _: None)
