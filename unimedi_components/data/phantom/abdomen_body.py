# SPDX-License-Identifier: Apache-2.0
"""What surrounds the labelled abdominal organs: trunk, lung bases, heart, bones, muscles and bowel."""

import numpy as np

from .abdomen_shapes import Canvas, Varied, inside, wall_depth
from .geometry import Box, FloatArray, Grid, noise, separable

AIR, LUNG, FAT, MUSCLE, GAS = -1000.0, -850.0, -100.0, 58.0, -900.0
_SIDES = (-1.0, 1.0)
_HEIGHTS = (-210.0, -150.0, -100.0, -50.0, 0.0, 50.0, 100.0, 150.0, 200.0, 250.0)
_OUTLINE = {
    "core_a": (152, 158, 158, 148, 134, 133, 139, 143, 142, 138),
    "core_b": (100, 102, 102, 98, 92, 92, 97, 101, 102, 101),
    "cavity_a": (40, 58, 78, 106, 116, 120, 126, 130, 129, 125),
    "cavity_b": (38, 54, 64, 66, 66, 70, 76, 82, 85, 86),
    "cavity_y": (5, -4, -12, -16, -18, -17, -14, -8, -4, 0),
    "spine_y": (70, 76, 74, 56, 35, 33, 38, 44, 50, 55),
}
_VERTEBRA = 34.0


class Trunk:
    """Outlines of the trunk per slice, and the domes of the diaphragm.

    Args:
        grid: voxel grid in reference mm.
        fat: thickness of the subcutaneous fat in mm.

    Attributes:
        core_a: half width of the trunk without its fat, (nz,); ``core_b`` its half depth.
        cavity_a: half width inside the muscles or ribs; ``cavity_b`` its half depth, ``cavity_y`` its centre.
        spine_y: centre of the vertebral bodies.
    """

    def __init__(self, grid: Grid, varied: Varied, fat: float) -> None:
        def column(name: str) -> FloatArray:
            return np.interp(grid.z, _HEIGHTS, _OUTLINE[name]).astype(np.float32)

        self.grid, self.fat = grid, fat
        self.core_a, self.core_b = column("core_a"), column("core_b")
        self.cavity_a, self.cavity_b, self.cavity_y = column("cavity_a"), column("cavity_b"), column("cavity_y")
        self.spine_y = column("spine_y")
        self.domes = {-1.0: 206.0 + varied.normal(5.0), 1.0: 196.0 + varied.normal(4.0)}

    def cavity(self, box: Box) -> FloatArray:
        """Depth below the inner surface of the abdominal wall."""
        return wall_depth(self.grid, box, self.cavity_y, self.cavity_b, self.cavity_a)

    def diaphragm(self, box: Box) -> FloatArray:
        """Height of the diaphragm, (ny, nx) mm: two domes with a saddle between them."""
        y, x = self.grid.y[box[1], None], self.grid.x[box[2]]
        along = 68.0 * np.abs((y + 20.0) / 95.0) ** 2.2
        heights = []
        for side, top in self.domes.items():
            outwards = (x - side * 66.0) * side
            across = 52.0 * np.abs(np.where(outwards > 0, outwards, 0.6 * outwards) / 72.0) ** 2.4
            heights.append(top - across - along)
        return np.maximum(heights[0], heights[1]).astype(np.float32)

    def below(self, box: Box) -> FloatArray:
        """Depth below the diaphragm."""
        return (self.diaphragm(box)[None] - self.grid.z[box[0], None, None]) * np.float32(0.8)


def paint_body(canvas: Canvas, trunk: Trunk, varied: Varied) -> None:
    """Paint everything that carries no label, from the skin inwards."""
    _paint_wall(canvas, trunk)
    _paint_chest(canvas, trunk)
    _paint_ribs(canvas, trunk, varied)
    _paint_spine(canvas, trunk)
    _paint_muscles(canvas)
    _paint_buttocks(canvas)
    _paint_pelvis(canvas)
    _paint_vessels(canvas, varied)
    _paint_colon(canvas, varied)
    _paint_small_bowel(canvas, varied)


def _whole(canvas: Canvas) -> Box:
    nz, ny, nx = canvas.grid.shape
    return slice(0, nz), slice(0, ny), slice(0, nx)


