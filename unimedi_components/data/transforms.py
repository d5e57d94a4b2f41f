# SPDX-License-Identifier: Apache-2.0
"""From files to network input: upright X-rays (1, H, W) and oriented CT volumes (1, D, H, W) in [-1, 1].

The chains are lists of MONAI transforms, so that a config can extend or replace them. `ByDimension` runs the chain that
fits an item and keeps its random part apart, which is what lets a persistent dataset cache the rest.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    EnsureTyped,
    MapTransform,
    Orientationd,
    Randomizable,
    RandomizableTrait,
    RandRotated,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSpatialCropd,
    Resized,
    ScaleIntensityRanged,
    Spacingd,
    SpatialPadd,
    Transform,
)
from monai.transforms.utils import scale_affine
from torch.nn.functional import adaptive_avg_pool3d

from unimedi_components.data.fingerprint import fingerprint
from unimedi_components.data.volume_loading import LoadVolumed, Uprightd
from unimedi_components.data.xray_loading import LoadXrayd
from unimedi_components.errors import DataError

# nibabel's letter pairs, spelled out because MONAI otherwise follows each reader's own `space`
RAS_LABELS = (("L", "R"), ("P", "A"), ("I", "S"))


class CheckVolumed(MapTransform):
    """Let one-channel volumes with a usable affine pass. Raises DataError: what else a file may hold."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            volume = data[key]
            name = volume.meta.get("filename_or_obj", key)
            if volume.ndim != 4 or volume.shape[0] != 1 or min(volume.shape) < 1:
                raise DataError(
                    f"{name}: shape {tuple(volume.shape)} (channel first) is not one 3D volume; extract one time point"
                )
            affine = torch.as_tensor(volume.affine)[:3, :3]
            if not torch.isfinite(affine).all() or abs(torch.linalg.det(affine.double())) < 1e-6:
                raise DataError(f"{name}: the affine is singular or not finite; rewrite the file with a valid header")
        return dict(data)


