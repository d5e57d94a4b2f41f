# SPDX-License-Identifier: Apache-2.0
"""Figures of single predictions: the image, what the network attended to, and the probabilities."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from unimedi_components.data.slice_files import evenly_spread
from unimedi_components.engines import figures
from unimedi_components.engines.curves import DPI, WIDTH, save_png

__all__ = ["draw_prediction"]

Array = npt.NDArray[Any]

_MOST_SLICES = 10
_HEADING, _TITLE = 0.42, 0.24
_TEXT, _CHOSEN, _OTHER = "#222222", "#2f6fb2", "#c5cad3"


def draw_prediction(
    name: str,
    image: Array,
    attention: Array,
    probability: Mapping[str, float],
    chosen: Collection[str],
    path: str | Path,
) -> Path:
    """Draw an X-ray, or slices of a volume from foot to head, with attention over it and the probabilities beside.

    Attention is transparent where it is at most what even attention over the whole image would give.

    Args:
        name: of the image, for the heading.
        image: (H, W), or (D, H, W) of which at most ten slices are shown, each the middle of its slab of tokens.
        attention: Eq. 1's **v** on the token grid, (rows, columns) or (slabs, rows, columns).
        probability: by label.
        chosen: labels that are predicted.
        path: PNG to write.
    """
    count = 2 if image.ndim == 2 else min(len(attention), _MOST_SLICES)
    columns = count if count < 4 else (count + 1) // 2
    side = min(8.2 / columns, 3.6)
    height = -(-count // columns) * (side + _TITLE) + _HEADING
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    figure.text(0.008, 1 - 0.2 / height, name, va="center", fontsize=11, fontweight="bold", parse_math=False)
    cells = []
    for place in range(count):
        row, column = divmod(place, columns)
        bottom = height - _HEADING - (row + 1) * (side + _TITLE) + 0.04
        cells.append(
            figure.add_axes((0.008 + column * side / WIDTH, bottom / height, 0.97 * side / WIDTH, side / height))
        )
    _draw_image(cells, image, attention)
    left = 0.05 + columns * side / WIDTH + 0.0065 * min(max(map(len, probability)), 24)
    bars = min(height - 0.8, 0.42 * len(probability) + 0.2)
    bottom = 1 - (bars + _HEADING + 0.1) / height
    _draw_bars(figure.add_axes((left, bottom, 0.985 - left, bars / height)), probability, chosen)
    return save_png(figure, path)


def _draw_image(cells: list[Axes], image: Array, attention: Array) -> None:
    low, high = np.percentile(image, (0.5, 99.5))
    if image.ndim == 2:
        for axes, title in zip(cells, ("image", "attention"), strict=True):
            figures._panel(axes, image, low, high, title, _CHOSEN)
        figures._overlay(cells[1], attention, image.shape, attention)
        return
    depth = len(image) // len(attention)
    for axes, slab in zip(cells, evenly_spread(len(attention), len(cells)), strict=True):
        index = slab * depth + depth // 2
        figures._panel(axes, image[index], low, high, f"slice {index} of {len(image)}", _CHOSEN)
        figures._overlay(axes, attention[slab], image.shape[1:], attention)


def _draw_bars(axes: Axes, probability: Mapping[str, float], chosen: Collection[str]) -> None:
    colours = [_CHOSEN if name in chosen else _OTHER for name in probability]
    axes.barh(range(len(probability)), list(probability.values()), color=colours, height=0.62)
    for place, value in enumerate(probability.values()):
        axes.text(value + 0.015, place, f"{value:.2f}", va="center", fontsize=9, color=_TEXT)
    labels = [textwrap.shorten(name, 24, placeholder=" ...") for name in probability]
    axes.set_yticks(range(len(probability)), labels=labels, parse_math=False)
    axes.set(xlim=(0, 1.14), xticks=[0, 0.5, 1])
    axes.invert_yaxis()
    axes.tick_params(labelsize=9, length=0)
    axes.set_title("probability", fontsize=9, color=_TEXT)
    axes.spines[["top", "right"]].set_visible(False)
