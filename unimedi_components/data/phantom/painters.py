# SPDX-License-Identifier: Apache-2.0
"""The shapes of the findings: each painter yields parts (index box, share of the lung to replace, new HU)."""

from collections.abc import Callable, Iterator

import numpy as np

from .anatomy import SIDES, diaphragm
from .findings import Finding
from .geometry import Box, FloatArray, ellipsoid, noise, separable, soft
from .organs import Scene
from .vessels import hilum

Part = tuple[Box, FloatArray, float]


def _region(scene: Scene, side: str, low: float = -1e4, high: float = 1e4) -> Box:
    """The chest box on one side between two heights."""
    columns, x = scene.side_slice(side), scene.chest[2]
    start = x.start + (columns.start or 0)
    stop = x.stop if columns.stop is None else x.start + columns.stop
    return scene.grid.span(0, low, high), scene.chest[1], slice(start, stop)


def _place(scene: Scene, side: str, zone: str, radius: float, rng: np.random.Generator) -> tuple[float, float, float]:
    """A centre (z, y, x) in the lung of that side and zone with as much room as can be found around it."""
    grid, patient = scene.grid, scene.patient
    low, high = patient.zone_range(zone, side)
    low = max(low, patient.dome(side) + 0.4 * radius)
    margin = min(0.5 * radius, 0.3 * (high - low))
    box = _region(scene, side, low + margin, high - margin)
    if box[0].stop == box[0].start:
        box = _region(scene, side, low - grid.spacing[0], high + grid.spacing[0])
    inner = scene.local(box)
    index = np.argwhere(scene.lung[inner][:, ::2, ::2] > 0.9) * (1, 2, 2)
    # Off the mediastinum and the rim of the cage, where a film would hide it.
    off = np.abs(grid.x[box[2]] - patient.shift)[index[:, 2]] / patient.cage[0]
    clear = (off > 0.42) & (off < 0.82)
    index = index[clear] if clear.any() else index
    if not len(index):
        return (low + high) / 2, 0.0, SIDES[side] * 0.5 * patient.cage[0]
    index = index[rng.integers(0, len(index), 48)] + [s.start for s in inner]
    room = np.zeros(len(index))
    for axis in range(3):
        for sign in (-1, 1):
            offset = np.zeros(3, np.int64)
            offset[axis] = sign * max(round(0.9 * radius / grid.spacing[axis]), 1)
            at = np.clip(index + offset, 0, np.array(scene.lung.shape) - 1)
            room += scene.lung[at[:, 0], at[:, 1], at[:, 2]]
    z, y, x = index[int(np.argmax(room))] + [s.start for s in scene.chest]
    return float(grid.z[z]), float(grid.y[y]), float(grid.x[x])


def _nodule(scene: Scene, f: Finding, rng: np.random.Generator, erect: bool) -> Iterator[Part]:
    for side in f.sides:
        radius = 0.5 * (f.size or 20.0)
        centre = _place(scene, side, f.zone or "middle", radius, rng)
        half = radius * rng.uniform(0.92, 1.08, 3)
        box, ball = ellipsoid(scene.grid, centre, (half[0], half[1], half[2]), 1.5)
        yield _clip(scene, box, soft(ball, 0.5 * radius / scene.grid.spacing[2] + 0.5), 70.0)


def _clip(scene: Scene, box: Box, share: FloatArray, value: float) -> Part:
    """Cut a part to the chest box."""
    inner = scene.local(box)
    start = [i.start + c.start - b.start for i, c, b in zip(inner, scene.chest, box, strict=True)]
    z, y, x = (slice(s, s + i.stop - i.start) for s, i in zip(start, inner, strict=True))
    kept = tuple(slice(i.start + c.start, i.stop + c.start) for i, c in zip(inner, scene.chest, strict=True))
    return (kept[0], kept[1], kept[2]), share[z, y, x], value


def _consolidation(scene: Scene, f: Finding, rng: np.random.Generator, erect: bool) -> Iterator[Part]:
    height, width = {"small": (16.0, 27.0), "moderate": (24.0, 38.0), "large": (38.0, 52.0)}[f.severity]
    for side in f.sides:
        centre = _place(scene, side, f.zone or "middle", height, rng)
        half = np.array((height, width * 1.05, width * 0.95)) * rng.uniform(0.9, 1.1, 3)
        box, shape = ellipsoid(scene.grid, centre, (half[0], half[1], half[2]))
        box, shape, value = _clip(scene, box, shape, 35.0)
        shape += 0.16 * noise(rng, shape.shape, "cloud", scene.grid.noise_axis)
        yield box, 0.96 * soft(shape, 2.2), value


