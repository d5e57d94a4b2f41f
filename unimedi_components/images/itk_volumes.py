# SPDX-License-Identifier: Apache-2.0
"""3D volumes as ITK reads them: their geometry, a box of their voxels, and places in millimetres as voxel indices.

Places are written in ITK's world coordinates, LPS: mm to the patient's left, back and head. Affines are RAS, as in
nibabel and MONAI, so x and y change sign in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unimedi_components.errors import DataError
from unimedi_components.images.itk_loading import load_itk
from unimedi_components.images.text_headers import (
    check_packed,
    header_gap,
    missing_voxels,
    too_few_bytes,
    voxels_elsewhere,
)

__all__ = [
    "AIR_HU",
    "LPS_TO_RAS",
    "NOT_GREY",
    "VolumeGeometry",
    "read_block",
    "read_geometry",
    "read_itk",
    "read_itk_geometry",
    "voxel_to_world",
    "world_to_voxel",
]

AIR_HU = -1000.0
#: What every reader says of voxels that are no single number.
NOT_GREY = "its voxels are colours or complex numbers. Convert them to grey values"
#: Turns homogeneous LPS coordinates into RAS ones, and back.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class VolumeGeometry:
    """Where a file's voxels are.

    Args:
        shape: voxels along the file's x, y and z axes.
        affine: (4, 4) voxel index to mm, RAS.
        voxel_bytes: bytes per stored voxel.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    voxel_bytes: int


def read_geometry(path: str | Path) -> VolumeGeometry:
    """Read size, offset, spacing and direction cosines of a 3D volume with ITK, without its voxels.

    Raises:
        DataError: see `read_itk_geometry`; it is not 3D, or the axes do not span space.
        RuntimeError: ITK cannot read the header.
    """
    shape, affine, voxel_bytes = read_itk_geometry(path)
    if len(shape) != 3:
        raise DataError(f"{path}: has {len(shape)} axes where a volume has 3")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-6:
        raise DataError(f"{path}: the direction cosines are singular or not finite; write the header again")
    return VolumeGeometry(shape, affine, voxel_bytes)


def read_itk_geometry(path: str | Path) -> tuple[tuple[int, ...], np.ndarray, int]:
    """Shape of any number of axes, affine (4, 4) to RAS mm of the first three, and bytes of a voxel.

    Raises:
        DataError: ITK does not know the format, a voxel holds several values, the header names voxels outside its
            folder or that are missing or too few, or leaves spacing or orientation open.
        RuntimeError: ITK cannot read the header.
    """
    if fault := voxels_elsewhere(path) or header_gap(path) or missing_voxels(path):
        raise DataError(f"{path}: {fault}")
    itk = load_itk()
    image_io = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
    if image_io is None:
        raise DataError(f"{path}: no such file, or no reader knows the format")
    image_io.SetFileName(str(path))
    image_io.ReadImageInformation()
    n_axes = int(image_io.GetNumberOfDimensions())
    if int(image_io.GetNumberOfComponents()) > 1:
        raise DataError(f"{path}: {NOT_GREY}")
    affine = np.eye(4)
    for axis in range(min(3, n_axes)):
        direction = np.zeros(3)
        direction[: min(3, n_axes)] = np.asarray(list(image_io.GetDirection(axis)))[:3]
        affine[:3, axis] = direction * image_io.GetSpacing(axis)
        affine[axis, 3] = image_io.GetOrigin(axis)
    shape, voxel_bytes = tuple(int(image_io.GetDimensions(axis)) for axis in range(n_axes)), image_io.GetComponentSize()
    if cut := too_few_bytes(path, math.prod(shape) * int(voxel_bytes)):
        raise DataError(f"{path}: {cut}")
    return shape, LPS_TO_RAS @ affine, int(voxel_bytes)


def read_itk(path: str | Path) -> np.ndarray:
    """Read all voxels as float32, axes in the file's order.

    Raises:
        DataError: see `read_itk_geometry`.
        RuntimeError: ITK cannot read the file.
        zlib.error: its packed voxels are damaged.
    """
    shape, _, voxel_bytes = read_itk_geometry(path)
    check_packed(path, math.prod(shape) * voxel_bytes)
    itk = load_itk()
    array = np.asarray(itk.array_from_image(itk.imread(str(path))))
    return array.astype(np.float32, copy=False).transpose()


def world_to_voxel(world: Any, affine: Any) -> np.ndarray:
    """Continuous voxel indices (N, 3) of places (N, 3) in LPS mm, for an affine (4, 4) to RAS mm."""
    to_index = np.linalg.inv(np.asarray(affine, dtype=float)) @ LPS_TO_RAS
    return np.asarray(world, dtype=float).reshape(-1, 3) @ to_index[:3, :3].T + to_index[:3, 3]


def voxel_to_world(voxel: Any, affine: Any) -> np.ndarray:
    """Places (N, 3) in LPS mm of continuous voxel indices (N, 3), for an affine (4, 4) to RAS mm."""
    to_world = LPS_TO_RAS @ np.asarray(affine, dtype=float)
    return np.asarray(voxel, dtype=float).reshape(-1, 3) @ to_world[:3, :3].T + to_world[:3, 3]


def read_block(path: str | Path, start: Sequence[int], size: Sequence[int], fill: float = AIR_HU) -> np.ndarray:
    """Read a box of voxels; of an uncompressed file no other bytes are read.

    Args:
        path: any 3D volume that ITK reads.
        start: first index along the file's x, y and z axes; may lie outside.
        size: voxels along them.
        fill: value of the voxels outside the volume.

    Returns:
        float32 (x, y, z) of shape ``size``.

    Raises:
        RuntimeError: ITK cannot read the file.
    """
    itk = load_itk()
    reader = itk.ImageFileReader[itk.Image[itk.F, 3]].New(FileName=str(path))
    reader.UpdateOutputInformation()
    image = reader.GetOutput()
    shape = np.array(image.GetLargestPossibleRegion().GetSize())
    begin = np.asarray(start, dtype=int)
    low, high = np.clip(begin, 0, shape), np.clip(begin + np.asarray(size), 0, shape)
    block = np.full(tuple(size), fill, np.float32)
    if (high <= low).any():
        return block
    image.SetRequestedRegion(itk.ImageRegion[3](low.tolist(), (high - low).tolist()))
    reader.Update()
    # A compressed file comes whole.
    first = low - np.array(image.GetBufferedRegion().GetIndex())
    buffered = itk.array_view_from_image(image, update=False).transpose(2, 1, 0)
    inside = tuple(slice(a, b) for a, b in zip(low - begin, high - begin, strict=True))
    block[inside] = buffered[tuple(slice(a, a + n) for a, n in zip(first, high - low, strict=True))]
    return block
