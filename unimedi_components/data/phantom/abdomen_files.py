# SPDX-License-Identifier: Apache-2.0
"""Abdominal CT and label maps as NIfTI files in any axis order, and the truth about them."""

import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from .abdomen import AbdomenStudy
from .geometry import Grid

_LPS_SHARE = 0.4
_TURNED = 4


def axis_order(index: int, seed: np.random.SeedSequence) -> str:
    """Where the axes of a patient's files point: RAS or LPS, and SLP (slices first) for every tenth patient."""
    if index % 10 == _TURNED:
        return "SLP"
    return "LPS" if np.random.default_rng(second_seed(seed, 1)).random() < _LPS_SHARE else "RAS"


def second_seed(seed: np.random.SeedSequence, key: int) -> np.random.SeedSequence:
    """A seed for something beside the patient's own study, by a key of its own."""
    return np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, 1000 + key))


def save_volume(
    path: Path, volume: npt.NDArray[Any], grid: Grid, order: str
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """Write a volume (nz, ny, nx) of the canvas as .nii.gz without a time stamp; same volume, same bytes.

    ``order``: where the file's three axes point, such as ``RAS``.

    Returns:
        The array as stored and the affine of the file (voxel to RAS+ mm).
    """
    sign = np.array((-1.0, -1.0, 1.0))
    affine = np.diag([*(sign * grid.spacing[::-1]), 1.0])
    affine[:3, 3] = sign * grid.origin[::-1]
    data = volume.transpose(2, 1, 0)
    turn = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(order))
    affine = affine @ inv_ornt_aff(turn, data.shape)
    data = apply_orientation(data, turn)
    image = nib.Nifti1Image(np.asfortranarray(data), affine)
    image.header.set_xyzt_units("mm")
    packer = zlib.compressobj(1, zlib.DEFLATED, 31, 9, zlib.Z_RLE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packer.compress(image.to_bytes()) + packer.flush())
    return data, affine


def organ_truth(
    stored: npt.NDArray[np.uint8], affine: npt.NDArray[np.float64], names: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """What a label map holds: {name: {"label", "voxels", "box", "centroid_mm"}}, absent organs left out.

    ``box`` is [[z0, z1], [y0, y1], [x0, x1]], first and last index along the file's axis that runs between feet
    and head, front and back, left and right, whichever of the three that is and whichever way it points.
    ``centroid_mm`` is [x, y, z] in the affine's RAS+ mm: x grows to the patient's right.
    """
    codes = nib.aff2axcodes(affine)
    axes = [next(i for i, code in enumerate(codes) if code in pair) for pair in ("SI", "AP", "LR")]
    places = np.argwhere(stored)
    values = stored[tuple(places.T)]
    found = {}
    for label, name in enumerate(names, start=1):
        own = places[values == label]
        if len(own):
            centre = affine @ (*own.mean(axis=0), 1.0)
            found[name] = {
                "label": label,
                "voxels": len(own),
                "box": [[int(own[:, axis].min()), int(own[:, axis].max())] for axis in axes],
                "centroid_mm": [round(float(v), 3) for v in centre[:3]],
            }
    return found


def case_record(study: AbdomenStudy, organs: dict[str, dict[str, Any]], image: str, mask: str) -> dict[str, Any]:
    """The entry of a case in truth.json; ``image`` and ``mask`` are paths relative to its folder."""
    return {"image": image, "mask": mask, "sex": study.sex, "age": study.age, "organs": organs}
