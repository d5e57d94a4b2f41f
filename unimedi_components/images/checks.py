# SPDX-License-Identifier: Apache-2.0
"""Whether a CT volume is sound: geometry and Hounsfield units, in the same words for every command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unimedi_components.errors import DataError, reason_of
from unimedi_components.images.dicom import stored_values
from unimedi_components.images.itk_volumes import VolumeGeometry, read_block, read_geometry
from unimedi_components.images.volume import (
    SAMPLED_SLICES,
    VolumeHeader,
    find_stack,
    read_volume_header,
    sample_volume,
    shape_problem,
    stack_header,
)
from unimedi_components.images.xray_checks import Fault

__all__ = [
    "NOT_FINITE",
    "SAMPLED_SLICES",
    "CTLimits",
    "Fault",
    "check_ct",
    "check_metaimage",
    "header_fault",
    "hounsfield_fault",
    "refused_values",
    "short_reason",
]

#: What every reader says of voxels that are no numbers.
NOT_FINITE = "some voxels are NaN or infinite. Convert it again from DICOM"
_AIR = (-1100.0, -500.0)
_SOFT_TISSUE = (-200.0, 300.0)
_PADDING_BELOW = -1100.0
_FAT, _MIN_FAT_SHARE = (-200.0, -30.0), 0.01
_MIN_AIR_SHARE = 0.001
_ASSUME_HU = ", or read the values as they are with --assume_hu"
_MIN_TISSUE_SHARE = 0.01
# what the readers say, and what a drop of it is counted as
_REASONS = {
    "is one CT slice": "one CT slice",
    "scout view": "scout view",
    "lie at one place": "one CT slice",
    "several stacks": "several volumes",
    " volumes (": "several volumes",
    "images and not one": "several images",
    "stored values, not Hounsfield": "not Hounsfield units",
    "lacks Image": "no position",
    "without positions": "no position",
    "lacks PixelSpacing": "no position",
    "that is not ": "no position",
    "slices are missing": "slices are missing",
    "complex numbers": "not grey values",
    "voxels outside its folder": "voxels outside the folder",
}


@dataclass(frozen=True)
class CTLimits:
    """Limits of :func:`check_ct`.

    Args:
        min_slices: smallest extent of the volume in voxels along every axis.
        min_megabytes: smallest size of the voxels in megabytes (1e6 bytes), uncompressed.
        spacing: smallest and largest spacing in mm along every axis.
        hounsfield: whether values must be Hounsfield units.
    """

    min_slices: int = 20
    min_megabytes: float = 1.0
    spacing: tuple[float, float] = (0.2, 10.0)
    hounsfield: bool = True


def check_ct(
    path: str | Path,
    limits: CTLimits = CTLimits(),
    *,
    values: bool = True,
    strict: bool = False,
    files: Sequence[str | Path] = (),
    assume_hu: bool = False,
) -> Fault | None:
    """Say what is wrong with a CT volume.

    Args:
        path: NIfTI file, a folder with one DICOM stack, a DICOM file of many frames, or any 3D file that ITK reads
            (``.mhd``, ``.nrrd``).
        limits: the limits.
        values: look at the voxels too; NIfTI reads a few slices, other formats the whole volume.
        strict: raise instead of returning the fault.
        files: exactly the DICOM files that make the volume; by default all of the folder that do.
        assume_hu: the voxels are Hounsfield units, whatever they look like.

    Returns:
        None when sound, otherwise the first fault. Reasons: ``missing image``, ``unreadable image``, ``one CT slice``,
        ``several volumes``, ``no position``, ``voxels outside the folder``, ``not grey values``, ``not a 3D volume``,
        ``affine not finite``, ``zero affine``, ``singular affine``, ``spacing out of range``, ``affine and spacing
        disagree``, ``fewer than N slices``, ``fewer than X MB of voxels``, ``non-finite voxels``, ``not Hounsfield
        units``.

    Raises:
        DataError: ``strict`` and there is a fault; the message is the fault's detail.
    """
    fault = _find_fault(Path(path), limits, values, files, assume_hu)
    if fault is not None and strict:
        raise DataError(fault.detail)
    return fault


def _find_fault(
    path: Path, limits: CTLimits, values: bool, files: Sequence[str | Path], assume_hu: bool
) -> Fault | None:
    if not path.exists():
        return Fault("missing image", f"{path}: no such file. Correct the path or fetch the file")
    try:
        stack = find_stack(path, files, assume_hu)
        header = read_volume_header(path) if stack is None else stack_header(stack)
        problem = header_fault(header, limits)
        if problem is None and values:
            # every file has to decode, and a few slices tell the units
            for one in {one.header.path: one.header for one in stack.slices}.values() if stack else ():
                stored_values(one)
            sample = sample_volume(path, header, stack)
            problem = hounsfield_fault(sample, limits.hounsfield and not assume_hu)
    except DataError as error:
        return Fault(short_reason(str(error)), str(error))
    except Exception as error:
        problem = "unreadable image", reason_of(error, path)
    return None if problem is None else Fault(problem[0], f"{path}: {problem[1]}")


def short_reason(message: str) -> str:
    """The reason to count a message of the readers by."""
    return next((reason for words, reason in _REASONS.items() if words in message), "unreadable image")


def header_fault(header: VolumeHeader, limits: CTLimits = CTLimits()) -> tuple[str, str] | None:
    """Return ``(reason, detail)`` of the first fault of a volume's geometry; None where it is sound."""
    shape, matrix = header.shape, header.affine[:3, :3]
    size = "x".join(map(str, shape))
    if problem := shape_problem(shape):
        return "not a 3D volume", problem
    if not np.isfinite(header.affine).all():
        return "affine not finite", "the affine holds NaN or infinity. Convert it again from DICOM"
    if not matrix.any():
        return ("zero affine", "the affine is zero, so size and orientation are unknown. Convert it again from DICOM")
    spacing = np.linalg.norm(matrix, axis=0)
    text = "x".join(f"{step:.4g}" for step in spacing)
    low, high = limits.spacing
    if (spacing > 0).all() and not ((spacing >= low) & (spacing <= high)).all():
        return (
            "spacing out of range",
            f"spacing {text} mm is outside {low:g} to {high:g} mm. Convert it again from DICOM",
        )
    if abs(np.linalg.det(matrix)) < 1e-3 * spacing.prod() or not (spacing > 0).all():
        return "singular affine", "the affine cannot be inverted. Convert it again from DICOM"
    if not np.allclose(spacing, header.spacing, rtol=0.05, atol=0.01):
        stored = "x".join(f"{step:.4g}" for step in header.spacing)
        return (
            "affine and spacing disagree",
            f"affine says {text} mm, pixdim {stored} mm. Convert it again from DICOM",
        )
    if min(shape) < limits.min_slices:
        reason = f"fewer than {limits.min_slices} slices"
        return reason, f"has shape {size}, {reason} along one axis. Lower min_slices if it is meant so"
    if np.prod(shape) * header.voxel_bytes < limits.min_megabytes * 1e6:
        reason = f"fewer than {limits.min_megabytes:g} MB of voxels"
        return reason, f"has shape {size}, {reason}. Lower min_megabytes if it is meant so"
    return None


