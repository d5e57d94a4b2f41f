# SPDX-License-Identifier: Apache-2.0
"""UNETR over the unified encoder beside MONAI's UNETR: Dice per minute of training on the same abdominal phantoms.

Run from the repository's root: `python -m benchmarks.peer_dice --json results/peer_dice.json`. Both networks get
the same volumes, order of cases, augmentation, loss, kind of optimizer, learning rate and wall-clock time of training;
time spent on measuring does not count. The peer's patches are 16 x 16 x 16, which MONAI's UNETR prescribes, with the
same width, heads and channels; its depth must be twelve blocks, which MONAI prescribes too. The bars hold if the
pre-trained network is at least the peer's equal in mean Dice at each third of the time.
"""

from __future__ import annotations

import json as json_module
import platform
import time
from pathlib import Path
from typing import Any

import fire
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import UNETR
from torch import nn

from unimedi_components.engines import build_optimizer
from unimedi_components.loading import ImageDataset, ImageLoader, RepeatedDataset
from unimedi_components.metrics.organs import OrganDice
from unimedi_components.networks import encoder_sizes

CONFIG = "bundles/abdomen_ct_segmentation/configs/train.json"
THIRDS = 3


def peer_dice(
    json: str | None = None,
    minutes: float = 4.0,
    phantoms: int = 45,
    seed: int = 0,
    networks: str = "unimedi,random,monai",
    threads: int | None = None,
) -> dict[str, Any]:
    """Train each network for the same time and measure mean Dice on the held-out phantoms.

    Args:
        json: file for the result.
        minutes: wall-clock time of training for each network.
        phantoms: patients in BCV's layout, written below `data/` unless they are there.
        seed: of new weights, the order of cases and the augmentation.
        networks: of "unimedi" (pre-trained encoder), "random" (the same without) and "monai".
        threads: of torch; None leaves its own.
    """
    if threads:
        torch.set_num_threads(threads)
    chosen = networks.split(",") if isinstance(networks, str) else list(networks)
    rows = [row for name in chosen for row in _train(name, minutes, phantoms, seed)]
    result = {
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "minutes": minutes,
        "rows": rows,
        "bars": _bars(rows),
    }
    if json is not None:
        Path(json).parent.mkdir(parents=True, exist_ok=True)
        Path(json).write_text(json_module.dumps(result, indent=1), encoding="utf-8")
    print(json_module.dumps(result, indent=1))
    return result


def _train(name: str, minutes: float, phantoms: int, seed: int) -> list[dict[str, Any]]:
    parser = ConfigParser(json_module.loads(Path(CONFIG).read_text(encoding="utf-8")))
    # only what is asked for is built: the network for the peer never is
    changes: dict[str, Any] = {"data#datalist#phantoms": phantoms, "seed": seed}
    if name == "random":
        changes["encoder_weights"] = "none"
    parser.update(changes)
    torch.manual_seed(seed)
    network = _network(name, parser)
    device = torch.device(parser.get_parsed_content("device"))
    network.to(device)
    dataset: Any = parser.get_parsed_content("train#dataset")
    held_out = _held_out(parser)
    loader = ImageLoader(RepeatedDataset(dataset, steps=50), 1, shuffle=True, seed=seed)
    loss: Any = parser.get_parsed_content("loss")
    rates = {key: parser[f"optimizer#{key}"] for key in ("lr", "weight_decay", "encoder_lr")}
    optimizer: torch.optim.Optimizer
    if name == "monai":
        optimizer = torch.optim.AdamW(network.parameters(), lr=rates["lr"], weight_decay=rates["weight_decay"])
    else:
        optimizer = build_optimizer(network, **rates)
    peaks = [group["lr"] for group in optimizer.param_groups]
    rows: list[dict[str, Any]] = []
    steps, trained, epoch = 0, 0.0, 0
    network.train()
    while len(rows) < THIRDS:
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        dataset.set_epoch(epoch)
        epoch += 1
        batches = iter(loader)
        while len(rows) < THIRDS:
            started = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            share = trained / (60 * minutes)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                rise = min(1.0, (steps + 1) / (parser["lr_scheduler#warmup_iters"] + 1))
                group["lr"] = peak * rise * max(0.0, 1 - share) ** parser["lr_scheduler#power"]
            value = loss(network(batch["image"].to(device)), batch["label"].to(device))
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(network.parameters(), parser["train#run#max_grad_norm"])
            optimizer.step()
            steps += 1
            trained += time.perf_counter() - started
            if trained >= 60 * minutes * (len(rows) + 1) / THIRDS:
                dice = _dice(network, held_out, len(parser["label_names"]), device)
                rows.append({"network": name, "seconds": trained, "steps": steps, "mean_dice": dice})
                print(f"{name}: {trained:.0f} s, {steps} steps, mean Dice {dice:.3f}", flush=True)
    return rows


def _network(name: str, parser: ConfigParser) -> nn.Module:
    if name in ("unimedi", "random"):
        network: Any = parser.get_parsed_content("network_def")
        return network
    if name != "monai":
        raise SystemExit(f"unknown network {name!r}; choose from: unimedi, random, monai")
    encoder = encoder_sizes(parser["size"])
    width = encoder["embed_dim"]
    return UNETR(
        1,
        len(parser["label_names"]),
        parser["vol_size"],
        feature_size=parser["network_def#feature_size"],
        hidden_size=width,
        mlp_dim=4 * width,
        num_heads=encoder["num_heads"],
    )


def _held_out(parser: ConfigParser) -> ImageDataset:
    items: Any = parser.get_parsed_content("data#items")
    chain: Any = parser.get_parsed_content("validate#preprocessing")
    folders = {key: parser.get_parsed_content(key) for key in ("dataset_dir", "cache_dir")}
    return ImageDataset(items["test"], chain, folders["dataset_dir"], "mask", dim=3, cache_dir=folders["cache_dir"])


@torch.no_grad()
def _dice(network: nn.Module, dataset: ImageDataset, classes: int, device: torch.device) -> float:
    """Mean Dice on the network's grid."""
    network.eval()
    metric = OrganDice(classes)
    for batch in ImageLoader(dataset, 1):
        metric.update((network(batch["image"].to(device)), batch["label"].to(device)))
    network.train()
    return metric.compute()


def _bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether ours reaches the peer's Dice after each third of the time, and the random encoder's after all."""
    by = {name: [row["mean_dice"] for row in rows if row["network"] == name] for name in ("unimedi", "random", "monai")}
    bars = []
    if by["unimedi"] and by["monai"]:
        for third, (ours, peer) in enumerate(zip(by["unimedi"], by["monai"], strict=True), start=1):
            title = f"mean Dice after {third}/{THIRDS} of the time, at least MONAI's UNETR"
            bars.append({"name": title, "value": ours, "limit": peer, "holds": ours >= peer})
    if by["unimedi"] and by["random"]:
        ours, peer = by["unimedi"][-1], by["random"][-1]
        title = "mean Dice of the pre-trained encoder, above the random one"
        bars.append({"name": title, "value": ours, "limit": peer, "holds": ours > peer})
    return bars


if __name__ == "__main__":
    fire.Fire(peer_dice, serialize=lambda _: None)
