# SPDX-License-Identifier: Apache-2.0
"""A step in micro-batches beside the same step on the whole batch: equal gradients, peak memory, time.

Run from the repository's root: `python -m benchmarks.accumulation --json results/accumulation.json`. UniMedI with its
loss over one contrastive batch, the encoders on 1 (whole), 2 and 4 parts of it one after another
(`network_def#accumulation`); in each modality the parts are of equal size. A step in parts costs one more forward pass.
"""

from __future__ import annotations

from typing import Any

import fire
import torch
from torch import Tensor

from benchmarks import measure, recipe
from unimedi_components.losses import UniMediLoss
from unimedi_components.networks import UniMedI

MAX_DIFFERENCE, MAX_MEMORY, MAX_TIME = 1e-5, 0.5, 1.35
PARTS = (1, 2, 4)


def accumulation(
    device: str = "cpu", json: str | None = None, quick: bool = False, rounds: int = 3, size: str | None = None
) -> dict[str, Any]:
    """Measure the whole batch and its parts.

    `device` "cpu" or "cuda", `json` the result's file, `quick` small sizes and one round, `rounds` turns of each.

    Args:
        size: "vit_b16" or "vit_s16"; by default the smaller one on a CPU.
    """
    # products of full precision, so that parts and whole differ by rounding alone
    place = measure.set_up(device, "highest")
    gpu = place.type == "cuda"
    size = "quick" if quick else size or ("vit_b16" if gpu else "vit_s16")
    counts = (24, 12) if gpu and not quick else (4, 4)
    network = recipe.network(size, place)
    batch = recipe.batch(size, *counts, place)
    runs: dict[str, Any] = {}
    found: dict[str, dict[str, Tensor]] = {}
    for parts in PARTS:
        name = "whole" if parts == 1 else f"{parts} parts"
        runs[name] = (network, _run(network, batch, parts, 2048 if gpu else 128))
        runs[name][1]()
        found[name] = recipe.gradients(network)
    differences = {name: recipe.gradient_difference(each, found["whole"]) for name, each in found.items()}
    del found
    sizes = measure.peaks(runs, place)
    times = measure.by_turns({name: run for name, (_, run) in runs.items()}, place, 1 if quick else rounds)
    # what a step gives back in any case: its gradients
    given = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    rows = [
        {
            **{"name": name, "seconds": times[name], "bytes": sizes[name], "bytes_of_gradients": given},
            **{"time_over_whole": measure.ratio(times, name, "whole"), "gradient_difference": differences[name]},
            **{"bytes_over_whole": sizes[name] / sizes["whole"]},
            "bytes_over_whole_without_gradients": (sizes[name] - given) / (sizes["whole"] - given),
        }
        for name in runs
    ]
    bars = {
        f"{name}: gradients": measure.at_most(differences[name], MAX_DIFFERENCE) for name in runs if name != "whole"
    }
    bars |= {
        "4 parts: memory beside the gradients": measure.at_most(
            rows[-1]["bytes_over_whole_without_gradients"], MAX_MEMORY
        ),
        "4 parts: time": measure.at_most(measure.ratio(times, "4 parts", "whole"), MAX_TIME),
    }
    return measure.report(
        "accumulation", place, json, rows, bars, quick, size=size, images=counts[0], volumes=counts[1]
    )


def _run(network: UniMedI, batch: dict[str, Tensor], parts: int, chunk: int) -> measure.Run:
    prototypes = network.dino_head.hparams["out_dim"] if network.dino_head is not None else 0
    loss = UniMediLoss(out_dim=prototypes, center_momentum=1.0, chunk_size=chunk).to(batch["image2d"].device)
    step = measure.step(network, lambda: loss(network(batch)))

    def run() -> None:
        network.accumulation = parts
        torch.manual_seed(0)
        step()

    return run


if __name__ == "__main__":
    fire.Fire(accumulation, serialize=lambda _: None)