def hounsfield_fault(sample: np.ndarray, hounsfield: bool = True) -> tuple[str, str] | None:
    """Judge by a sample of voxels whether a CT is in Hounsfield units.

    Values below -1100 are padding. Of the rest, air (-1100..-500) must fill at least 0.1%, or, as in a crop of a
    body, fat (-200..-30) at least 1%, and soft tissue (-200..300) at least 1%; so stored values (air near 0), 8-bit or
    [0, 1] grey levels and volumes that were rescaled twice (soft tissue near -1000) are all found, with or without a
    padding value.

    Args:
        sample: voxels of some slices, any shape.
        hounsfield: False checks only that the values are finite.

    Returns:
        None or ``(reason, detail)``.
    """
    # in the order of memory, since their places do not matter
    sample = np.asarray(sample, dtype=np.float32).ravel(order="K")
    if not np.isfinite(sample).all():
        return "non-finite voxels", NOT_FINITE
    if not hounsfield:
        return None
    inside = sample[sample >= _PADDING_BELOW]
    low, high = (
        (float(inside.min()), float(inside.max())) if inside.size else (float(sample.min()), float(sample.max()))
    )
    air, fat, tissue = (
        np.count_nonzero((inside >= first) & (inside < last)) / max(inside.size, 1)
        for first, last in (_AIR, _FAT, _SOFT_TISSUE)
    )
    if (air >= _MIN_AIR_SHARE or fat >= _MIN_FAT_SHARE) and tissue >= _MIN_TISSUE_SHARE:
        return None
    if air >= _MIN_AIR_SHARE:
        why = "almost no voxel is soft tissue (-200 to 300), as when the rescaling was applied twice"
        remedy = "Apply RescaleSlope and RescaleIntercept once"
    elif high > 300:
        body = float(np.median(inside[inside > low + 0.1 * (high - low)])) if high > low else high
        why = f"none reaches air (below -500) and the body lies near {body:.0f}, as raw stored values do"
        remedy = "Apply RescaleSlope/RescaleIntercept (HU = stored value * slope + intercept)"
    else:
        why = "none reaches air (below -500), as grey levels or rescaled intensities do"
        remedy = "Convert it again from DICOM without rescaling the intensities"
    return (
        "not Hounsfield units",
        f"values {low:.4g} to {high:.4g} are not Hounsfield units: {why}. {remedy}{_ASSUME_HU}",
    )


def refused_values(sample: np.ndarray, hounsfield: bool = True) -> str:
    """Why values are refused by every command: not finite, or no Hounsfield units; empty where they are read."""
    fault = hounsfield_fault(sample, hounsfield)
    return "" if fault is None else fault[1]


def check_metaimage(
    path: str | Path, check: str = "quick", hounsfield: bool = True
) -> tuple[Fault | None, VolumeGeometry | None]:
    """Say what is wrong with a CT volume in an ``.mhd`` file, with the voxels in a file of their own.

    Args:
        path: the header file.
        check: ``"full"`` also reads some slices: whether they are in Hounsfield units; any other only the header and
            the size of the voxels' file.
        hounsfield: whether values must be Hounsfield units.

    Returns:
        The fault and None, or None and the geometry. Reasons as of
        :func:`~unimedi_components.images.checks.check_ct`.
    """
    path = Path(path)
    fault = check_ct(path, CTLimits(min_slices=2, min_megabytes=0.0), values=False)
    if fault is not None:
        return fault, None
    geometry = read_geometry(path)
    if check == "full":
        *plane, depth = geometry.shape
        slices = np.unique(np.linspace(0, depth - 1, SAMPLED_SLICES).round().astype(int))
        try:
            sample = np.stack([read_block(path, (0, 0, index), (*plane, 1)) for index in slices.tolist()])
        except RuntimeError as error:
            return Fault("unreadable image", f"{path}: {reason_of(error, path)}"), None
        if (values := hounsfield_fault(sample, hounsfield)) is not None:
            return Fault(values[0], f"{path}: {values[1]}"), None
    return None, geometry
