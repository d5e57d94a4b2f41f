# SPDX-License-Identifier: Apache-2.0
"""Volumes from files into transform chains, and upright where a gantry was tilted."""

import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import compute_shape_offset
from monai.transforms import InvertibleTransform, MapTransform, SpatialResample

from unimedi_components.errors import DataError
from unimedi_components.images.checks import NOT_FINITE, SAMPLED_SLICES, CTLimits, header_fault, refused_values
from unimedi_components.images.itk_volumes import AIR_HU
from unimedi_components.images.volume import VolumeHeader, read_volume

_GEOMETRY = CTLimits(min_slices=2, min_megabytes=0.0)
# axes that are further from right angles than this (a tilt of 0.1 degrees) are resampled
_SHEAR = 1.7e-3


class LoadVolumed(MapTransform):
    """Read the CT volume that an item names: a file, a folder with one DICOM stack, or the files under "files".

    Each key becomes a MetaTensor (1, X, Y, Z), int16 or float32 as of `read_volume`, in the file's own axes and affine.
    "assume_hu" and "check_hu" of an item say what to make of values that may be no Hounsfield units. What `prepare` and
    `inspect` say of a file is decided by the same readers and checks. Raises DataError: when run: a path names no
    volume, one without sound geometry, or with values that are not finite.
    """

    def __call__(self, data: Mapping[Any, Any]) -> dict[Hashable, Any]:
        loaded = dict(data)
        for key in self.key_iterator(loaded):
            place = loaded[key]
            many = not isinstance(place, (str, Path))
            files = [str(file) for file in place] if many else list(loaded.get("files") or ())
            path = str(Path(files[0]).parent) if many and len(files) > 1 else str(files[0] if many else place)
            volume = read_volume(path, files if len(files) > 1 else (), bool(loaded.get("assume_hu")))
            spacing = tuple(float(step) for step in np.linalg.norm(volume.affine[:3, :3], axis=0))
            fault = header_fault(VolumeHeader(volume.values.shape, volume.affine, spacing, 4), _GEOMETRY)
            if fault is not None:
                raise DataError(f"{path}: {fault[1]}")
            if volume.values.dtype.kind == "f" and not np.isfinite(volume.values).all():
                raise DataError(f"{path}: {NOT_FINITE}")
            if loaded.get("check_hu") and not loaded.get("assume_hu"):
                places = np.unique(np.linspace(0, volume.values.shape[2] - 1, SAMPLED_SLICES).round().astype(int))
                if text := refused_values(volume.values[..., places]):
                    raise DataError(f"{path}: {text}")
            meta = {
                "filename_or_obj": path,
                "part": part_of({**loaded, "files": files}),
                "original_affine": torch.as_tensor(volume.affine),
                # an array, as of MONAI's readers: MONAI Label compares it with numpy
                "spatial_shape": np.asarray(volume.values.shape),
                "space": "RAS",
            }
            values = torch.from_numpy(volume.values[None])
            loaded[key] = MetaTensor(values, affine=torch.as_tensor(volume.affine), meta=meta)
        return loaded


def part_of(item: Mapping[Any, Any]) -> str:
    """What says beside its path which volume an item is, as text that collation leaves alone; see `with_part`."""
    files, assume_hu = list(item.get("files") or ()), bool(item.get("assume_hu"))
    return json.dumps({"files": files, "assume_hu": assume_hu}) if len(files) > 1 or assume_hu else ""


def with_part(path: str | Path, part: str | None) -> dict[str, Any]:
    """An item for `LoadVolumed` under "image", from a path and the text of `part_of`."""
    return {"image": str(path), **(json.loads(part) if part else {})}


class Uprightd(MapTransform, InvertibleTransform):
    """Resample volumes whose axes are not at right angles, as of a tilted gantry, to a grid that is; others pass.

    The axis of the slices keeps its direction, or their plane does, whichever is nearer to the patient's own axes, so
    that a patient who lies straight is seen straight. The grid holds the whole field of view, air around it. MONAI's
    inverse transforms bring predictions back to the file's own sheared grid. ``keys``: of MetaTensors (C, D, H, W)
    whose first axis runs along the slices.
    """

    def __init__(
        self,
        keys: KeysCollection,
        modes: Sequence[str] = ("bilinear", "nearest"),
        fill: Sequence[float] = (AIR_HU, 0.0),
    ) -> None:
        super().__init__(keys)
        self.modes, self.fill = tuple(modes), tuple(fill)
        self.resample = SpatialResample(padding_mode="zeros", dtype=np.float64)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        turned = dict(data)
        for key, mode, fill in self.key_iterator(turned, self.modes[: len(self.keys)], self.fill[: len(self.keys)]):
            volume = turned[key]
            affine = np.asarray(volume.affine, dtype=float)
            axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
            if np.abs(axes.T @ axes - np.eye(3)).max() < _SHEAR:
                continue
            target, shape = _upright_grid(affine, tuple(volume.shape[1:]))
            moved = self.resample(volume - fill, dst_affine=torch.as_tensor(target), spatial_size=shape, mode=mode)
            turned[key] = moved + fill
        return turned

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        back = dict(data)
        for key in self.key_iterator(back):
            done = back[key].applied_operations
            if done and done[-1].get("class") == SpatialResample.__name__:
                back[key] = self.resample.inverse(back[key])
        return back


def _upright_grid(affine: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Affine (4, 4) and shape of a grid with right angles around the one of `affine`."""
    best, target = -np.inf, np.eye(4)
    # either the slices' axis or the slices' plane keeps its direction, whichever lies straighter in the patient
    for order in ([0, 1, 2], [1, 2, 0]):
        turned, steps = np.linalg.qr(affine[:3, :3][:, order])
        turned = turned * np.sign(np.diag(steps))
        straight = float(np.abs(turned).max(axis=0).sum())
        if straight > best + 1e-6:
            best = straight
            target[:3, order] = turned * np.abs(np.diag(steps))
    size, offset = compute_shape_offset(shape, affine, target)
    target[:3, 3] = np.asarray(offset)[:3]
    return target, tuple(int(length) for length in size)
