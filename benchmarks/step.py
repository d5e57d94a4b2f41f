# SPDX-License-Identifier: Apache-2.0
"""A pre-training step beside a literal port of the paper: time, memory, and the share of the matrix rate it reaches.

Run from the repository's root: `python -m benchmarks.step --json results/step.json`. Forward and backward of ViT-B with
a BERT-base, X-rays of 224 x 224 and volumes of 32 x 128 x 128 with k = 4 slices; optimizer and teacher's update are the
same on both sides and left out. The rows, each with what it is in comparison with the port ("kind"):

- "literal port": `benchmarks.literal`, on the same weights.
- "equal work": the same loss and gradients, which a bar checks, by fused attention and the chunked loss.
- "reading": what the paper leaves open, one after another: L_vl from the masked student pass (as A-CLIP), then masked
  tokens dropped (A-CLIP) instead of replaced.
- "recipe": what `mimic_cxr_bimcv.json` trains: L_vl from the masked pass, mask token, all patches, 8,192 prototypes,
  Sinkhorn targets. Its FLOPs over its time, as a share of the fastest matrix product's rate, is the achieved share.
"""

from __future__ import annotations

from typing import Any

import fire
import torch

from benchmarks import measure, recipe
from benchmarks.literal import LiteralStep
from unimedi_components.losses import UniMediLoss
from unimedi_components.plan import step_cost

MIN_SPEED_UP, MAX_MEMORY, MAX_DIFFERENCE = 3.0, 0.35, 1e-4
#: Share of the matrix rate that the recipe must reach, on a CPU and on a GPU.
MIN_SHARE = {("cpu", "float32"): 0.75, ("cpu", "bfloat16"): 0.65, ("cuda", "bfloat16"): 0.45}
PROTOTYPES = 65536
_ONE_PASS = {"vl_on_full": False, "mask_mode": "mask_token", "patch_loss_on": "all"}
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fused attention, chunked loss": ("equal work", {**_ONE_PASS, "vl_on_full": True}),
    "+ L_vl from the masked pass": ("reading", _ONE_PASS),
    "+ masked tokens dropped": ("reading", {**_ONE_PASS, "mask_mode": "drop", "patch_loss_on": "visible"}),
    "recipe": ("recipe", _ONE_PASS),
}


def step(
    device: str = "cpu",
    json: str | None = None,
    quick: bool = False,
    rounds: int = 3,
    size: str = "vit_b16",
    images: int | None = None,
    volumes: int | None = None,
    dtypes: str = "float32,bfloat16",
    port: bool = True,
) -> dict[str, Any]:
    """Measure the variants.

    Args:
        device: "cpu" or "cuda".
        json: file for the result.
        quick: small sizes and a single round.
        rounds: turns of each.
        size: "vit_b16" or "vit_s16".
        images: X-rays in the batch; by default 2, on a GPU the paper's 12.
        volumes: CTs in the batch; by default 2, on a GPU the paper's 6.
        dtypes: of "float32" and "bfloat16" (autocast).
        port: False measures the recipe alone.
    """
    place = measure.set_up(device)
    gpu = place.type == "cuda"
    size, most = ("quick", 512) if quick else (size, PROTOTYPES)
    counts = (images or (12 if gpu and not quick else 2), volumes or (6 if gpu and not quick else 2))
    networks = {"recipe": recipe.network(size, place)}
    if port:
        networks["port"] = recipe.network(size, place, most)
    batch = recipe.batch(size, *counts, place)
    chunk = 2048 if gpu else 128
    rows: list[dict[str, Any]] = []
    bars: dict[str, Any] = {}
    for name in dtypes.split(",") if isinstance(dtypes, str) else dtypes:
        dtype = getattr(torch, name)
        product = measure.Product(place, dtype, quick)
        runs: dict[str, Any] = {}
        flops = {}
        if port:
            runs["literal port"] = (
                networks["port"],
                _run(networks["port"], LiteralStep(networks["port"]), batch, dtype),
            )
        for variant, (kind, options) in _VARIANTS.items():
            if kind != "recipe" and not port:
                continue
            network = networks["recipe" if kind == "recipe" else "port"]
            targets = "sinkhorn" if kind == "recipe" else "center"
            prototypes = network.dino_head.hparams["out_dim"]
            loss = UniMediLoss(out_dim=prototypes, targets=targets, chunk_size=chunk, center_momentum=1.0).to(place)
            _set(network, options)
            cost = step_cost(
                network, *counts, recipe.SIZES[size]["words"], rounds=3 * (kind == "recipe"), amp=dtype != torch.float32
            )
            flops[variant] = cost.flops
            runs[variant] = (network, _run(network, lambda b, n=network, loss=loss: loss(n(b)), batch, dtype, options))
        if port and name == "float32":
            bars["gradients of equal work, against the port's"] = measure.at_most(
                _difference(runs["literal port"], runs["fused attention, chunked loss"]), MAX_DIFFERENCE
            )
        sizes = measure.peaks(runs, place)
        times = measure.by_turns(
            {**{n: run for n, (_, run) in runs.items()}, "product": product}, place, 1 if quick else rounds
        )
        first = "literal port" if port else "recipe"
        for variant in runs:
            row = {"dtype": name, "name": variant, "kind": _VARIANTS.get(variant, ("port", {}))[0]}
            row |= {"seconds": times[variant], "bytes": sizes[variant]}
            row |= {f"{first.split()[-1]}_time_over": measure.ratio(times, first, variant)}
            row |= {f"bytes_over_{first.split()[-1]}": sizes[variant] / sizes[first]}
            if variant in flops:
                row |= {"flops": flops[variant], "share": product.share(times, variant, flops[variant], "product")}
            rows.append(row)
        rate = product.flops / min(times["product"])
        rows.append({"dtype": name, "name": "product", "shape": product.shape, "flops_per_second": rate})
        last = "+ masked tokens dropped"
        if port:
            bars[f"{name}: port's time over ours, readings included"] = measure.at_least(
                measure.ratio(times, first, last), MIN_SPEED_UP
            )
            bars[f"{name}: our memory over the port's, readings included"] = measure.at_most(
                sizes[last] / sizes[first], MAX_MEMORY
            )
        limit = MIN_SHARE.get((place.type, name))
        if limit is not None:
            shares = product.share(times, "recipe", flops["recipe"], "product")
            bars[f"{name}: recipe's share of the matrix rate"] = measure.at_least(shares, limit)
    facts = {"size": size, "images": counts[0], "volumes": counts[1], "prototypes": most, "chunk_size": chunk}
    return measure.report("step", place, json, rows, bars, quick, **facts)


def _set(network: Any, options: dict[str, Any]) -> None:
    for name, value in options.items():
        setattr(network, name, value)


def _run(network: Any, loss: Any, batch: Any, dtype: torch.dtype, options: dict[str, Any] | None = None) -> measure.Run:
    run = measure.step(network, lambda: loss(batch), dtype)

    def with_options() -> None:
        _set(network, options or {})
        run()

    return with_options


def _difference(*pair: tuple[torch.nn.Module, measure.Run]) -> float:
    """Of the gradients that two runs leave in one network."""
    found = []
    for network, run in pair:
        with measure.full_precision():
            run()
        found.append(recipe.gradients(network))
    expected, same = found
    return recipe.gradient_difference(same, expected)


if __name__ == "__main__":
    fire.Fire(step, serialize=lambda _: None)
