# SPDX-License-Identifier: Apache-2.0
"""Bones: spine, ribs, sternum, scapulae, clavicles and humeral heads."""

import numpy as np

from .anatomy import SIDES, Patient, Profiles
from .geometry import Box, FloatArray, Grid, ellipsoid, mix, separable, soft, splat
from .vessels import tube

RIB_THICKNESS = 7.0
_DISC = 25.0


def rib_profile(patient: Patient, z: FloatArray, angle: FloatArray) -> FloatArray:
    """How much bone lies at a height and an angle: 0 between ribs, 0.6 in the marrow, 1 at the cortex.

    ``angle``: 0 at the spine, pi at the sternum; broadcast against z.
    """
    fall = patient.rib_drop * angle / np.pi
    phase = (patient.lung_height + 8.0 - z - fall) / patient.rib_pitch
    offset = np.abs(phase - np.rint(phase)) * patient.rib_pitch
    half = 5.2
    body = np.clip((half - offset) / 1.6 + 0.5, 0.0, 1.0)
    cortex = 0.62 + 0.38 * np.clip((offset - 2.2) / 1.8, 0.0, 1.0)
    # The front end is cartilage; there is no rib above the first.
    bone = np.clip((0.80 - angle / np.pi) * 14.0, 0.10, 1.0) * (phase > -0.4)
    return (body * cortex * bone).astype(np.float32)


def paint_skeleton(
    patient: Patient, grid: Grid, p: Profiles, hu: FloatArray, chest: Box, cage: FloatArray, ribs: bool
) -> None:
    """Paint the bones over ``hu`` in place; ``cage`` is the rib cage's field inside ``chest``."""
    if ribs:
        paint_ribs(patient, grid, p, hu[chest], chest, cage)
    _paint_spine(patient, grid, p, hu)
    _paint_shoulders(patient, grid, hu)
    top, b = patient.lung_height, patient.cage[1]
    rows = grid.span(0, 0.36 * top, 0.86 * top)
    turn = -patient.rotation * b
    box = (rows, *grid.box((0, 0), (-b - 24, -0.5 * b), (turn - 30, turn + 30))[1:])
    front = -p.cage_b - 4.0
    share = soft(separable(grid, box, (front, turn), (6.0, 17.0), 4.0), 2.0)
    mix(hu[box], share, 260.0)


def paint_ribs(patient: Patient, grid: Grid, p: Profiles, view: FloatArray, chest: Box, cage: FloatArray) -> None:
    """Paint the ribs over ``view``, the HU inside ``chest``, in place; ``cage`` is the rib cage's field there."""
    thick = np.maximum((1.0 + RIB_THICKNESS / p.cage_b) ** p.power, 1.06).astype(np.float32)
    shell = np.flatnonzero((cage > 1.0) & (cage < thick[:, None, None]))
    z, y, x = np.unravel_index(shell, cage.shape)
    a, b = patient.cage
    around = np.arctan2(np.abs(grid.x[chest[2]])[None, :] / a, grid.y[chest[1]][:, None] / b).astype(np.float32)
    share = rib_profile(patient, grid.z[z], around[y, x])
    flat = view[z, y, x]
    view[z, y, x] = flat + share * (620.0 - flat)


