# SPDX-License-Identifier: Apache-2.0
"""Panels: images with masks, boxes, organs, attention and probabilities, and searches with what they find."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from unimedi_components.arrays import Array
from unimedi_components.data.slice_files import evenly_spread
from unimedi_components.figures import attention as maps
from unimedi_components.figures.curves import DPI, WIDTH, cut, save_png

TRUE, FOUND = "#2ca02c", "#ff7f0e"
_TEXT, _CHOSEN, _OTHER = "#222222", "#2f6fb2", "#c5cad3"
# masks: images to a row, inches of a panel, pixels of the longer side
_PAIRS, _SIDE, _LARGEST = 2, 2.35, 768
_BOXES_PER_ROW = 4
# organs: slices to a row, inches of heading, legend and left border, opacity of the colours
_SLICES, _ORGANS_HEADING, _LEGEND, _LEFT, _OPACITY = 6, 0.4, 0.5, 0.3, 0.55
# predictions: slices of a volume, inches of heading and panel titles
_MOST_SLICES, _HEADING, _TITLE = 10, 0.42, 0.24
# searches: inches of an image, and of its findings below
_FOUND, _BELOW = 1.83, 0.45


def _grid(count: int, size: tuple[float, float], rows: int, columns: int, panels: int = 1) -> tuple[Figure, Array]:
    """A figure with `panels` axes for each of `count` images, (rows * columns, panels); those left over are empty."""
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
    cells = figure.subplots(rows, panels * columns, squeeze=False).reshape(-1, panels)
    for axes in cells[count:].ravel():
        axes.set_axis_off()
    return figure, cells


def _finish(figure: Figure, title: str, path: str | Path, predicted: Artist, true: Artist | None) -> Path:
    lines = [predicted] if true is None else [true, predicted]
    figure.legend(handles=lines, loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=_TEXT, parse_math=False)
    return save_png(figure, path)


def _show(axes: Axes, image: Array, title: str) -> None:
    low, high = np.percentile(image, (0.5, 99.5))
    axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="bilinear")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8.5, color=_TEXT, parse_math=False)


@dataclass(frozen=True)
class MaskView:
    """One image with its masks.

    Args:
        found: the predicted mask, bool (H, W).
        truth: the true one, or None where it is not known.
    """

    name: str
    image: Array
    found: Array
    truth: Array | None = None
    note: str = ""


def draw_masks(views: Sequence[MaskView], path: str | Path, title: str = "") -> Path:
    """Draw images plain, with the true mask where known, and with the predicted one. Raises ValueError: none."""
    if not views:
        raise ValueError("no image to draw")
    known = any(view.truth is not None for view in views)
    panels = 3 if known else 2
    across = min(_PAIRS, len(views))
    rows = -(-len(views) // across)
    tall = max(view.image.shape[0] / view.image.shape[1] for view in views)
    size = (max(_SIDE * panels * across, 5.0), (_SIDE * min(max(tall, 0.4), 2.5) + 0.3) * rows + 0.7)
    figure, cells = _grid(len(views), size, rows, across, panels)
    for group, view in zip(cells, views, strict=False):
        _draw_masks(group, view)
    predicted, true = (Patch(facecolor="none", edgecolor=c, label=n) for c, n in ((FOUND, "predicted"), (TRUE, "true")))
    return _finish(figure, title, path, predicted, true if known else None)


def _draw_masks(cells: Array, view: MaskView) -> None:
    # a film of 3000 pixels would make the same figure slower
    step = max(1, max(view.image.shape) // _LARGEST)
    image = view.image[::step, ::step]
    plain = (cut(view.name, 26), None, "")
    true, predicted = ("truth", view.truth, TRUE), (view.note or "prediction", view.found, FOUND)
    panels = (plain, true, predicted) if len(cells) == 3 else (plain, predicted)
    for axes, (title, mask, colour) in zip(cells, panels, strict=True):
        _show(axes, image, title)
        if mask is not None and mask.any():
            _shade(axes, mask[::step, ::step], colour)


def _shade(axes: Axes, mask: Array, colour: str) -> None:
    shade = np.zeros((*mask.shape, 4))
    shade[..., :3], shade[..., 3] = to_rgb(colour), 0.3 * mask
    axes.imshow(shade, interpolation="nearest")
    # a frame of background: a mask that reaches the border is closed there
    framed = np.pad(mask.astype(float), 1)
    y, x = (np.arange(n + 2) - 1 for n in mask.shape)
    axes.contour(x, y, framed, levels=[0.5], colors=[colour], linewidths=1.3)
    axes.set(xlim=(-0.5, mask.shape[1] - 0.5), ylim=(mask.shape[0] - 0.5, -0.5))


@dataclass(frozen=True)
class BoxImage:
    """One image with boxes [x0, y0, x1, y1] in its pixels, x1 and y1 just beyond the box.

    Args:
        found: predicted, (n, 4).
        scores: of them, (n,).
        truth: (m, 4), or None where it is not known.
    """

    name: str
    image: Array
    found: Array
    scores: Array
    truth: Array | None = None


def draw_boxes(images: Sequence[BoxImage], path: str | Path, title: str = "") -> Path:
    """Draw images in rows of four, true boxes as full green lines and predicted ones as dashed orange, with scores.

    Raises ValueError: there is no image.
    """
    if not images:
        raise ValueError("no image to draw")
    columns = min(_BOXES_PER_ROW, len(images))
    rows = -(-len(images) // columns)
    figure, cells = _grid(len(images), (max(3.0 * columns, 5.0), 3.25 * rows + 0.6), rows, columns)
    for axes, image in zip(cells[:, 0], images, strict=False):
        _draw_boxes(axes, image)
    known = any(image.truth is not None for image in images)
    predicted = Rectangle((0, 0), 1, 1, fill=False, ec=FOUND, ls="--", label="predicted, with score")
    true = Rectangle((0, 0), 1, 1, fill=False, ec=TRUE, label="true")
    return _finish(figure, title, path, predicted, true if known else None)


def _draw_boxes(axes: Axes, image: BoxImage) -> None:
    _show(axes, image.image, cut(image.name, 30))
    for box in () if image.truth is None else np.reshape(image.truth, (-1, 4)):
        axes.add_patch(_rectangle(box, ec=TRUE, lw=1.8))
    for box, score in zip(np.reshape(image.found, (-1, 4)), np.ravel(image.scores), strict=True):
        axes.add_patch(_rectangle(box, ec=FOUND, lw=1.5, ls="--"))
        place: dict[str, Any] = {"fontsize": 7.5, "color": "white", "va": "bottom", "clip_on": True}
        back: dict[str, Any] = {"facecolor": FOUND, "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
        axes.text(box[0], box[1], f"{score:.2f}", bbox=back, **place)
    axes.set(xlim=(-0.5, image.image.shape[1] - 0.5), ylim=(image.image.shape[0] - 0.5, -0.5))


def _rectangle(box: Sequence[float] | Array, **style: Any) -> Rectangle:
    # pixel i covers [i, i + 1) in boxes, and [i - 0.5, i + 0.5) in matplotlib
    return Rectangle((box[0] - 0.5, box[1] - 0.5), box[2] - box[0], box[3] - box[1], fill=False, **style)


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
        image: (D, H, W), D to the head, H to the back, W to the patient's left.
        truth: labels, 0 background and i + 1 for `organs[i]`, or None.
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
    height = _ORGANS_HEADING + len(rows) * tall + _LEGEND
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    figure.text(0.008, 1 - 0.2 / height, name, va="center", fontsize=11, fontweight="bold", parse_math=False)
    colours = organ_colours(len(organs))
    grey = np.clip((image - image.min()) / max(float(np.ptp(image)), 1e-6), 0, 1)
    for row, (title, labels) in enumerate(rows):
        bottom = height - _ORGANS_HEADING - (row + 1) * tall
        figure.text(0.012, (bottom + tall / 2) / height, title, rotation=90, va="center", ha="center", fontsize=9)
        for column, index in enumerate(slices):
            box = ((_LEFT + column * side) / WIDTH, bottom / height, 0.98 * side / WIDTH, 0.98 * tall / height)
            axes = figure.add_axes(box)
            axes.imshow(_painted(grey[index], None if labels is None else labels[index], colours), aspect="auto")
            axes.set_axis_off()
            if row == 0:
                axes.text(0.02, 0.97, f"slice {index}", transform=axes.transAxes, va="top", fontsize=8, color="white")
    handles = [Patch(color=colours[i], label=name) for i, name in enumerate(organs) if (shown == i + 1).any()]
    if handles:
        figure.legend(handles=handles, loc="lower center", ncols=min(7, len(handles)), frameon=False, fontsize=8)
    return save_png(figure, path)


def _painted(grey: Array, labels: Array | None, colours: Sequence[tuple[float, float, float]]) -> Array:
    """(H, W, 3): the slice with its organs over it."""
    rgb = np.repeat(grey[..., None], 3, axis=-1)
    if labels is None:
        return rgb
    paint = np.concatenate([np.zeros((1, 3)), np.asarray(colours, float)])[labels]
    opacity = _OPACITY * (labels > 0)[..., None]
    return rgb * (1 - opacity) + paint * opacity


def draw_prediction(
    name: str, image: Array, attention: Array, probability: Mapping[str, float], chosen: Sequence[str], path: str | Path
) -> Path:
    """Draw an X-ray, or slices of a volume from foot to head, with attention over it and the probabilities beside.

    Attention is transparent where it is at most what even attention over the whole image would give.

    Args:
        image: (H, W), or (D, H, W) of which at most ten slices are shown, each the middle of its slab of tokens.
        attention: Eq. 1's **v** on the token grid, (rows, columns) or (slabs, rows, columns).
        probability: by label.
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
        box = (0.008 + column * side / WIDTH, bottom / height, 0.97 * side / WIDTH, side / height)
        cells.append(figure.add_axes(box))
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
            maps.draw_panel(axes, image, low, high, title, _CHOSEN)
        maps.draw_overlay(cells[1], attention, image.shape, attention)
        return
    depth = len(image) // len(attention)
    for axes, slab in zip(cells, evenly_spread(len(attention), len(cells)), strict=True):
        index = slab * depth + depth // 2
        maps.draw_panel(axes, image[index], low, high, f"slice {index} of {len(image)}", _CHOSEN)
        maps.draw_overlay(axes, attention[slab], image.shape[1:], attention)


