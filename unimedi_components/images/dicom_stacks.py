# SPDX-License-Identifier: Apache-2.0
"""CT slices as DICOM files hold them, and stacks of them: places, steps, gaps, tilt, and the affine of the volume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from unimedi_components.errors import DataError
from unimedi_components.images.headers import DicomHeader, functional_group, numbers_of, values_of

__all__ = [
    "MAX_GAP_MM",
    "ONE_SLICE",
    "SAME_COSINE",
    "DicomSlice",
    "Stack",
    "file_slices",
    "has_rescale",
    "is_even",
    "make_stack",
    "offsets",
]

#: Why a slice alone is left out.
ONE_SLICE = "is one CT slice. Give all files of its series, or its folder"

# steps that stray further than both from even ones are uneven: positions are often rounded to a tenth of a millimetre
_UNEVEN_MM, _UNEVEN_SHARE = 0.11, 0.02
#: Directions that differ by less are one; slices of one stack may stray by `_STRAY_COSINE`.
SAME_COSINE = 1e-3
_STRAY_COSINE = 0.02
# a larger block without slices is not filled
MAX_GAP_MM = 30.0


@dataclass(frozen=True)
class DicomSlice:
    """One slice: a file of one frame, or one frame of a file.

    Args:
        header: of the file.
        frame: index in the file.
        position: centre of the first voxel in mm, LPS.
        orientation: directions of rows and of columns, (6,).
        spacing: mm between rows and between columns.
    """

    header: DicomHeader
    frame: int
    position: np.ndarray
    orientation: np.ndarray
    spacing: tuple[float, float]

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.orientation[:3], self.orientation[3:])

    def value(self, name: str) -> str:
        """An element by its keyword, in the frame's functional groups or in the header; empty where it is missing."""
        for group in values_of(self.header.dataset, "PerFrameFunctionalGroupsSequence")[self.frame : self.frame + 1]:
            for element in group:
                if element.VR == "SQ" and element.value and (values := values_of(element.value[0], name)):
                    return "\\".join(map(str, values))
        return self.header.text(name)


