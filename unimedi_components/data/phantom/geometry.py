# SPDX-License-Identifier: Apache-2.0
"""Grids in millimetres and the phantoms' painting primitives: separable fields, ellipsoids, splats, noise."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Grid:
    """A regular grid of voxel centres, array order (z, y, x).

    Patient coordinates in mm: x grows to the patient's left, y to the back, z to the head, so that an axial
    slice drawn with rows y and columns x is in radiological convention.

    Args:
        shape: number of voxels (nz, ny, nx).
        origin: centre of voxel (0, 0, 0) in mm (z, y, x).
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]

    def _axis(self, i: int) -> FloatArray:
        return (self.origin[i] + self.spacing[i] * np.arange(self.shape[i])).astype(np.float32)

    @cached_property
    def z(self) -> FloatArray:
        return self._axis(0)

    @cached_property
    def y(self) -> FloatArray:
        return self._axis(1)

    @cached_property
    def x(self) -> FloatArray:
        return self._axis(2)

    @cached_property
    def noise_axis(self) -> int:
        """The coarser of the first two axes, along which noise need not be smooth: 0 for CT, 1 to project."""
        return int(np.argmax(self.spacing[:2]))

    @cached_property
    def voxel_volume(self) -> float:
        return float(np.prod(self.spacing))

    def span(self, axis: int, low: float, high: float) -> slice:
        """Index range of the voxel centres in [low, high] mm along an axis (0 z, 1 y, 2 x); may be empty."""
        step, start, n = self.spacing[axis], self.origin[axis], self.shape[axis]
        first = min(max(int(np.ceil((low - start) / step)), 0), n)
        last = min(max(int(np.floor((high - start) / step)) + 1, first), n)
        return slice(first, last)

    def box(self, z: tuple[float, float], y: tuple[float, float], x: tuple[float, float]) -> Box:
        """Index box of the voxel centres inside three ranges in mm."""
        return self.span(0, *z), self.span(1, *y), self.span(2, *x)


def mix(view: FloatArray, share: FloatArray, value: float | FloatArray) -> None:
    """``view`` becomes ``value`` where share is 1."""
    view += share * (value - view)


def soft(field: FloatArray, steepness: float) -> FloatArray:
    """Fraction of a voxel inside ``field < 1``: a linear edge, half at the boundary. Works in place."""
    np.subtract(1.0, field, out=field)
    field *= steepness
    field += 0.5
    return np.clip(field, 0.0, 1.0, out=field)


def separable(
    grid: Grid,
    box: Box,
    centre: tuple[float | FloatArray, float | FloatArray],
    half: tuple[float | FloatArray, float | FloatArray],
    power: float = 2.0,
) -> FloatArray:
    """Superellipse field |(y-cy)/b|^p + |(x-cx)/a|^p; centre and half axes may change from slice to slice.

    Args:
        centre: (cy, cx) in mm, each a number or an array over all slices of the grid (nz,).
        half: (b, a) in mm, likewise; clamped to 0.5 mm.

    Returns:
        The field inside the box, below 1 inside the superellipse.
    """
    z, y, x = box

    def term(axis: FloatArray, mid: float | FloatArray, radius: float | FloatArray) -> FloatArray:
        mid_z, radius_z = (np.broadcast_to(np.float32(v), grid.z.shape)[z, None] for v in (mid, radius))
        ratio = np.abs(axis[None, :] - mid_z) / np.maximum(radius_z, np.float32(0.5))
        return ratio * ratio if power == 2.0 else ratio ** np.float32(power)

    return term(grid.y[y], centre[0], half[0])[:, :, None] + term(grid.x[x], centre[1], half[1])[:, None, :]


def ellipsoid(
    grid: Grid, centre: tuple[float, float, float], half: tuple[float, float, float], margin: float = 1.25
) -> tuple[Box, FloatArray]:
    """Index box around an ellipsoid and its field, below 1 inside; ``margin`` leaves room for soft edges."""
    box = grid.box(*((c - margin * h, c + margin * h) for c, h in zip(centre, half, strict=True)))
    axes = (grid.z[box[0]], grid.y[box[1]], grid.x[box[2]])
    z, y, x = (((a - np.float32(c)) / np.float32(h)) ** 2 for a, c, h in zip(axes, centre, half, strict=True))
    return box, z[:, None, None] + y[None, :, None] + x[None, None, :]


def splat(grid: Grid, points: FloatArray, volumes: FloatArray) -> tuple[Box, FloatArray]:
    """Index box that holds many small parts, as of thin tubes, and the fraction of each voxel that they fill.

    ``points``: positions (z, y, x) in mm, (N, 3). ``volumes``: of each part in cubic mm, (N,).
    """
    axes = [
        np.rint((points[:, i] - np.float32(grid.origin[i])) / np.float32(grid.spacing[i])).astype(np.int32)
        for i in range(3)
    ]
    inside = np.logical_and.reduce([(v >= 0) & (v < n) for v, n in zip(axes, grid.shape, strict=True)])
    if not inside.any():
        return (slice(0, 0), slice(0, 0), slice(0, 0)), np.zeros((0, 0, 0), np.float32)
    z, y, x = (v[inside] for v in axes)
    box = tuple(slice(int(v.min()), int(v.max()) + 1) for v in (z, y, x))
    shape = tuple(s.stop - s.start for s in box)
    flat = ((z - box[0].start) * shape[1] + (y - box[1].start)) * shape[2] + (x - box[2].start)
    filled = np.bincount(flat, volumes[inside] / grid.voxel_volume, minlength=int(np.prod(shape)))
    return (box[0], box[1], box[2]), np.minimum(filled, 1.0).astype(np.float32).reshape(shape)


_BANK_SIDE = 768
_banks: dict[str, FloatArray] = {}


def noise(rng: np.random.Generator, shape: tuple[int, ...], kind: str = "grain", axis: int = 0) -> FloatArray:
    """Unit-variance noise cut at random places out of a bank that every process makes once from a fixed seed.

    Args:
        shape: (H, W) or (D, H, W), H and W below 768.
        kind: ``grain`` (correlated over about a pixel) or ``cloud`` (smooth over about ten pixels).
        axis: the axis of a volume along which neighbouring slices are independent, 0 or 1.
    """
    if axis == 1:
        return noise(rng, (shape[1], shape[0], shape[2]), kind).transpose(1, 0, 2)
    if 0 in shape:
        return np.zeros(shape, np.float32)
    if kind not in _banks:
        white = np.random.default_rng(20231124).standard_normal((_BANK_SIDE, _BANK_SIDE), dtype=np.float32)
        sigma = 0.6 if kind == "grain" else 5.0
        frequency = np.fft.fftfreq(_BANK_SIDE)[:, None] ** 2 + np.fft.rfftfreq(_BANK_SIDE)[None, :] ** 2
        smooth = np.fft.irfft2(np.fft.rfft2(white) * np.exp(-2 * (np.pi * sigma) ** 2 * frequency))
        _banks[kind] = (smooth / smooth.std()).astype(np.float32)
    bank = _banks[kind]
    height, width = shape[-2:]
    count = shape[0] if len(shape) == 3 else 1
    tops = rng.integers(0, _BANK_SIDE - height + 1, count)
    lefts = rng.integers(0, _BANK_SIDE - width + 1, count)
    if len(shape) == 2:
        return bank[tops[0] : tops[0] + height, lefts[0] : lefts[0] + width].copy()
    return np.stack([bank[t : t + height, u : u + width] for t, u in zip(tops, lefts, strict=True)])