def _ground_glass(scene: Scene, f: Finding, rng: np.random.Generator, erect: bool) -> Iterator[Part]:
    count = {"small": 2, "moderate": 4, "large": 6}[f.severity]
    for side in f.sides:
        base = np.array(_place(scene, side, f.zone or "middle", 26.0, rng))
        for _ in range(count):
            centre = base + rng.normal(0.0, 1.0, 3) * (8.0, 26.0, 14.0) * (0.4 + 0.2 * count)
            half = np.array((17.0, 34.0, 27.0)) * rng.uniform(0.8, 1.25)
            box, shape = ellipsoid(scene.grid, (centre[0], centre[1], centre[2]), (half[0], half[1], half[2]))
            box, shape, _ = _clip(scene, box, shape, 0.0)
            shape += 0.22 * noise(rng, shape.shape, "cloud", scene.grid.noise_axis)
            yield box, 0.85 * soft(shape, 1.6), -400.0


def _effusion(scene: Scene, f: Finding, rng: np.random.Generator, erect: bool) -> Iterator[Part]:
    grid, patient, p = scene.grid, scene.patient, scene.profiles
    jitter = rng.uniform(-1.0, 1.0)
    for side in f.sides:
        dome = patient.dome(side)
        if erect:
            level = dome + {"small": -20.0, "moderate": 12.0, "large": 66.0}[f.severity] + 9.0 * jitter
            box = _region(scene, side, -1e4, level + 70.0)
            rim = np.minimum(scene.cage[scene.local(box)], 1.0)
            rim *= rim * rim
            rim *= 58.0
            rim += np.float32(level) - grid.z[box[0], None, None]
            yield box, np.clip(rim / 6.0 + 0.5, 0.0, 1.0), 12.0
            continue
        deep, high = {"small": (24.0, 0.24), "moderate": (40.0, 0.42), "large": (70.0, 0.72)}[f.severity]
        base = dome - 55.0
        run = (grid.z - base) / (dome + high * patient.lung_height - base)
        depth = (deep + 4.0 * jitter) * np.sqrt(np.clip(1.0 - run, 0.0, 1.0))
        box = _region(scene, side, -1e4, dome + high * patient.lung_height)
        front = separable(grid, box, (-depth, p.cage_x), (p.cage_b, p.cage_a), p.power)
        yield box, 1.0 - soft(front, 10.0), 12.0


def _pneumothorax(scene: Scene, f: Finding, rng: np.random.Generator, erect: bool) -> Iterator[Part]:
    grid, patient, p = scene.grid, scene.patient, scene.profiles
    top = patient.lung_height
    rim = {"small": 25.0, "moderate": 36.0, "large": 58.0}[f.severity] * rng.uniform(0.9, 1.1)
    squeeze = {"small": 0.08, "moderate": 0.16, "large": 0.30}[f.severity]
    for side in f.sides:
        box = _region(scene, side)
        if erect:
            start = {"small": 0.30, "moderate": 0.05, "large": -0.5}[f.severity]
            gap = rim * np.clip((grid.z / top - start) / (1.0 - start), 0.0, 1.0) ** 0.45
            gap += 60.0 * np.clip((grid.z - top + 2.6 * rim) / (2.0 * rim), 0.0, 1.0) ** 2
            edge = separable(grid, box, (0.0, p.cage_x), (p.cage_b - 0.7 * gap, p.cage_a - gap), p.power)
        else:
            middle, reach = {"small": (0.5, 0.30), "moderate": (0.5, 0.44), "large": (0.45, 0.8)}[f.severity]
            gap = 1.25 * rim * np.sqrt(np.clip(1.0 - ((grid.z / top - middle) / reach) ** 2, 0.0, 1.0))
            edge = separable(grid, box, (gap, p.cage_x), (p.cage_b, p.cage_a + 2.0), p.power)
        outside = 1.0 - soft(edge.copy(), 12.0)
        touched = (gap > 0.0)[box[0], None, None]
        yield box, outside * touched, -1000.0
        inside = (1.0 - outside) * (squeeze * touched)
        # The visceral pleura, seen as a thin line.
        inside += 0.45 * np.clip(1.0 - np.abs(edge - 0.97) * 14.0, 0.0, 1.0) * touched
        yield box, inside, -40.0


