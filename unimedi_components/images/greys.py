# SPDX-License-Identifier: Apache-2.0
"""Values of a film as greys in [0, 1]: through the VOI window or table of a DICOM file, or between robust ends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import numpy as np

from unimedi_components.arrays import Array
from unimedi_components.errors import DataError
from unimedi_components.images.dicom import DicomHeader, DicomValues, functional_group, lookup_table
from unimedi_components.images.headers import values_of

__all__ = ["FILM_VALUES", "dicom_greys", "robust_ends", "robust_greys"]


#: What a film's values become, for cards and pages.
FILM_VALUES = (
    "DICOM: modality transform, then the file's first VOI LUT or window, else its robust ends; padding is black; "
    "MONOCHROME1 and INVERSE are inverted. 8-bit pictures: value / 255. Deeper ones: their robust ends"
)

#: Share of the pixels at either end that cannot set black or white.
_SHARE = 0.005
# ends within this share of the range from the rest are the film's own
_NEAR = 0.15
# a film whose darkest value lies below this share of its brightest counts from 0
_FROM_ZERO = 0.1
# nothing lies between a film and a mark that is this share of the range away, which covers no more than this
_GAP, _MARKED = 0.75, 0.25
# a line of pixels along a side of the image that is white to this share is a border
_BORDER = 0.9
# fewer pixels have no tails
_FEW = 1024
# a window that clips more than this was not made for these values
_CLIPPED = 0.95


def robust_greys(values: Array, name: str, padding: Array | None = None, inverted: bool = False) -> tuple[Array, str]:
    """Bring values of any range to [0, 1] so that marks, borders and single pixels set neither black nor white.

    The ends are the 0.5th and 99.5th percentiles, or the very least and largest value where these lie within 15% of the
    range, unless that is the largest that its bits can hold. Values without any others near, and a white border along a
    side of the image, do not count. The lower end is
    0 where it lies between 0 and a tenth of the upper one, since a film's values count from 0. Images of fewer than
    1,024 pixels are taken from their least value, or 0, to their largest.

    Args:
        values: (H, W), numbers of any kind.
        name: of the file, for errors.
        padding: true where nothing was imaged, which does not count and becomes 0.
        inverted: whether the largest value is black.

    Returns:
        float32 (H, W) in [0, 1], and what was done.

    Raises:
        DataError: all pixels are of one value, or some are not finite.
    """
    low, high = robust_ends(values, name, padding, inverted)
    greys = np.clip((values.astype(np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    return _finish(greys, padding, inverted), f"{low:g} to {high:g}, the robust ends of its values"


def robust_ends(values: Array, name: str, padding: Array | None = None, inverted: bool = False) -> tuple[float, float]:
    """The values that `robust_greys`, with the same arguments, makes 0 and 1."""
    shown = values if padding is None else values[~padding]
    if not shown.size or not np.isfinite(shown).all() or shown.min() == shown.max():
        value = float(shown.min()) if shown.size else 0.0
        raise DataError(f"{name}: all pixels have the value {value:g}, or some are not finite; this is no X-ray")
    low, high = float(shown.min()), float(shown.max())
    if shown.size >= _FEW:
        shown = _without_marks(values, shown, padding, inverted)
        low, high = _ends(shown, inverted)
    # values count from 0, so that a dark film stays dark; negative ones have no zero to keep
    low = 0.0 if 0 <= low < _FROM_ZERO * high else low
    return low, high


def _ends(shown: Array, inverted: bool) -> tuple[float, float]:
    least, largest = float(shown.min()), float(shown.max())
    count = int(shown.size * _SHARE)
    ordered = np.partition(shown.ravel(), (count, shown.size - 1 - count))
    low, high = float(ordered[count]), float(ordered[shown.size - 1 - count])
    if high <= low:
        return least, largest
    near = _NEAR * (high - low)
    # white that saturates is a mark rather than the film's own
    saturated = not inverted and largest >= 255 and _all_ones(largest)
    return least if low - least <= near else low, largest if largest - high <= near and not saturated else high


def _all_ones(value: float) -> bool:
    """Whether a value is the largest that a number of bits can hold."""
    whole = int(value)
    return whole == value and whole > 0 and whole & (whole + 1) == 0


def _without_marks(values: Array, shown: Array, padding: Array | None, inverted: bool) -> Array:
    """What of the values counts: no white border, and nothing that stands alone far from all others."""
    white, rest = float(shown.min() if inverted else shown.max()), shown
    if white == 0 if inverted else _all_ones(white):
        covered = values == white if padding is None else (values == white) | padding
        if max(side.mean() for side in (covered[0], covered[-1], covered[:, 0], covered[:, -1])) >= _BORDER:
            rest = shown[shown != white]
    if rest.size < _FEW or rest.min() == rest.max():
        rest = shown
    least, largest = float(rest.min()), float(rest.max())
    # which of 256 equal parts of the range hold values, and the widest run of them without any
    parts = np.bincount(((rest - least) * (255 / (largest - least))).astype(np.uint8).ravel(), minlength=256)
    filled = np.flatnonzero(parts)
    widest = int(np.diff(filled).argmax())
    if filled[widest + 1] - filled[widest] <= _GAP * 256:
        return np.asarray(rest)
    upper = rest > least + (filled[widest] + 1) * (largest - least) / 255
    film, share = (rest[~upper], upper.mean()) if upper.mean() < 0.5 else (rest[upper], 1 - upper.mean())
    # a drawing of a few greys has gaps of its own
    several = len(np.unique(film[:: max(1, film.size // _FEW)])) > 2
    return np.asarray(film if share < _MARKED and several else rest)


def dicom_greys(header: DicomHeader, pixels: DicomValues) -> tuple[Array, list[str]]:
    """Bring one frame of grey modality values to what a radiologist's screen shows (PS3.3 C.11.2, C.11.6).

    Args:
        header: of the file.
        pixels: its values, one frame.

    Returns:
        float32 (H, W) in [0, 1], 0 black, padding 0, and a line for each thing that was done.

    Raises:
        DataError: see `robust_greys`.
    """
    values, padding = pixels.values[0], None if pixels.padding is None else pixels.padding[0]
    shape = header.text("PresentationLUTShape").upper()
    inverted = header.photometric == "MONOCHROME1" or shape == "INVERSE"
    notes = list(pixels.notes)
    voi, greys = functional_group(header, "FrameVOILUTSequence"), None
    for shown, said in _views(header, header.dataset if voi is None else voi, values):
        if shown is not None and _fits(shown, padding):
            greys = shown
            notes.append(said)
            break
        notes.append(f"the file's {said} {'cannot be read' if shown is None else 'does not fit its values'}, not used")
    plain = not pixels.notes and header.bits_stored <= 8 and not header.signed and values.dtype.kind == "f"
    shown = values if padding is None else values[~padding]
    if greys is not None:
        greys = _finish(greys, padding, inverted)
    elif plain and shown.size and shown.min() != shown.max():
        top = 2**header.bits_stored - 1
        greys = _finish(values / np.float32(top), padding, inverted)
        notes.append(f"value / {top}")
    else:
        greys, said = robust_greys(values, str(header.path), padding, inverted)
        notes.append(said)
    if inverted:
        notes.append(f"inverted ({'MONOCHROME1' if header.photometric == 'MONOCHROME1' else 'PresentationLUTShape'})")
    if padding is not None:
        notes.append(f"padding is black ({padding.mean():.1%} of the pixels)")
    return greys, notes


def _finish(greys: Array, padding: Array | None, inverted: bool) -> Array:
    greys = 1 - greys if inverted else greys
    if padding is not None:
        greys[padding] = 0
    return greys


def _fits(greys: Array, padding: Array | None) -> bool:
    shown = greys if padding is None else greys[~padding]
    clipped = np.count_nonzero((shown <= 0) | (shown >= 1)) / shown.size if shown.size else 1.0
    return bool(clipped <= _CLIPPED and shown.min() < shown.max())


def _views(header: DicomHeader, dataset: Any, values: Array) -> Iterator[tuple[Array | None, str]]:
    """Values through each VOI LUT, then each window, in [0, 1], None where it is damaged; and its name."""
    for item in values_of(dataset, "VOILUTSequence"):
        try:
            first, table, bits = lookup_table(header, item, "VOILUTSequence")
        except DataError:
            yield None, "VOI LUT"
            continue
        places = np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)
        yield np.clip(table[places] / np.float32(2**bits - 1), 0, 1), "VOI LUT"
    function = (str((values_of(dataset, "VOILUTFunction") or ["LINEAR"])[0]).strip() or "LINEAR").upper()
    for centre, width in zip_longest(_each(dataset, "WindowCenter"), _each(dataset, "WindowWidth"), fillvalue=math.nan):
        if not math.isfinite(centre + width) or width <= 0:
            yield None, f"window {centre:g} / {width:g}"
        else:
            greys = _window(values, centre, width, function)
            yield greys, f"window {centre:g} / {width:g} ({function})"


def _each(dataset: Any, keyword: str) -> list[float]:
    """An element's values, NaN where one is no number."""
    if not (values := values_of(dataset, keyword)) and keyword in dataset:
        # pydicom gives none of them where one is no number
        raw = dataset.get_item(keyword).value
        values = (raw.decode("latin-1") if isinstance(raw, bytes) else str(raw or "")).strip("\0 ").split("\\")
    numbers = []
    for value in values if any(map(str, values)) else ():
        try:
            numbers.append(float(value))
        except (TypeError, ValueError):
            numbers.append(math.nan)
    return numbers


def _window(values: Array, centre: float, width: float, function: str) -> Array:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3; a function of another name is LINEAR."""
    if function not in ("SIGMOID", "LINEAR_EXACT") and width > 1:
        # in place, since films are large
        greys = np.subtract(values, centre - 0.5, dtype=np.float64)
        greys /= width - 1
        greys += 0.5
        return np.clip(greys, 0, 1, out=greys).astype(np.float32)
    values = values.astype(np.float64)
    if function == "SIGMOID":
        greys = 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    elif function == "LINEAR_EXACT":
        greys = (values - centre) / width + 0.5
    else:
        greys = (values > centre - 0.5).astype(np.float64)
    return np.clip(greys, 0, 1, out=greys).astype(np.float32)
