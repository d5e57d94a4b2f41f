# SPDX-License-Identifier: Apache-2.0
"""DICOM files as what they are together: X-rays, stacks of CT slices, and what is left out with its reason.

A series is not a volume: one series UID may hold two films, a scout beside its slices, several phases, or slices twice,
and details such as the thickness may change inside one stack. Slices belong together by geometry: study, series, size,
direction, and places along the normal, as in ITK and dicom2nifti.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from unimedi_components.errors import DataError
from unimedi_components.images.dicom import modality_values, pixel_fault
from unimedi_components.images.dicom_stacks import (
    MAX_GAP_MM,
    ONE_SLICE,
    DicomSlice,
    Stack,
    file_slices,
    has_rescale,
    is_even,
    make_stack,
    offsets,
)
from unimedi_components.images.headers import DicomHeader
from unimedi_components.images.xray_checks import CT_CLASSES, XRAYS, modality_words

__all__ = ["Sorted", "is_ct", "sort_headers"]

_SCOUTS = ("LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW", "SCANOGRAM")
# so many views are scouts where their description says so
_SCOUT_VIEWS = 3
# one place along the normal, and one direction
_SAME_MM, _SAME_COSINE = 0.01, 1e-3
# what tells phases or reconstructions in one series apart, in the order of trust
_PHASE_TAGS = (
    *("AcquisitionNumber", "TemporalPositionIdentifier", "TemporalPositionIndex", "StackID"),
    *("NominalPercentageOfCardiacPhase", "TriggerTime", "NominalCardiacTriggerDelayTime", "SeriesNumber"),
    *("ConvolutionKernel", "ReconstructionDiameter", "ImageType", "SliceThickness", "KVP", "ContrastBolusAgent"),
    *("SeriesDescription", "ProtocolName", "FrameOfReferenceUID", "SeriesTime", "AcquisitionTime"),
    *("AcquisitionDateTime", "ContentTime", "InstanceCreationTime", "EchoNumbers", "ImageComments"),
)
_TIMES = ("TriggerTime", "AcquisitionTime", "AcquisitionDateTime", "FrameAcquisitionDateTime", "ContentTime")


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
        else:
            result.xrays.append(header)
    for group in _groups(slices):
        _add_stacks(group, result, assume_hu)
    order = {Path(header.path): place for place, header in enumerate(headers)}
    result.stacks.sort(key=lambda stack: min(order[file] for file in stack.files))
    result.left_out.sort(key=lambda pair: order[pair[0]])
    return result


def _other(header: DicomHeader) -> str:
    """What a file is that is neither an X-ray nor a CT slice by its nature; empty where it may be one."""
    if "DirectoryRecordSequence" in header.dataset:
        return "is a directory of DICOM files (DICOMDIR); the files that it lists are read themselves"
    if not is_ct(header) and header.modality not in XRAYS:
        return f"is DICOM of modality {modality_words(header.modality)}. Give a chest X-ray (CR, DX) or a CT"
    words = set(header.image_type) & set(_SCOUTS)
    return f"is a scout view ({min(words)}), no slice of the series" if words and header.pixels else ""


def _not_read(header: DicomHeader) -> str:
    """Why a file that may be an X-ray or a CT slice is not read; empty where it is."""
    if fault := pixel_fault(header):
        return fault
    if not is_ct(header):
        return "" if header.frames == 1 else f"holds {header.frames} frames, a film or loop. Export one X-ray frame"
    if header.samples > 1:
        return "holds colours, as a screen capture or dose report, and not CT slices. Give the original grey series"
    return ""


def _groups(slices: Iterable[DicomSlice]) -> list[list[DicomSlice]]:
    """Slices of one patient, study, series, size and direction."""
    buckets: dict[tuple[Any, ...], list[list[DicomSlice]]] = {}
    for one in slices:
        header = one.header
        series = header.series or f"in {Path(header.path).parent}"
        patient = header.text("PatientID")
        alike = buckets.setdefault((patient, header.study, series, header.rows, header.columns), [])
        for group in alike:
            other = group[0]
            same = np.abs(one.orientation - other.orientation).max() < _SAME_COSINE
            if same and np.allclose(one.spacing, other.spacing, rtol=1e-3):
                group.append(one)
                break
        else:
            alike.append([one])
    return [part for alike in buckets.values() for group in alike for part in _by_folder(group)]


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
    places = _at_places(_sorted(group))
    if len(places) < len(group):
        return list(parts.values())
    along = offsets([place[0] for place in places])
    apart = np.diff(along).max() > MAX_GAP_MM or _interleaved([_sorted(part) for part in parts.values()])
    return list(parts.values()) if apart and not is_even(along) else [group]


def _add_stacks(group: list[DicomSlice], result: Sorted, assume_hu: bool) -> None:
    """Sort one group's slices into stacks, or leave them out."""
    described = group[0].header.text("SeriesDescription").upper()
    scout = next((word for word in _SCOUTS if word in described), "")
    if len(group) == 1 or (scout and len(group) <= _SCOUT_VIEWS):
        result.leave(group, f"is a scout view ({scout})" if scout else ONE_SLICE, fault=not scout)
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
        parts, doubles = _parts(_sorted(group))
        stacks = [make_stack(part, label, [] if number else doubles) for number, (label, part) in enumerate(parts)]
        files = [file for stack in stacks for file in stack.files]
        if len(set(files)) < len(files):
            # an item is its files, which cannot say which of their frames are meant
            named = "; ".join(stack.described for stack in stacks[:4])
            raise DataError(f"holds {len(stacks)} volumes in one file ({named}). Export each to files of its own")
    except DataError as error:
        result.leave(group, str(error))
        return
    result.stacks += stacks
    dropped = [one for one in doubles if Path(one.header.path) not in files]
    result.leave(dropped, "is the same slice as another file (position and pixels)", fault=False)