def _paint_wall(canvas: Canvas, trunk: Trunk) -> None:
    """Skin, subcutaneous fat, muscle wall and the fat inside it."""
    grid, box = canvas.grid, _whole(canvas)
    width = grid.spacing[2]
    layers = (
        (trunk.core_b + 0.8 * trunk.fat + 2.0, trunk.core_a + trunk.fat + 2.0, np.zeros_like(grid.z), 20.0),
        (trunk.core_b + 0.8 * trunk.fat, trunk.core_a + trunk.fat, np.zeros_like(grid.z), FAT),
        (trunk.core_b, trunk.core_a, np.zeros_like(grid.z), MUSCLE),
        (trunk.cavity_b, trunk.cavity_a, trunk.cavity_y, FAT),
    )
    for b, a, y, value in layers:
        field = separable(grid, box, (y, 0.0), (b, a), 2.4)
        edge = (0.5 * (a + b) / 2.4)[:, None, None]
        canvas.paint(box, inside((1.0 - field) * edge, width), value)


def _paint_chest(canvas: Canvas, trunk: Trunk) -> None:
    """Lung bases above the diaphragm, the heart between them."""
    lowest = min(trunk.domes.values()) - 125.0
    box = canvas.grid.box((lowest, 1e4), (-100.0, 100.0), (-135.0, 135.0))
    depth = np.minimum(trunk.cavity(box), -trunk.below(box))
    _, y, x = canvas.axes(box)
    depth = np.minimum(depth, np.abs(x - 2.0) - 27.0 + 0.06 * y)
    canvas.fill(box, depth, LUNG)
    box, depth = canvas.ball(np.array((trunk.domes[1.0] + 38.0, -32.0, 20.0)), (40.0, 50.0, 66.0))
    canvas.fill(box, np.minimum(depth, -trunk.below(box)), 130.0)


def _paint_ribs(canvas: Canvas, trunk: Trunk, varied: Varied) -> None:
    """Oblique lower ribs in the wall of the chest, cartilage towards the front."""
    grid, box = canvas.grid, canvas.grid.box((35.0, 1e4), (-125.0, 125.0), (-160.0, 160.0))
    depth = -trunk.cavity(box)
    z, y, x = canvas.axes(box)
    angle = np.arctan2(np.abs(x) / 130.0, (y + 8.0) / 84.0) / np.pi
    phase = (z + 95.0 * angle + varied.normal(8.0)) / 27.0
    offset = np.abs(phase - np.rint(phase)) * 27.0
    free = z - 45.0 - 95.0 * np.clip(angle - 0.42, 0.0, 1.0)
    bone = np.minimum(np.minimum(depth - 1.0, 9.0 - depth), np.minimum(6.0 - offset, free))
    value = np.where(angle < 0.72, 450.0, 110.0).astype(np.float32)
    canvas.paint(box, inside(bone.astype(np.float32), grid.spacing[2]), value)


def _paint_spine(canvas: Canvas, trunk: Trunk) -> None:
    """Vertebral bodies with discs, canal, arches and processes, and the sacrum below them."""
    grid = canvas.grid
    box = grid.box((-125.0, 1e4), (0.0, 130.0), (-75.0, 75.0))
    z = grid.z
    phase = np.abs((z / _VERTEBRA) % 1.0 - 0.5)
    disc = np.clip((phase - 0.38) * 20.0, 0.0, 1.0) * (z > -12.0)
    half_x = np.interp(z, (-125, -60, -18, -10, 250), (13.0, 44.0, 54.0, 25.0, 19.0)).astype(np.float32)
    half_y = np.interp(z, (-125, -60, -12, 250), (7.0, 13.0, 17.5, 16.0)).astype(np.float32)
    field = separable(grid, box, (trunk.spine_y, 0.0), (half_y, half_x), 2.4)
    cortex = np.clip((field - 0.72) * 4.0, 0.0, 1.0)
    value = 190.0 + 180.0 * cortex
    value += disc[box[0], None, None] * (85.0 - value)
    canvas.fill(box, (1.0 - field) * 8.0, value.astype(np.float32))
    arch = (z > -60.0) * np.clip(1.6 - 3.0 * phase, 0.3, 1.0)
    parts = ((24.0, 0.0, 9.0, 17.0, 330.0), (23.0, 0.0, 7.0, 9.0, 30.0), (41.0, 0.0, 13.0, 4.0, 340.0))
    for y, x, b, a, level in (*parts, *((24.0, side * 30.0, 4.0, 13.0, 330.0) for side in _SIDES)):
        field = separable(grid, box, (trunk.spine_y + y, x), (b, a))
        gain = arch if level > 100.0 else (z > -60.0)
        canvas.paint(box, inside((1.0 - field) * 6.0, 3.0) * gain[box[0], None, None].astype(np.float32), level)


