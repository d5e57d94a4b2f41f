# SPDX-License-Identifier: Apache-2.0
"""Figures of a detector's results: precision over recall, and images with true and predicted boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from unimedi_components.engines.curves import DPI, save_png

__all__ = ["BoxImage", "draw_boxes", "draw_precision_recall"]

Array = npt.NDArray[Any]

TRUE, FOUND = "#2ca02c", "#ff7f0e"
_TEXT = "#222222"
_PER_ROW = 4


@dataclass(frozen=True)
class BoxImage:
    """One image with boxes [x0, y0, x1, y1] in its pixels, x1 and y1 just beyond the box.

    Args:
        name: for the title.
        image: (H, W).
        found: predicted, (n, 4).
        scores: of them, (n,).
        truth: (m, 4), or None where it is not known.
    """

    name: str
    image: Array
    found: Array
    scores: Array
    truth: Array | None = None


def draw_precision_recall(curves: Mapping[str, tuple[Array, Array]], path: str | Path, title: str = "") -> Path:
    """Draw precision over recall.

    Args:
        curves: legend -> (recall, precision), from the highest score to the lowest.
        path: PNG to write.
        title: heading of the figure.
    """
    figure = Figure(figsize=(7.2, 5.2), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots()
    for label, (recall, precision) in curves.items():
        axes.plot(recall, precision, drawstyle="steps-post", lw=1.8, label=label, clip_on=False)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="recall", ylabel="precision")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=_TEXT, parse_math=False)
    return save_png(figure, path)


def draw_boxes(images: Sequence[BoxImage], path: str | Path, title: str = "") -> Path:
    """Draw images in rows of four, true boxes as full green lines and predicted ones as dashed orange, with scores.

    Args:
        images: at least one.
        path: PNG to write.
        title: heading of the figure.

    Raises:
        ValueError: there is no image.
    """
    if not images:
        raise ValueError("no image to draw")
    columns = min(_PER_ROW, len(images))
    rows = -(-len(images) // columns)
    size = (max(3.0 * columns, 5.0), 3.25 * rows + 0.6)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in cells[len(images) :]:
        axes.set_axis_off()
    for axes, image in zip(cells, images, strict=False):
        _draw_one(axes, image)
    known = any(image.truth is not None for image in images)
    lines = [Rectangle((0, 0), 1, 1, fill=False, ec=FOUND, ls="--", label="predicted, with score")]
    lines = [Rectangle((0, 0), 1, 1, fill=False, ec=TRUE, label="true"), *lines] if known else lines
    figure.legend(handles=lines, loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=_TEXT, parse_math=False)
    return save_png(figure, path)


def _draw_one(axes: Axes, image: BoxImage) -> None:
    low, high = np.percentile(image.image, (0.5, 99.5))
    axes.imshow(image.image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="bilinear")
    for box in () if image.truth is None else np.reshape(image.truth, (-1, 4)):
        axes.add_patch(_rectangle(box, ec=TRUE, lw=1.8))
    for box, score in zip(np.reshape(image.found, (-1, 4)), np.ravel(image.scores), strict=True):
        axes.add_patch(_rectangle(box, ec=FOUND, lw=1.5, ls="--"))
        place: dict[str, Any] = {"fontsize": 7.5, "color": "white", "va": "bottom", "clip_on": True}
        back: dict[str, Any] = {"facecolor": FOUND, "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
        axes.text(box[0], box[1], f"{score:.2f}", bbox=back, **place)
    axes.set(xlim=(-0.5, image.image.shape[1] - 0.5), ylim=(image.image.shape[0] - 0.5, -0.5))
    axes.set_xticks([])
    axes.set_yticks([])
    shown = image.name if len(image.name) <= 30 else f"{image.name[:27]}..."
    axes.set_title(shown, fontsize=8.5, color=_TEXT, parse_math=False)


def _rectangle(box: Sequence[float] | Array, **style: Any) -> Rectangle:
    # pixel i covers [i, i + 1) in boxes, and [i - 0.5, i + 0.5) in matplotlib
    return Rectangle((box[0] - 0.5, box[1] - 0.5), box[2] - box[0], box[3] - box[1], fill=False, **style)
