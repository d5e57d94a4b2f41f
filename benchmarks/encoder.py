# SPDX-License-Identifier: Apache-2.0
"""The unified encoder beside the ViTs of timm, Hugging Face and MONAI on the same images, and what Eq. 1 adds to it.

Run from the repository's root: `python -m benchmarks.encoder --json results/encoder.json`. ViT-B/16 on images of 224 x
224, against timm (if it is installed: `pip install timm`) and transformers' `ViTModel`; on volumes of 32 x 128 x 128
in patches of 4 x 16 x 16 (512 tokens) and 1 x 16 x 16 (2,048), against MONAI's `ViT`. All have random weights, and ours
also runs with **v** ("ours, v").
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import fire
import torch
from monai.networks.nets import ViT
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from benchmarks import measure
from unimedi_components.networks import UnifiedViT

MAX_OVER_PEER, MAX_OVER_MONAI, MAX_V = 1.05, 0.55, 1.05


def encoder(device: str = "cpu", json: str | None = None, quick: bool = False, rounds: int = 7) -> dict[str, Any]:
    """Measure forward passes and steps.

    `device` "cpu" or "cuda", `json` the result's file, `quick` small sizes and one round, `rounds` turns of each.
    """
    place = measure.set_up(device)
    size = {"embed_dim": 48, "depth": 2, "num_heads": 3} if quick else {"embed_dim": 768, "depth": 12, "num_heads": 12}
    side, volume = (32, (4, 32, 32)) if quick else (224, (32, 128, 128))
    images, volumes = (64, 4) if place.type == "cuda" else (2, 1)
    rows: list[dict[str, Any]] = []
    bars: dict[str, Any] = {}
    inputs = [("2D", torch.randn(images, 1, side, side), 4)]
    inputs += [(f"3D, depth {depth}", torch.randn(volumes, 1, *volume), depth) for depth in (4, 1)]
    for title, image, depth in inputs:
        ours = UnifiedViT(side, volume, patch_size_3d=(depth, 16, 16), **size)
        peers = _peers_2d(side, size) if image.ndim == 4 else {"monai": _monai(volume, depth, size)}
        networks = {"ours": ours, "ours, v": ours, **peers}
        image = image.to(place)
        for network in networks.values():
            network.to(place)
        for dtype in (torch.float32, torch.bfloat16):
            found = _measure(networks, image, dtype, place, 1 if quick else rounds)
            named = f"{title}, {str(dtype).removeprefix('torch.')}"
            rows += [{"input": named, **row} for row in found]
            over = {(row["pass"], row["name"]): row["time_over_ours"] for row in found}
            for kind in ("forward", "step"):
                bars[f"{named}, {kind}: v over none"] = measure.at_most(over[kind, "ours, v"], MAX_V)
                if image.ndim == 4:
                    peer = "timm" if "timm" in networks else "transformers"
                    bars[f"{named}, {kind}: ours over {peer}"] = measure.at_most(
                        _inverse(over[kind, peer]), MAX_OVER_PEER
                    )
                elif depth == 1:
                    bars[f"{named}, {kind}: ours over monai"] = measure.at_most(
                        _inverse(over[kind, "monai"]), MAX_OVER_MONAI
                    )
    return measure.report("encoder", place, json, rows, bars, quick, size=size, images=images, volumes=volumes)


def _measure(
    networks: dict[str, Any], image: Tensor, dtype: torch.dtype, place: torch.device, rounds: int
) -> list[dict[str, Any]]:
    found = []
    for kind in ("forward", "step"):
        runs = {}
        for name, network in networks.items():
            options = {"return_attention": True} if name == "ours, v" else {}
            if kind == "forward":
                runs[name] = (network, measure.forward(network, image, dtype=dtype, **options))
            else:
                runs[name] = (network, measure.step(network, _loss(network, image, options), dtype))
        sizes = measure.peaks(runs, place)
        times = measure.by_turns({name: run for name, (_, run) in runs.items()}, place, rounds)
        for name in networks:
            over = {
                "time_over_ours": measure.ratio(times, name, "ours"),
                "bytes_over_ours": sizes[name] / sizes["ours"],
            }
            found.append({"pass": kind, "name": name, "seconds": times[name], "bytes": sizes[name], **over})
    return found


def _loss(network: nn.Module, image: Tensor, options: dict[str, Any]) -> Any:
    def run() -> Tensor:
        out: Any = network(image, **options)
        tokens = [getattr(out, name, None) for name in ("patches", "last_hidden_state")]
        value = next((part for part in tokens if part is not None), out[0] if isinstance(out, tuple) else out)
        return value.float().square().mean()

    return run


def _inverse(found: dict[str, float]) -> dict[str, float]:
    return {"median": 1 / found["median"], "least": 1 / found["most"], "most": 1 / found["least"]}


def _peers_2d(side: int, size: dict[str, int]) -> dict[str, nn.Module]:
    width, depth, heads = size.values()
    config = ViTConfig(
        **{"image_size": side, "num_channels": 1, "hidden_size": width, "num_hidden_layers": depth},
        **{"num_attention_heads": heads, "intermediate_size": 4 * width},
    )
    peers: dict[str, nn.Module] = {"transformers": ViTModel(config, add_pooling_layer=False)}
    if find_spec("timm") is not None:
        from timm.models.vision_transformer import VisionTransformer

        peers["timm"] = VisionTransformer(side, in_chans=1, num_classes=0, **size)
    return peers


def _monai(volume: tuple[int, ...], depth: int, size: dict[str, int]) -> nn.Module:
    width, layers, heads = size.values()
    options = {"hidden_size": width, "mlp_dim": 4 * width, "num_layers": layers, "num_heads": heads}
    return ViT(1, volume, (depth, 16, 16), **options)


if __name__ == "__main__":
    fire.Fire(encoder, serialize=lambda _: None)
