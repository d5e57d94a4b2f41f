# SPDX-License-Identifier: Apache-2.0
"""Paint a patient into a volume of Hounsfield units: body, lungs, heart, great vessels, abdomen, bones."""

from dataclasses import dataclass

import numpy as np

from .anatomy import SIDES, Patient, Profiles, diaphragm
from .geometry import Box, FloatArray, Grid, ellipsoid, mix, noise, separable, soft, splat
from .skeleton import paint_skeleton
from .vessels import airway_points, vessel_points

AIR, LUNG, FAT, MUSCLE, BLOOD, LIVER = -1000.0, -850.0, -90.0, 45.0, 42.0, 58.0


@dataclass
class Scene:
    """A painted patient.

    Args:
        hu: (nz, ny, nx) Hounsfield units without noise.
        chest: index box that holds the rib cage.
        cage: field of the rib cage inside ``chest``, below 1 within.
        lung: share of aerated lung in each voxel of ``chest``.
    """

    grid: Grid
    patient: Patient
    profiles: Profiles
    hu: FloatArray
    chest: Box
    cage: FloatArray
    lung: FloatArray

    def side_slice(self, side: str) -> slice:
        """Columns of ``chest`` on one side of the midline."""
        middle = int(np.searchsorted(self.grid.x[self.chest[2]], self.patient.shift))
        return slice(0, middle) if side == "right" else slice(middle, None)

    def local(self, box: Box) -> Box:
        """The same box, clipped to ``chest`` and counted from its corner."""
        pairs = zip(box, self.chest, strict=True)
        clipped = [(max(b.start, c.start), min(b.stop, c.stop), c.start) for b, c in pairs]
        z, y, x = (slice(low - start, max(high, low) - start) for low, high, start in clipped)
        return z, y, x

    @property
    def chest_hu(self) -> FloatArray:
        return self.hu[self.chest]


def paint_patient(patient: Patient, grid: Grid, rng: np.random.Generator, ribs: bool = True) -> Scene:
    """Paint the anatomy, without lesions and noise.

    ``ribs``: False leaves the ribs out (the X-ray adds them at the film's own resolution).
    """
    profiles = Profiles(patient, grid.z)
    hu = _paint_body(patient, grid, profiles)
    a, b = patient.cage
    reach_x, reach_y = a + 26.0 + patient.scoliosis[0], b + 26.0
    chest = grid.box((-1e4, 1e4), (-reach_y, reach_y), (-reach_x, reach_x))
    cage = separable(grid, chest, (0.0, profiles.cage_x), (profiles.cage_b, profiles.cage_a), profiles.power)
    lung = _lung_share(patient, grid, profiles, chest, cage)
    scene = Scene(grid, patient, profiles, hu, chest, cage, lung)
    _paint_abdomen(scene)
    _paint_mediastinum(scene)
    texture = _lung_texture(scene, rng)
    view = scene.chest_hu
    texture -= view
    texture *= lung
    view += texture
    paint_skeleton(patient, grid, profiles, hu, chest, cage, ribs)
    _paint_tubes(scene, rng)
    return scene


def _paint_body(patient: Patient, grid: Grid, profiles: Profiles) -> FloatArray:
    """Air, skin, fat and muscle by depth below the skin, out of a table over the outline's field."""
    box = grid.box((-1e4, 1e4), (-1e4, 1e4), (-1e4, 1e4))
    field = separable(grid, box, (4.0, profiles.cage_x), (profiles.body_b, profiles.body_a), 2.3)
    slope = 2.3 / (patient.cage[0] + patient.wall)
    edges = np.array([-patient.fat - 3, -patient.fat, -2.0, -1.0, 1.5]) * slope + 1.0
    levels = 192
    table = np.interp(np.arange(levels) / 160.0, edges, (MUSCLE, FAT, FAT, 20.0, AIR)).astype(np.float32)
    field *= 160.0
    np.minimum(field, levels - 1, out=field)
    hu = np.take(table, field.astype(np.uint8), mode="clip")
    if patient.breast:
        radius = patient.breast
        for sign in SIDES.values():
            centre = (0.10 * patient.lung_height, 10.0 - float(profiles.body_b.max()), sign * 0.50 * patient.cage[0])
            part, breast = ellipsoid(grid, centre, (1.9 * radius, 0.62 * radius, 1.25 * radius))
            below = grid.z[part[0]] < centre[0]
            breast[below] += 3.0 * ((grid.z[part[0]][below] - centre[0]) / (1.9 * radius))[:, None, None] ** 2
            share = soft(breast, 5.0)
            view = hu[part]
            np.maximum(view, AIR + (AIR * -1 - 45.0) * share, out=view)
    return hu