def _draw_bars(axes: Axes, probability: Mapping[str, float], chosen: Sequence[str]) -> None:
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


@dataclass(frozen=True)
class Found:
    """One image of a search.

    ``similarity``: to the query; None for the query itself.
    """

    image: Array
    findings: Sequence[str] | None
    similarity: float | None = None


def draw_search(rows: Sequence[tuple[Found, Sequence[Found]]], path: str | Path, title: str = "") -> Path:
    """Draw each query in a row with what was found, the nearest first.

    Frames are green where something found shares a finding with the query, or has none as the query has none, grey
    where it does not, and blue where labels are not known. Raises ValueError: there is no query.
    """
    if not rows:
        raise ValueError("no query to draw")
    height = _TITLE + _FOUND + _BELOW
    figure, parts = maps.row_figure([height] * len(rows), title)
    for part, (query, found) in zip(parts, rows, strict=True):
        for place, one in enumerate((query, *found)):
            left = 0.008 + place * (_FOUND + 0.12) / WIDTH + (0.02 if place else 0.0)
            axes = part.add_axes((left, _BELOW / height, _FOUND / WIDTH, _FOUND / height))
            low, high = np.percentile(one.image, (0.5, 99.5))
            name = "query" if one.similarity is None else f"{place}: {one.similarity:.2f}"
            maps.draw_panel(axes, one.image, float(low), float(high), name, _colour(query, one))
            text = "labels not known" if one.findings is None else ", ".join(one.findings) or "none of these findings"
            lines = textwrap.wrap(text, 30, max_lines=3, placeholder=" ...")
            part.text(left, (_BELOW - 0.06) / height, "\n".join(lines), va="top", fontsize=8, parse_math=False)
    return save_png(figure, path)


def _colour(query: Found, one: Found) -> str:
    if one.similarity is None or query.findings is None or one.findings is None:
        return maps.NEUTRAL
    mine, theirs = set(query.findings), set(one.findings)
    return maps.RIGHT if mine & theirs or not (mine or theirs) else maps.WRONG
