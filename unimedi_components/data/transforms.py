# SPDX-License-Identifier: Apache-2.0
"""From files to network input: upright X-rays (1, H, W) and oriented CT volumes (1, D, H, W) in [-1, 1].

The chains are lists of MONAI transforms, so that a config can extend or replace them. `ByDimension` runs the
chain that fits an item and keeps its random part apart, which is what lets a persistent dataset cache the
rest.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import ImageReader
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImaged,
    MapTransform,
    Orientationd,
    Randomizable,
    RandomizableTrait,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSpatialCropd,
    Resized,
    ScaleIntensityRanged,
    Spacingd,
    SpatialPadd,
    Transform,
)
from PIL import Image, ImageOps

from unimedi_components.data.ct_checks import NIFTI_ENDINGS, read_ct_header
from unimedi_components.data.fingerprint import fingerprint
from unimedi_components.data.itk_loading import load_itk, monochrome1_values
from unimedi_components.errors import DataError

__all__ = ["ByDimension", "CheckVolumed", "XrayReader", "ct_transforms", "xray_transforms"]

# nibabel's letter pairs, spelled out because MONAI otherwise follows each reader's own `space`
RAS_LABELS = (("L", "R"), ("P", "A"), ("I", "S"))


class XrayReader(ImageReader):
    """Read a projection image of any common format as an upright grey array (H, W) in [0, 1], 0 black.

    JPG, PNG, BMP and TIFF go through PIL: colour becomes ITU-R 601 luma, an alpha channel is ignored, the
    EXIF rotation is applied. DICOM goes through ITK, which applies the rescale slope and inverts MONOCHROME1.
    8-bit values are divided by 255; deeper ones by the image's own maximum, since 16-bit files commonly hold
    10 or 12 bits (RSNA's scaling in the MGCA repository), after negative values were shifted to start at 0.

    Args:
        draft_size: JPEG files may be decoded at a reduced DCT scale, never below this many pixels per side;
            None decodes all pixels. Twice the size that they are resized to later costs no visible detail.
    """

    def __init__(self, draft_size: int | None = None) -> None:
        super().__init__()
        self.draft_size = draft_size

    def verify_suffix(self, filename: Any) -> bool:
        """Whether `filename` names one file; its content decides about the format."""
        return not isinstance(filename, Sequence) or isinstance(filename, str) or len(filename) == 1

    def read(self, data: Any, **kwargs: Any) -> str:
        """Return the path alone: `LoadImage` would hand a file whose opening fails to its next reader."""
        if not isinstance(data, (str, Path)):
            if len(data) != 1:
                raise DataError(f"an X-ray item must name one file, got {len(data)}: {data}")
            data = data[0]
        return str(data)

    def get_data(self, img: str) -> tuple[np.ndarray, dict]:
        """Decode the file at path `img`.

        Returns:
            float32 (H, W) in [0, 1], and its meta data.

        Raises:
            DataError: the file holds more than one frame or is of one constant value, which is no X-ray.
            OSError: the file is missing, truncated or of an unknown format.
        """
        with open(img, "rb") as file:
            is_dicom = file.read(132)[128:] == b"DICM"
        scaled = self._read_dicom(img) if is_dicom else _scale_to_unit(self._read_pil(img), img)
        return scaled, {"spatial_shape": np.asarray(scaled.shape), "original_channel_dim": float("nan")}

    def _read_pil(self, path: str) -> np.ndarray:
        with Image.open(path) as image:
            if self.draft_size is not None:
                image.draft("L", (self.draft_size, self.draft_size))
            upright = ImageOps.exif_transpose(image)
            if upright.mode[0] not in "IF":
                # a palette or CMYK image has to become RGB before its luma can be taken
                upright = upright if upright.mode in ("L", "LA", "RGB", "RGBA", "1") else upright.convert("RGB")
                upright = upright.convert("L")
            return np.asarray(upright)

    def _read_dicom(self, path: str) -> np.ndarray:
        itk = load_itk()
        image = itk.imread(path)
        array = itk.array_from_image(image)
        if image.GetNumberOfComponentsPerPixel() > 1:
            array = array[..., :3].astype(np.float32) @ np.asarray([0.299, 0.587, 0.114], np.float32)
            array = np.round(array).astype(np.uint8) if array.max() < 256 else array
        if len(frames := array.reshape(-1, *array.shape[-2:])) != 1:
            raise DataError(f"{path}: {len(frames)} frames where one X-ray was expected")
        if (film := monochrome1_values(image, frames[0])) is not None:
            return 1 - _scale_to_unit(film, path)
        return _scale_to_unit(frames[0], path)


def _scale_to_unit(array: np.ndarray, path: str) -> np.ndarray:
    scaled = array.astype(np.float32)
    low, high = float(scaled.min()), float(scaled.max())
    if not np.isfinite([low, high]).all() or low == high:
        raise DataError(f"{path}: all pixels have the value {low:g}, or some are not finite; this is no X-ray")
    if array.dtype == np.uint8:
        return scaled / 255
    low = min(low, 0.0)
    return (scaled - low) / (high - low)


class CheckVolumed(MapTransform):
    """Let one-channel volumes with a usable affine pass; fail with one message otherwise."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return `data` unchanged.

        Raises:
            DataError: several time points or channels, not three spatial dimensions, or a singular or
                non-finite affine.
        """
        for key in self.key_iterator(dict(data)):
            volume = data[key]
            name = volume.meta.get("filename_or_obj", key)
            if volume.ndim != 4 or volume.shape[0] != 1 or min(volume.shape) < 1:
                raise DataError(
                    f"{name}: shape {tuple(volume.shape)} (channel first) is not one 3D volume; extract one time point"
                )
            affine = torch.as_tensor(_stored_affine(str(name), volume))[:3, :3]
            if not torch.isfinite(affine).all() or abs(torch.linalg.det(affine.double())) < 1e-6:
                raise DataError(f"{name}: the affine is singular or not finite; rewrite the file with a valid header")
        return dict(data)


def _stored_affine(name: str, volume: Any) -> Any:
    """The affine in the file: MONAI's NIfTI reader replaces one that is zero by a guess from the spacing."""
    if name.lower().endswith(NIFTI_ENDINGS) and Path(name).is_file():
        return read_ct_header(name).affine
    return volume.affine


def xray_transforms(
    size: int = 224, long_side: int | None = None, random_crop: bool = False, jitter: float = 0.0
) -> list[Transform]:
    """Transforms of one X-ray item: file to "image", (1, size, size) in [-1, 1], black and padding at -1.

    The long side is resized (area), the short side padded with black on both sides to a square, and a square
    of `size` cropped. A random crop comes last, so that all before it can be cached. This is what the MGCA
    repository does.

    Args:
        size: pixels per side of the result.
        long_side: pixels of the padded square; None keeps the ratio of 256 to 224.
        random_crop: crop at a random place (training) instead of the centre.
        jitter: random contrast and brightness (training), as a share and as an offset of at most this much.

    Raises:
        DataError: `size` is larger than `long_side`.
    """
    long_side = round(size * 256 / 224) if long_side is None else long_side
    if size > long_side:
        raise DataError(f"size {size} is larger than long_side {long_side}: there is nothing to crop from")
    crop = (
        RandSpatialCropd("image", roi_size=(size, size), random_size=False)
        if random_crop
        else CenterSpatialCropd("image", roi_size=(size, size))
    )
    # LoadImaged accepts an instance; its annotation leaves that out
    reader: Any = XrayReader(draft_size=2 * long_side)
    return [
        LoadImaged("image", reader=reader, image_only=True),
        EnsureChannelFirstd("image"),
        Resized("image", spatial_size=long_side, size_mode="longest", mode="area"),
        SpatialPadd("image", spatial_size=(long_side, long_side)),
        ScaleIntensityRanged("image", a_min=0, a_max=1, b_min=-1, b_max=1, clip=True),
        crop,
        EnsureTyped("image", dtype=torch.float32, track_meta=False),
        *_intensity_jitter(jitter),
    ]


def _intensity_jitter(amount: float) -> list[Transform]:
    if amount == 0:
        return []
    return [
        RandScaleIntensityd("image", factors=amount, prob=1.0),
        RandShiftIntensityd("image", offsets=amount, prob=1.0),
    ]


def ct_transforms(
    spatial_size: Sequence[int] = (32, 128, 128),
    window: tuple[float, float] = (-1000.0, 1000.0),
    spacing: Sequence[float] | None = None,
    random_shift: int = 0,
    jitter: float = 0.0,
) -> list[Transform]:
    """Transforms of one CT item: file or DICOM folder to "image", (1, D, H, W) in [-1, 1].

    Axes run to Superior, Posterior and Left ("SPL"): the first slice is the lowest, and each slice is seen as
    radiologists display it, from the feet, front up, the patient's left on the right.

    Args:
        spatial_size: D, H, W of the result; the whole field of view is resized to it by averaging areas.
        window: Hounsfield units that become -1 and 1; values beyond are clipped before any averaging.
        spacing: mm along D, H, W to resample to first; None (the paper only resizes) skips this.
        random_shift: move the volume in the plane by up to this many voxels (training), with air behind it.
        jitter: see `xray_transforms`.
    """
    steps: list[Transform] = [
        LoadImaged("image", image_only=True),
        EnsureChannelFirstd("image"),
        CheckVolumed("image"),
        Orientationd("image", axcodes="SPL", labels=RAS_LABELS),
    ]
    if spacing is not None:
        steps.append(Spacingd("image", pixdim=tuple(spacing), mode="bilinear"))
    shift: list[Transform] = []
    if random_shift:
        size = tuple(spatial_size)
        padded = (size[0], size[1] + 2 * random_shift, size[2] + 2 * random_shift)
        shift = [
            SpatialPadd("image", spatial_size=padded, value=-1.0),
            RandSpatialCropd("image", roi_size=size, random_size=False),
        ]
    return [
        *steps,
        ScaleIntensityRanged("image", a_min=window[0], a_max=window[1], b_min=-1, b_max=1, clip=True),
        Resized("image", spatial_size=tuple(spatial_size), mode="area"),
        EnsureTyped("image", dtype=torch.float32, track_meta=False),
        *shift,
        *_intensity_jitter(jitter),
    ]


def _is_random(transform: Any) -> bool:
    return isinstance(transform, RandomizableTrait) or not isinstance(transform, Transform)


class _Branches(Transform):
    """One chain per value of `item["dim"]`."""

    def __init__(self, branches: Mapping[int, Compose]) -> None:
        self.branches = dict(branches)

    def __call__(self, data: Mapping[Hashable, Any]) -> Any:
        dim = data.get("dim")
        if dim not in self.branches:
            raise DataError(f'item {data.get("id")!r}: "dim" is {dim!r}, must be one of {sorted(self.branches)}')
        return self.branches[dim](dict(data))


class _RandomBranches(_Branches, Randomizable):
    """The chains from their first random transform on."""

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> _RandomBranches:
        for branch in self.branches.values():
            branch.set_random_state(seed, state)
        return self

    def randomize(self, data: Any) -> None:
        """Each transform draws when it is called."""


class ByDimension(Compose):
    """Run `two_d` on items with "dim" 2 and `three_d` on items with "dim" 3.

    As a `Compose` it holds two transforms: the chains up to their first random transform, and the rest.
    Caching datasets (`monai.data.PersistentDataset`, `CacheDataset`) split it there, so each dimension's
    chain is cached as far as can be.

    Args:
        two_d: transforms of X-ray items, for example `xray_transforms(...)`; empty when there are none.
        three_d: transforms of CT items, for example `ct_transforms(...)`; empty when there are none.

    Attributes:
        fingerprints: per dimension, a hash of what its deterministic transforms compute, for cache keys.

    Example:
        >>> transform = ByDimension(xray_transforms(64, random_crop=True), ct_transforms((32, 48, 48)))
        >>> transform({"id": "a", "dim": 2, "image": "a.jpg"})["image"].shape  # doctest: +SKIP
        torch.Size([1, 64, 64])
    """

    def __init__(self, two_d: Sequence[Callable] = (), three_d: Sequence[Callable] = ()) -> None:
        cached, random = {}, {}
        for dim, chain in ((2, list(two_d)), (3, list(three_d))):
            flat = list(Compose(chain).flatten().transforms)
            first = next((i for i, transform in enumerate(flat) if _is_random(transform)), len(flat))
            if flat:
                cached[dim], random[dim] = Compose(flat[:first]), Compose(flat[first:])
        self.cached, self.random = _Branches(cached), _RandomBranches(random)
        self.fingerprints = {dim: fingerprint(self.cached_transforms(dim)) for dim in (2, 3)}
        super().__init__([self.cached, self.random])

    def cached_transforms(self, dim: int) -> tuple[Callable, ...]:
        """The deterministic transforms of dimension `dim`, whose parameters decide what a cache may hold."""
        return self.cached.branches[dim].transforms if dim in self.cached.branches else ()

    def seed_random(self, dim: int, seed: int) -> None:
        """Seed the random transforms of one dimension; cheaper than `set_random_state` for all of them."""
        if dim in self.random.branches:
            for i, transform in enumerate(self.random.branches[dim].transforms):
                if isinstance(transform, Randomizable):
                    transform.set_random_state(seed=(seed + i) % 2**32)
