# SPDX-License-Identifier: Apache-2.0
"""3D volumes as ITK reads them: their geometry, a box of their voxels, and places in millimetres as voxel indices.

Places are written in ITK's world coordinates, LPS: mm to the patient's left, back and head. Affines are RAS, as in
nibabel and MONAI, so x and y change sign in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unimedi_components.data.ct_checks import (
    SAMPLED_SLICES,
    CTLimits,
    Fault,
    check_ct,
    hounsfield_fault,
    voxels_elsewhere,
)
from unimedi_components.data.itk_loading import load_itk
from unimedi_components.errors import DataError

__all__ = [
    "AIR_HU",
    "LPS_TO_RAS",
    "VolumeGeometry",
    "check_metaimage",
    "read_block",
    "read_geometry",
    "voxel_to_world",
    "world_to_voxel",
]

AIR_HU = -1000.0
#: Turns homogeneous LPS coordinates into RAS ones, and back.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_LIMITS = CTLimits(min_slices=2, min_megabytes=0.0)


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
        DataError: ITK does not know the format, it is not 3D, the axes do not span space, or the header names voxels
            outside its folder.
        RuntimeError: ITK cannot read the header.
    """
    if elsewhere := voxels_elsewhere(path):
        raise DataError(f"{path}: {elsewhere}")
    itk = load_itk()
    image_io = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
    if image_io is None:
        raise DataError(f"{path}: no such file, or no reader knows the format")
    image_io.SetFileName(str(path))
    image_io.ReadImageInformation()
    if (n_axes := image_io.GetNumberOfDimensions()) != 3:
        raise DataError(f"{path}: has {n_axes} axes where a volume has 3")
    affine = np.eye(4)
    for axis in range(3):
        affine[:3, axis] = np.array(image_io.GetDirection(axis)) * image_io.GetSpacing(axis)
        affine[axis, 3] = image_io.GetOrigin(axis)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-6:
        raise DataError(f"{path}: the direction cosines are singular or not finite; write the header again")
    shape = tuple(int(image_io.GetDimensions(axis)) for axis in range(3))
    return VolumeGeometry(shape, LPS_TO_RAS @ affine, int(image_io.GetComponentSize()))


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


def check_metaimage(path: str | Path, check: str = "quick") -> tuple[Fault | None, VolumeGeometry | None]:
    """Say what is wrong with a CT volume in an ``.mhd`` file, with the voxels in a file of their own.

    Args:
        path: the header file.
        check: ``"exists"`` (header, and whether the voxels' file is there), ``"quick"`` (also its size) or
            ``"full"`` (also whether some slices are in Hounsfield units).

    Returns:
        The fault and None, or None and the geometry. Reasons as of
        :func:`~unimedi_components.data.ct_checks.check_ct`.
    """
    path = Path(path)
    load_itk()
    fault = check_ct(path, _LIMITS, values=False)
    if fault is not None:
        return fault, None
    geometry = read_geometry(path)
    problem = _voxel_file_problem(path, geometry, check)
    if not problem and check == "full":
        *plane, depth = geometry.shape
        slices = np.unique(np.linspace(0, depth - 1, SAMPLED_SLICES).round().astype(int))
        try:
            sample = np.stack([read_block(path, (0, 0, index), (*plane, 1)) for index in slices.tolist()])
        except RuntimeError as error:
            problem = f"its voxels cannot be read ({str(error).strip().splitlines()[-1]})"
        else:
            if (values := hounsfield_fault(sample)) is not None:
                return Fault(values[0], f"{path}: {values[1]}"), None
    if problem:
        return Fault("unreadable image", f"{path}: {problem}. Unpack or download it again"), None
    return None, geometry


def _voxel_file_problem(path: Path, geometry: VolumeGeometry, check: str) -> str:
    """Compare the file of voxels that a header names with what the header says; empty when they agree."""
    fields: dict[str, str] = {}
    for line in path.read_bytes()[:65536].decode("latin-1").splitlines():
        name, _, value = line.partition("=")
        fields[name.strip()] = value.strip()
    voxels = fields.get("ElementDataFile", "")
    if not voxels or voxels.split()[0] in ("LOCAL", "LIST") or "%" in voxels:
        return ""
    raw = path.parent / voxels
    if not raw.is_file():
        return f"its voxels {voxels} are missing"
    need, size = int(np.prod(geometry.shape)) * geometry.voxel_bytes, raw.stat().st_size
    if fields.get("CompressedData", "").lower() == "true":
        stored = fields.get("CompressedDataSize", "")
        need = int(stored) if stored.isdigit() else 1
    return f"{voxels} has {size} bytes where the header says {need}" if size < need and check != "exists" else ""
