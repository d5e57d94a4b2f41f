# SPDX-License-Identifier: Apache-2.0
"""X-rays with what lies where in them: the way from files to network input with masks or boxes, and back."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    CenterSpatialCropd,
    DeleteItemsd,
    EnsureTyped,
    Resized,
    ScaleIntensityRanged,
    SpatialPadd,
    Transform,
)
from PIL import Image, ImageOps

from unimedi_components.data.boxes import BoxesToImaged, BoxesToMaskd
from unimedi_components.data.slice_files import IMAGE_ENDINGS
from unimedi_components.data.xray_loading import LoadXrayd
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.images.dicom import is_dicom, modality_values, read_header
from unimedi_components.images.itk_loading import load_itk

TARGETS = ("mask", "boxes")


class FilmMaskd(Transform):
    """A film's mask in the film's own pixels: read from the file that "mask" names, or painted from "boxes".

    PNG, JPG, BMP and TIFF files, and whatever ITK reads as one slice (NIfTI, NRRD, DICOM), are taken in the same
    orientation as the film, a picture's EXIF rotation applied. Every value but 0 belongs to the mask. "mask" becomes a
    MetaTensor (1, H, W) of float32 0 and 1 with the affine of "image", the film as loaded. Raises DataError: there is
    neither a mask file nor a list of boxes, or the mask has other pixels than the film.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        if data.get("mask") is None:
            if data.get("boxes") is None:
                raise DataError(
                    f"item {data.get('id')!r} has neither a mask nor boxes; prepare the data with --task segmentation"
                )
            return BoxesToMaskd()(data)
        path, film = str(data["mask"]), data["image"]
        mask = _read_mask(path)
        if mask.shape != tuple(film.shape[1:]):
            found, wanted = (" x ".join(map(str, shape[::-1])) for shape in (mask.shape, tuple(film.shape[1:])))
            raise DataError(f"{path}: the mask has {found} pixels, its film {wanted}; give the film's own mask")
        tensor = torch.from_numpy((mask != 0).astype(np.float32))[None]
        return {**data, "mask": MetaTensor(tensor, affine=film.affine.clone())}


def _read_mask(path: str) -> np.ndarray:
    """Rows x columns of a mask file."""
    if path.lower().endswith(IMAGE_ENDINGS):
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return np.asarray(upright if upright.mode in ("L", "1", "P", "I", "I;16", "F") else upright.convert("L"))
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; correct the datalist or `dataset_dir`")
    if is_dicom(path):
        array = modality_values(read_header(path)).values
        array = array.max(axis=-1) if array.ndim > 3 else array
    else:
        array = np.asarray(load_itk().array_from_image(load_itk().imread(path)))
    frames = array.reshape(-1, *array.shape[-2:]) if array.ndim > 2 else array[None]
    if len(frames) != 1:
        raise DataError(f"{path}: {len(frames)} slices where the mask of one film was expected")
    return frames[0]


def film_transforms(
    size: int = 224,
    long_side: int | None = None,
    target: str | None = None,
    keep_meta: bool = False,
    min_visible: float = 0.2,
) -> list[Transform]:
    """Transforms of one X-ray: file to "image", (1, size, size) in [-1, 1], with its mask or boxes.

    The long side is resized (area), the short side padded with black to a square, and its centre cropped. All of it is
    deterministic; random transforms of a recipe follow behind it. Raises ConfigError: an unknown target; DataError:
    `size` is larger than `long_side`; when run, see `LoadXrayd`, `FilmMaskd` and `BoxesToImaged`.

    Args:
        size: pixels per side of the result.
        long_side: pixels of the padded square; None for `size`: the whole film, nothing cropped.
        target: "mask" for (1, size, size) float32 of 0 and 1, from a mask file or painted from boxes; "boxes" for
            (N, 4) float32 in pixels of the result, with the "affine" that `boxes_to_file` needs to bring predictions
            back; None for the image alone.
        keep_meta: leave MetaTensors, with which `Restored` brings a predicted mask back to the file's pixels.
        min_visible: see `BoxesToImaged`.
    """
    if target is not None and target not in TARGETS:
        raise ConfigError(f"target {target!r} of a film is unknown; use {', '.join(TARGETS)}, or None")
    long_side = size if long_side is None else long_side
    if size > long_side:
        raise DataError(f"size {size} is larger than long_side {long_side}: there is nothing to crop from")
    keys = ["image", "mask"] if target == "mask" else ["image"]
    modes = ["area", "nearest-exact"][: len(keys)]
    return [
        LoadXrayd("image"),
        *([FilmMaskd()] if target == "mask" else []),
        Resized(keys, spatial_size=long_side, size_mode="longest", mode=modes),
        SpatialPadd(keys, spatial_size=(long_side, long_side)),
        ScaleIntensityRanged("image", a_min=0, a_max=1, b_min=-1, b_max=1, clip=True),
        *([CenterSpatialCropd(keys, roi_size=(size, size))] if size < long_side else []),
        *([BoxesToImaged(min_visible=min_visible)] if target == "boxes" else [DeleteItemsd("boxes")]),
        EnsureTyped(keys, dtype=torch.float32, track_meta=keep_meta),
    ]
