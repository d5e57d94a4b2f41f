# SPDX-License-Identifier: Apache-2.0
"""Volumes that lie on disk as a folder of slice images: which file is which slice, and how they become a volume.

Such images hold grey levels and no Hounsfield units: intensity / 255 is all that is known of them, and neither
spacing nor direction is stored. What the first slice shows is therefore said by the caller.
"""

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import ImageReader
from monai.transforms import EnsureChannelFirstd, EnsureTyped, MapTransform, Resized, ScaleIntensityRanged, Transform
from PIL import Image

from unimedi_components.data.slice_files import IMAGE_ENDINGS, checked_end, evenly_spread, slice_files
from unimedi_components.errors import DataError
from unimedi_components.images.itk_loading import load_imaged


class ChooseSlicesd(MapTransform):
    """Replace a folder by the files of a number of its slices, spread evenly, from the lowest to the highest.

    An item's ``"slices"`` says which files of the folder make up the volume and in which order; without it
    every image of the folder counts, by number.

    Args:
        depth: number of slices; None takes all of them.

    Raises:
        DataError: `first_slice` is neither, or `depth` is below 1.
    """

    def __init__(self, keys: KeysCollection, depth: int | None = None, first_slice: str = "head") -> None:
        super().__init__(keys)
        self.depth, self.first_slice = depth, checked_end(first_slice)
        if depth is not None and depth < 1:
            raise DataError(f"depth {depth} is not a number of slices; use at least 1, or None for all")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of `data` with a list of files in place of each folder."""
        chosen = dict(data)
        for key in self.key_iterator(chosen):
            files = slice_files(chosen[key], chosen.get("slices"), self.first_slice)
            places = range(len(files)) if self.depth is None else evenly_spread(len(files), self.depth)
            chosen[key] = [files[place] for place in places]
        return chosen


class SliceFolderReader(ImageReader):
    """Read a folder of slice images, or a list of them, as one volume (D, H, W) in [0, 1].

    8-bit values are divided by 255, 16-bit values by 65535. Of colour images the first channel counts (some
    slices of Clean-CC-CCII are grey images stored as RGB). The slices of a folder are sorted by number and run
    from the lowest to the highest; the files of a list keep their order.

    Args:
        first_slice: end of the patient that the first slice of a folder shows, ``"head"`` or ``"foot"``.

    Raises:
        DataError: `first_slice` is neither.
    """

    def __init__(self, first_slice: str = "head") -> None:
        super().__init__()
        self.first_slice = checked_end(first_slice)

    def verify_suffix(self, filename: Any) -> bool:
        """Whether `filename` names a folder, or files that end like images."""
        names = [filename] if isinstance(filename, (str, Path)) else list(filename)
        return all(Path(name).is_dir() or str(name).lower().endswith(IMAGE_ENDINGS) for name in names)

    def read(self, data: Any, **kwargs: Any) -> list[str]:
        """Return the files of the volume; `get_data` opens them."""
        if isinstance(data, (str, Path)):
            return slice_files(data, first_slice=self.first_slice)
        files = [str(name) for name in data]
        return (
            slice_files(files[0], first_slice=self.first_slice)
            if len(files) == 1 and Path(files[0]).is_dir()
            else files
        )

    def get_data(self, img: Sequence[str]) -> tuple[np.ndarray, dict]:
        """Decode the files, each once even if the list repeats it.

        Returns:
            float32 (D, H, W) in [0, 1], and its meta data.

        Raises:
            DataError: slices differ in size, or all voxels have one value.
            OSError: a file is missing, truncated or of an unknown format.
        """
        decoded = {path: _read_slice(path) for path in dict.fromkeys(img)}
        sizes = {pixels.shape: path for path, pixels in decoded.items()}
        if len(sizes) > 1:
            (rows, columns), (others, more) = list(sizes)[:2]
            raise DataError(
                f"{sizes[rows, columns]}: {columns} x {rows} pixels, but {os.path.basename(sizes[others, more])} "
                f"{more} x {others}. Bring the slices of a scan to one size or leave the odd ones out"
            )
        volume = np.stack([decoded[path] for path in img])
        if volume.min() == volume.max():
            raise DataError(f"{os.path.dirname(img[0])}: all voxels have the value {volume.min():g}; this is no scan")
        return volume, {"spatial_shape": np.asarray(volume.shape), "original_channel_dim": float("nan")}


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

    Axes run like those of :func:`~unimedi_components.data.transforms.ct_transforms`: the first slice is the
    lowest; rows and columns stay as in the files (radiological display). D slices are chosen evenly, no other
    is read, and each is resized to H x W by averaging areas. An item's "slices", if there, says which files of
    its folder make up the scan.

    Args:
        spatial_size: D, H, W of the result.
        grey_window: Hounsfield units that black and white stand for, where that is known: the volume then looks to
            the network as :func:`~unimedi_components.data.transforms.ct_transforms` would show it. None maps black
            to -1 and white to 1.
        window: with `grey_window`, Hounsfield units that become -1 and 1.

    Raises:
        DataError: `first_slice` is neither, or D is below 1.
    """
    ends = (0.0, 1.0)
    if grey_window is not None:
        black, white = grey_window
        # grey levels of the two Hounsfield values, so that one scaling does both steps
        ends = ((window[0] - black) / (white - black), (window[1] - black) / (white - black))
    return [
        ChooseSlicesd("image", depth=int(spatial_size[0]), first_slice=first_slice),
        load_imaged("image", SliceFolderReader(first_slice)),
        EnsureChannelFirstd("image"),
        Resized("image", spatial_size=tuple(spatial_size), mode="area"),
        ScaleIntensityRanged("image", a_min=ends[0], a_max=ends[1], b_min=-1, b_max=1, clip=True),
        EnsureTyped("image", dtype=torch.float32, track_meta=False),
    ]
