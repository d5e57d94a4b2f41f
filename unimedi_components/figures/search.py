# SPDX-License-Identifier: Apache-2.0
"""Figures of a search: queries and what is nearest to them in the other dimension."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unimedi_components.figures import attention as figures
from unimedi_components.figures.curves import WIDTH, save_png

Array = npt.NDArray[Any]

_SIDE, _TITLE, _TEXT = 1.83, 0.24, 0.45
_SHORT = 30


@dataclass(frozen=True)
class Found:
    """One image of a search.

    Args:
        image: (H, W).
        similarity: to the query; None for the query itself.
    """

    image: Array
    findings: Sequence[str] | None
    similarity: float | None = None


def draw_search(rows: Sequence[tuple[Found, Sequence[Found]]], path: str | Path, title: str = "") -> Path:
    """Draw each query in a row with what was found, the nearest first.

    Frames are green where something found shares a finding with the query, or has none as the query has none, grey
    where it does not, and blue where labels are not known.

    Raises:
        ValueError: there is no query.
    """
    if not rows:
        raise ValueError("no query to draw")
    height = _TITLE + _SIDE + _TEXT
    figure, parts = figures.row_figure([height] * len(rows), title)
    for part, (query, found) in zip(parts, rows, strict=True):
        for place, one in enumerate((query, *found)):
            left = 0.008 + place * (_SIDE + 0.12) / WIDTH + (0.02 if place else 0.0)
            axes = part.add_axes((left, _TEXT / height, _SIDE / WIDTH, _SIDE / height))
            low, high = np.percentile(one.image, (0.5, 99.5))
            name = "query" if one.similarity is None else f"{place}: {one.similarity:.2f}"
            figures.draw_panel(axes, one.image, float(low), float(high), name, _colour(query, one))
            text = "labels not known" if one.findings is None else ", ".join(one.findings) or "none of these findings"
            lines = textwrap.wrap(text, _SHORT, max_lines=3, placeholder=" ...")
            part.text(left, (_TEXT - 0.06) / height, "\n".join(lines), va="top", fontsize=8, parse_math=False)
    return save_png(figure, path)


def _colour(query: Found, one: Found) -> str:
    if one.similarity is None or query.findings is None or one.findings is None:
        return figures.NEUTRAL
    mine, theirs = set(query.findings), set(one.findings)
    return figures.RIGHT if mine & theirs or not (mine or theirs) else figures.WRONG
