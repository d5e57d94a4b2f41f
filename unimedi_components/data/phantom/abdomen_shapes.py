# SPDX-License-Identifier: Apache-2.0
"""Canvas and shapes of the abdominal phantom; a shape is a depth in millimetres, positive inside."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .geometry import Box, FloatArray, Grid, separable

Curve = Sequence[Sequence[float]]
#: Where organs lie in mm of the reference body. Rows of curves are z, y, x, radius; of plates z, y and x of the start,
#: y and x of the end, half thickness. Tubes come by priority, with the deviations of their place (z, y, x) and calibre.
TABLES: dict[str, Any] = json.loads(Path(__file__).with_name("abdomen.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Varied:
    """Draws of one patient, clipped to two standard deviations so that no organ leaves its place."""

    rng: np.random.Generator

    def normal(self, deviation: float) -> float:
        return deviation * min(max(float(self.rng.standard_normal()), -2.0), 2.0)

    def factor(self, deviation: float) -> float:
        return 1.0 + self.normal(deviation)

    def shift(self, z: float, y: float, x: float) -> npt.NDArray[np.float64]:
        """A displacement (z, y, x) with these deviations in mm."""
        return np.array([self.normal(deviation) for deviation in (z, y, x)])


@dataclass
class Canvas:
    """A volume being painted, in millimetres of a reference body; the grid carries the patient's own size.

    The origin lies between the iliac crests (L4), x to the patient's left, y to the back, z to the head.

    Args:
        hu: (nz, ny, nx) Hounsfield units without noise.
        organs: (nz, ny, nx) uint8, number of the organ last painted, 0 for none.
        warp: three waves that bend all curves a little, rows of (amplitude z, y, x, wave number z, y, x, phase).
    """

    grid: Grid
    hu: FloatArray
    organs: npt.NDArray[np.uint8]
    warp: npt.NDArray[np.float64]

    def axes(self, box: Box) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Coordinates z (nz, 1, 1), y (ny, 1) and x (nx,) of the box."""
        return self.grid.z[box[0], None, None], self.grid.y[box[1], None], self.grid.x[box[2]]

    def paint(self, box: Box, share: FloatArray, value: float | FloatArray, organ: int = 0) -> None:
        """Mix ``value`` into the box; where an organ fills more than half of a voxel the voxel becomes its own."""
        view = self.hu[box]
        view += share * (value - view)
        if organ:
            self.organs[box][share > 0.5] = organ

    def fill(self, box: Box, depth: FloatArray, value: float | FloatArray, organ: int = 0) -> None:
        """`paint` with an edge one pixel wide."""
        self.paint(box, inside(depth, self.grid.spacing[2]), value, organ)

    def bend(self, points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Move points (N, 3) along the patient's waves."""
        phase = points @ self.warp[:, 3:6].T + self.warp[:, 6]
        return points + np.sin(phase) @ self.warp[:, :3]

    def sweep(
        self, curve: Curve | npt.NDArray[np.float64], squash: Sequence[float] = (1.0, 1.0, 1.0)
    ) -> tuple[Box, FloatArray]:
        """Depth below the surface of a ball of changing radius that moves along a smooth curve.

        Args:
            curve: corners (z, y, x, radius) in mm.
            squash: factors (z, y, x) on the ball's half axes.

        Returns:
            Index box and the depth inside it, at least one pixel below 0 outside.
        """
        corners = np.array(curve, np.float64)
        corners[:, :3] = self.bend(corners[:, :3])
        balls = _smooth(corners)
        stretch = np.array(squash)
        pixel = self.grid.spacing[2]
        reach = (balls[:, 3:] + pixel) * stretch
        low, high = (balls[:, :3] - reach).min(axis=0), (balls[:, :3] + reach).max(axis=0)
        box = self.grid.box(*((float(a), float(b)) for a, b in zip(low, high, strict=True)))
        z, y, x = (self.grid.z[box[0]], self.grid.y[box[1]], self.grid.x[box[2]])
        depth = np.full((len(z), len(y), len(x)), -pixel, np.float32)
        for *centre, radius in balls.astype(np.float32):
            parts, terms = [], []
            for axis, middle, factor in zip((z, y, x), centre, stretch, strict=True):
                span = (radius + np.float32(pixel)) * np.float32(factor)
                part = slice(*np.searchsorted(axis, (middle - span, middle + span)))
                parts.append(part)
                terms.append(((axis[part] - middle) / np.float32(factor)) ** 2)
            distance = np.sqrt(terms[0][:, None, None] + terms[1][:, None] + terms[2])
            view = depth[tuple(parts)]
            np.maximum(view, radius - distance, out=view)
        return box, depth

    def ball(self, centre: npt.NDArray[np.float64], half: tuple[float, float, float]) -> tuple[Box, FloatArray]:
        """Depth in an ellipsoid with the given half axes (z, y, x)."""
        middle = self.bend(np.asarray(centre)[None])[0]
        box = self.grid.box(*((c - 1.25 * h, c + 1.25 * h) for c, h in zip(middle, half, strict=True)))
        z, y, x = (((a - np.float32(c)) / np.float32(h)) for a, c, h in zip(self.axes(box), middle, half, strict=True))
        return box, (1.0 - np.sqrt(z * z + y * y + x * x)) * np.float32(np.mean(half))

    def sheet(self, levels: Curve) -> tuple[Box, FloatArray]:
        """Depth in a plate whose cut through each slice is a straight line of some thickness.

        ``levels``: rows (z, y start, x start, y end, x end, half thickness) by increasing z.
        """
        table = np.array(levels, np.float64)
        table[:, 1:3] = self.bend(table[:, :3])[:, 1:]
        table[:, 3:5] = self.bend(table[:, [0, 3, 4]])[:, 1:]
        thick = float(table[:, 5].max()) + 3.0
        ends = [(table[:, [i, i + 2]].min() - thick, table[:, [i, i + 2]].max() + thick) for i in (1, 2)]
        box = self.grid.box((table[0, 0], table[-1, 0]), *ends)
        z, y, x = self.axes(box)
        columns = (np.interp(z, table[:, 0], table[:, i]).astype(np.float32) for i in range(1, 6))
        y0, x0, y1, x1, half = columns
        along = ((y - y0) * (y1 - y0) + (x - x0) * (x1 - x0)) / ((y1 - y0) ** 2 + (x1 - x0) ** 2 + 1e-3)
        along = np.clip(along, 0.0, 1.0)
        return box, half - np.hypot(y - y0 - along * (y1 - y0), x - x0 - along * (x1 - x0))


def _smooth(corners: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Cut the corners twice (Chaikin), then place a ball at every 0.45 of the smallest radius."""
    for _ in range(2):
        first, second = corners[:-1], corners[1:]
        cut = np.stack((0.75 * first + 0.25 * second, 0.25 * first + 0.75 * second), axis=1).reshape(-1, 4)
        corners = np.concatenate((corners[:1], cut, corners[-1:]))
    steps = np.linalg.norm(np.diff(corners[:, :3], axis=0), axis=1)
    length = np.concatenate(([0.0], np.cumsum(steps)))
    count = max(int(length[-1] / (0.45 * corners[:, 3].min())), 2)
    at = np.linspace(0.0, length[-1], count)
    return np.stack([np.interp(at, length, corners[:, i]) for i in range(4)], axis=1)


def inside(depth: FloatArray, width: float) -> FloatArray:
    """Fraction of a voxel inside: a linear edge ``width`` mm wide, half at depth 0."""
    return np.clip(depth * np.float32(1.0 / width) + np.float32(0.5), 0.0, 1.0)


def rounded(first: FloatArray, second: FloatArray, radius: float) -> FloatArray:
    """Intersection of two depths whose edge is rounded off over ``radius`` mm."""
    blend = np.clip(0.5 + (second - first) * np.float32(0.5 / radius), 0.0, 1.0)
    return second + blend * (first - second) - np.float32(radius) * blend * (1.0 - blend)


def wall_depth(grid: Grid, box: Box, y: FloatArray, half_y: FloatArray, half_x: FloatArray) -> FloatArray:
    """Depth below a trunk-shaped wall centred at ``y``, about true to scale near the wall and far from it."""
    field = separable(grid, box, (y, 0.0), (half_y, half_x), 2.4)
    return (1.0 - field ** np.float32(1 / 2.4)) * np.minimum(half_y, half_x)[box[0], None, None]
