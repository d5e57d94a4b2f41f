# SPDX-License-Identifier: Apache-2.0
"""A montage of a CT volume's slices with its organs in colour: the image, the truth if known, the prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from unimedi_components.engines.curves import DPI, WIDTH, save_png

__all__ = ["draw_organs", "organ_colours"]

Array = npt.NDArray[Any]

_SLICES = 6
_HEADING, _LEGEND, _LEFT = 0.4, 0.5, 0.3
_OPACITY = 0.55


def organ_colours(count: int) -> list[tuple[float, float, float]]:
    """One colour per organ, neighbours in number far apart in hue."""
    palette = colormaps["tab20"]
    order = [*range(0, 20, 2), *range(1, 20, 2)]
    return [tuple(palette(order[i % 20])[:3]) for i in range(count)]  # type: ignore[misc]


def draw_organs(
    name: str,
    image: Array,
    truth: Array | None,
    prediction: Array,
    organs: Sequence[str],
    path: str | Path,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> Path:
    """Draw at most six axial slices, spread over those that hold an organ, from foot to head.

    Args:
        name: of the case, for the heading.
        image: (D, H, W), D to the head, H to the back, W to the patient's left.
        truth: labels, 0 background and i + 1 for `organs[i]`, or None.
        prediction: labels as of the truth.
        organs: names.
        path: PNG to write.
        spacing: mm between slices, rows and columns; sets the height of a slice to its width.
    """
    shown = prediction if truth is None else np.maximum(prediction, truth)
    filled = np.flatnonzero(shown.any(axis=(1, 2)))
    low, high = (0, len(image) - 1) if not len(filled) else (int(filled[0]), int(filled[-1]))
    slices = np.unique(np.linspace(low, high, min(_SLICES, high - low + 1) + 2).round().astype(int)[1:-1])
    slices = slices if len(slices) else np.asarray([low])
    rows = [("image", None), *([("truth", truth)] if truth is not None else []), ("prediction", prediction)]
    side = (WIDTH - _LEFT) / _SLICES
    tall = min(side * image.shape[1] * spacing[1] / (image.shape[2] * spacing[2]), 2.5 * side)
    height = _HEADING + len(rows) * tall + _LEGEND
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    figure.text(0.008, 1 - 0.2 / height, name, va="center", fontsize=11, fontweight="bold", parse_math=False)
    colours = organ_colours(len(organs))
    grey = np.clip((image - image.min()) / max(float(np.ptp(image)), 1e-6), 0, 1)
    for row, (title, labels) in enumerate(rows):
        bottom = height - _HEADING - (row + 1) * tall
        figure.text(0.012, (bottom + tall / 2) / height, title, rotation=90, va="center", ha="center", fontsize=9)
        for column, index in enumerate(slices):
            box = ((_LEFT + column * side) / WIDTH, bottom / height, 0.98 * side / WIDTH, 0.98 * tall / height)
            axes = figure.add_axes(box)
            axes.imshow(_painted(grey[index], None if labels is None else labels[index], colours), aspect="auto")
            axes.set_axis_off()
            if row == 0:
                axes.text(0.02, 0.97, f"slice {index}", transform=axes.transAxes, va="top", fontsize=8, color="white")
    present = [i for i in range(len(organs)) if (shown == i + 1).any()]
    handles = [Patch(color=colours[i], label=organs[i]) for i in present]
    if handles:
        columns = min(7, len(handles))
        figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=8)
    return save_png(figure, path)


def _painted(grey: Array, labels: Array | None, colours: Sequence[tuple[float, float, float]]) -> Array:
    """(H, W, 3): the slice with its organs over it."""
    rgb = np.repeat(grey[..., None], 3, axis=-1)
    if labels is None:
        return rgb
    paint = np.concatenate([np.zeros((1, 3)), np.asarray(colours, float)])[labels]
    opacity = _OPACITY * (labels > 0)[..., None]
    return rgb * (1 - opacity) + paint * opacity
