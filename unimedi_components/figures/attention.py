# SPDX-License-Identifier: Apache-2.0
"""Figures of what the network looked at: selected slices, attention, report (the paper's Fig. 5)."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from unimedi_components.arrays import Array
from unimedi_components.figures.curves import DPI, WIDTH, save_png

RIGHT, WRONG, NEUTRAL, LESION = "#2a9d4a", "#8a8f98", "#2f6fb2", "#d1495b"
COLOUR_MAP = "inferno"
_SHOWN = 4
_MAX_LINES = 6
# Attention that is nearly even is drawn faint instead of being stretched into a pattern.
_FAINT = 0.25


@dataclass(frozen=True)
class CTView:
    """One CT study as the network saw it.

    Args:
        volume: (D, H, W), inferior to superior, front up, the patient's right on the left.
        scores: Eq. 2 score of each slab, (S,).
        attention: Eq. 1's **v** on the token grid, (S, rows, columns).
        lesions: which slices are lesion slices, bool (D,); None where that is not known.
    """

    name: str
    volume: Array
    selected: Sequence[int]
    scores: Array
    attention: Array
    report: str
    lesions: Array | None = None


@dataclass(frozen=True)
class XrayView:
    """One X-ray as the network saw it: (H, W), with Eq. 1's **v** on the token grid (rows, columns)."""

    name: str
    image: Array
    attention: Array
    report: str


def draw_selection(views: Sequence[CTView], path: str | Path, title: str = "") -> Path:
    """Draw selected slices with the attention over them, a true lesion slice, the slab scores and the report.

    Raises ValueError: there is no study.
    """
    if not views:
        raise ValueError("no CT study to draw")
    texts = [_wrap(f"{view.name}:  {view.report or 'no report'}", 168) for view in views]
    heights = [2.12 + 0.19 * len(text) for text in texts]
    figure, parts = row_figure(heights, title)
    for row in zip(parts, views, texts, heights, strict=True):
        _draw_study(*row)
    return save_png(figure, path)