def _paint_muscles(canvas: Canvas) -> None:
    """Psoas on both sides of the spine and the crura of the diaphragm beside the aorta."""
    for side in _SIDES:
        psoas = ((105, 40, 28, 8), (60, 40, 39, 16), (0, 33, 48, 21), (-60, 6, 62, 19), (-130, -24, 82, 14))
        canvas.fill(*canvas.sweep(tuple((z, y, side * x, r) for z, y, x, r in psoas)), 62.0)
        crus = ((190, 24, 5 + side * 20, 4), (130, 22, 5 + side * 17, 4), (80, 20, 3 + side * 14, 3))
        canvas.fill(*canvas.sweep(crus), 62.0)


def _paint_buttocks(canvas: Canvas) -> None:
    """Fat between the muscles of the buttocks and beside the rectum."""
    if canvas.grid.z[0] > -40.0:
        return
    for side in _SIDES:
        stripe = (
            (-235, 66, 60, 96, 16, 5),
            (-150, 70, 104, 98, 22, 3),
            (-95, 62, 112, 98, 56, 2.5),
            (-45, 50, 116, 90, 74, 2),
        )
        other = ((-235, -78, 30, -30, 112, 4), (-180, -74, 58, -20, 138, 3), (-130, -60, 92, 20, 140, 2))
        for plate in (stripe, other):
            levels = tuple((z, y, side * x, v, side * u, half) for z, y, x, v, u, half in plate)
            canvas.fill(*canvas.sheet(levels), -85.0)
        canvas.fill(
            *canvas.sweep(((-235, 64, side * 28, 15), (-195, 58, side * 34, 15), (-165, 52, side * 38, 8))), -90.0
        )


def _paint_pelvis(canvas: Canvas) -> None:
    """Iliac wings, acetabula, femoral heads and shafts, pubic and ischial rami."""
    if canvas.grid.z[0] > 5.0:
        return
    for side in _SIDES:
        wing = (
            (-122, 12, 90, -22, 94, 9),
            (-90, 46, 66, -40, 106, 7),
            (-60, 66, 50, -46, 118, 5),
            (-28, 60, 54, -34, 124, 5),
            (4, 34, 84, 4, 110, 5),
        )
        levels = tuple((z, y, side * x, v, side * u, half) for z, y, x, v, u, half in wing)
        box, depth = canvas.sheet(levels)
        canvas.fill(box, depth, 240.0 + 260.0 * np.clip(1.0 - depth / 4.0, 0.0, 1.0))
        box, depth = canvas.ball(np.array((-140.0, -4.0, side * 86.0)), (36.0, 36.0, 34.0))
        canvas.fill(box, depth, 420.0)
        canvas.fill(
            *canvas.sweep(((-215, 2, side * 126, 15), (-165, 4, side * 126, 19), (-142, -2, side * 92, 15))), 330.0
        )
        box, depth = canvas.ball(np.array((-142.0, -4.0, side * 92.0)), (28.0, 28.0, 29.0))
        canvas.fill(box, depth, 60.0)
        box, depth = canvas.ball(np.array((-142.0, -4.0, side * 92.0)), (25.0, 25.0, 25.0))
        canvas.fill(box, depth, 290.0 + 190.0 * np.clip(1.0 - depth / 5.0, 0.0, 1.0))
        canvas.fill(
            *canvas.sweep(((-140, -36, side * 72, 10), (-160, -60, side * 32, 8), (-172, -64, side * 9, 10))), 380.0
        )
        canvas.fill(
            *canvas.sweep(((-150, 22, side * 76, 13), (-185, 34, side * 62, 14), (-215, 20, side * 52, 11))), 360.0
        )