def _lung_share(patient: Patient, grid: Grid, p: Profiles, chest: Box, cage: FloatArray) -> FloatArray:
    """Share of lung per voxel: in the cage, below the apices, above the diaphragm, off the mediastinum."""
    a, b = patient.cage
    steep = min(0.5 * a / (p.power * grid.spacing[2]), 14.0)
    lung = soft(cage * np.float32(1.03), steep)
    for side, sign in SIDES.items():
        upper = grid.span(0, 0.4 * patient.lung_height, 1e4)
        half = (0.30 * a * sign, 0.10 * b)
        x = grid.span(2, -1e4, patient.shift) if sign < 0 else grid.span(2, patient.shift, 1e4)
        box = (upper, chest[1], slice(max(x.start, chest[2].start), min(x.stop, chest[2].stop)))
        apex = separable(grid, box, (half[1], half[0] + p.cage_x), (1.3 * b * p.taper, 0.78 * a * p.taper), 2.2)
        lo = (box[0], slice(None), slice(box[2].start - chest[2].start, box[2].stop - chest[2].start))
        lung[lo] *= soft(apex, 9.0)
        low = grid.span(0, -1e4, patient.dome(side) + 4.0)
        dome = diaphragm(patient, side, grid.y[chest[1]], grid.x[box[2]])
        above = grid.z[low, None, None] - dome[None]
        above *= 1.0 / grid.spacing[0]
        above += 0.5
        lung[low, :, lo[2]] *= np.clip(above, 0.0, 1.0, out=above)
    _cut(lung, grid, chest, (0.98 * b, p.spine_x), (0.48 * b, np.full_like(grid.z, 25.0)))
    middle = np.float32(0.7 * patient.shift) + 0.5 * p.cage_x + np.float32(2.0)
    width = np.interp(grid.z / patient.lung_height, (0.0, 0.35, 0.62, 0.85, 1.0), (22.0, 24.0, 31.0, 27.0, 24.0))
    _cut(lung, grid, chest, (-0.12 * b, middle), (0.86 * p.cage_b, width.astype(np.float32)))
    return lung


def _cut(
    lung: FloatArray,
    grid: Grid,
    chest: Box,
    centre: tuple[float, FloatArray],
    half: tuple[float | FloatArray, FloatArray],
) -> None:
    """Take a vertical elliptical column out of the lung."""
    reach = float(np.max(half[1])) * 1.2
    columns = grid.span(2, float(centre[1].min()) - reach, float(centre[1].max()) + reach)
    field = separable(grid, (slice(0, grid.shape[0]), chest[1], columns), centre, half)
    lung[:, :, columns.start - chest[2].start : columns.stop - chest[2].start] *= 1.0 - soft(field, 5.0)


def _paint_abdomen(scene: Scene) -> None:
    """Liver, spleen and the stomach with its gas under the domes."""
    grid, patient = scene.grid, scene.patient
    a, b = patient.cage
    right, left = patient.domes
    size = patient.gas
    gas = ((left - 22 - 9 * size, -0.42 * b, 0.40 * a), (13.0 * size + 1, 24.0, 30.0 * size + 1), -950.0, 5.0)
    # from the back to the front; the bubble once more over all
    for centre, half, value, edge in (
        ((left - 92, -0.1 * b, 0.1 * a), (40.0, 0.7 * b, 0.55 * a), -70.0, 5.0),
        gas,
        ((left - 46, -0.26 * b, 0.42 * a), (38.0, 0.42 * b, 0.34 * a), 15.0, 5.0),
        ((left - 48, 0.46 * b, 0.62 * a), (38.0, 0.34 * b, 0.26 * a), 50.0, 5.0),
        ((right - 62, -0.05 * b, -0.36 * a), (64.0, 0.90 * b, 0.60 * a), LIVER, 5.0),
        (*gas[:3], 6.0),
    ):
        box, field = ellipsoid(grid, centre, half)
        mix(scene.hu[box], soft(field, edge), value)