def _draw_study(part: SubFigure, view: CTView, text: list[str], height: float) -> None:
    chosen = _best(view)
    plain_too = len(chosen) <= 2
    count = len(chosen) * (1 + plain_too)
    below, side = (0.19 * len(text) + 0.15) / height, min(1.74, 9.0 / (count + 1))
    step, tall = (side + 0.09) / WIDTH, side / height
    cells = iter(part.add_axes((0.008 + step * i, below, side / WIDTH, tall)) for i in range(count + 1))
    low, high = np.percentile(view.volume, (0.5, 99.5))
    slabs = len(view.attention)
    for index in chosen:
        image = view.volume[index]
        overlay = view.attention[index * slabs // len(view.volume)]
        verdict, colour = _verdict(view, index)
        if plain_too:
            draw_panel(next(cells), image, low, high, f"slice {index}{verdict}", colour)
        axes = next(cells)
        draw_panel(axes, image, low, high, "attention" if plain_too else f"slice {index}{verdict}", colour)
        draw_overlay(axes, overlay, image.shape, view.attention)
    _draw_lesion(next(cells), view, low, high)
    _draw_scores(part.add_axes((0.79, below + 0.2 / height, 0.165, tall - 0.2 / height)), view)
    _report(part, 0.008, below - 0.08 / height, text, 9)


def _best(view: CTView) -> list[int]:
    """The slices to show: the best scored ones, in anatomical order."""
    slab = [index * len(view.scores) // len(view.volume) for index in view.selected]
    order = sorted(range(len(slab)), key=lambda i: -view.scores[slab[i]])[:_SHOWN]
    return sorted(int(view.selected[i]) for i in order)


def _verdict(view: CTView, index: int) -> tuple[str, str]:
    if view.lesions is None or not view.lesions.any():
        return "", NEUTRAL
    return (", lesion", RIGHT) if view.lesions[index] else (", no lesion", WRONG)


def _draw_lesion(axes: Axes, view: CTView, low: float, high: float) -> None:
    """The middle one of the true lesion slices, or a word on why there is none."""
    where = np.flatnonzero(() if view.lesions is None else view.lesions)
    if len(where):
        index = int(where[len(where) // 2])
        draw_panel(axes, view.volume[index], low, high, f"true lesion, slice {index}", LESION)
        return
    axes.axis("off")
    word = "lesion slices\nnot known" if view.lesions is None else "no lesion"
    axes.text(0.5, 0.5, word, ha="center", va="center", color="#888888", fontsize=9, transform=axes.transAxes)


def _draw_scores(axes: Axes, view: CTView) -> None:
    """Slab scores over depth, the selected slabs dark, true lesion slices as a band behind them."""
    depth, slabs = len(view.volume), len(view.scores)
    score = np.asarray(view.scores, dtype=float) * slabs / max(float(np.sum(view.scores)), 1e-12)
    taken = {int(index) * slabs // depth for index in view.selected}
    colours = [NEUTRAL if i in taken else "#c5cad3" for i in range(slabs)]
    bars: dict[str, Any] = {"width": depth / slabs * 0.9, "align": "edge", "zorder": 2}
    axes.bar(np.arange(slabs) * depth / slabs, score, color=colours, **bars)
    for i in np.flatnonzero(view.lesions) if view.lesions is not None else ():
        axes.axvspan(float(i), float(i) + 1, color=LESION, alpha=0.25, lw=0, zorder=1)
    spread = max(float(np.ptp(score)), 0.1)
    axes.set(xlim=(0, depth), ylim=(score.min() - 0.35 * spread, score.max() + 0.12 * spread))
    axes.set_title("slab score / mean, foot to head", fontsize=8.5, pad=4)
    axes.yaxis.tick_right()
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter("{x:.2f}")
    axes.tick_params(labelsize=8, length=2)
    axes.spines[["top", "left"]].set_visible(False)


def draw_xrays(views: Sequence[XrayView], path: str | Path, title: str = "") -> Path:
    """Draw X-rays beside the attention over them and their reports, two to a row. Raises ValueError: there is none."""
    if not views:
        raise ValueError("no X-ray to draw")
    figure, parts = row_figure([2.45] * math.ceil(len(views) / 2), title)
    for number, view in enumerate(views):
        part, column = parts[number // 2], 0.5 * (number % 2)
        image, marked = (part.add_axes((column + 0.006 + 0.17 * i, 0.03, 0.165, 0.86)) for i in range(2))
        low, high = np.percentile(view.image, (0.5, 99.5))
        draw_panel(image, view.image, low, high, view.name, NEUTRAL)
        draw_panel(marked, view.image, low, high, "attention", NEUTRAL)
        draw_overlay(marked, view.attention, view.image.shape, view.attention)
        _report(part, column + 0.352, 0.87, _wrap(view.report or "no report", 26, 15), 8)
    return save_png(figure, path)


def row_figure(heights: Sequence[float], title: str) -> tuple[Figure, list[SubFigure]]:
    top = 0.38 if title else 0.05
    figure = Figure(figsize=(WIDTH, sum(heights) + top), dpi=DPI, facecolor="white")
    ratios = [top, *heights]
    parts = figure.subfigures(len(ratios), 1, height_ratios=ratios, hspace=0.0, squeeze=False)[:, 0]
    if title:
        parts[0].text(0.012, 0.35, title, fontsize=12, fontweight="bold", va="center", parse_math=False)
    return figure, list(parts[1:])


def draw_panel(axes: Axes, image: Array, low: float, high: float, title: str, colour: str) -> None:
    axes.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="bilinear")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2)
    axes.set_title(title, fontsize=8.5, color=colour, pad=4, parse_math=False)


def attention_strength(attention: Array, whole: Array) -> Array:
    """How strongly attention is drawn, from 0 where it is at most what even attention would give, to 1 at its peak.

    Args:
        attention: Eq. 1's **v** of some tokens, any shape.
        whole: of all tokens of the study; its mean is even attention.
    """
    even = max(float(whole.mean()), 1e-12)
    return np.clip((attention / even - 1) / max(float(whole.max()) / even - 1, _FAINT), 0.0, 1.0)


def attention_opacity(strength: Array) -> Array:
    return 0.8 * strength**0.7


def draw_overlay(axes: Axes, attention: Array, shape: tuple[int, ...], whole: Array) -> None:
    """Attention over an image, see `attention_strength`; `shape` is the image's."""
    strength = attention_strength(attention, whole)
    extent = (-0.5, shape[1] - 0.5, shape[0] - 0.5, -0.5)
    colours: dict[str, Any] = {"cmap": COLOUR_MAP, "vmin": 0, "vmax": 1, "alpha": attention_opacity(strength)}
    axes.imshow(strength, extent=extent, interpolation="bilinear", **colours)


def _report(part: SubFigure, x: float, y: float, lines: list[str], size: float) -> None:
    part.text(x, y, "\n".join(lines), va="top", fontsize=size, color="#222222", parse_math=False)


def _wrap(text: str, width: int, lines: int = _MAX_LINES) -> list[str]:
    return textwrap.wrap(text, width, max_lines=lines, placeholder=" ...") or [""]
