# SPDX-License-Identifier: Apache-2.0
"""Cubes around places in a CT volume: LUNA16's candidates."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import EnsureTyped, MapTransform, ScaleIntensityRanged, SpatialResample, Transform

from unimedi_components.data.transforms import RAS_LABELS
from unimedi_components.errors import DataError
from unimedi_components.images.itk_volumes import (
    AIR_HU,
    LPS_TO_RAS,
    VolumeGeometry,
    read_block,
    read_geometry,
    world_to_voxel,
)


class LoadCubed(MapTransform):
    """Replace a file name by the cube (1, D, H, W) around the item's "center" ([x, y, z], LPS mm), in Hounsfield units.

    Only the cube is read. Its axes are those of the file nearest to Superior, Posterior and Left, as in
    :func:`~unimedi_components.data.transforms.ct_transforms`; index (D // 2, H // 2, W // 2) is the voxel nearest
    to the place or, after resampling, the place itself.

    Args:
        size: D, H, W in voxels.
        spacing: mm along D, H, W to resample to linearly; None keeps the file's voxels (Models Genesis).
        fill: Hounsfield units outside the volume.
    """

    def __init__(
        self,
        keys: KeysCollection,
        size: Sequence[int] = (32, 64, 64),
        spacing: Sequence[float] | None = None,
        fill: float = AIR_HU,
    ) -> None:
        super().__init__(keys)
        self.fill = float(fill)
        self.size = tuple(int(n) for n in size)
        self.spacing = None if spacing is None else tuple(float(step) for step in spacing)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        found = dict(data)
        center = found.get("center")
        for key in self.key_iterator(found):
            if center is None:
                raise DataError(f"{found[key]}: the item has no 'center'; prepare the data with --mode candidates")
            found[key] = self._cube(str(found[key]), np.asarray(center, dtype=float))
        return found

    def _cube(self, path: str, center: np.ndarray) -> MetaTensor:
        geometry = read_geometry(path)
        voxel = world_to_voxel(center, geometry.affine)[0]
        nearest = np.floor(voxel + 0.5).astype(int)
        if (nearest < 0).any() or (nearest >= geometry.shape).any():
            place = ", ".join(f"{mm:g}" for mm in center)
            raise DataError(f"{path}: the place ({place}) mm lies outside the volume; correct its row in the table")
        stored = nib.orientations.io_orientation(geometry.affine)
        wanted = nib.orientations.axcodes2ornt("SPL", labels=RAS_LABELS)
        turn = nib.orientations.ornt_transform(stored, wanted)
        start, size = self._box(voxel, nearest, geometry, turn)
        block = read_block(path, start, size, self.fill)
        shift = np.eye(4)
        shift[:3, 3] = start
        affine = geometry.affine @ shift @ nib.orientations.inv_ornt_aff(turn, size)
        turned = np.ascontiguousarray(nib.orientations.apply_orientation(block, turn))
        cube = MetaTensor(torch.from_numpy(turned)[None], affine=torch.from_numpy(affine))
        return cube if self.spacing is None else self._resampled(cube, center)

    def _box(
        self, voxel: np.ndarray, nearest: np.ndarray, geometry: VolumeGeometry, turn: np.ndarray
    ) -> tuple[list[int], list[int]]:
        axes = turn[:, 0].astype(int)
        size = np.array(self.size)[axes]
        if self.spacing is None:
            # Where an axis is reversed, the voxel must still end up at index size // 2.
            start = np.where(turn[:, 1] > 0, nearest - size // 2, nearest + size // 2 - size + 1)
            return start.tolist(), size.tolist()
        steps = np.linalg.norm(geometry.affine[:3, :3], axis=0)
        reach = 0.5 * size * np.array(self.spacing)[axes] / steps + 2
        low, high = np.floor(voxel - reach).astype(int), np.ceil(voxel + reach).astype(int)
        return low.tolist(), (high - low + 1).tolist()

    def _resampled(self, cube: MetaTensor, center: np.ndarray) -> MetaTensor:
        affine = np.asarray(cube.affine, dtype=float).copy()
        affine[:3, :3] *= np.array(self.spacing) / np.linalg.norm(affine[:3, :3], axis=0)
        affine[:3, 3] = LPS_TO_RAS[:3, :3] @ center - affine[:3, :3] @ (np.array(self.size) // 2)
        resample = SpatialResample(mode="bilinear", padding_mode="border", dtype=np.float32)
        cut: Any = resample(cube, dst_affine=torch.from_numpy(affine), spatial_size=self.size)
        return cut


def luna_cube_transforms(
    size: Sequence[int] = (32, 64, 64),
    window: tuple[float, float] = (-1000.0, 1000.0),
    spacing: Sequence[float] | None = None,
) -> list[Transform]:
    """Transforms of one candidate {"image": file, "center": [x, y, z]} to "image", (1, D, H, W) in [-1, 1]."""
    return [
        LoadCubed("image", size=size, spacing=spacing),
        ScaleIntensityRanged("image", a_min=window[0], a_max=window[1], b_min=-1, b_max=1, clip=True),
        EnsureTyped("image", dtype=torch.float32, track_meta=False),
    ]
