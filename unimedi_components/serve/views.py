# SPDX-License-Identifier: Apache-2.0
"""A study as the network's input, and the same field of view in more pixels for people."""

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import nibabel as nib
import numpy as np
import torch
from monai.transforms import Compose
from PIL import Image
from torch import Tensor

from unimedi_components.arrays import Array
from unimedi_components.data.transforms import WindowAread, ct_transforms, input_transforms
from unimedi_components.data.volume_loading import with_part
from unimedi_components.errors import reason_of
from unimedi_components.figures.attention import COLOUR_MAP, attention_opacity, attention_strength
from unimedi_components.images.checks import SAMPLED_SLICES
from unimedi_components.serve.faults import unusable
from unimedi_components.serve.study import Study

_SHOWN = {2: 512, 3: 384}
_SHORT_MM, _NARROW_MM, _FEW_SLICES = 150, 200, 20


@dataclass(frozen=True)
class View:
    """A study that was read.

    Args:
        image: the network's input, (1, H, W) or (1, D, H, W) in [-1, 1].
        shown: the same field of view in more pixels per slice, (H', W') or (D, H', W') in [-1, 1].
        slices: slices of the file along the body's axis; 0 for an X-ray.
    """

    image: Tensor
    shown: Array
    facts: dict[str, str]
    warnings: list[str]
    slices: int = 0


def view_of(study: Study, preprocessing: Mapping[str, Any]) -> View:
    """Read a study as the network was trained to see it.

    Args:
        preprocessing: of the checkpoint's card: arguments of `xray_transforms` and `ct_transforms`.

    Raises:
        UploadError: it cannot be read, or holds values that are not finite.
    """
    try:
        if study.dim == 2:
            view = xray_view(study.path, preprocessing["xray"])
        else:
            view = volume_view(study.path, preprocessing["ct"], part=study.part)
    except MemoryError:
        raise
    except Exception as error:
        reason = reason_of(error, study.path, study.name)
        for number, name in enumerate(study.names):
            reason = reason.replace(f"{study.name}/{number:05d}.dcm", name)
        raise unusable(f"{study.name}: {reason[:400]}.") from error
    if not torch.isfinite(view.image).all():
        raise unusable(f"{study.name}: holds values that are not finite numbers. Convert it again from the original.")
    return view


def xray_view(path: Path, options: Mapping[str, Any], shown: int = _SHOWN[2]) -> View:
    """Read an X-ray; `options` of `xray_transforms`, `shown` the least pixels per side for people."""
    size = int(options["size"])
    long_side = int(options.get("long_side") or round(size * 256 / 224))
    item = {"image": str(path)}

    def chain(**sizes: int) -> Compose:
        return Compose(input_transforms({"xray": {**options, **sizes}, "ct": {}}).cached_transforms(2))

    read = chain()(item)
    image = read["image"]
    scale = math.ceil(shown / size)
    finer = chain(size=size * scale, long_side=long_side * scale)(item)["image"]
    cut = f"long side to {long_side}, padded to a square" + (f", {size} from its centre" if size < long_side else "")
    facts = {"Values": read["film_values"], "Network input": f"{size} × {size} pixels ({cut})"}
    return View(image, finer[0].numpy(), facts, [])


def volume_view(path: Path, options: Mapping[str, Any], shown: int = _SHOWN[3], part: str = "") -> View:
    """Read a volume; `options` of `ct_transforms`, `shown` as above, `part` of `part_of`."""
    steps = ct_transforms(**options)
    # all before the window is read and turned once
    first = next(i for i, step in enumerate(steps) if isinstance(step, WindowAread))
    volume = Compose(steps[:first])({**with_part(path, part), "check_hu": True})["image"]
    image = Compose(steps[first:])({"image": volume})["image"]
    depth, *plane = image.shape[1:]
    scale = math.ceil(shown / max(plane))
    larger = {**options, "spatial_size": (depth, *(side * scale for side in plane))}
    finer = Compose(ct_transforms(**larger)[first:])({"image": volume})["image"]
    facts, warnings = _describe(volume, image, options)
    return View(image, finer[0].numpy(), facts, warnings, int(volume.shape[1]))


def _describe(volume: Any, image: Tensor, options: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """What to say about a volume (1, D, H, W) in its own values, and what to warn of."""
    shape = volume.shape[:0:-1]
    spacing = np.linalg.norm(np.asarray(volume.affine)[:3, :3], axis=0)[::-1]
    extent = spacing * np.asarray(shape)
    places = np.unique(np.linspace(0, volume.shape[1] - 1, SAMPLED_SLICES).round().astype(int))
    sample = np.asarray(volume[0, places])
    low, high = options.get("window", (-1000, 1000))
    stored = volume.meta.get("original_affine", volume.affine)
    facts = {
        "Volume": f"{_by(shape)} voxels of {_by(spacing)} mm",
        "Field of view": f"{_by(extent.round())} mm (across, front to back, feet to head)",
        "Orientation": f"{''.join(map(str, nib.aff2axcodes(np.asarray(stored))))} in the file, turned to SPL",  # type: ignore[attr-defined]
        "Values": f"{sample.min():.4g} to {sample.max():.4g} in {len(places)} slices",
        "Window": f"{low:g} to {high:g} HU",
        "Network input": f"{_by(image.shape[:0:-1])} voxels, the whole field of view",
    }
    warnings = []
    if volume.shape[1] < _FEW_SLICES or extent[2] < _SHORT_MM:
        warnings.append(
            f"Only {volume.shape[1]} slices over {extent[2]:.0f} mm: a slab, not a whole chest, and it is stretched to "
            "the network's depth."
        )
    if extent[:2].min() < _NARROW_MM:
        warnings.append(f"The field of view is only {_by(extent[:2].round())} mm: a crop, not a whole chest.")
    return facts, warnings


def _by(values: Any) -> str:
    return " × ".join(f"{value:.4g}" for value in values)


def grey_png(image: Array, low: float, high: float) -> bytes:
    """An image (H, W) as PNG, `low` black and `high` white."""
    grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    return _png(Image.fromarray(np.rint(255 * grey).astype(np.uint8)))


def overlay_png(attention: Array, whole: Array, size: tuple[int, int]) -> bytes:
    """Attention as a transparent colour layer.

    Args:
        attention: of the image's tokens, (rows, columns).
        whole: of all tokens of the study, see `attention_strength`.
    """
    strength = attention_strength(attention, whole).astype(np.float32)
    fine = np.asarray(Image.fromarray(strength).resize(size[::-1], Image.Resampling.BILINEAR))
    coloured = matplotlib.colormaps[COLOUR_MAP](fine)
    coloured[..., 3] = attention_opacity(fine)
    return _png(Image.fromarray(np.rint(255 * coloured).astype(np.uint8)))


def _png(image: Image.Image) -> bytes:
    packed = io.BytesIO()
    image.save(packed, format="PNG")
    return packed.getvalue()


def data_url(png: bytes) -> str:
    """PNG bytes for the `src` of an image."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
