# SPDX-License-Identifier: Apache-2.0
"""Checks of a CT volume before it enters a datalist: header geometry, and Hounsfield units."""

from __future__ import annotations

import gzip
import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from unimedi_components.data.itk_loading import load_itk
from unimedi_components.errors import DataError

__all__ = [
    "NOT_GREY",
    "CTHeader",
    "CTLimits",
    "Fault",
    "check_ct",
    "hounsfield_fault",
    "read_ct_header",
    "require_volume",
    "shape_problem",
    "voxels_elsewhere",
]

NIFTI_ENDINGS = (".nii", ".nii.gz")
SAMPLED_SLICES = 9
_AIR = (-1100.0, -500.0)
_SOFT_TISSUE = (-200.0, 300.0)
_PADDING_BELOW = -1100.0
_MIN_AIR_SHARE = 0.001
_MIN_TISSUE_SHARE = 0.01
_HEADER_BYTES = 2**16
#: What every reader says of voxels that are no single number.
NOT_GREY = "its voxels are colours or complex numbers. Convert them to grey values"

# nibabel logs its own repairs of a header, which would repeat what the checks report.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Fault:
    """What is wrong with a file: a stable ``reason`` to count by, and a ``detail`` with file and remedy."""

    reason: str
    detail: str


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


@dataclass(frozen=True)
class CTHeader:
    """Geometry of a volume: shape in voxels, affine (4, 4) to mm, spacing in mm, bytes per voxel.

    ``grey`` is False where a voxel is no single number: a colour, a vector or a complex number.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    spacing: tuple[float, ...]
    voxel_bytes: int
    grey: bool = True

    @property
    def num_slices(self) -> int:
        """Number of slices along the axis nearest to inferior-superior."""
        return self.shape[self._axial]

    @property
    def slice_spacing(self) -> float:
        """Distance of neighbouring slices along that axis in mm."""
        return self.spacing[self._axial]

    @property
    def _axial(self) -> int:
        return int(
            np.argmax(np.abs(self.affine[2, :3]) / np.maximum(np.linalg.norm(self.affine[:3, :3], axis=0), 1e-12))
        )


def check_ct(
    path: str | Path, limits: CTLimits = CTLimits(), *, values: bool = True, strict: bool = False
) -> Fault | None:
    """Say what is wrong with a CT volume.

    Args:
        path: NIfTI file, a folder with one DICOM series, or any 3D file that ITK reads (``.mhd``, ``.nrrd``).
        limits: the limits.
        values: look at the voxels too; NIfTI reads a few slices, other formats the whole volume.
        strict: raise instead of returning the fault.

    Returns:
        None when sound, otherwise the first fault. Reasons: ``missing image``, ``unreadable image``, ``voxels outside
        the folder``, ``not grey values``, ``not a 3D volume``, ``affine not finite``, ``zero affine``, ``singular
        affine``, ``spacing out of range``, ``affine and spacing disagree``, ``fewer than N slices``, ``fewer than X MB
        of voxels``, ``non-finite voxels``, ``not Hounsfield units``.

    Raises:
        DataError: ``strict`` and there is a fault; the message is the fault's detail.
    """
    fault = _find_fault(Path(path), limits, values)
    if fault is not None and strict:
        raise DataError(fault.detail)
    return fault


def _find_fault(path: Path, limits: CTLimits, values: bool) -> Fault | None:
    if not path.exists():
        return Fault("missing image", f"{path}: no such file. Correct the path or fetch the file")
    try:
        if elsewhere := voxels_elsewhere(path):
            return Fault("voxels outside the folder", f"{path}: {elsewhere}")
        header = read_ct_header(path)
        problem = _header_problem(header, limits)
        if problem is None and values:
            problem = hounsfield_fault(_sample(path, header), limits.hounsfield)
    except Exception as error:  # nibabel, zlib and ITK raise many kinds for broken files
        text = str(error).strip().splitlines()
        problem = (
            "unreadable image",
            f"cannot be read ({text[-1] if text else type(error).__name__}). Download or export it again",
        )
    return None if problem is None else Fault(problem[0], f"{path}: {problem[1]}")


def require_volume(path: str | Path) -> None:
    """Let a file pass that holds one 3D volume of numbers, all its voxels in its own folder.

    Called before any reader opens a file; the words are those of :func:`check_ct`. Folders pass, and so does what no
    reader knows, which the reading itself refuses.

    Raises:
        DataError: the header names voxels outside the folder, or they are not one 3D volume of grey values.
    """
    path = Path(path)
    if not path.is_file():
        return
    problem = voxels_elsewhere(path)
    if not problem:
        try:
            header = read_ct_header(path)
        except Exception:  # nibabel, zlib and ITK raise many kinds for broken files
            return
        problem = shape_problem(header.shape) if header.grey else NOT_GREY
    if problem:
        raise DataError(f"{path}: {problem}")


def shape_problem(shape: Sequence[int]) -> str:
    """Say why a shape, trailing axes of length 1 dropped, is not that of one 3D volume; empty when it is."""
    text = " × ".join(map(str, shape))
    if len(shape) > 3:
        return f"is {len(shape)}D ({text}): several time points or channels. Extract one 3D volume"
    if len(shape) < 3 or min(shape) < 2:
        return f"has shape {text}, which is not a 3D volume. Give all slices in one file"
    return ""


def voxels_elsewhere(path: str | Path) -> str:
    """Say that a MetaImage or NRRD header names voxels outside its folder; empty when it does not.

    A header is text from a stranger: followed, it would read any file of this machine as an image.

    Args:
        path: any file; its content decides, not its name.
    """
    path = Path(path)
    if not path.is_file():
        return ""
    with open(path, "rb") as stream:
        head = stream.read(_HEADER_BYTES)
        if head.startswith(b"NRRD0") or b"NDims" in head:
            head += stream.read(64 * _HEADER_BYTES)
    home = path.parent.resolve()
    for name in _voxel_files(head):
        parts = re.split(r"[/\\]", name)
        absolute = os.path.isabs(name) or re.match(r"[A-Za-z]:|\\", name)
        if absolute or ".." in parts or not (home / name).resolve().is_relative_to(home):
            return f"its header names voxels outside its folder ({name[:80]}). Put them beside it and name them there"
    return ""


def _voxel_files(head: bytes) -> list[str]:
    """Return the files of voxels that a MetaImage or NRRD header names; patterns and lists included."""
    nrrd = head.startswith(b"NRRD0")
    if not nrrd and b"ElementDataFile" not in head:
        return []
    # an attached NRRD's header ends with an empty line, a MetaImage's with the line ElementDataFile
    lines = (re.split(rb"\r?\n\r?\n", head)[0] if nrrd else head).decode("latin-1").splitlines()
    field = re.compile(r"data ?file:\s*(.*)" if nrrd else r"ElementDataFile\s*=\s*(.*)", re.IGNORECASE)
    for number, line in enumerate(lines):
        match = field.match(line.strip())
        if match is None:
            continue
        value = match[1].strip()
        if value.split()[:1] == ["LIST"]:
            return [name.strip() for name in lines[number + 1 :] if name.strip()]
        pattern = re.match(r"(.*%\S*)(\s+-?\d+)+$", value)
        return [] if value.upper() == "LOCAL" else [pattern[1] if pattern else value]
    return []


def read_ct_header(path: str | Path) -> CTHeader:
    """Read the geometry of a volume without its voxels.

    Trailing axes of length 1 are dropped. A NIfTI with neither sform nor qform has a zero affine here: where
    its voxels lie is not stored.

    Raises:
        Exception: whatever the reader raises for a broken file.
    """
    path = Path(path)
    if path.name.lower().endswith(NIFTI_ENDINGS):
        image: Any = nib.load(path)
        raw = _raw_nifti_header(path)
        affine = np.asarray(image.affine, dtype=float)
        if raw is not None and int(raw["sform_code"]) <= 0 and int(raw["qform_code"]) <= 0:
            affine = np.zeros((4, 4))
        shape, spacing = tuple(image.shape), tuple(float(zoom) for zoom in image.header.get_zooms()[:3])
        kind = image.header.get_data_dtype()
        voxel_bytes, grey = int(kind.itemsize), not kind.names and kind.kind in "iuf"
    else:
        shape, spacing, affine, voxel_bytes, grey = _itk_header(path)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return CTHeader(shape, affine, spacing, voxel_bytes, grey)


def _raw_nifti_header(path: Path) -> nib.Nifti1Header | None:
    """Return the NIfTI-1 header as stored; nibabel replaces zero pixdims while it loads. None for NIfTI-2."""
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as stream:
        block = stream.read(348)
    return nib.Nifti1Header(block, check=False) if block[344:347] in (b"n+1", b"ni1") else None


def _header_problem(header: CTHeader, limits: CTLimits) -> tuple[str, str] | None:
    """Return ``(reason, detail)`` of the first fault of the geometry."""
    shape, matrix = header.shape, header.affine[:3, :3]
    size = "x".join(map(str, shape))
    if not header.grey:
        return "not grey values", NOT_GREY
    if problem := shape_problem(shape):
        return "not a 3D volume", problem
    if not np.isfinite(header.affine).all():
        return "affine not finite", "the affine holds NaN or infinity. Convert it again from DICOM"
    if not matrix.any():
        return (
            "zero affine",
            "the affine is zero, so size and orientation are unknown. Convert it again from DICOM",
        )
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

    Values below -1100 are padding. Of the rest, air (-1100..-500) must fill at least 0.1% and soft tissue
    (-200..300) at least 1%; so stored values (air near 0), 8-bit or [0, 1] grey levels and volumes that were
    rescaled twice (soft tissue near -1000) are all found, with or without a padding value.

    Args:
        sample: voxels of some slices, any shape.
        hounsfield: False checks only that the values are finite.

    Returns:
        None or ``(reason, detail)``.
    """
    sample = np.asarray(sample, dtype=np.float32).ravel()
    if not np.isfinite(sample).all():
        return "non-finite voxels", "some voxels are NaN or infinite. Convert it again from DICOM"
    if not hounsfield:
        return None
    inside = sample[sample >= _PADDING_BELOW]
    low, high = (
        (float(inside.min()), float(inside.max())) if inside.size else (float(sample.min()), float(sample.max()))
    )
    air, tissue = (
        float(((inside >= first) & (inside < last)).mean()) if inside.size else 0.0
        for first, last in (_AIR, _SOFT_TISSUE)
    )
    if air >= _MIN_AIR_SHARE and tissue >= _MIN_TISSUE_SHARE:
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
    return "not Hounsfield units", f"values {low:.4g} to {high:.4g} are not Hounsfield units: {why}. {remedy}"