def _atelectasis(scene: Scene, f: Finding, rng: np.random.Generator, erect: bool) -> Iterator[Part]:
    grid, patient = scene.grid, scene.patient
    thick, bands, base = {"small": (9.0, 1, 8.0), "moderate": (11.0, 2, 14.0), "large": (14.0, 3, 26.0)}[f.severity]
    for side in f.sides:
        dome = patient.dome(side)
        z, y, x = _place(scene, side, f.zone or "lower", 14.0, rng)
        z = dome + 16.0 + 8.0 * rng.random() if f.zone == "lower" else z
        for i in range(bands):
            slope_x, slope_y = rng.uniform(0.05, 0.50) * SIDES[side], rng.uniform(-0.15, 0.15)
            box = _region(scene, side, z - 45.0, z + 60.0)
            rows, columns = grid.y[box[1]], grid.x[box[2]]
            plane = slope_x * (columns - x)[None, :] + slope_y * rows[:, None] + z + 17.0 * i
            away = np.abs(grid.z[box[0], None, None] - plane) / (0.5 * thick)
            along = ((rows - 0.5 * y) / (0.62 * patient.cage[1]))[:, None] ** 2
            across = ((columns / patient.cage[0] - 0.56 * SIDES[side]) / 0.40)[None, :] ** 2
            patch = np.clip(1.5 * (1.0 - along - across), 0.0, 1.0).astype(np.float32)
            yield box, 0.85 * soft(away.astype(np.float32), 1.0) * patch, 20.0
        if f.zone == "lower":
            box = _region(scene, side, dome - 26.0, dome + base + 6.0)
            floor = diaphragm(patient, side, grid.y[box[1]], grid.x[box[2]])
            above: FloatArray = ((grid.z[box[0], None, None] - floor[None]) / base).astype(np.float32)
            yield box, 0.9 * soft(above, 2.0), 20.0


def _edema(scene: Scene, f: Finding, rng: np.random.Generator, erect: bool) -> Iterator[Part]:
    grid, patient = scene.grid, scene.patient
    a, b = patient.cage
    strength = {"small": 0.26, "moderate": 0.36, "large": 0.48}[f.severity]
    for side in f.sides:
        z, y, x = hilum(patient, side)
        box = _region(scene, side)
        zz, yy, xx = (axis[s] for axis, s in zip((grid.z, grid.y, grid.x), box, strict=True))
        fall = [
            np.exp(-(((zz - z + 18.0) / 72.0) ** 2)),
            np.exp(-(((yy - y) / (0.9 * b)) ** 2)),
            np.exp(-(((xx - x) / (0.55 * a)) ** 2)),
        ]
        haze = fall[0][:, None, None] * (fall[1][:, None] * fall[2][None, :])[None]
        haze *= 1.0 + 0.22 * noise(rng, haze.shape, "cloud", scene.grid.noise_axis)
        edge = np.clip((scene.cage[scene.local(box)] - 0.55) * 3.0, 0.0, 1.0)
        if erect:
            lines = np.clip(np.abs(((zz / 11.0) % 1.0) - 0.5) * 6.0 - 2.0, 0.0, 1.0)[:, None, None]
        else:
            grating = [np.clip(np.abs(((v / 19.0) % 1.0) - 0.5) * 8.0 - 3.0, 0.0, 1.0) for v in (yy, xx)]
            lines = np.maximum(grating[0][:, None], grating[1][None, :])[None]
        lower = np.clip((0.6 * patient.lung_height - zz) / 40.0, 0.0, 1.0)[:, None, None]
        yield box, (strength * haze + 0.35 * strength * edge * lines * lower).astype(np.float32), -20.0


PAINTERS: dict[str, Callable[[Scene, Finding, np.random.Generator, bool], Iterator[Part]]] = {
    "nodule": _nodule,
    "consolidation": _consolidation,
    "ground_glass": _ground_glass,
    "effusion": _effusion,
    "pneumothorax": _pneumothorax,
    "atelectasis": _atelectasis,
    "edema": _edema,
}