@dataclass(frozen=True)
class Stack:
    """Slices of one volume along their normal, from the feet where they are axial.

    Args:
        slices: in the order of their places.
        places: (N,) mm along the normal from the first one.
        label: what tells this stack from others of its series, such as "AcquisitionNumber 2".
        warnings: gaps, doubles, tilt.
        doubles: files of slices that were dropped because they come twice.
    """

    slices: tuple[DicomSlice, ...]
    places: np.ndarray
    label: str = ""
    warnings: tuple[str, ...] = ()
    doubles: tuple[Path, ...] = ()

    @property
    def header(self) -> DicomHeader:
        return self.slices[0].header

    @property
    def files(self) -> list[Path]:
        """The files in the order of their first slices."""
        return list(dict.fromkeys(one.header.path for one in self.slices))

    @property
    def is_even(self) -> bool:
        return is_even(self.places)

    @property
    def even_places(self) -> np.ndarray:
        """Places of slices in even steps from the first slice to the last; the slices' own where they are even."""
        extent, steps = float(self.places[-1]), np.diff(self.places)
        if self.is_even or steps.max() < 1.5 * steps.min():
            return np.linspace(0, extent, len(self.places))
        # the fine part keeps its step; a stray pair of slices does not decide
        step = max(float(np.percentile(steps, 5)), extent / (4 * len(self.places)))
        return np.linspace(0, extent, round(extent / step) + 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Columns, rows and slices, in even steps."""
        return self.header.columns, self.header.rows, len(self.even_places)

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) voxel (column, row, slice) to mm, RAS; sheared where the gantry was tilted."""
        first, last = self.slices[0], self.slices[-1]
        affine = np.eye(4)
        affine[:3, 0] = first.orientation[:3] * first.spacing[1]
        affine[:3, 1] = first.orientation[3:] * first.spacing[0]
        affine[:3, 2] = (last.position - first.position) / (len(self.even_places) - 1)
        affine[:3, 3] = first.position
        return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine

    @property
    def described(self) -> str:
        """The stack in a few words."""
        first = self.header
        label = f" ({self.label})" if self.label else ""
        return f"{len(self.slices)} slices of {first.columns} x {first.rows}{label}"


def file_slices(header: DicomHeader) -> list[DicomSlice]:
    """The slices of a CT file, one a frame.

    Raises:
        DataError: position, orientation or pixel spacing is missing; the message does not name the file.
    """
    each = values_of(header.dataset, "PerFrameFunctionalGroupsSequence")
    if each and len(each) < header.frames:
        raise DataError(f"describes {len(each)} of its {header.frames} frames. Export the series again")
    if header.frames == 1 or each:
        return [_frame(header, number) for number in range(header.frames)]
    first = _frame(header, 0)
    places = header.numbers("GridFrameOffsetVector")
    step = (header.numbers("SpacingBetweenSlices") or (0.0,))[0]
    if step and places is None:
        places = tuple(step * number for number in range(header.frames))
    if places is None or len(places) != header.frames:
        raise DataError(
            f"holds {header.frames} frames without positions (ImagePositionPatient of each frame), so their order and "
            "spacing are unknown. Export the original series"
        )
    return [replace(first, frame=n, position=first.position + first.normal * place) for n, place in enumerate(places)]


def _frame(header: DicomHeader, number: int) -> DicomSlice:
    wanted = {
        "ImagePositionPatient": ("PlanePositionSequence", header.position, 3),
        "ImageOrientationPatient": ("PlaneOrientationSequence", header.orientation, 6),
        "PixelSpacing": ("PixelMeasuresSequence", header.pixel_spacing, 2),
    }
    values = []
    for name, (sequence, plain, count) in wanted.items():
        group = functional_group(header, sequence, number)
        numbers = (numbers_of(group, name) if group is not None else None) or plain
        if numbers is None or len(numbers) != count:
            said = f"has {name} that is not {count} numbers" if header.text(name) else f"lacks {name}"
            raise DataError(f"{said}, so the place and size of its slices are unknown. Export the original series")
        values.append(np.asarray(numbers, float))
    position, orientation, spacing = values
    cosines = np.linalg.norm(orientation.reshape(2, 3), axis=1)
    if np.abs(cosines - 1).max() > 0.01 or abs(float(orientation[:3] @ orientation[3:])) > 0.01 or spacing.min() <= 0:
        raise DataError("has an ImageOrientationPatient or PixelSpacing that is no geometry. Export it again")
    return DicomSlice(header, number, position, orientation, (float(spacing[0]), float(spacing[1])))


def has_rescale(one: DicomSlice) -> bool:
    group = functional_group(one.header, "PixelValueTransformationSequence", one.frame)
    dataset = one.header.dataset if group is None else group
    both = all(numbers_of(dataset, name) is not None for name in ("RescaleSlope", "RescaleIntercept"))
    return both or bool(values_of(one.header.dataset, "ModalityLUTSequence"))


def offsets(slices: Sequence[DicomSlice]) -> np.ndarray:
    positions = np.asarray([one.position for one in slices])
    return (positions - positions[0]) @ slices[0].normal


def is_even(places: np.ndarray) -> bool:
    if len(places) < 3:
        return True
    even = np.linspace(places[0], places[-1], len(places))
    limit = max(_UNEVEN_MM, _UNEVEN_SHARE * float(even[1] - even[0]))
    return bool(np.abs(places - even).max() <= limit)


def make_stack(slices: list[DicomSlice], label: str, doubles: Sequence[DicomSlice]) -> Stack:
    """Slices in order as a volume.

    Raises:
        DataError: there is one alone, they lie beside each other or in several directions, or a block of them is
            missing.
    """
    if len(slices) == 1:
        raise DataError(ONE_SLICE)
    slices, warnings = _parallel(slices)
    places = offsets(slices)
    positions = np.asarray([one.position for one in slices])
    line = positions[0] + np.outer(places / places[-1], positions[-1] - positions[0])
    stray = float(
        np.linalg.norm(
            positions - line - np.outer((positions - line) @ slices[0].normal, slices[0].normal), axis=1
        ).max()
    )
    if stray > max(0.5, 0.5 * min(slices[0].spacing)):
        raise DataError(f"the slices lie up to {stray:.3g} mm beside the line of the stack. Export one series alone")
    steps = np.diff(places)
    usual = float(np.median(steps))
    if not is_even(places):
        gaps = steps[steps > 1.5 * usual]
        if len(gaps) and gaps.max() > max(MAX_GAP_MM, 2.5 * usual):
            raise DataError(
                f"slices are missing: a block of {gaps.max():.4g} mm where steps of {usual:.4g} mm are usual. "
                "Export the whole series"
            )
        target = Stack(tuple(slices), places).even_places
        resampled = f"resampled to {len(target)} slices in even steps of {target[1]:.4g} mm"
        if 0 < len(gaps) <= len(steps) / 4 and steps.min() > 0.7 * usual:
            warnings.append(
                f"Slices seem to be missing: {len(gaps)} gap(s) of up to {gaps.max():.4g} mm where {usual:.4g} mm is "
                f"usual; {resampled}."
            )
        else:
            warnings.append(f"Slices lie in uneven steps of {steps.min():.4g} to {steps.max():.4g} mm; {resampled}.")
    direction = (positions[-1] - positions[0]) / np.linalg.norm(positions[-1] - positions[0])
    tilt = math.degrees(math.acos(min(1.0, float(direction @ slices[0].normal))))
    if tilt > 0.1:
        warnings.append(f"The gantry was tilted by {tilt:.3g} degrees; the network sees the volume upright.")
    if doubles:
        warnings.append(f"{len(doubles)} slice(s) are the same as another and were dropped.")
    files = tuple(dict.fromkeys(Path(one.header.path) for one in doubles))
    return Stack(tuple(slices), places, label, tuple(warnings), files)


def _parallel(slices: list[DicomSlice]) -> tuple[list[DicomSlice], list[str]]:
    """Slices in the mean of their directions, in the order of their places, and a warning where that turns them."""
    directions = np.asarray([one.orientation for one in slices])
    apart = float(np.abs(directions - directions[0]).max())
    if apart <= SAME_COSINE:
        return slices, []
    degrees = math.degrees(apart)
    if apart > _STRAY_COSINE:
        raise DataError(
            f"the slices lie in directions up to {degrees:.2g} degrees apart and are no one stack. Export each stack "
            "as a series of its own"
        )
    rows, columns = directions.mean(axis=0).reshape(2, 3)
    rows = rows / np.linalg.norm(rows)
    columns = columns - (columns @ rows) * rows
    mean = np.concatenate([rows, columns / np.linalg.norm(columns)])
    turned = [replace(one, orientation=mean) for one in slices]
    turned.sort(key=lambda one: float(one.position @ one.normal))
    return turned, [f"The directions of slices differ by up to {degrees:.2g} degrees; their mean is taken."]