class WindowAread(MapTransform):
    """Bring a window of values to [-1, 1], clip what lies beyond, and average areas to a size.

    As `ScaleIntensityRanged` and `Resized` in mode "area" do, one slice of the result at a time: a CT of 1,000 slices
    would fill several GB with its copies otherwise.

    Args:
        keys: of volumes (C, D, H, W); each becomes float32, with its affine where it has one.
        window: values that become -1 and 1.
        spatial_size: D, H, W of the result.
    """

    def __init__(self, keys: KeysCollection, window: Sequence[float], spatial_size: Sequence[int]) -> None:
        super().__init__(keys)
        self.window, self.spatial_size = tuple(window), tuple(spatial_size)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        resized = dict(data)
        low, high = self.window
        depth, height, width = self.spatial_size
        for key in self.key_iterator(resized):
            given, slices = resized[key], []
            volume = given.as_tensor() if isinstance(given, MetaTensor) else torch.as_tensor(given)
            # the bins of adaptive pooling
            bins = [(n * volume.shape[1] // depth, -(-(n + 1) * volume.shape[1] // depth)) for n in range(depth)]
            # in place, since new memory for each step takes longer than the arithmetic
            room = torch.empty_like(volume[:, : max(end - start for start, end in bins)], dtype=torch.float32)
            for start, end in bins:
                block = room[:, : end - start].copy_(volume[:, start:end])
                block.sub_(low).div_(high - low).mul_(2).sub_(1).clamp_(-1, 1)
                slices.append(adaptive_avg_pool3d(block, (1, height, width)))
            resized[key] = torch.cat(slices, dim=1)
            if isinstance(given, MetaTensor):
                scale = torch.as_tensor(scale_affine(volume.shape[1:], self.spatial_size))
                affine = given.affine @ scale.to(given.affine)
                meta = {name: value for name, value in given.meta.items() if name != "affine"}
                resized[key] = MetaTensor(resized[key], affine=affine, meta=meta)
        return resized


def xray_transforms(
    size: int = 224, long_side: int | None = None, random_crop: bool = False, jitter: float = 0.0
) -> list[Transform]:
    """Transforms of one X-ray item: file to "image", (1, size, size) in [-1, 1], black and padding at -1.

    The long side is resized (area), the short side padded with black on both sides to a square, and a square of `size`
    cropped. A random crop comes last, so that all before it can be cached. This is what the MGCA repository does.
    Raises DataError: `size` is larger than `long_side`.

    Args:
        long_side: pixels of the padded square; None keeps the ratio of 256 to 224.
        random_crop: crop at a random place (training) instead of the centre.
        jitter: random contrast and brightness (training), as a share and as an offset of at most this much.
    """
    long_side = round(size * 256 / 224) if long_side is None else long_side
    if size > long_side:
        raise DataError(f"size {size} is larger than long_side {long_side}: there is nothing to crop from")
    crop = (
        RandSpatialCropd("image", roi_size=(size, size), random_size=False)
        if random_crop
        else CenterSpatialCropd("image", roi_size=(size, size))
    )
    return [
        LoadXrayd("image", draft_size=2 * long_side),
        Resized("image", spatial_size=long_side, size_mode="longest", mode="area"),
        SpatialPadd("image", spatial_size=(long_side, long_side)),
        ScaleIntensityRanged("image", a_min=0, a_max=1, b_min=-1, b_max=1, clip=True),
        crop,
        EnsureTyped("image", dtype=torch.float32, track_meta=False),
        *_intensity_jitter(jitter),
    ]


def _intensity_jitter(amount: float) -> list[Transform]:
    steps = (RandScaleIntensityd("image", amount, prob=1.0), RandShiftIntensityd("image", amount, prob=1.0))
    return list(steps) if amount else []


def ct_transforms(
    spatial_size: Sequence[int] = (32, 128, 128),
    window: tuple[float, float] = (-1000.0, 1000.0),
    spacing: Sequence[float] | None = None,
    random_shift: int = 0,
    rotate: float = 0.0,
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
        rotate: turn it in the plane by up to this many degrees to either side (training). It is never flipped: the side
            of an organ or a finding is in the reports.
    """
    steps: list[Transform] = [
        LoadVolumed("image"),
        Orientationd("image", axcodes="SPL", labels=RAS_LABELS),
        Uprightd("image"),
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
    plain = EnsureTyped("image", dtype=torch.float32, track_meta=False)
    turn: list[Transform] = []
    if rotate:
        options: dict[str, Any] = {"mode": "bilinear", "padding_mode": "border", "prob": 1.0}
        turn = [RandRotated("image", range_x=math.radians(rotate), **options), plain]
    return [*steps, WindowAread("image", window, spatial_size), plain, *shift, *turn, *_intensity_jitter(jitter)]


class _Branches(Transform):
    def __init__(self, branches: Mapping[int, Compose]) -> None:
        self.branches = dict(branches)

    def __call__(self, data: Mapping[Hashable, Any]) -> Any:
        dim = data.get("dim")
        if dim not in self.branches:
            raise DataError(f'item {data.get("id")!r}: "dim" is {dim!r}, must be one of {sorted(self.branches)}')
        return self.branches[dim](dict(data))


class _RandomBranches(_Branches, Randomizable):
    """The chains from their first random transform on."""

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> Self:
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

    Attributes:
        fingerprints: per dimension, a hash of what its deterministic transforms compute, for cache keys.
    """

    def __init__(self, two_d: Sequence[Callable] = (), three_d: Sequence[Callable] = ()) -> None:
        cached, random = {}, {}
        for dim, chain in ((2, list(two_d)), (3, list(three_d))):
            flat = list(Compose(chain).flatten().transforms)
            fixed = [isinstance(step, Transform) and not isinstance(step, RandomizableTrait) for step in flat]
            first = [*fixed, False].index(False)
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


def input_transforms(preprocessing: Mapping[str, Any]) -> ByDimension:
    """The chains of a trained network's input, without random crops, by the "preprocessing" of its card."""
    two_d = {**preprocessing["xray"], "random_crop": False}
    return ByDimension(xray_transforms(**two_d), ct_transforms(**preprocessing["ct"]))
