# SPDX-License-Identifier: Apache-2.0
"""Volumes that lie on disk as a folder of slice images: which file is which slice, and how they become a volume.

Such images hold grey levels and no Hounsfield units: intensity / 255 is all that is known of them, and neither
spacing nor direction is stored. What the first slice shows is therefore said by the caller.
"""

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import EnsureTyped, MapTransform, Resized, ScaleIntensityRanged, Transform
from PIL import Image

from unimedi_components.data.slice_files import evenly_spread, slice_files
from unimedi_components.errors import DataError

FIRST_SLICES = ("head", "foot")


class LoadSlicesd(MapTransform):
    """Replace a folder by a volume (1, D, H, W) in [0, 1] of slices spread evenly over it, the lowest first.

    An item's ``"slices"`` says which files of the folder make up the volume and in which order; without it every image
    of the folder counts, by number. Raises DataError: `first_slice` is neither, or `depth` is below 1; when run, see
    `slice_files` and `read_slices`.

    Args:
        depth: number of slices, D.
        first_slice: end of the patient that the first slice of a folder shows, ``"head"`` or ``"foot"``.
    """

    def __init__(self, keys: KeysCollection, depth: int, first_slice: str = "head") -> None:
        super().__init__(keys)
        self.depth, self.first_slice = depth, first_slice
        if first_slice not in FIRST_SLICES:
            raise DataError(f"first_slice {first_slice!r} is unknown. Use one of {', '.join(FIRST_SLICES)}.")
        if depth < 1:
            raise DataError(f"depth {depth} is not a number of slices; use at least 1")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        loaded = dict(data)
        for key in self.key_iterator(loaded):
            files = slice_files(loaded[key], loaded.get("slices"), self.first_slice)
            chosen = [files[place] for place in evenly_spread(len(files), self.depth)]
            volume = torch.from_numpy(read_slices(chosen))[None]
            loaded[key] = MetaTensor(volume, meta={"filename_or_obj": chosen[0]})
        return loaded


def read_slices(files: Sequence[str]) -> np.ndarray:
    """Decode slices to a volume, float32 (D, H, W) in [0, 1], each file once even if it is named again.

    8-bit values are divided by 255, 16-bit values by 65535. Of colour images the first channel counts (some slices of
    Clean-CC-CCII are grey images stored as RGB). Raises DataError: slices differ in size, or all voxels have one value;
    OSError: a file is missing, truncated or of an unknown format.
    """
    decoded = {path: _read_slice(path) for path in dict.fromkeys(files)}
    sizes = {pixels.shape: path for path, pixels in decoded.items()}
    if len(sizes) > 1:
        (rows, columns), (others, more) = list(sizes)[:2]
        raise DataError(
            f"{sizes[rows, columns]}: {columns} x {rows} pixels, but {os.path.basename(sizes[others, more])} "
            f"{more} x {others}. Bring the slices of a scan to one size or leave the odd ones out"
        )
    volume = np.stack([decoded[path] for path in files])
    if volume.min() == volume.max():
        raise DataError(f"{os.path.dirname(files[0])}: all voxels have the value {volume.min():g}; this is no scan")
    return volume


def _read_slice(path: str) -> np.ndarray:
    """Return one slice, float32 (H, W) in [0, 1]."""
    with Image.open(path) as image:
        # A palette index is no grey level, and CMYK's first channel is no red.
        plain = image.mode in ("L", "LA", "RGB", "RGBA", "I", "F") or image.mode.startswith("I;")
        pixels = np.asarray(image if plain else image.convert("RGB"))
    if pixels.ndim == 3:
        pixels = pixels[..., 0]
    scaled = pixels.astype(np.float32) / (255 if pixels.dtype == np.uint8 else 65535)
    if pixels.dtype.kind == "f" or scaled.min() < 0 or scaled.max() > 1:
        raise DataError(f"{path}: values {pixels.min():g} to {pixels.max():g} are no 8-bit or 16-bit grey levels")
    return scaled


def slice_volume_transforms(
    spatial_size: Sequence[int] = (32, 128, 128),
    first_slice: str = "head",
    grey_window: Sequence[float] | None = None,
    window: Sequence[float] = (-1000.0, 1000.0),
) -> list[Transform]:
    """Transforms of one folder of slices: "image" becomes (1, D, H, W) in [-1, 1], black at -1.

    Axes run like those of :func:`~unimedi_components.data.transforms.ct_transforms`: the first slice is the lowest;
    rows and columns stay as in the files (radiological display). D slices are chosen evenly, no other is read, and each
    is resized to H x W by averaging areas. An item's "slices", if there, says which files of its folder make up the
    scan. Raises DataError: `first_slice` is neither, or D is below 1.

    Args:
        spatial_size: D, H, W of the result.
        grey_window: Hounsfield units that black and white stand for, where that is known: the volume then looks to
            the network as :func:`~unimedi_components.data.transforms.ct_transforms` would show it. None maps black
            to -1 and white to 1.
        window: with `grey_window`, Hounsfield units that become -1 and 1.
    """
    ends = (0.0, 1.0)
    if grey_window is not None:
        black, white = grey_window
        # grey levels of the two Hounsfield values, so that one scaling does both steps
        ends = ((window[0] - black) / (white - black), (window[1] - black) / (white - black))
    return [
        LoadSlicesd("image", int(spatial_size[0]), first_slice),
        Resized("image", spatial_size=tuple(spatial_size), mode="area"),
        ScaleIntensityRanged("image", a_min=ends[0], a_max=ends[1], b_min=-1, b_max=1, clip=True),
        EnsureTyped("image", dtype=torch.float32, track_meta=False),
    ]
