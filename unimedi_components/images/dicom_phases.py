# SPDX-License-Identifier: Apache-2.0
"""Slices that lie in one direction as the stacks that they are: phases, reconstructions, doubles told apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from unimedi_components.errors import DataError
from unimedi_components.images.dicom import modality_values
from unimedi_components.images.dicom_stacks import DicomSlice, is_even, offsets
from unimedi_components.images.headers import numbers_of

__all__ = ["SAME_MM", "at_places", "in_order", "interleaved", "split_phases", "tracking_of"]

#: Places along the normal that are nearer are one.
SAME_MM = 0.01
# slices of one even stack never differ in these
_OTHER_TAGS = (
    *("TemporalPositionIdentifier", "TemporalPositionIndex", "StackID", "NominalPercentageOfCardiacPhase"),
    *("ConvolutionKernel", "ReconstructionDiameter", "FrameOfReferenceUID"),
)
# what tells phases or reconstructions in one series apart, in the order of trust
_PHASE_TAGS = (
    *("AcquisitionNumber", *_OTHER_TAGS, "TriggerTime", "NominalCardiacTriggerDelayTime", "SeriesNumber"),
    *("AcquisitionUID", "IrradiationEventUID"),
    *("ImageType", "SliceThickness", "KVP", "ContrastBolusAgent"),
    *("SeriesDescription", "ProtocolName", "SeriesTime", "AcquisitionTime"),
    *("AcquisitionDateTime", "ContentTime", "InstanceCreationTime", "EchoNumbers", "ImageComments"),
)
_TIMES = ("TriggerTime", "AcquisitionTime", "AcquisitionDateTime", "FrameAcquisitionDateTime", "ContentTime")
_GIVE_ONE = "Export each as a series of its own, or give the files of one alone"


def in_order(slices: Iterable[DicomSlice]) -> list[DicomSlice]:
    slices = list(slices)
    normal = slices[0].normal
    return sorted(slices, key=lambda one: float(one.position @ normal))


def at_places(slices: Sequence[DicomSlice]) -> list[list[DicomSlice]]:
    """Sorted slices, those of one place along the normal together."""
    normal = slices[0].normal
    places: list[list[DicomSlice]] = []
    for one in slices:
        if places and float((one.position - places[-1][0].position) @ normal) < SAME_MM:
            places[-1].append(one)
        else:
            places.append([one])
    return places


def split_phases(group: list[DicomSlice]) -> tuple[list[tuple[str, list[DicomSlice]]], list[DicomSlice]]:
    """Slices as stacks without a place twice: (label, slices) each, and the identical doubles that were dropped.

    Raises:
        DataError: places come twice, or slices lie between each other's, and no element tells the stacks apart.
    """
    places = at_places(group)
    single = None
    if len(places) < len(group):
        single, doubles = _without_doubles(places)
        if single is not None:
            return [("", single)], doubles
    elif through := _running_through(group):
        return through, []
    elif is_even(offsets(group)) or len(group) < 6:
        return [("", group)], []
    for label, parts in _partitions(group):
        cleaned, doubles = [], []
        for part in parts:
            single, dropped = _without_doubles(at_places(part))
            if single is None or len(single) < 2:
                break
            cleaned.append(single)
            doubles += dropped
        else:
            if len(places) == len(group) and not interleaved(cleaned):
                continue
            return [(name, part) for name, part in zip(label, cleaned, strict=True)], doubles
    if len(places) == len(group):
        return [("", group)], []
    if len(places) == 1:
        raise DataError(
            f"all {len(group)} slices lie at one place, as in bolus tracking, and make no volume. Export the whole scan"
        )
    counts = sorted({len(place) for place in places})
    raise DataError(
        f"the series holds several stacks: {len(places)} places with {' or '.join(map(str, counts))} slices at "
        f"each, as of several phases or reconstructions, and no element tells them apart. {_GIVE_ONE}"
    )


def tracking_of(group: list[DicomSlice]) -> list[DicomSlice]:
    """Slices that an element tells from an even stack and that all lie at one place, as bolus tracking does."""
    for _, _, parts in _by_tags(group):
        stack = max(parts, key=len)
        rest = in_order(one for part in parts if part is not stack for one in part)
        if 3 < len(at_places(stack)) == len(stack) and is_even(offsets(stack)) and len(at_places(rest)) == 1:
            return rest
    return []


def _running_through(group: list[DicomSlice]) -> list[tuple[str, list[DicomSlice]]]:
    """Even stacks whose slices lie between each other's, as of two acquisitions half a step apart; empty where not so.

    Raises:
        DataError: only the order of InstanceNumber tells them apart.
    """
    thickness = numbers_of(group[0].header.dataset, "SliceThickness") or (0.0,)
    thick = thickness[0] > 1.5 * float(np.median(np.diff(offsets(group))))
    one_pass, telling = _rising(group), ("AcquisitionNumber", *_OTHER_TAGS)
    for name, labels, parts in _by_tags(group, telling if one_pass else _PHASE_TAGS):
        # what some slices lack says nothing
        named = name in telling and all(part[0].value(name) for part in parts)
        several = not one_pass and all(map(_rising, parts))
        if (several or (named and (thick or name in _OTHER_TAGS))) and interleaved(parts):
            return list(zip(labels, parts, strict=True))
    normal = group[0].normal
    for name in (*_TIMES, "InstanceNumber"):
        if group[0].value(name) == group[1].value(name):
            continue
        values = {id(one): _natural(one.value(name)) for one in group}
        if len(set(values.values())) < len(group):
            continue
        ordered = sorted(group, key=lambda one: values[id(one)])
        steps = np.sign(np.diff([float(one.position @ normal) for one in ordered]))
        # passes in one direction, or there and back
        for cuts in (np.flatnonzero(steps != np.sign(steps.sum())) + 1, np.asarray([len(group) // 2])):
            bounds = [0, *cuts.tolist(), len(group)]
            passes = [in_order(ordered[start:end]) for start, end in pairwise(bounds)]
            if len(passes) < 2 or not interleaved(passes):
                continue
            if name != "InstanceNumber":
                return list(zip(_labels(name, [str(n) for n in range(len(passes))]), passes, strict=True))
            counts = " and ".join(str(len(one)) for one in passes)
            raise DataError(
                f"the series holds several stacks: {counts} slices that lie between each other's, one stack after the "
                f"other by InstanceNumber, and no other element tells them apart. {_GIVE_ONE}"
            )
    return []


def _without_doubles(places: Sequence[Sequence[DicomSlice]]) -> tuple[list[DicomSlice] | None, list[DicomSlice]]:
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
    if np.abs(one.position - other.position).max() > 10 * SAME_MM:
        return False
    return np.array_equal(*(modality_values(each.header).values[each.frame] for each in (one, other)))


def _rising(slices: Sequence[DicomSlice]) -> bool:
    """Whether InstanceNumber goes one way along the places."""
    numbers = [_natural(one.value("InstanceNumber"))[0] for one in slices]
    return all(a < b for a, b in pairwise(numbers)) or all(a > b for a, b in pairwise(numbers))


def _by_tags(
    group: list[DicomSlice], names: Sequence[str] = _PHASE_TAGS
) -> list[tuple[str, list[str], list[list[DicomSlice]]]]:
    """Ways to split a group by one element, those of fewest parts first: the element, labels and parts."""
    found = []
    for name in names:
        parts: dict[str, list[DicomSlice]] = {}
        for one in group:
            parts.setdefault(one.value(name), []).append(one)
        if 1 < len(parts) <= len(group) // 2:
            labels = sorted(parts, key=_natural)
            found.append((name, _labels(name, labels), [parts[label] for label in labels]))
    return sorted(found, key=lambda way: len(way[1]))


def _partitions(group: list[DicomSlice]) -> Iterable[tuple[list[str], list[list[DicomSlice]]]]:
    """Ways to split a group by one element, or by the times of its slices: labels and parts."""
    yield from ((labels, parts) for _, labels, parts in _by_tags(group))
    yield from _by_time(group)


def _by_time(group: list[DicomSlice]) -> Iterable[tuple[list[str], list[list[DicomSlice]]]]:
    """Phases whose slices each have a time of their own, one phase after the other."""
    places = at_places(group)
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


def interleaved(parts: Sequence[Sequence[DicomSlice]]) -> bool:
    """Whether even stacks run through each other, rather than one after the other."""
    normal = parts[0][0].normal
    spans = sorted((float(part[0].position @ normal), float(part[-1].position @ normal)) for part in parts)
    inside = all(after[0] < before[1] for before, after in pairwise(spans))
    return inside and all(len(part) > 2 and is_even(offsets(part)) for part in parts)
