# SPDX-License-Identifier: Apache-2.0
"""DICOM files as what they are together: X-rays, stacks of CT slices, and what is left out with its reason.

A series is not a volume: one series UID may hold two films, a scout beside its slices, several phases, or slices twice,
and details such as the thickness may change inside one stack. Slices belong together by geometry: study, series, size,
direction, and places along the normal, as in ITK and dicom2nifti.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from unimedi_components.errors import DataError
from unimedi_components.images.dicom import pixel_fault, transform_fault
from unimedi_components.images.dicom_phases import SAME_MM, at_places, in_order, interleaved, split_phases, tracking_of
from unimedi_components.images.dicom_stacks import (
    MAX_GAP_MM,
    ONE_SLICE,
    SAME_COSINE,
    DicomSlice,
    Stack,
    file_slices,
    has_rescale,
    is_even,
    make_stack,
    offsets,
)
from unimedi_components.images.headers import DicomHeader
from unimedi_components.images.xray_checks import CT_CLASSES, XRAYS, modality_of, modality_words

__all__ = ["Sorted", "is_ct", "sort_headers"]

# secondary capture image storage, as of dose reports
_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_SCOUTS = ("LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW", "SCANOGRAM")
# so many views are scouts where their description says so
_SCOUT_VIEWS = 3
# the cosine between the normals of a scout and of the slices that were planned on it
_ACROSS = 0.5
# directions of one stack
_NEAR_COSINE = 0.02
_PHOTOMETRIC = {
    1: ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"),
    3: ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_PARTIAL_422", "YBR_ICT", "YBR_RCT"),
}


@dataclass
class Sorted:
    """What DICOM files are together: X-rays, volumes, and (file, reason, whether that is a fault) of all others."""

    xrays: list[DicomHeader] = field(default_factory=list)
    stacks: list[Stack] = field(default_factory=list)
    left_out: list[tuple[Path, str, bool]] = field(default_factory=list)

    def leave(self, slices: Iterable[DicomSlice | DicomHeader], reason: str, fault: bool = True) -> None:
        """Leave out the files of slices, each once."""
        headers = [one.header if isinstance(one, DicomSlice) else one for one in slices]
        self.left_out += [(path, reason, fault) for path in dict.fromkeys(Path(header.path) for header in headers)]


def is_ct(header: DicomHeader) -> bool:
    """Whether a file is CT by its modality or its class."""
    return header.modality == "CT" or header.sop_class in CT_CLASSES


def sort_headers(headers: Sequence[DicomHeader], assume_hu: bool = False) -> Sorted:
    """Sort files into X-rays, volumes and what is left out.

    Args:
        headers: of any files.
        assume_hu: take slices without RescaleSlope and RescaleIntercept for Hounsfield units.

    Returns:
        X-rays and volumes in the order of the files; of each file that is in neither, why.
    """
    result = Sorted()
    slices: list[DicomSlice] = []
    nowhere: list[DicomHeader] = []
    for header in headers:
        if reason := _other(header):
            result.leave([header], reason, fault=False)
        elif reason := _not_read(header):
            result.leave([header], reason)
        elif is_ct(header):
            try:
                slices += file_slices(header)
            except DataError as error:
                result.leave([header], str(error))
                nowhere.append(header)
        else:
            result.xrays.append(header)
    groups = _groups(slices)
    for group in groups:
        if across := _lies_across(group, groups):
            reason = f"is a scout view by its geometry (it lies across {across} slices of its study)"
            result.leave(group, f"{reason}, no slice of the series", fault=False)
        elif lost := _without_place(group, nowhere):
            count = len({one.header.path for one in group}) + lost
            result.leave(
                group,
                f"{lost} of the {count} files of its series lack ImagePositionPatient, ImageOrientationPatient or "
                "PixelSpacing, so their places are unknown. Export the original series",
            )
        else:
            _add_stacks(group, result, assume_hu)
    order = {Path(header.path): place for place, header in enumerate(headers)}
    result.stacks = _with_siblings(result.stacks)
    result.stacks.sort(key=lambda stack: min(order[file] for file in stack.files))
    result.left_out.sort(key=lambda pair: order[pair[0]])
    return result


def _with_siblings(stacks: Sequence[Stack]) -> list[Stack]:
    """Stacks that warn of others in their series, which a reader of one might not expect."""
    series: dict[tuple[str, str], list[Stack]] = {}
    for stack in stacks:
        series.setdefault((stack.header.study, stack.header.series), []).append(stack)
    told = []
    for stack in stacks:
        others = [other for other in series[stack.header.study, stack.header.series] if other is not stack]
        named = "; ".join(other.described for other in others[:4])
        warning = f"The series holds {len(others) + 1} stacks; besides this one: {named}."
        told.append(replace(stack, warnings=(*stack.warnings, warning)) if others and stack.header.series else stack)
    return told


def _other(header: DicomHeader) -> str:
    """What a file is that is neither an X-ray nor a CT slice by its nature; empty where it may be one."""
    if "DirectoryRecordSequence" in header.dataset:
        return "holds a directory of DICOM files (DICOMDIR); the files that it lists are read themselves"
    if not is_ct(header) and (modality := modality_of(header)) not in XRAYS:
        return f"is DICOM of modality {modality_words(modality)}. Give a chest X-ray (CR, DX) or a CT"
    words = set(header.image_type) & set(_SCOUTS)
    return f"is a scout view ({min(words)}), no slice of the series" if words and header.pixels else ""


def _not_read(header: DicomHeader) -> str:
    """Why a file that may be an X-ray or a CT slice is not read; empty where it is."""
    if fault := pixel_fault(header):
        return fault
    if not is_ct(header):
        if header.frames > 1:
            return f"holds {header.frames} frames, a film or loop. Export one X-ray frame"
        if header.photometric not in _PHOTOMETRIC[header.samples]:
            named = header.photometric or "missing"
            return f"its PhotometricInterpretation is {named}, so what is black is unknown. Export it again"
        return transform_fault(header)
    if header.samples > 1 or header.photometric == "PALETTE COLOR":
        return "holds colours, as a screen capture or dose report, and not CT slices. Give the original grey series"
    return ""


def _groups(slices: Iterable[DicomSlice]) -> list[list[DicomSlice]]:
    """Slices of one patient, study, series, size and direction."""
    buckets: dict[tuple[Any, ...], list[DicomSlice]] = {}
    for one in slices:
        header = one.header
        place = "" if header.series else str(Path(header.path).parent)
        names = (header.text("PatientID"), header.study, header.series)
        buckets.setdefault((*names, header.rows, header.columns, place), []).append(one)
    _join_nameless(buckets)
    alike = [group for bucket in buckets.values() for group in _of_one_direction(bucket)]
    return [part for group in alike for part in _by_folder(group)]


def _join_nameless(buckets: dict[tuple[Any, ...], list[DicomSlice]]) -> None:
    """Bring slices that lack a name (patient, study or series) to the only others that they can belong to."""

    def places(key: tuple[Any, ...]) -> set[tuple[float, ...]]:
        return {tuple(np.round(one.position / SAME_MM)) for one in buckets[key]}

    for key in [key for key in buckets if not all(key[:3])]:
        others = [
            other
            for other in buckets
            if other != key
            and other[3:5] == key[3:5]
            and all(mine in ("", yours) for mine, yours in zip(key[:3], other[:3], strict=True))
            and (key[2] or key[5] in (other[5], *(str(Path(one.header.path).parent) for one in buckets[other])))
        ]
        if len(others) == 1 and not places(key) & places(others[0]):
            buckets[others[0]] += buckets.pop(key)


def _of_one_direction(slices: Iterable[DicomSlice]) -> list[list[DicomSlice]]:
    """Slices of one pixel size, each near another one in direction; `make_stack` judges how far they stray in all."""
    groups: list[tuple[list[DicomSlice], list[DicomSlice]]] = []
    for one in slices:
        near = []
        for group in groups:
            apart = [np.abs(one.orientation - other.orientation).max() for other in group[1]]
            if min(apart) < _NEAR_COSINE and np.allclose(one.spacing, group[0][0].spacing, rtol=1e-3):
                near.append(group)
                if min(apart) > SAME_COSINE:
                    group[1].append(one)
        if not near:
            groups.append(([one], [one]))
            continue
        near[0][0].append(one)
        for members, directions in near[1:]:
            near[0][0].extend(members)
            near[0][1].extend(directions)
            groups = [group for group in groups if group[0] is not members]
    return [members for members, _ in groups]


def _by_folder(group: list[DicomSlice]) -> list[list[DicomSlice]]:
    """Slices of each folder, and frames of each file, by themselves unless they make one stack together.

    Copies of one export keep its UIDs, so that these do not say that folders belong together; folders of one slice each
    say nothing.
    """
    parts: dict[Path, list[DicomSlice]] = {}
    for one in group:
        path = Path(one.header.path)
        parts.setdefault(path if one.header.frames > 1 else path.parent, []).append(one)
    if len(parts) in (1, len(group)):
        return [group]
    places = at_places(in_order(group))
    if len(places) < len(group):
        return list(parts.values())
    along = offsets([place[0] for place in places])
    apart = np.diff(along).max() > MAX_GAP_MM or interleaved([in_order(part) for part in parts.values()])
    return list(parts.values()) if apart and not is_even(along) else [group]


def _scout_word(group: list[DicomSlice]) -> str:
    described = group[0].header.text("SeriesDescription").upper()
    return next((word for word in _SCOUTS if word in described), "")


def _lies_across(group: list[DicomSlice], groups: list[list[DicomSlice]]) -> int:
    """How many slices of its study's largest stack a view or two lie across; 0 where they do not."""
    if len(group) > _SCOUT_VIEWS or _scout_word(group):
        return 0
    header = group[0].header
    sizes = [
        len(other)
        for other in groups
        if (other[0].header.study, other[0].header.text("PatientID")) == (header.study, header.text("PatientID"))
        and abs(float(other[0].normal @ group[0].normal)) < _ACROSS
    ]
    return max((size for size in sizes if size > _SCOUT_VIEWS), default=0)