def _sorted(slices: Iterable[DicomSlice]) -> list[DicomSlice]:
    slices = list(slices)
    normal = slices[0].normal
    return sorted(slices, key=lambda one: float(one.position @ normal))


def _at_places(slices: Sequence[DicomSlice]) -> list[list[DicomSlice]]:
    """Sorted slices, those of one place along the normal together."""
    normal = slices[0].normal
    places: list[list[DicomSlice]] = []
    for one in slices:
        if places and float((one.position - places[-1][0].position) @ normal) < _SAME_MM:
            places[-1].append(one)
        else:
            places.append([one])
    return places


def _parts(group: list[DicomSlice]) -> tuple[list[tuple[str, list[DicomSlice]]], list[DicomSlice]]:
    """Slices as stacks without a place twice: (label, slices) each, and the identical doubles that were dropped.

    Raises:
        DataError: places come twice and no element tells the stacks apart.
    """
    places = _at_places(group)
    uneven = not is_even(offsets([place[0] for place in places]))
    if len(places) == len(group) and not (uneven and len(group) > 5):
        return [("", group)], []
    if len(places) < len(group):
        single, doubles = _without_doubles(places)
        if single is not None:
            return [("", single)], doubles
    for label, parts in _partitions(group):
        cleaned, doubles = [], []
        for part in parts:
            single, dropped = _without_doubles(_at_places(part))
            if single is None or len(single) < 2:
                break
            cleaned.append(single)
            doubles += dropped
        else:
            if len(places) == len(group) and not _interleaved(cleaned):
                continue
            return [(name, part) for name, part in zip(label, cleaned, strict=True)], doubles
    if len(places) == len(group):
        return [("", group)], []
    counts = sorted({len(place) for place in places})
    raise DataError(
        f"the series holds several stacks: {len(places)} places with {' or '.join(map(str, counts))} slices at "
        "each, as of several phases or reconstructions, and no element tells them apart. Give one of them alone"
    )


def _without_doubles(
    places: Sequence[Sequence[DicomSlice]],
) -> tuple[list[DicomSlice] | None, list[DicomSlice]]:
    """The first slice of each place, and its doubles; None where slices of one place differ."""
    kept, doubles = [], []
    for place in places:
        first, *others = place
        for other in others:
            if not _same_pixels(first, other):
                return None, []
            doubles.append(other)
        kept.append(first)
    return kept, doubles


def _same_pixels(one: DicomSlice, other: DicomSlice) -> bool:
    if np.abs(one.position - other.position).max() > 10 * _SAME_MM:
        return False
    return np.array_equal(*(modality_values(each.header).values[each.frame] for each in (one, other)))


def _partitions(group: list[DicomSlice]) -> Iterable[tuple[list[str], list[list[DicomSlice]]]]:
    """Ways to split a group by one element or folder, those of fewest parts first: labels and parts."""
    found = []
    for name in _PHASE_TAGS:
        parts: dict[str, list[DicomSlice]] = {}
        for one in group:
            parts.setdefault(one.value(name), []).append(one)
        if 1 < len(parts) <= len(group) // 2:
            labels = sorted(parts, key=_natural)
            found.append((_labels(name, labels), [parts[label] for label in labels]))
    found.sort(key=lambda pair: len(pair[0]))
    yield from found
    yield from _by_time(group)


def _by_time(group: list[DicomSlice]) -> Iterable[tuple[list[str], list[list[DicomSlice]]]]:
    """Phases whose slices each have a time of their own, one phase after the other."""
    places = _at_places(group)
    count = len(places[0])
    if count == 1 or any(len(place) != count for place in places):
        return
    for name in _TIMES:
        times = {id(one): one.value(name) for one in group}
        if not all(times.values()):
            continue
        ordered = [sorted(place, key=lambda one: _natural(times[id(one)])) for place in places]
        parts = [[place[number] for place in ordered] for number in range(count)]
        spans = [sorted(_natural(times[id(one)]) for one in part) for part in parts]
        if all(before[-1] < after[0] for before, after in pairwise(spans)):
            yield _labels(name, [str(number) for number in range(count)]), parts


def _labels(name: str, values: Sequence[str]) -> list[str]:
    """What stacks are called: no date, time or free text, which would tell who the patient is."""
    if name.endswith(("Time", "UID", "Description", "Name", "Comments")):
        return [f"{name}, phase {number} of {len(values)}" for number in range(1, len(values) + 1)]
    return [f"{name} {value or 'none'}" for value in values]


def _natural(text: str) -> tuple[float, str]:
    try:
        return float(text), ""
    except ValueError:
        return math.inf, text


def _interleaved(parts: Sequence[Sequence[DicomSlice]]) -> bool:
    """Whether even stacks run through each other, rather than one after the other."""
    normal = parts[0][0].normal
    spans = sorted((float(part[0].position @ normal), float(part[-1].position @ normal)) for part in parts)
    inside = all(after[0] < before[1] for before, after in pairwise(spans))
    return inside and all(len(part) > 2 and is_even(offsets(part)) for part in parts)
