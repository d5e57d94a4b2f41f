# SPDX-License-Identifier: Apache-2.0
"""Loading on one thread: the first epoch beside MONAI's plain chain, later epochs from the shards, and what these keep.

Run from the repository's root: `python -m benchmarks.data --json results/data.json`. Phantoms in the layouts of
MIMIC-CXR and BIMCV are read by turns, some items by one and then by the other, in CPU time of this process. MONAI's
plain chain is `LoadImaged` and the transforms of a config behind it, without checks and without a cache; the first
epoch holds both. The bars: the first epoch takes no longer than MONAI's chain, and later ones give 1,500 X-rays and
2,000 CT volumes a second.
"""

from __future__ import annotations

import json as json_module
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImaged,
    Orientationd,
    Resized,
    ScaleIntensityd,
    ScaleIntensityRanged,
)

from unimedi_components.data import ByDimension, ct_transforms, pretraining_datalist, xray_transforms
from unimedi_components.data.datalist import load_datalist
from unimedi_components.data.transforms import RAS_LABELS
from unimedi_components.loading import ImageDataset

NAMES = {2: "X-rays", 3: "CT volumes"}
MIN_LATER = {2: 1500, 3: 2000}
MAX_BYTES = {2: 65 * 1024, 3: 513 * 1024}
_TURN = 10


def data(json: str | None = None, patients: int = 100, repeats: int = 5, img_size: int = 224, folder: str = "") -> Any:
    """Time the chains.

    Args:
        json: file for the result.
        patients: of each phantom data set.
        repeats: passes over all items.
        img_size: pixels per side of X-rays; CT volumes are 32 x 128 x 128.
        folder: where phantoms are kept between runs; by default they are written anew.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(folder or scratch) / "phantom"
        listed = load_datalist(pretraining_datalist(root, {"mimic_cxr": patients, "bimcv": patients}), root)
        items = [item for part in ("training", "validation", "test") for item in listed[part]]
        rows = [
            _measure([item for item in items if item["dim"] == dim], dim, root, Path(scratch), img_size, repeats)
            for dim in (2, 3)
        ]
    bars: list[dict[str, Any]] = []
    for row in rows:
        name, dim = row["name"], row["dim"]
        bars += [
            _bar(f"first epoch of {name}: time over MONAI's", row["first_over_monai"]["median"], 1.0),
            _bar(f"{name} a second in later epochs", row["later_per_second"]["median"], MIN_LATER[dim], least=True),
            _bar(f"bytes of cached {name}", row["bytes"], MAX_BYTES[dim]),
            _bar(f"largest rounding of {name}", row["rounding"], 1 / 255 + 1e-6),
        ]
    chirp = {mode: _beyond_nyquist(mode) for mode in ("area", "trilinear")}
    bars.append(
        _bar("waves left beyond Nyquist by CT's resize, over trilinear", chirp["area"] / chirp["trilinear"], 0.5)
    )
    machine = {"cpu": platform.processor() or platform.machine(), "threads": 1, "torch": torch.__version__}
    result = {"machine": machine, "patients": patients, "rows": rows, "chirp": chirp, "bars": bars}
    if json is not None:
        Path(json).parent.mkdir(parents=True, exist_ok=True)
        Path(json).write_text(json_module.dumps(result, indent=1), encoding="utf-8")
    print(json_module.dumps(result, indent=1))
    return result


def _bar(name: str, value: float, limit: float, least: bool = False) -> dict[str, Any]:
    return {"name": name, "value": value, "limit": limit, "holds": value >= limit if least else value <= limit}


def _measure(
    items: Sequence[dict[str, Any]], dim: int, root: Path, scratch: Path, img_size: int, repeats: int
) -> dict[str, Any]:
    xray, ct = xray_transforms(img_size, random_crop=True), ct_transforms()
    plain = _plain_chain(xray if dim == 2 else ct, dim)
    exact = ImageDataset(items, ByDimension(xray, ct), root, "report")

    def dataset(number: int) -> ImageDataset:
        return ImageDataset(items, ByDimension(xray, ct), root, "report", cache_dir=scratch / f"{dim}d-{number}")

    # imports and first pages are nobody's time
    for index in range(min(_TURN, len(items))):
        plain({"image": str(root / items[index]["image"])}), exact[index]
    times: dict[str, list[float]] = {"monai": [], "first": [], "later": []}
    for number in range(repeats):
        fresh, known = dataset(number), dataset(0)
        readers: dict[str, Callable[[int], Any]] = {
            "monai": lambda index: plain({"image": str(root / items[index]["image"])}),
            "first": fresh.__getitem__,
        }
        parts = dict.fromkeys(times, 0.0)
        for name, seconds in _by_turns(readers, len(items)).items():
            parts[name] += seconds
        # an epoch before, in which each file's time is looked at
        _by_turns({"later": known.__getitem__}, len(items))
        parts["later"] = _by_turns({"later": known.__getitem__}, len(items))["later"]
        for name, seconds in parts.items():
            times[name].append(seconds)
    rounding = max(float((known[i]["image"] - exact[i]["image"]).abs().max()) for i in range(len(items)))
    stored = sum(path.stat().st_size for path in (scratch / f"{dim}d-0").glob("*/*"))
    rates = {f"{name}_per_second": _spread([len(items) / second for second in found]) for name, found in times.items()}
    ratios = [first / monai for first, monai in zip(times["first"], times["monai"], strict=True)]
    return {
        "name": NAMES[dim],
        "dim": dim,
        "items": len(items),
        **rates,
        "first_over_monai": _spread(ratios),
        "bytes": stored / len(items),
        "rounding": rounding,
    }


def _plain_chain(chain: Sequence[Any], dim: int) -> Compose:
    """MONAI's loader and what of a chain is MONAI's."""
    load = [LoadImaged("image"), EnsureChannelFirstd("image", channel_dim="no_channel")]
    if dim == 2:
        return Compose([*load, ScaleIntensityd("image"), *chain[1:]])
    return Compose(
        [
            *load,
            Orientationd("image", axcodes="SPL", labels=RAS_LABELS),
            ScaleIntensityRanged("image", a_min=-1000, a_max=1000, b_min=-1, b_max=1, clip=True),
            Resized("image", spatial_size=(32, 128, 128), mode="area"),
            EnsureTyped("image", dtype=torch.float32, track_meta=False),
        ]
    )


def _by_turns(readers: dict[str, Callable[[int], Any]], count: int) -> dict[str, float]:
    """CPU seconds of each reader over all items, a few items of one and then of the next."""
    spent = dict.fromkeys(readers, 0.0)
    for start in range(0, count, _TURN):
        for name, read in readers.items():
            begun = time.process_time()
            for index in range(start, min(start + _TURN, count)):
                read(index)
            spent[name] += time.process_time() - begun
    return spent


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "least": min(values), "most": max(values)}


def _beyond_nyquist(mode: str, size: int = 512, factor: int = 4) -> float:
    """RMS that is left of waves too short for the resized grid; what is left shows as waves that are not there."""
    places = torch.arange(size, dtype=torch.float64)
    # the frequency rises from 0 to a half along the axis
    chirp = torch.cos(torch.pi * places**2 / (2 * size)).float().expand(1, 8, 8, size)
    resize = Resized("image", spatial_size=(8, 8, size // factor), mode=mode)
    out = resize({"image": chirp})["image"][..., round(1.2 * size // factor**2) :]
    return float(out.square().mean().sqrt() / chirp[..., round(1.2 * size // factor) :].square().mean().sqrt())


if __name__ == "__main__":
    fire.Fire(data, serialize=lambda _: None)