def _without_place(group: list[DicomSlice], nowhere: Iterable[DicomHeader]) -> int:
    """How many files of a stack's own series and size say nothing of their place; derived ones may be captures."""
    first = group[0].header
    alike = (
        header
        for header in nowhere
        if (header.study, header.series, header.rows, header.columns)
        == (first.study, first.series, first.rows, first.columns)
    )
    return sum("DERIVED" not in header.image_type and header.sop_class != _CAPTURE for header in alike)


def _add_stacks(group: list[DicomSlice], result: Sorted, assume_hu: bool) -> None:
    """Sort one group's slices into stacks, or leave them out."""
    scout = _scout_word(group)
    if len(group) == 1 or (scout and len(group) <= _SCOUT_VIEWS):
        result.leave(group, f"is a scout view ({scout})" if scout else ONE_SLICE, fault=not scout)
        return
    faults = {one.header.path: fault for one in group if (fault := transform_fault(one.header, one.frame))}
    if faults:
        count = len({one.header.path for one in group})
        result.leave(group, f"in {len(faults)} of the {count} files of its series, {next(iter(faults.values()))}")
        return
    if not assume_hu and (bare := [one for one in group if not has_rescale(one)]):
        count = len({one.header.path for one in bare})
        result.leave(
            group,
            f"the series holds stored values, not Hounsfield units: RescaleSlope and RescaleIntercept are missing in "
            f"{count} of its {len({one.header.path for one in group})} files. Export it again, or give --assume_hu",
        )
        return
    try:
        parts, doubles = split_phases(in_order(group))
        stacks = [make_stack(part, label, [] if number else doubles) for number, (label, part) in enumerate(parts)]
        files = [file for stack in stacks for file in stack.files]
        if len(set(files)) < len(files):
            # an item is its files, which cannot say which of their frames are meant
            named = "; ".join(stack.described for stack in stacks[:4])
            raise DataError(f"holds {len(stacks)} volumes in one file ({named}). Export each to files of its own")
    except DataError as error:
        if tracking := tracking_of(in_order(group)):
            reason = "repeats one place of the scan, as bolus tracking does, and is no slice of the series"
            result.leave(tracking, reason, fault=False)
            kept = set(map(id, tracking))
            _add_stacks([one for one in group if id(one) not in kept], result, assume_hu)
        else:
            result.leave(group, str(error))
        return
    result.stacks += stacks
    dropped = [one for one in doubles if Path(one.header.path) not in files]
    result.leave(dropped, "is the same slice as another file (position and pixels)", fault=False)
