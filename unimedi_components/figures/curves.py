# SPDX-License-Identifier: Apache-2.0
"""Loss curves of a run.

Drawn on matplotlib's Agg canvas directly, so that neither a display nor the caller's settings matter.
"""

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from unimedi_components.arrays import Array
from unimedi_components.files import replacing

Rows = Sequence[Mapping[str, float]]

#: Figures are 12 inches wide at 100 dots per inch: 1200 pixels, as wide as a README shows.
WIDTH = 12.0
DPI = 100
_PARTS = {"vl": "$L_{vl}$ image-report", "icl": "$L_{icl}$ CLS", "pcl": "$L_{pcl}$ patches"}
_COLOURS = {"loss": "#333333", "vl": "#2f6fb2", "icl": "#d98324", "pcl": "#2a9d4a"}
_MAX_BYTES = 390_000


def draw_loss_curves(history: Rows, path: str | Path) -> Path:
    """Draw the losses, the learning rate and the validation metrics of a run.

    ``history``: one dict per iteration with "iteration", "epoch", "loss", and where there are "vl", "icl", "pcl", "lr",
    and keys that begin with "val_" at the iterations that ended in a validation. Raises ValueError: the history is
    empty.
    """
    if not history:
        raise ValueError("no iteration to draw; the history is empty")
    parts = [key for key in _PARTS if any(key in row for row in history)]
    figure = Figure(figsize=(WIDTH, 3.6), dpi=DPI, layout="constrained", facecolor="white")
    panels = figure.subplots(1, 3 if parts else 2)
    left, right = panels[0], panels[-1]
    _curve(left, history, "loss", "training")
    left.set(title="training loss", xlabel="iteration")
    if any("val_loss" in row for row in history):
        left.plot(*_series(history, "val_loss"), color="#7a4fa3", marker="o", ms=3, lw=1.2, label="validation")
        left.set_title("training and validation loss")
        left.legend(frameon=False, fontsize=9)
    _mark_epochs(left, history)
    if parts:
        for key in parts:
            _curve(panels[1], history, key, _PARTS[key])
        panels[1].set(title="its parts, unweighted", xlabel="iteration")
        panels[1].legend(frameon=False, fontsize=9)
        _mark_epochs(panels[1], history)
    _draw_validation(right, history)
    for axes in figure.axes:
        axes.spines["top"].set_visible(False)
    return save_png(figure, path)


def _series(history: Rows, key: str) -> tuple[Array, Array]:
    rows = [(row["iteration"], row[key]) for row in history if key in row]
    x, y = np.asarray(rows, dtype=float).reshape(-1, 2).T
    return x, y


def _curve(axes: Axes, history: Rows, key: str, label: str) -> None:
    """The values, and their running mean over about a twentieth of the run."""
    x, y = _series(history, key)
    width = max(1, len(y) // 20)
    # A window that shrinks at both ends shows no rise or fall that is not there.
    total = np.concatenate([[0.0], np.cumsum(y)])
    low, high = np.arange(len(y)) - width // 2, np.arange(len(y)) + width // 2 + 1
    low, high = low.clip(0), high.clip(max=len(y))
    axes.plot(x, y, color=_COLOURS[key], alpha=0.25, lw=0.8)
    axes.plot(x, (total[high] - total[low]) / (high - low), color=_COLOURS[key], lw=1.8, label=label)
    axes.grid(axis="y", alpha=0.25)


def _mark_epochs(axes: Axes, history: Rows) -> None:
    starts = [b["iteration"] - 0.5 for a, b in pairwise(history) if b["epoch"] != a["epoch"]]
    for start in starts if len(starts) <= 60 else ():
        axes.axvline(start, color="#bbbbbb", lw=0.6, ls=":", zorder=0)


def _draw_validation(axes: Axes, history: Rows) -> None:
    names = sorted({key for row in history for key in row if key.startswith("val_") and "loss" not in key})
    for name, colour in zip(names, ("#7a4fa3", "#c0567a", "#4f86a3", "#a38a4f"), strict=False):
        x, y = _series(history, name)
        axes.plot(x, y, marker="o", ms=4, color=colour, label=name.removeprefix("val_").replace("_", " "))
    axes.set(title="validation and learning rate" if names else "learning rate", xlabel="iteration")
    axes.grid(axis="y", alpha=0.25)
    if names:
        axes.set_ylim(bottom=0)
    if any("lr" in row for row in history):
        rate = axes.twinx() if names else axes
        rate.plot(*_series(history, "lr"), color="#999999", lw=1.0, ls="--", label="learning rate")
        rate.set_ylabel("learning rate", color="#777777", fontsize=9)
        rate.tick_params(axis="y", colors="#777777", labelsize=8)
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _mark_epochs(axes, history)
    axes.legend(frameon=False, fontsize=9, loc="best") if names else None


def cut(text: str, length: int) -> str:
    """A text of at most `length` letters, with three dots where some are left out."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def save_png(figure: Figure, path: str | Path) -> Path:
    """Write a figure as a PNG, under a temporary name first; coarser colours keep it below 400 kB."""
    path = Path(path)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.array(np.asarray(canvas.buffer_rgba())[..., :3])
    for step in (1, 4, 8, 16):
        # Stretched so that black stays black and white stays white.
        levels = np.rint(np.arange(256) // step * step * 255 / (256 - step)).astype(np.uint8)
        packed = io.BytesIO()
        Image.fromarray(levels[pixels]).save(packed, format="PNG", optimize=True)
        if packed.tell() <= _MAX_BYTES:
            break
    with replacing(path) as temporary:
        temporary.write_bytes(packed.getvalue())
    return path
