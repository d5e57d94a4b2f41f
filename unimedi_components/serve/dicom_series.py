# SPDX-License-Identifier: Apache-2.0
"""Uploaded DICOM files as one study: one X-ray, one multi-frame CT, or the slices of one CT series."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from unimedi_components.data.itk_loading import load_itk
from unimedi_components.serve.dicom import XRAYS, DicomFile, check_image
from unimedi_components.serve.faults import Limits, UploadError, unsupported, unusable
from unimedi_components.serve.pictures import check_size, colour_fault
from unimedi_components.serve.uploads import names_of
from unimedi_components.serve.volumes import check_voxels

__all__ = ["check_series", "check_xray", "split_series"]

Array = npt.NDArray[Any]

_CHEST = ("CHEST", "THORAX", "LUNG", "TORAX", "ABDOMEN", "TRUNK", "BODY", "RIBS", "HEART")


def check_xray(found: DicomFile, limits: Limits) -> tuple[dict[str, str], list[str]]:
    """Check one file of one frame that is no CT.

    Returns:
        what to say about it, and warnings.

    Raises:
        UploadError: see `check_image`; several frames, a strange size, or in colour.
    """
    check_image(found)
    if found.frames > 1:
        raise unusable(f"{found.name}: holds {found.frames} frames, a film or loop. Export one X-ray frame.")
    check_size(found.shape, found.name, limits)
    if found.samples > 1:
        pixels = _decode(found)
        if pixels.ndim == 4 and (fault := colour_fault(pixels[0, ..., :3], found.name)) is not None:
            raise fault
    width, height = found.shape
    facts = {"File": f"DICOM, modality {found.described}, {width} × {height} pixels"}
    return facts, body_part_warning(found)


def _decode(found: DicomFile) -> Array:
    itk = load_itk()
    try:
        return itk.array_from_image(itk.imread(str(found.file.path)))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][:160]
        raise unusable(f"{found.name}: the pixels cannot be decoded ({reason}). Export it uncompressed.") from error


def body_part_warning(found: DicomFile) -> list[str]:
    """A warning where the header names another part of the body than the chest."""
    part = found.tags.get("0018|0015", "")
    if not part or any(word in part.upper() for word in _CHEST):
        return []
    return [f"The DICOM header names the body part {part[:40]}; the network knows chests."]


def check_series(found: Sequence[DicomFile], limits: Limits) -> tuple[dict[str, str], list[str]]:
    """Check the slices of one CT series, or one file of many frames.

    Returns:
        what to say about it, and warnings.

    Raises:
        UploadError: several series, slices that do not make one volume, or see `check_image`.
    """
    for file in found:
        check_image(file)
    first = found[0]
    if first.samples > 1:
        raise unsupported(f"{first.name}: holds colour frames, not a CT. Give the original grey series.")
    depth = first.frames if len(found) == 1 else len(found)
    check_voxels((*first.shape, depth), first.name, limits)
    if depth == 1:
        raise unusable(
            f"{first.name}: is one slice of a CT series. Drop all files of the series, its folder, or a zip of it."
        )
    facts = {"File": f"DICOM CT series of {len(found)} files" if len(found) > 1 else f"DICOM CT of {depth} frames"}
    if first.description:
        facts["Series"] = first.description
    warnings = body_part_warning(first)
    return facts, warnings if len(found) == 1 else [*warnings, *_stack_warnings(found)]


def _stack_warnings(found: Sequence[DicomFile]) -> list[str]:
    """Warnings about gaps.

    Raises:
        UploadError: the slices are not a stack: other sizes or directions, no positions, or a position twice.
    """
    if len(sizes := Counter(file.shape for file in found)) > 1:
        odd = next(file for file in found if file.shape == sizes.most_common()[-1][0])
        raise unusable(
            f"{odd.name}: the slices of the series differ in size. Leave out those that do not belong to it."
        )
    try:
        directions = np.asarray([file.numbers("0020|0037") for file in found])
        positions = np.asarray([file.numbers("0020|0032") for file in found])
        normal = np.cross(directions[0, :3], directions[0, 3:])
        places = positions @ normal
    except (ValueError, IndexError):
        missing = next((file.name for file in found if "0020|0032" not in file.tags), found[0].name)
        raise unusable(f"{missing}: the slice lacks its position in the patient. Export the original series.") from None
    if np.abs(directions - directions[0]).max() > 0.01:
        raise unusable(f"{found[0].name}: the slices of the series differ in direction. Drop the axial series alone.")
    order = np.argsort(places)
    steps = np.diff(places[order])
    if len(steps) and steps.min() < 1e-3:
        twice = found[int(order[int(steps.argmin()) + 1])].name
        raise unusable(
            f"{twice}: two slices lie at the same place, as with several phases or a file dropped twice. "
            "Drop one reconstruction alone."
        )
    usual = float(np.median(steps))
    if steps.max() > 1.5 * usual:
        gaps = int((steps > 1.5 * usual).sum())
        return [
            f"Slices seem to be missing: {gaps} gap(s) of up to {steps.max():.3g} mm where {usual:.3g} mm is usual."
        ]
    return []


def split_series(found: Sequence[DicomFile]) -> tuple[list[DicomFile], list[str]]:
    """The image files of the one series among DICOM files, and notes on what was left out.

    Raises:
        UploadError: there is no image, several series, or several X-rays.
    """
    # contours, reports and the scout view come along with an exported series
    known = [file for file in found if file.is_image and file.modality in XRAYS | {"CT"}]
    images = [file for file in known if not file.is_localizer] or known
    if not images:
        check_image(found[0])
    left = [file.file for file in found if file not in images]
    notes = [f"Left out, no image of the series: {names_of(left)}."] if left else []
    series = Counter(file.series for file in images)
    if len(images) > 1 and (len(series) > 1 or any(file.modality != "CT" for file in images)):
        raise _several(images, series)
    return images, notes


def _several(images: Sequence[DicomFile], series: Counter[str]) -> UploadError:
    if all(file.modality != "CT" for file in images):
        return unusable(f"{names_of(f.file for f in images)}: {len(images)} X-rays at once. Drop one at a time.")
    parts = []
    for uid, count in series.most_common(4):
        file = next(file for file in images if file.series == uid)
        described = f" {file.description!r}" if file.description else ""
        parts.append(f"{count} × {file.modality}{described}")
    return unusable(
        f"{names_of((f.file for f in images), 1)}: the files are of {len(series)} DICOM series ({', '.join(parts)}). "
        "Drop the files of one series alone."
    )
