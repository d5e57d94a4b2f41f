# SPDX-License-Identifier: Apache-2.0
"""Branching tubes as clouds of small parts: airways and the pulmonary vessels."""

import numpy as np

from .anatomy import SIDES, Patient
from .geometry import FloatArray, Grid

#: First directions (up, back, outwards) of the lobar vessels.
_FAN = (
    *((0.95, 0.10, 0.35), (0.75, -0.45, 0.65), (0.55, 0.55, 0.50), (0.35, 0.45, 0.85)),
    *((0.05, -0.55, 0.85), (-0.30, 0.25, 0.90), (-0.60, 0.62, 0.55), (-0.75, 0.20, 0.80)),
    *((-0.85, -0.35, 0.50), (-0.92, 0.10, 0.55), (-0.95, 0.42, 0.30), (-0.98, -0.05, 0.25)),
)


def hilum(patient: Patient, side: str) -> FloatArray:
    """Where the vessels enter a lung, (z, y, x) mm."""
    high = 0.545 if side == "right" else 0.575
    x = SIDES[side] * 32.0 + 0.8 * patient.shift
    return np.array((high * patient.lung_height, 5.0, x), np.float32)


def tube(path: FloatArray, radius: FloatArray | float, step: float) -> tuple[FloatArray, FloatArray]:
    """Positions (M, 3) of parts ``step`` mm apart that fill a tube, and volumes (M,) in cubic mm that add up to it.

    ``path``: corners (z, y, x) in mm, (N, 3). ``radius``: in mm at the corners, a number or (N,).
    """
    radii = np.broadcast_to(np.float32(radius), len(path))
    length = np.concatenate(([0.0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))))
    count = max(int(length[-1] / step), 2)
    at = (np.arange(count) + 0.5) * length[-1] / count
    centres = np.stack([np.interp(at, length, path[:, i]) for i in range(3)], axis=1)
    local = np.interp(at, length, radii)
    rings = np.arange(-(widest := float(radii.max())), widest + step / 2, step) / widest
    disc = np.array([(0.0, u, v) for u in rings for v in rings if u * u + v * v <= 1.0])
    heading = np.gradient(centres, axis=0)
    heading /= np.linalg.norm(heading, axis=1, keepdims=True) + 1e-9
    helper = np.where(np.abs(heading[:, :1]) > 0.8, np.array([[0.0, 0.0, 1.0]]), np.array([[1.0, 0.0, 0.0]]))
    first = np.cross(heading, helper)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    second = np.cross(heading, first)
    spread = disc[None, :, 1:2] * first[:, None] + disc[None, :, 2:3] * second[:, None]
    points = centres[:, None] + spread * local[:, None, None]
    volumes = np.pi * local**2 * (length[-1] / count) / len(disc)
    return points.reshape(-1, 3).astype(np.float32), np.repeat(volumes, len(disc)).astype(np.float32)


def airway_points(patient: Patient, grid: Grid) -> tuple[FloatArray, FloatArray]:
    """Trachea, carina and the main bronchi as parts for `splat`."""
    top, b = patient.lung_height, patient.cage[1]
    step = 0.75 * min(grid.spacing)
    turn, shift = patient.rotation * 10.0, patient.shift
    carina = np.array((0.645 * top, 0.12 * b, 1.0 + turn + 0.8 * shift))
    neck = np.array((1.35 * top, -0.16 * b, turn + 0.1 * shift))
    bend = np.array((0.86 * top, 0.02 * b, 3.0 + turn + 0.6 * shift))
    trunk = tube(np.array((neck, bend, carina)), 8.0 if patient.sex == "M" else 7.0, step)
    parts = [trunk]
    for side, fall, radius in (("right", 26.0, 6.0), ("left", 24.0, 5.0)):
        end = np.array((carina[0] - fall, 0.14 * b, carina[2] + SIDES[side] * (34.0 if side == "right" else 42.0)))
        middle = 0.5 * (carina + end) + np.array((2.0, 0.0, 0.0))
        parts.append(tube(np.array((carina, middle, end)), np.array((radius, radius, 0.7 * radius)), step))
    return np.concatenate([p for p, _ in parts]), np.concatenate([v for _, v in parts])


def vessel_points(patient: Patient, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Vessels that branch from the hila and taper towards the pleura, (M, 3) positions and (M,) volumes."""
    a, b = patient.cage
    top = patient.lung_height
    starts, heads = [], []
    fan = np.array(_FAN)
    for side, sign in SIDES.items():
        starts.append(np.repeat(hilum(patient, side)[None], len(fan), axis=0))
        heads.append(fan * (1.0, 1.0, sign) + rng.normal(0.0, 0.12, fan.shape))
    start, head = np.concatenate(starts), np.concatenate(heads)
    head /= np.linalg.norm(head, axis=1, keepdims=True)
    reach = np.array((0.42 * top, 0.62 * b, 0.62 * a))
    length = 0.40 * np.linalg.norm(head * reach, axis=1)
    radius = np.full(len(head), 4.0 * patient.vessel_gain) * rng.uniform(0.85, 1.15, len(head))
    points, volumes = [], []
    for count in (14, 12, 10, 8, 6):
        bend = rng.normal(0.0, 0.16, head.shape)
        t = (np.arange(count) + 0.5) / count
        line = start[:, None] + length[:, None, None] * (
            t[None, :, None] * head[:, None] + (t * (1 - t))[None, :, None] * bend[:, None]
        )
        local = radius[:, None] * (1.0 - 0.30 * t)[None]
        spread = rng.standard_normal((*line.shape[:2], 3, 3), np.float32) * (0.45 * local)[:, :, None, None]
        points.append((line[:, :, None] + spread).reshape(-1, 3))
        part = np.pi * local**2 * (length[:, None] / count) / 3
        volumes.append(np.repeat(part.reshape(-1), 3))
        start = np.repeat(start + length[:, None] * head, 2, axis=0)
        head = np.repeat(head, 2, axis=0) + rng.normal(0.0, 0.42, (2 * len(head), 3))
        head /= np.linalg.norm(head, axis=1, keepdims=True)
        length = np.repeat(length, 2) * rng.uniform(0.55, 0.95, 2 * len(length))
        radius = np.repeat(radius, 2) * 0.72
    return np.concatenate(points).astype(np.float32), np.concatenate(volumes).astype(np.float32)
