# SPDX-License-Identifier: Apache-2.0
"""Paint the findings into a patient and measure where they are."""

from dataclasses import dataclass, field

import numpy as np

from .anatomy import NORMAL_CTR
from .findings import Finding
from .geometry import Box
from .organs import LUNG, Scene
from .painters import PAINTERS, Part

VISIBLE_HU = 80.0
"""A voxel belongs to a lesion if the lesion changes it by at least this much."""
_MIN_AREA = 60.0


@dataclass
class Lesion:
    """Where one finding is in the painted volume.

    Args:
        slices: sorted indices of the slices that show it (at least 60 square mm changed by `VISIBLE_HU`).
        boxes: one for each side that shows it: index ranges [first, last] along z, y and x.
    """

    finding: Finding
    slices: list[int]
    boxes: list[list[list[int]]] = field(default_factory=list)


def paint_lesions(scene: Scene, rng: np.random.Generator, erect: bool) -> list[Lesion]:
    """Paint all findings of the scene's patient, in place.

    Returns one `Lesion` per finding, in the patient's order. Cardiomegaly counts the slices in which the heart is wider
    than half the inner rib cage.
    """
    first = ("pneumothorax", "effusion")
    order = sorted(scene.patient.findings, key=lambda f: first.index(f.name) if f.name in first else len(first))
    made = {}
    for finding in order:
        if finding.name == "cardiomegaly":
            made[finding.name] = _heart_lesion(scene, finding)
            continue
        changed = np.zeros(scene.lung.shape, bool)
        boxes = [_apply(scene, p, changed) for p in PAINTERS[finding.name](scene, finding, rng, erect)]
        made[finding.name] = _measure(scene, finding, changed, boxes)
    return [made[f.name] for f in scene.patient.findings]


def _apply(scene: Scene, part: Part, changed: np.ndarray) -> Box:
    """Mix one part into the aerated lung and note what it changed visibly; returns its box in the chest."""
    box, share, value = part
    inner = scene.local(box)
    lung = scene.lung[inner]
    share = np.clip(share, 0.0, 1.0) * lung
    view = scene.chest_hu[inner]
    change = np.float32(value) - view
    if value > LUNG:
        # A voxel at the pleura is part lung: that part is replaced whole, never beyond the lesion's value.
        np.maximum(change, 0.0, out=change)
        np.minimum(change, share * np.float32(value - LUNG), out=change)
    else:
        change *= share
    view += change
    changed[inner] |= np.abs(change) >= VISIBLE_HU
    if value > -500.0 or value < -900.0:
        lung *= 1.0 - share
    return inner


def _measure(scene: Scene, finding: Finding, changed: np.ndarray, boxes: list[Box]) -> Lesion:
    grid = scene.grid
    starts = [min(b[axis].start for b in boxes) for axis in range(3)]
    z, y, x = (slice(starts[axis], max(b[axis].stop for b in boxes)) for axis in range(3))
    changed = changed[z, y, x]
    enough = max(_MIN_AREA / (grid.spacing[1] * grid.spacing[2]), 1.0)
    slices = np.flatnonzero(np.count_nonzero(changed, axis=(1, 2)) >= enough)
    if not len(slices):
        return Lesion(finding, [])
    offset = [starts[axis] + (scene.chest[axis].start if axis else 0) for axis in range(3)]
    middle = (scene.side_slice("right").stop or 0) - starts[2]
    halves = ((0, max(middle, 0)), (max(middle, 0), changed.shape[2]))
    found = []
    for low, high in halves:
        corner = (offset[0] + int(slices[0]), offset[1], offset[2] + low)
        bounds = _bounds(changed[slices[0] : slices[-1] + 1, :, low:high])
        found += [[[a + c, b + c] for (a, b), c in zip(bounds, corner, strict=True)]] if bounds else []
    return Lesion(finding, (slices + starts[0]).tolist(), found)


def _bounds(changed: np.ndarray) -> list[list[int]] | None:
    """First and last index of the True voxels along each axis, or None."""
    hits = [np.flatnonzero(changed.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return [[int(hit[0]), int(hit[-1])] for hit in hits] if len(hits[0]) else None


def _heart_lesion(scene: Scene, finding: Finding) -> Lesion:
    grid, patient = scene.grid, scene.patient
    right, left, _ = scene.profiles.heart(patient)
    wide = np.flatnonzero(left - right > NORMAL_CTR * 2 * patient.cage[0])
    b = patient.cage[1]
    depth = grid.span(1, -0.8 * b, 0.35 * b)
    across = grid.span(2, float(right.min()), float(left.max()))
    box = [[depth.start, depth.stop - 1], [across.start, across.stop - 1]]
    return Lesion(finding, wide.tolist(), [[[int(wide[0]), int(wide[-1])], *box]])
