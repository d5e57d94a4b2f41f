# SPDX-License-Identifier: Apache-2.0
"""Charts of results: ROC curves, precision over recall, and confusion matrices."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from unimedi_components.arrays import Array
from unimedi_components.figures.curves import DPI, cut, save_png

_TEXT = "#222222"
_PER_ROW = 5
_LINES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class RocCurve:
    """One ROC curve.

    Args:
        false_positive, true_positive: rates, from 0 to 1; empty where there is no curve.
    """

    name: str
    false_positive: Array
    true_positive: Array
    auroc: float | None
    interval: Sequence[float] | None = None

    @classmethod
    def of(cls, name: str, truth: Any, score: Any, auroc: float | None, interval: Sequence[float] | None) -> Self:
        """The curve of scores (N,) by their truth, 1, 0 or -1 (does not count)."""
        false, true = (np.empty(0),) * 2 if auroc is None else roc_curve(truth[truth >= 0], score[truth >= 0])[:2]
        return cls(name, false, true, auroc, interval)


def draw_roc(curves: Sequence[RocCurve], path: str | Path, title: str = "") -> Path:
    """Draw ROC curves, with the AUROC and its interval in the legend. Raises ValueError: there is no curve."""
    if not curves:
        raise ValueError("no ROC curve to draw")
    figure = Figure(figsize=(10.0, 5.2), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#bbbbbb", lw=1.0, ls=":", zorder=0)
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for number, curve in enumerate(curves):
        line: dict[str, Any] = {"color": colours[number % 10], "ls": _LINES[number // 10 % len(_LINES)], "lw": 1.8}
        # a good curve runs along the frame, which must neither cut it in half nor cover it
        line |= {"label": _label(curve), "clip_on": False, "zorder": 3}
        axes.plot(curve.false_positive, curve.true_positive, **line)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_xlabel("false positive rate (1 - specificity)")
    axes.set_ylabel("true positive rate (sensitivity)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _heading(figure, title)
    legend = axes.legend(
        loc="upper left", bbox_to_anchor=(1.03, 1.0), frameon=False, fontsize=8.5, title="AUROC", alignment="left"
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return save_png(figure, path)


def _label(curve: RocCurve) -> str:
    name = cut(curve.name, 30)
    if curve.auroc is None:
        return f"{name}  n/a"
    interval = f" ({curve.interval[0]:.3f} to {curve.interval[1]:.3f})" if curve.interval else ""
    return f"{name}  {curve.auroc:.3f}{interval}"


def draw_precision_recall(curves: Mapping[str, tuple[Array, Array]], path: str | Path, title: str = "") -> Path:
    """Draw precision over recall. ``curves``: legend -> (recall, precision), from the highest score to the lowest."""
    figure = Figure(figsize=(7.2, 5.2), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots()
    for label, (recall, precision) in curves.items():
        axes.plot(recall, precision, drawstyle="steps-post", lw=1.8, label=label, clip_on=False)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="recall", ylabel="precision")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=_TEXT, parse_math=False)
    return save_png(figure, path)


def draw_confusion(
    matrices: Mapping[str, npt.ArrayLike], names: Sequence[str], path: str | Path, title: str = ""
) -> Path:
    """Draw confusion matrices: counts, and shares of each true class. Raises ValueError: there is no matrix.

    ``matrices``: (C, C) with true classes in rows and predicted ones in columns, by panel title; "" for none.
    """
    if not matrices:
        raise ValueError("no confusion matrix to draw")
    columns = min(len(matrices), _PER_ROW)
    rows = math.ceil(len(matrices) / columns)
    side = len(names) * (0.62 if len(matrices) > 1 else 1.0 if len(names) < 8 else 0.6)
    width = max(columns * (side + 1.15) + 0.3, 5.2)
    size = (width, rows * (side + 1.1) + (0.4 if title else 0.1))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(matrices) :]:
        axes.axis("off")
    for number, (axes, (name, matrix)) in enumerate(zip(panels, matrices.items(), strict=False)):
        _matrix(axes, np.asarray(matrix), [textwrap.fill(str(text), 14) for text in names])
        axes.set_title(cut(name, 28), fontsize=9, color=_TEXT, parse_math=False)
        if number % columns == 0:
            axes.set_ylabel("true", fontsize=9)
        if number >= len(matrices) - columns:
            axes.set_xlabel("predicted", fontsize=9)
    _heading(figure, title)
    return save_png(figure, path)


def _matrix(axes: Axes, matrix: Array, names: Sequence[str]) -> None:
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    places = range(len(names))
    axes.set_xticks(places, labels=names, fontsize=8, parse_math=False)
    axes.set_yticks(places, labels=names, fontsize=8, parse_math=False)
    if len(names) > 2:
        axes.tick_params(axis="x", labelrotation=30)
    axes.tick_params(length=0)
    for row in places:
        for column in places:
            colour = "white" if share[row, column] > 0.55 else _TEXT
            text = f"{int(matrix[row, column])}\n{share[row, column]:.0%}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)


def _heading(figure: Figure, title: str) -> None:
    if title:
        title = textwrap.fill(title, int(figure.get_figwidth() * 11))
        figure.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold", parse_math=False)
