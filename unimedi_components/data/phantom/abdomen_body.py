# SPDX-License-Identifier: Apache-2.0
"""What surrounds the labelled abdominal organs: trunk, lung bases, heart, bones, muscles and bowel."""

import numpy as np

from .abdomen_shapes import TABLES, Canvas, Curve, Varied, inside, wall_depth
from .geometry import Box, FloatArray, Grid, noise, separable

AIR, LUNG, FAT, MUSCLE, GAS = -1000.0, -850.0, -100.0, 58.0, -900.0
_SIDES = (-1.0, 1.0)
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
            return np.interp(grid.z, TABLES["trunk"]["z"], TABLES["trunk"][name]).astype(np.float32)

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


def _paint_wall(canvas: Canvas, trunk: Trunk) -> None:
    """Skin, subcutaneous fat, muscle wall and the fat inside it."""
    grid, width, middle = canvas.grid, canvas.grid.spacing[2], np.zeros_like(canvas.grid.z)
    box = grid.box((-1e4, 1e4), (-1e4, 1e4), (-1e4, 1e4))
    layers = (
        (trunk.core_b + 0.8 * trunk.fat + 2.0, trunk.core_a + trunk.fat + 2.0, middle, 20.0),
        (trunk.core_b + 0.8 * trunk.fat, trunk.core_a + trunk.fat, middle, FAT),
        (trunk.core_b, trunk.core_a, middle, MUSCLE),
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
        for plate in TABLES["buttocks"]:
            canvas.fill(*canvas.sheet(_on_side(plate, side)), -85.0)
        beside = ((-235, 64, side * 28, 15), (-195, 58, side * 34, 15), (-165, 52, side * 38, 8))
        canvas.fill(*canvas.sweep(beside), -90.0)


def _on_side(plate: Curve, side: float) -> Curve:
    return tuple((z, y, side * x, v, side * u, half) for z, y, x, v, u, half in plate)


def _paint_pelvis(canvas: Canvas) -> None:
    """Iliac wings, acetabula, femoral heads and shafts, pubic and ischial rami."""
    if canvas.grid.z[0] > 5.0:
        return
    for side in _SIDES:
        box, depth = canvas.sheet(_on_side(TABLES["iliac wing"], side))
        canvas.fill(box, depth, 240.0 + 260.0 * np.clip(1.0 - depth / 4.0, 0.0, 1.0))
        canvas.fill(*canvas.ball(np.array((-140.0, -4.0, side * 86.0)), (36.0, 36.0, 34.0)), 420.0)
        femur = ((-215, 2, side * 126, 15), (-165, 4, side * 126, 19), (-142, -2, side * 92, 15))
        canvas.fill(*canvas.sweep(femur), 330.0)
        head = np.array((-142.0, -4.0, side * 92.0))
        canvas.fill(*canvas.ball(head, (28.0, 28.0, 29.0)), 60.0)
        box, depth = canvas.ball(head, (25.0, 25.0, 25.0))
        canvas.fill(box, depth, 290.0 + 190.0 * np.clip(1.0 - depth / 5.0, 0.0, 1.0))
        pubis = ((-140, -36, side * 72, 10), (-160, -60, side * 32, 8), (-172, -64, side * 9, 10))
        canvas.fill(*canvas.sweep(pubis), 380.0)
        ischium = ((-150, 22, side * 76, 13), (-185, 34, side * 62, 14), (-215, 20, side * 52, 11))
        canvas.fill(*canvas.sweep(ischium), 360.0)


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
    for name, part in TABLES["colon"].items():
        curve = np.array(part, np.float64)
        if name == "transverse":
            curve[2:4, 0] += drop
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
