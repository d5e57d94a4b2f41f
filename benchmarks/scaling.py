# SPDX-License-Identifier: Apache-2.0
"""How cost grows: with tokens, slices k, the batch, workers that load, and ranks.

Run from the repository's root: `python -m benchmarks.scaling --json results/scaling.json`. A step of the encoder over
more and more tokens, and of UniMedI with more slices and larger batches, each with the share of the matrix rate that
its counted FLOPs reach; the bars are that no size falls behind the best of its kind. Workers hand out cached phantoms,
by the wall clock. Ranks train the smaller network over gloo on CPUs, whatever `--device` says: CPU time of a rank's
step over that of a run without others, with the same images each, and averaged gradients against the whole batch's.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import fire
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks import measure, recipe
from unimedi_components import distributed
from unimedi_components.losses import UniMediLoss
from unimedi_components.networks import UnifiedViT, encoder_sizes
from unimedi_components.plan import step_cost

#: Of the best size's share of the matrix rate, that of every other.
MIN_EVEN, MAX_RANK_TIME, MAX_DIFFERENCE = 0.7, 1.35, 1e-4


def scaling(
    device: str = "cpu",
    json: str | None = None,
    quick: bool = False,
    rounds: int = 3,
    size: str | None = None,
    kinds: str = "tokens,k,batch,workers,ranks",
) -> dict[str, Any]:
    """Measure each kind.

    Args:
        device: "cpu" or "cuda".
        json: file for the result.
        quick: small sizes and a single round.
        rounds: turns of each size.
        size: "vit_b16" or "vit_s16"; by default the smaller one on a CPU.
        kinds: of "tokens", "k", "batch", "workers" and "ranks".
    """
    place = measure.set_up(device)
    gpu = place.type == "cuda"
    size, rounds = ("quick", 1) if quick else (size or ("vit_b16" if gpu else "vit_s16"), rounds)
    chosen = kinds.split(",") if isinstance(kinds, str) else list(kinds)
    dtype = torch.bfloat16 if gpu else torch.float32
    runs: dict[str, dict[str, tuple[torch.nn.Module, measure.Run, float]]] = {}
    if "tokens" in chosen:
        runs["tokens"] = _tokens(size, place, dtype, 8 if gpu else 1)
    images, volumes = (12, 6) if gpu and not quick else (2, 2)
    if "k" in chosen:
        runs["k"] = {str(k): _step(size, place, dtype, images, volumes, k) for k in ((1, 2, 4) if quick else (1, 4, 8))}
    if "batch" in chosen:
        sizes = [(n * images, n * volumes) for n in (1, 2, 4)]
        runs["batch"] = {f"{a} + {b}": _step(size, place, dtype, a, b) for a, b in sizes}
    rows: list[dict[str, Any]] = []
    bars: dict[str, Any] = {}
    product = measure.Product(place, dtype, quick)
    for kind, each in runs.items():
        bytes_ = measure.peaks({name: (module, run) for name, (module, run, _) in each.items()}, place)
        timed = {name: run for name, (_, run, _) in each.items()}
        times = measure.by_turns({**timed, "product": product}, place, rounds)
        shares = {name: product.share(times, name, flops, "product") for name, (_, _, flops) in each.items()}
        for name, (_, _, flops) in each.items():
            found = {"seconds": times[name], "bytes": bytes_[name], "flops": flops, "share": shares[name]}
            rows.append({"kind": kind, "name": name, **found})
        medians = [share["median"] for share in shares.values()]
        bars[f"{kind}: least share over the best"] = measure.at_least(min(medians) / max(medians), MIN_EVEN)
    if "workers" in chosen:
        rows += _workers(quick)
    if "ranks" in chosen:
        found, bar = _ranks("quick" if quick else "vit_s16", rounds)
        rows, bars = rows + found, {**bars, **bar}
    return measure.report("scaling", place, json, rows, bars, quick, size=size, dtype=str(dtype).removeprefix("torch."))


def _tokens(size: str, place: torch.device, dtype: torch.dtype, batch: int) -> dict[str, Any]:
    """Steps of the encoder on volumes, whose depth gives the tokens."""
    quick = size == "quick"
    sizes = encoder_sizes(**recipe.SIZES[size]["encoder"])
    plane, patch = (32, (1, 8, 8)) if quick else (128, (1, 16, 16))
    sizes |= {"patch_size_3d": patch}
    found = {}
    for depth in (2, 4) if quick else (4, 8, 16, 32):
        tokens = depth * (plane // patch[1]) ** 2
        encoder = UnifiedViT(**{**sizes, "vol_size": (depth, plane, plane)}).to(place)
        volume = torch.randn(batch, 1, depth, plane, plane, device=place)
        width, hidden = encoder.embed_dim, encoder.blocks[0].mlp.fc1.out_features
        # three times the forward: backward is two products for each
        block = 2.0 * (1 + tokens) * (4 * width**2 + 2 * width * hidden) + 4.0 * (1 + tokens) ** 2 * width
        flops = 3.0 * batch * len(encoder.blocks) * block

        def loss(encoder: UnifiedViT = encoder, volume: Tensor = volume) -> Tensor:
            return encoder(volume).patches.float().square().mean()

        found[str(1 + tokens)] = (encoder, measure.step(encoder, loss, dtype), flops)
    return found


def _step(size: str, place: torch.device, dtype: torch.dtype, images: int, volumes: int, k: int | None = None) -> Any:
    """A pre-training step of UniMedI: module, run, FLOPs."""
    network = recipe.network(size, place, num_slices=k or recipe.SIZES[size]["k"])
    head: Any = network.dino_head
    chunk = 2048 if place.type == "cuda" else 128
    loss = UniMediLoss(out_dim=head.hparams["out_dim"], chunk_size=chunk).to(place)
    batch = recipe.batch(size, images, volumes, place)
    cost = step_cost(network, images, volumes, recipe.SIZES[size]["words"], amp=dtype != torch.float32)
    return network, measure.step(network, lambda: loss(network(batch)), dtype), cost.flops


def _workers(quick: bool) -> list[dict[str, Any]]:
    """Images a second that a loader hands out of its cache, by the number of its workers."""
    from unimedi_components import data
    from unimedi_components.data.datalist import load_datalist
    from unimedi_components.loading import ImageDataset

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "phantom"
        listed = load_datalist(data.pretraining_datalist(root, {"mimic_cxr": 6, "bimcv": 1}), root)
        items = [item for part in ("training", "validation", "test") for item in listed[part]]
        items = [item for item in items if item["dim"] == 2]
        chain = data.ByDimension(data.xray_transforms(32 if quick else 224), data.ct_transforms())
        dataset = ImageDataset(items, chain, root, "report", cache_dir=Path(scratch) / "cache")
        for index in range(len(items)):
            dataset[index]
        count = 20 if quick else 5000
        for workers in (0, 1) if quick else (0, 1, 2, 4):
            indices = [index % len(items) for index in range(count)]
            loader: Any = torch.utils.data.DataLoader(
                dataset, 16, sampler=indices, num_workers=workers, collate_fn=_stack, persistent_workers=workers > 0
            )
            for _ in loader:  # workers start, and look at the files
                pass
            begun = time.perf_counter()
            for _ in loader:
                pass
            seconds = time.perf_counter() - begun
            rows.append(
                {"kind": "workers", "name": str(workers), "wall_seconds": seconds, "per_second": count / seconds}
            )
    return rows


def _stack(samples: list[dict[str, Any]]) -> Tensor:
    return torch.stack([sample["image"] for sample in samples])


def _ranks(size: str, rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """CPU time of a step on one and on two ranks, each with a share of the same kind, and their gradients."""
    with tempfile.TemporaryDirectory() as scratch, measure.full_precision():
        # a fork needs no imports, but autograd's threads for a GPU do not survive it
        method = "spawn" if torch.cuda.is_initialized() else "fork"
        for ranks in (1, 2):
            arguments = (ranks, size, rounds, scratch)
            torch.multiprocessing.start_processes(_rank, arguments, nprocs=ranks, start_method=method)
        whole = _joint_gradients(size, 2)
        one, *two = (torch.load(f"{scratch}/{name}.pt") for name in ("1-0", "2-0", "2-1"))
    rows = [{"kind": "ranks", "name": name, "seconds": found["seconds"]} for name, found in (("1", one), ("2", two[0]))]
    difference = recipe.gradient_difference(two[0]["gradients"], whole)
    over = [max(a, b) / c for a, b, c in zip(*(part["seconds"] for part in (*two, one)), strict=True)]
    return rows, {
        "ranks: CPU time of a rank's step over a single one's": measure.at_most(measure.spread(over), MAX_RANK_TIME),
        "ranks: averaged gradients against the whole batch's": measure.at_most(difference, MAX_DIFFERENCE),
    }


def _rank(rank: int, ranks: int, size: str, rounds: int, folder: str) -> None:
    measure.set_up("cpu", "highest")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", f"file://{folder}/store-{ranks}", rank=rank, world_size=ranks)
    network, loss, batch = _rank_parts(size, rank)
    parallel = DistributedDataParallel(network)
    first: dict[str, Tensor] = {}
    seconds = []
    for turn in range(rounds + 1):
        parallel.zero_grad(set_to_none=True)
        begun = time.process_time()
        loss(parallel(batch)).backward()
        seconds.append(time.process_time() - begun)
        if turn == 0:
            first = recipe.gradients(network)
    torch.save({"seconds": seconds[1:], "gradients": first}, f"{folder}/{ranks}-{rank}.pt")
    distributed.stop()


def _rank_parts(size: str, rank: int) -> tuple[Any, Any, dict[str, Tensor]]:
    network = recipe.network(size)
    head: Any = network.dino_head
    return network, UniMediLoss(out_dim=head.hparams["out_dim"]), recipe.batch(size, 2, 2, seed=rank)


def _joint_gradients(size: str, ranks: int) -> dict[str, Tensor]:
    """Of the ranks' batches joined, X-rays before volumes."""
    network, loss, _ = _rank_parts(size, 0)
    parts = [recipe.batch(size, 2, 2, seed=rank) for rank in range(ranks)]
    batch = {name: torch.cat([part[name] for part in parts]) for name in ("image2d", "image3d")}
    for name in ("input_ids", "attention_mask"):
        batch[name] = torch.cat([part[name][side] for side in (slice(0, 2), slice(2, 4)) for part in parts])
    loss(network(batch)).backward()
    return recipe.gradients(network)


if __name__ == "__main__":
    fire.Fire(scaling, serialize=lambda _: None)
