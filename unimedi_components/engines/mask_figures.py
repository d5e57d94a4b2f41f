# SPDX-License-Identifier: Apache-2.0
"""Figures of segmented images: the image, the true mask and the predicted one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from unimedi_components.engines.curves import DPI, save_png

__all__ = ["MaskView", "draw_masks"]

Array = npt.NDArray[Any]

TRUE, FOUND = "#2ca02c", "#ff7f0e"
_TEXT = "#222222"
_PAIRS, _SIDE = 2, 2.35
_LARGEST = 768


@dataclass(frozen=True)
class MaskView:
    """One image with its masks.

    Args:
        name: for the title.
        image: (H, W).
        found: the predicted mask, bool (H, W).
        truth: the true one, or None where it is not known.
        note: stands under the prediction, for example its Dice.
    """

    name: str
    image: Array
    found: Array
    truth: Array | None = None
    note: str = ""


def draw_masks(views: Sequence[MaskView], path: str | Path, title: str = "") -> Path:
    """Draw each image plain, with the true mask where one is known, and with the predicted one; two images to a row.

    Args:
        views: at least one.
        path: PNG to write.
        title: heading of the figure.

    Raises:
        ValueError: there is no image.
    """
    if not views:
        raise ValueError("no image to draw")
    known = any(view.truth is not None for view in views)
    panels = 3 if known else 2
    across = min(_PAIRS, len(views))
    rows = -(-len(views) // across)
    tall = max(view.image.shape[0] / view.image.shape[1] for view in views)
    size = (max(_SIDE * panels * across, 5.0), (_SIDE * min(max(tall, 0.4), 2.5) + 0.3) * rows + 0.7)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
    cells = figure.subplots(rows, panels * across, squeeze=False).reshape(-1, panels)
    for group in cells[len(views) :]:
        for axes in group:
            axes.set_axis_off()
    for group, view in zip(cells, views, strict=False):
        _draw_one(group, view)
    lines = [Patch(facecolor="none", edgecolor=FOUND, label="predicted")]
    lines = [Patch(facecolor="none", edgecolor=TRUE, label="true"), *lines] if known else lines
    figure.legend(handles=lines, loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=_TEXT, parse_math=False)
    return save_png(figure, path)


def _draw_one(cells: Array, view: MaskView) -> None:
    # a film of 3000 pixels would make the same figure slower
    step = max(1, max(view.image.shape) // _LARGEST)
    image = view.image[::step, ::step]
    masks = [None if mask is None else mask[::step, ::step] for mask in (view.truth, view.found)]
    shown = view.name if len(view.name) <= 26 else f"{view.name[:23]}..."
    titles = [shown, *(["truth"] if len(cells) == 3 else []), view.note or "prediction"]
    drawn = [None, *(masks[:1] if len(cells) == 3 else []), masks[1]]
    colours = [None, *([TRUE] if len(cells) == 3 else []), FOUND]
    for axes, title, mask, colour in zip(cells, titles, drawn, colours, strict=True):
        _panel(axes, image, title)
        if mask is not None and colour is not None and mask.any():
            _shade(axes, mask, colour)


def _panel(axes: Axes, image: Array, title: str) -> None:
    low, high = np.percentile(image, (0.5, 99.5))
    axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="bilinear")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8.5, color=_TEXT, parse_math=False)


def _shade(axes: Axes, mask: Array, colour: str) -> None:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    shade = np.zeros((*mask.shape, 4))
    shade[..., :3], shade[..., 3] = (red, green, blue), 0.3 * mask
    axes.imshow(shade, interpolation="nearest")
    # a frame of background: a mask that reaches the border is closed there
    framed = np.pad(mask.astype(float), 1)
    y, x = (np.arange(n + 2) - 1 for n in mask.shape)
    axes.contour(x, y, framed, levels=[0.5], colors=[colour], linewidths=1.3)
    axes.set(xlim=(-0.5, mask.shape[1] - 0.5), ylim=(mask.shape[0] - 0.5, -0.5))
