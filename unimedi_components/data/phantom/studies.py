# SPDX-License-Identifier: Apache-2.0
"""One patient to one study: a CT volume or a chest film with the truth about it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .anatomy import Patient, draw_patient
from .findings import FINDINGS, Finding, draw_findings
from .geometry import Grid, noise
from .lesions import Lesion, paint_lesions
from .organs import paint_patient
from .skeleton import paint_ribs
from .xray import develop, enlarge, path_length, rib_shadow

CT_SHAPE = (48, 128, 128)
XRAY_SHAPE = (128, 40, 128)


@dataclass
class CTStudy:
    """A CT volume. ``hu``: (nz, ny, nx) int16 Hounsfield units; z to the head, y to the back, x to the left."""

    patient: Patient
    hu: np.ndarray
    grid: Grid
    lesions: list[Lesion]


@dataclass
class XrayStudy:
    """A frontal film, and a lateral one for some.

    Args:
        film: (H, W) uint8, the patient's right on the image's left.
        lateral: (H, W) uint8 or None.
        portable: True for an AP film at the bedside, False for PA.
    """

    patient: Patient
    film: np.ndarray
    lateral: np.ndarray | None
    portable: bool
    lesions: list[Lesion]
    grid: Grid

    def records(self) -> list[dict[str, Any]]:
        return [lesion_record(lesion, self.film_boxes(lesion), slices=False) for lesion in self.lesions]

    def film_boxes(self, lesion: Lesion) -> list[list[int]]:
        """A lesion's boxes on the film in pixels, each [x0, y0, x1, y1] with the last pixel included."""
        nz, _, nx = self.grid.shape
        rows, columns = self.film.shape[0] / nz, self.film.shape[1] / nx
        return [
            [int(x0 * columns), int((nz - 1 - z1) * rows), int((x1 + 1) * columns - 1), int((nz - z0) * rows - 1)]
            for (z0, z1), _, (x0, x1) in lesion.boxes
        ]


def labels_of(findings: tuple[Finding, ...]) -> list[int]:
    """0/1 per name of `FINDINGS`."""
    present = {f.name for f in findings}
    return [int(name in present) for name in FINDINGS]


def make_patient(
    seed: np.random.SeedSequence, draw: Callable[[np.random.Generator], tuple[Finding, ...]] = draw_findings
) -> tuple[Patient, list[np.random.Generator]]:
    streams = [np.random.default_rng(s) for s in seed.spawn(6)]
    return draw_patient(streams[1], draw(streams[0])), streams[2:]


def make_ct(
    patient: Patient, streams: list[np.random.Generator], shape: tuple[int, int, int] = CT_SHAPE, lesions: bool = True
) -> CTStudy:
    """CT of a patient who lies on the back, arms up.

    ``lesions``: False leaves the findings out, all else being equal.
    """
    vessels, places, device = streams[:3]
    low, high = -42.0 + device.uniform(-6.0, 6.0), patient.lung_height + device.uniform(12.0, 26.0)
    field_of_view = max(2 * (patient.cage[0] + patient.wall) + device.uniform(14.0, 40.0), 300.0)
    step, thick = field_of_view / shape[2], (high - low) / shape[0]
    offset = device.uniform(-6.0, 6.0, 2)
    origin = (low, offset[0] + 4.0 - 0.5 * step * (shape[1] - 1), offset[1] - 0.5 * step * (shape[2] - 1))
    grid = Grid(shape, (thick, step, step), origin)
    scene = paint_patient(patient, grid, vessels)
    found = paint_lesions(scene, places, erect=False) if lesions else []
    grain = noise(device, shape)
    grain *= device.uniform(9.0, 20.0)
    grain *= scene.hu > -990.0
    grain += scene.hu
    np.clip(grain, -1024.0, 3071.0, out=grain)
    # Four HU per step keep the compressed file small and lie far below the noise.
    grain *= 0.25
    hu = np.rint(grain, out=grain).astype(np.int16)
    hu *= 4
    return CTStudy(patient, hu, grid, found)


def make_xray(
    patient: Patient, streams: list[np.random.Generator], lateral: bool = False, lesions: bool = True
) -> XrayStudy:
    """Chest film of a standing patient; see `xray` for the physics.

    ``lesions``: False leaves the findings out, all else being equal.
    """
    vessels, places, device = streams[:3]
    portable = bool(device.random() < 0.35)
    low, high = -78.0 + device.uniform(-14.0, 14.0), patient.lung_height + device.uniform(26.0, 46.0)
    width = 2 * (patient.cage[0] + patient.wall * device.uniform(0.7, 1.2)) + device.uniform(6.0, 36.0)
    nz, ny, nx = XRAY_SHAPE
    depth = 2 * (patient.cage[1] + patient.wall) + 2 * patient.breast + 24.0
    spacing = ((high - low) / nz, depth / ny, width / nx)
    centre = device.uniform(-7.0, 7.0)
    front = -0.5 * depth - 0.5 * patient.breast + 6.0
    grid = Grid(XRAY_SHAPE, spacing, (low, front, centre - 0.5 * spacing[2] * (nx - 1)))
    scene = paint_patient(patient, grid, vessels, ribs=False)
    found = paint_lesions(scene, places, erect=True) if lesions else []
    long_side = int(device.choice((256, 272, 288, 304, 320)))
    scale = long_side / max(high - low, width)
    shape = (round((high - low) * scale), round(width * scale))
    path = enlarge(path_length(scene.hu, grid), shape)
    z = np.linspace(grid.z[0], grid.z[-1], shape[0], dtype=np.float32)
    x = np.linspace(grid.x[0], grid.x[-1], shape[1], dtype=np.float32)
    path = path + rib_shadow(patient, z, x)
    film = develop(np.ascontiguousarray(path[::-1]), device, portable)
    side_film = None
    if lateral:
        paint_ribs(patient, grid, scene.profiles, scene.chest_hu, scene.chest, scene.cage)
        side_shape = (shape[0], round(depth * scale))
        side_path = enlarge(path_length(scene.hu, grid, axis=2), side_shape)
        side_film = develop(np.ascontiguousarray(side_path[::-1]), device)
    return XrayStudy(patient, film, side_film, portable, found, grid)


def lesion_record(lesion: Lesion, boxes: list[Any], slices: bool) -> dict[str, Any]:
    """The entry of one finding in truth.json; ``slices`` says whether the study has slices."""
    f = lesion.finding
    extent = [lesion.slices[0], lesion.slices[-1]] if slices and lesion.slices else None
    record = {"name": f.name, "side": f.side, "zone": f.zone, "severity": f.severity, "size_mm": f.size}
    return {**record, "slices": extent, "box": _union(boxes), "boxes": boxes}


def _union(boxes: list[Any]) -> Any:
    """The smallest box around all: [x0, y0, x1, y1] for films, [[z0, z1], [y0, y1], [x0, x1]] for volumes."""
    if not boxes:
        return None
    corners = np.array(boxes)
    if corners.ndim == 2:
        return [*corners[:, :2].min(axis=0).tolist(), *corners[:, 2:].max(axis=0).tolist()]
    return np.stack((corners[..., 0].min(axis=0), corners[..., 1].max(axis=0)), axis=1).tolist()