def _paint_vessels(canvas: Canvas, varied: Varied) -> None:
    """Iliac vessels and the superior mesenteric pair: their labels end at the bifurcation and the confluence."""
    blood = 150.0 * varied.factor(0.05)
    canvas.fill(*canvas.sweep(((114, -16, -2, 6.5), (85, -24, -4, 6), (50, -30, -6, 5.5))), blood)
    canvas.fill(*canvas.sweep(((112, -2, 10, 4), (85, -18, 9, 4), (45, -26, 6, 3.5))), blood)
    for side in _SIDES:
        artery = ((6, 4, 5, 6.5), (-25, 12, 5 + 22 * side, 6), (-85, 8, 50 * side, 5.5), (-140, -48, 66 * side, 5))
        vein = ((4, 8, -13, 8), (-30, 22, -6 + 24 * side, 7.5), (-85, 18, 48 * side, 7), (-140, -38, 60 * side, 6))
        canvas.fill(*canvas.sweep(vein), 0.85 * blood)
        canvas.fill(*canvas.sweep(artery), blood)


def _hollow(canvas: Canvas, curve: np.ndarray, wall: float, content: float, gas: float) -> None:
    """A loop of bowel: wall, content, and a bubble of gas that rises to the front."""
    canvas.fill(*canvas.sweep(curve), wall)
    inner = curve - (0.0, 0.0, 0.0, 2.5)
    box, depth = canvas.sweep(inner)
    canvas.fill(box, depth, content)
    if gas > 0.0:
        bubble = inner * (1.0, 1.0, 1.0, gas) - np.array((0.0, 1.0, 0.0, 0.0)) * (inner[:, 3:] * (1.0 - gas))
        canvas.fill(*canvas.sweep(bubble), GAS)


def _paint_colon(canvas: Canvas, varied: Varied) -> None:
    """Ascending, transverse and descending colon, sigmoid and rectum, each with its own content."""
    drop = varied.normal(14.0)
    parts = (
        ((-60, -20, -78, 20), (-35, 0, -92, 22), (5, 14, -95, 20), (40, 16, -95, 19), (60, -4, -92, 18)),
        ((60, -8, -90, 17), (52, -60, -62, 17), (36 + drop, -76, -20, 18), (38 + drop, -76, 25, 17), (62, -68, 66, 16)),
        (
            (62, -66, 68, 16),
            (92, -34, 96, 15),
            (112, 2, 106, 15),
            (80, 24, 106, 14),
            (10, 18, 100, 13),
            (-40, 8, 86, 13),
        ),
        (
            (-40, 8, 86, 13),
            (-85, 22, 58, 14),
            (-82, -12, 22, 14),
            (-105, 30, 4, 15),
            (-140, 50, 0, 16),
            (-200, 42, 0, 14),
        ),
    )
    for part in parts:
        curve = np.array(part, np.float64)
        curve[:, :3] += varied.shift(4.0, 4.0, 3.0)
        curve[:, 3] *= varied.factor(0.10)
        gas = float(varied.rng.choice((0.0, 0.55, 0.8)))
        _hollow(canvas, curve, 75.0, float(varied.rng.uniform(0.0, 45.0)), gas)


def _paint_small_bowel(canvas: Canvas, varied: Varied) -> None:
    """Coils of small bowel in the middle of the abdomen and in the pelvis."""
    for _ in range(14):
        low, high = (-115.0, 56.0)
        start = varied.rng.uniform((low, -62.0, -62.0), (high, -24.0, 72.0))
        heading = varied.rng.normal(0.0, 1.0, 3) * (0.8, 0.5, 1.2)
        points = [start]
        for _ in range(5):
            heading = 0.55 * heading + varied.rng.normal(0.0, 1.0, 3) * (0.8, 0.6, 1.1)
            step = points[-1] + 26.0 * heading / np.linalg.norm(heading)
            points.append(step.clip((low - 8.0, -70.0, -66.0), (high + 8.0, -18.0, 72.0)))
        radius = varied.rng.uniform(10.5, 14.0)
        curve = np.column_stack((np.array(points), np.full(6, radius)))
        curve[:, 3] *= 1.0 - 0.25 * np.abs(curve[:, 2]) / 90.0 * (curve[:, 0] < -60.0)
        gas = 0.6 if varied.rng.random() < 0.25 else 0.0
        _hollow(canvas, curve, 95.0, float(varied.rng.uniform(5.0, 45.0)), gas)


def grain(rng: np.random.Generator, hu: FloatArray, level: float) -> FloatArray:
    """Add reconstruction noise of a standard deviation in HU to everything but the air around."""
    noisy = noise(rng, hu.shape)
    noisy *= np.float32(level)
    noisy *= hu > -990.0
    noisy += hu
    return noisy
