# SPDX-License-Identifier: Apache-2.0
"""Training steps of the segmentation networks beside MONAI's UNETR of the same sizes.

Run from the repository's root: `python -m benchmarks.segmentation --json results/segmentation.json`. Of volumes: UNETR
over the unified encoder and MONAI's, both with 16 x 16 x 16 patches, twelve blocks of a ViT-B and the same decoder, on
96 x 96 x 96 voxels of 14 classes: equal work, with bars. Beside them the bundle's own, with 4 x 16 x 16 patches. Of
films: SETR-PUP over the frozen encoder and the same trained as a whole, beside MONAI's UNETR in 2D, which is another
decoder and has no bar. How fast they learn is what `benchmarks.peer_dice` measures.
"""

from __future__ import annotations

from typing import Any

import fire
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNETR
from torch import Tensor, nn

from benchmarks import measure
from unimedi_components.networks import SETRPUP, UnifiedViT
from unimedi_components.networks.unetr import UnifiedUNETR

MAX_TIME, MAX_MEMORY = 1.05, 1.05
CLASSES = 14


def segmentation(device: str = "cpu", json: str | None = None, quick: bool = False, rounds: int = 3) -> dict[str, Any]:
    """Measure steps.

    `device` "cpu" or "cuda", `json` the result's file, `quick` small sizes and one round, `rounds` turns of each.
    """
    place = measure.set_up(device)
    width, heads, cube, side, features = (48, 3, 32, 64, 4) if quick else (768, 12, 96, 224, 16)
    volumes, films = (4, 32) if place.type == "cuda" and not quick else (1, 2)
    volume, classes = (cube,) * 3, CLASSES
    sizes = {"embed_dim": width, "depth": 12, "num_heads": heads}
    peer = {"feature_size": features, "hidden_size": width, "mlp_dim": 4 * width, "num_heads": heads}

    def encoder(depth: int) -> UnifiedViT:
        return UnifiedViT(side, volume, patch_size_3d=(depth, 16, 16), **sizes)

    inputs: dict[str, tuple[Tensor, Tensor, dict[str, nn.Module]]] = {
        "volumes": (
            torch.randn(volumes, 1, *volume),
            torch.randint(classes, (volumes, 1, *volume)),
            {
                "monai": UNETR(1, classes, volume, **peer),
                "ours, equal work": UnifiedUNETR(encoder(16), classes, feature_size=features),
                "ours, patches of 4": UnifiedUNETR(encoder(4), classes, feature_size=features),
            },
        ),
        "films": (
            torch.randn(films, 1, side, side),
            torch.randint(2, (films, 1, side, side)),
            {
                "monai": UNETR(1, 1, (side, side), spatial_dims=2, **peer),
                "SETR-PUP, frozen encoder": SETRPUP(encoder(4), freeze_encoder=True),
                "SETR-PUP": SETRPUP(encoder(4), freeze_encoder=False),
            },
        ),
    }
    rows: list[dict[str, Any]] = []
    bars: dict[str, Any] = {}
    for kind, (image, target, networks) in inputs.items():
        image, target = image.to(place), target.to(place)
        several = kind == "volumes"
        loss = DiceCELoss(softmax=several, to_onehot_y=several, sigmoid=not several)
        for dtype in (torch.float32, torch.bfloat16):
            runs: dict[str, Any] = {}
            for name, network in networks.items():
                network.train().to(place)
                runs[name] = (network, measure.step(network, _loss(network, image, target, loss), dtype))
            found = measure.peaks(runs, place)
            times = measure.by_turns({name: run for name, (_, run) in runs.items()}, place, 1 if quick else rounds)
            named = f"{kind}, {str(dtype).removeprefix('torch.')}"
            for name in runs:
                over = {"time_over_monai": measure.ratio(times, name, "monai")}
                over["bytes_over_monai"] = found[name] / found["monai"]  # type: ignore[assignment]
                rows.append({"input": named, "name": name, "seconds": times[name], "bytes": found[name], **over})
            ours = "ours, equal work"
            if ours in runs:
                bars[f"{named}: time over monai's"] = measure.at_most(measure.ratio(times, ours, "monai"), MAX_TIME)
                bars[f"{named}: memory over monai's"] = measure.at_most(found[ours] / found["monai"], MAX_MEMORY)
    return measure.report("segmentation", place, json, rows, bars, quick, volume=volume, image=side, **sizes)


def _loss(network: nn.Module, image: Tensor, target: Tensor, loss: nn.Module) -> Any:
    def run() -> Tensor:
        scores = network(image)
        return loss((scores[0] if isinstance(scores, (list, tuple)) else scores).float(), target)

    return run


if __name__ == "__main__":
    fire.Fire(segmentation, serialize=lambda _: None)