def _paint_mediastinum(scene: Scene) -> None:
    """Fat and vessels of the mediastinum; the heart; each also takes its place from the lung."""
    grid, patient, p = scene.grid, scene.patient, scene.profiles
    b, top, shift = patient.cage[1], patient.lung_height, patient.shift
    turn = patient.rotation * 40.0
    lung_z = grid.span(0, min(patient.domes) - 10.0, 1.02 * top)
    fat = (lung_z, *grid.box((0, 0), (-0.85 * b, 0.3 * b), (shift - 34, shift + 38))[1:])
    mix(scene.hu[fat], soft(separable(grid, fat, (-0.3 * b, 0.7 * shift), (0.55 * b, 22.0)), 4.0), -45.0)
    descend = (grid.span(0, -1e4, 0.72 * top), *grid.box((0, 0), (0.1 * b, 0.85 * b), (-20.0, 60.0))[1:])
    column = separable(grid, descend, (p.spine_y - 18.0, p.spine_x + 0.5 * shift + 23.0), (12.5, 12.5))
    _organ(scene, descend, soft(column, 3.0), BLOOD)
    cava = (grid.span(0, 0.45 * top, 0.86 * top), *grid.box((0, 0), (-50, 20), (shift - 50, shift))[1:])
    _organ(scene, cava, soft(separable(grid, cava, (-12.0, -25.0 + shift + turn), (9.0, 9.0)), 3.0), BLOOD)
    blobs = (
        ((0.735 * top, 2.0, 16.0), (15.0, 34.0, 25.0)),
        ((0.62 * top, -22.0, -8.0), (36.0, 17.0, 17.0)),
        ((0.60 * top, -12.0, 25.0), (15.0, 22.0, 20.0)),
        ((0.545 * top, 4.0, -36.0), (23.0, 17.0, 14.0)),
        ((0.575 * top, 6.0, 39.0), (20.0, 16.0, 14.0)),
    )
    for (z, y, x), half in blobs:
        box, field = ellipsoid(grid, (z, y, x + 0.8 * shift + turn), half)
        _organ(scene, box, soft(field, 3.5), BLOOD)
    _paint_heart(scene, turn)


def _paint_heart(scene: Scene, turn: float) -> None:
    grid, patient, p = scene.grid, scene.patient, scene.profiles
    right, left, depth = p.heart(patient)
    rows = np.flatnonzero(depth > 0)
    if not len(rows):
        return
    b = patient.cage[1]
    half_a, middle = 0.5 * (left - right), 0.5 * (left + right) + np.float32(turn)
    half_b = (0.30 + 0.46 * patient.ctr) * b * depth
    box: Box = (
        slice(int(rows[0]), int(rows[-1]) + 1),
        grid.span(1, -0.98 * b, 0.55 * b),
        grid.span(2, float(right.min()) + turn - 6, float(left.max()) + turn + 6),
    )
    across = (grid.x[None, box[2]] - middle[box[0], None]) / np.maximum(half_a[box[0], None], 0.5)
    # The apex points to the front left: the axis of the slice's ellipse is tilted.
    tilt = (0.26 * half_a[box[0], None] * across)[:, None, :]
    along = (grid.y[box[1]] + np.float32(0.20 * b))[None, :, None] + tilt
    field = across[:, None, :] ** 2 + (along / np.maximum(half_b[box[0], None, None], 0.5)) ** 2
    share = soft(field.astype(np.float32), 8.0)
    _organ(scene, box, share, BLOOD)


def _organ(scene: Scene, box: Box, share: FloatArray, value: float) -> None:
    """Paint a soft organ and remove the lung that it displaces. The box must lie inside the chest."""
    inner = scene.local(box)
    mix(scene.hu[box], share, value)
    target = scene.lung[inner]
    if target.shape == share.shape:
        target *= 1.0 - share


def _lung_texture(scene: Scene, rng: np.random.Generator) -> FloatArray:
    """HU of the parenchyma inside the chest box: patchy texture, denser towards the back."""
    shape = scene.lung.shape
    if scene.grid.noise_axis == 0:
        texture = noise(rng, shape, "cloud")
        texture *= 16.0
        texture += LUNG
    else:
        texture = np.full(shape, LUNG, np.float32)
    texture += (0.22 * scene.grid.y[scene.chest[1]])[None, :, None]
    return texture


def _paint_tubes(scene: Scene, rng: np.random.Generator) -> None:
    """Trachea and main bronchi, and the pulmonary vessels."""
    grid, patient = scene.grid, scene.patient
    points, volumes = airway_points(patient, grid)
    box, share = splat(grid, points, volumes)
    mix(scene.hu[box], share, AIR + 5.0)
    points, volumes = vessel_points(patient, rng)
    box, share = splat(grid, points, volumes)
    inner = scene.local(box)
    clipped = tuple(
        slice(i.start + c.start - b.start, i.stop + c.start - b.start)
        for i, c, b in zip(inner, scene.chest, box, strict=True)
    )
    share = share[clipped] * scene.lung[inner]
    mix(scene.chest_hu[inner], share, BLOOD)