def _paint_spine(patient: Patient, grid: Grid, p: Profiles, hu: FloatArray) -> None:
    """Vertebral bodies with brighter end plates and discs between them, the canal, and the arches behind."""
    b = patient.cage[1]
    reach = float(np.abs(p.spine_x).max()) + 34.0
    box: Box = (slice(0, grid.shape[0]), grid.span(1, 0.2 * b, b + 34.0), grid.span(2, -reach, reach))
    half = np.interp(grid.z / patient.lung_height, (-0.2, 1.1), (19.0, 14.0)).astype(np.float32)
    phase = np.abs(((grid.z + 11.0) / _DISC) % 1.0 - 0.5)
    value = np.interp(phase, (0.0, 0.32, 0.40, 0.44), (130.0, 145.0, 250.0, 70.0)).astype(np.float32)
    body = separable(grid, box, (p.spine_y, p.spine_x), (0.80 * half, half), 2.4)
    cortex = np.clip((body - 0.75) * 4.0, 0.0, 1.0) * 160.0
    mix(hu[box], soft(body, 4.0), value[:, None, None] + cortex)
    arch = np.clip(phase * 4.0, 0.35, 1.0)[:, None, None].astype(np.float32)
    for y, half_y, half_x, level in ((26.0, 9.0, 16.0, 300.0), (25.0, 6.5, 8.0, 30.0), (41.0, 12.0, 4.0, 330.0)):
        share = soft(separable(grid, box, (p.spine_y + y, p.spine_x), (half_y, half_x)), 2.0)
        mix(hu[box], share * (arch if level > 100 else 1.0), level)
    for sign in SIDES.values():
        wing = separable(grid, box, (p.spine_y + 24.0, p.spine_x + sign * 24.0), (5.0, 12.0))
        mix(hu[box], soft(wing, 2.0) * np.clip(2.2 - phase * 7.0, 0.0, 1.0)[:, None, None], 380.0)


def _paint_shoulders(patient: Patient, grid: Grid, hu: FloatArray) -> None:
    a, b = patient.cage
    top, turn = patient.lung_height, patient.rotation * b
    step = 0.7 * min(grid.spacing)
    points, volumes = [], []
    for sign in SIDES.values():
        start = (0.88, -0.72 * b, 16 - turn * sign)
        path = np.array([start, (0.915, -0.78 * b, 52), (0.955, -0.45 * b, 92), (0.97, -0.1 * b, a + 18)])
        path[:, 0] *= top
        path[:, 2] *= sign
        points.append((part := tube(path, 6.2, step))[0])
        volumes.append(part[1])
        box, head = ellipsoid(grid, (0.90 * top, 0.15 * b, sign * (a + 40.0)), (23.0, 22.0, 21.0))
        shade = 220.0 + 260.0 * np.clip((head - 0.55) * 2.5, 0.0, 1.0)
        mix(hu[box], soft(head, 4.0), shade)
        _paint_scapula(patient, grid, hu, sign)
    box, share = splat(grid, np.concatenate(points), np.concatenate(volumes))
    mix(hu[box], share, 1000.0)


def _paint_scapula(patient: Patient, grid: Grid, hu: FloatArray, sign: float) -> None:
    """A thin oblique plate behind the ribs, narrower towards its lower tip."""
    a, b = patient.cage
    top = patient.lung_height
    low, high = 0.48 * top, 0.94 * top
    near, far = 0.48 * a, a + 16.0
    span = (near, far) if sign > 0 else (-far, -near)
    box = grid.box((low, high), (0.15 * b, b + 22.0), span)
    z, y, x = grid.z[box[0]], grid.y[box[1]], np.abs(grid.x[box[2]])
    height = ((z - low) / (high - low))[:, None, None]
    inner = near + 0.12 * a * (1.0 - height)
    outer = near + 0.34 * a + (far - near - 0.36 * a) * height
    across = np.clip((x - inner) / 3.0, 0.0, 1.0) * np.clip((outer - x) / 3.0, 0.0, 1.0)
    middle = (b + 15.0) * np.sqrt(np.clip(1.0 - (x / (a + 30.0)) ** 2, 0.05, 1.0)) + 3.0
    sheet = np.clip((3.0 - np.abs(y[None, :, None] - middle)) / grid.spacing[1] + 0.5, 0.0, 1.0)
    rim = 1.0 + 0.9 * np.clip(1.0 - np.abs(x - outer) / 6.0, 0.0, 1.0)
    mix(hu[box], (across * sheet).astype(np.float32), (420.0 * rim).astype(np.float32))