def _sample(path: Path, header: CTHeader) -> np.ndarray:
    """Read some slices, the last one included, so that a truncated file shows."""
    if path.name.lower().endswith(NIFTI_ENDINGS):
        proxy: Any = nib.load(path).dataobj  # type: ignore[attr-defined]
        index = np.unique(np.linspace(0, header.shape[2] - 1, SAMPLED_SLICES).round().astype(int))
        # Unscaled: a memory map for .nii, and one pass without a float copy for .nii.gz.
        stored = proxy.get_unscaled()[:, :, index]
        return np.asarray(stored, dtype=np.float32) * float(proxy.slope) + float(proxy.inter)
    itk = load_itk()

    return np.asarray(itk.array_view_from_image(itk.imread(_itk_files(path))))


def _itk_files(path: Path) -> str | list[str]:
    """Return the file, or the files of the longest DICOM series of a folder in order."""
    if not path.is_dir():
        return str(path)
    itk = load_itk()

    names = itk.GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(True)
    names.SetDirectory(str(path))
    series = [list(names.GetFileNames(uid)) for uid in names.GetSeriesUIDs()]
    if not series:
        raise DataError("the folder holds no DICOM series")
    return max(series, key=len)


def _itk_header(path: Path) -> tuple[tuple[int, ...], tuple[float, ...], np.ndarray, int, bool]:
    itk = load_itk()

    files = _itk_files(path)
    first = files if isinstance(files, str) else files[0]
    image_io = itk.ImageIOFactory.CreateImageIO(first, itk.CommonEnums.IOFileMode_ReadMode)
    if image_io is None:
        raise DataError("no reader knows this format")
    image_io.SetFileName(first)
    image_io.ReadImageInformation()
    n_axes = image_io.GetNumberOfDimensions()
    shape = [int(image_io.GetDimensions(axis)) for axis in range(n_axes)]
    spacing = [float(image_io.GetSpacing(axis)) for axis in range(n_axes)]
    direction = np.array([list(image_io.GetDirection(axis)) for axis in range(n_axes)]).T
    if isinstance(files, list):
        reader = itk.imread(files)  # the step between files is only known from all of them
        shape, spacing = list(reader.GetLargestPossibleRegion().GetSize()), list(reader.GetSpacing())
        direction = np.asarray(reader.GetDirection())
    affine = np.eye(4)
    if len(shape) == 3 or (len(shape) > 3 and math.prod(shape[3:]) == 1):
        spacing = spacing[:3]
        affine[:3, :3] = np.asarray(direction)[:3, :3] * np.asarray(spacing)
    grey = int(image_io.GetNumberOfComponents()) == 1
    return tuple(map(int, shape)), tuple(spacing), affine, int(image_io.GetComponentSize()), grey
