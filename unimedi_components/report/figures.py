# SPDX-License-Identifier: Apache-2.0
"""The page's own figures, each panel a file: features in two dimensions, bars, learning curves.

Panels are 4.8 inches wide, so that their labels can be read on a telephone too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from unimedi_components.arrays import Array
from unimedi_components.figures.curves import save_png

_SIZE, _DPI = (4.8, 3.9), 150
XRAY, CT = "#2f6fb2", "#d98324"
_COLOURS = ("#8a8f98", "#d98324", "#2f6fb2", "#2a9d4a")


def draw_tsne(groups: Mapping[str, tuple[Array, str, str]], path: Path, title: str, seed: int = 0) -> Path:
    """Draw groups of features by one t-SNE of all of them.

    ``groups``: name -> features (N, D), colour, marker.
    """
    rows = np.concatenate([features for features, _, _ in groups.values()]).astype(np.float64)
    perplexity = min(30.0, max(2.0, (len(rows) - 1) / 4))
    places = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows)
    figure, axes = _panel(title)
    start = 0
    for name, (features, colour, marker) in groups.items():
        x, y = places[start : start + len(features)].T
        start += len(features)
        axes.scatter(x, y, s=22, color=colour, marker=marker, alpha=0.75, lw=0, label=f"{name} ({len(features)})")
    axes.set_xticks([])
    axes.set_yticks([])
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    return save_png(figure, path)


def draw_bars(
    groups: Sequence[str], bars: Mapping[str, Sequence[Mapping[str, Any] | None]], path: Path, title: str, label: str
) -> Path:
    """Draw bars with intervals: a group for each share of the labels, a bar in it for each method.

    ``bars``: method -> for each group "mean" and "interval" or "patients" (see `statistics.summarise`), or None.
    """
    figure, axes = _panel(title)
    width = 0.8 / len(bars)
    ends: list[float] = []
    for number, (name, values) in enumerate(bars.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        known = [(group, value) for group, value in enumerate(values) if value is not None]
        for place, (group, value) in enumerate(known):
            x = group + (number - (len(bars) - 1) / 2) * width
            limits = value.get("interval") or value.get("patients") or (value["mean"], value["mean"])
            axes.bar(x, value["mean"], width * 0.92, color=colour, label=None if place else name)
            axes.plot([x, x], limits, color="#222222", lw=1.4)
            ends += [value["mean"], *limits]
    if ends:
        room = max(0.02, 0.15 * (max(ends) - min(ends)))
        axes.set_ylim(max(0.0, min(ends) - room), min(1.0, max(ends) + room))
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(label, fontsize=11)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    return save_png(figure, path)


def draw_curves(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path, title: str, x: str) -> Path:
    """Draw curves over steps or epochs, smoothed where they have many points. ``lines``: name -> x and y."""
    figure, axes = _panel(title)
    colours = ("#2f6fb2", "#d98324", "#2a9d4a", "#7a4fa3", "#c0567a", "#6b6b6b")
    for number, (name, (steps, values)) in enumerate(lines.items()):
        y, width = np.asarray(values, dtype=float), max(1, len(values) // 25)
        colour = colours[number % len(colours)]
        if width > 1:
            padded = np.pad(y, (width // 2, width - 1 - width // 2), mode="edge")
            y = np.convolve(padded, np.ones(width) / width, mode="valid")
        axes.plot(steps, y, color=colour, lw=1.8, marker="o" if len(y) <= 25 else None, ms=4, label=name)
    axes.set_xlabel(x, fontsize=11)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    return save_png(figure, path)


def _panel(title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.set_title(title, fontsize=12)
    axes.tick_params(labelsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
