# SPDX-License-Identifier: Apache-2.0
"""Chest CT of a narrow field of view with round lung nodules of 3 to 30 mm, and places that are none."""

from dataclasses import dataclass

import numpy as np

from .anatomy import Patient
from .geometry import FloatArray, Grid, noise
from .organs import Scene, paint_patient

DIAMETERS = (3.0, 30.0)
PADDING_HU = -3024
_SHAPE = (72, 144, 144)
_VISIBLE_SHARE = 0.1
_SMALL_MM = 8.0
_GAP_MM = 6.0
_SUBSAMPLES = 5
_DENSE_HU = -600.0
_BONE_HU = 80.0


@dataclass(frozen=True)
class Nodule:
    """One nodule of a volume.

    Args:
        voxel: centre as continuous index (z, y, x).
        slices: first and last slice that it fills by a tenth of a voxel or more.
    """

    voxel: tuple[float, float, float]
    diameter: float
    slices: tuple[int, int]


@dataclass(frozen=True)
class NoduleStudy:
    """A CT volume with its nodules.

    Args:
        hu: (nz, ny, nx) int16 Hounsfield units; z to the head, y to the back, x to the left.
        others: voxels (z, y, x) in the lung that belong to no nodule, vessels and parenchyma in turn.
    """

    hu: np.ndarray
    grid: Grid
    nodules: list[Nodule]
    others: list[tuple[float, float, float]]


def make_nodule_ct(
    patient: Patient, streams: list[np.random.Generator], diameters: list[float], n_others: int, padded: bool
) -> NoduleStudy:
    """CT of a patient who lies on the back, reconstructed close around the rib cage.

    ``padded``: fill what lies outside the reconstruction circle with -3024, as some scanners do.
    """
    vessels, places, device = streams[:3]
    low, high = -34.0 + device.uniform(-6.0, 6.0), patient.lung_height + device.uniform(8.0, 20.0)
    field_of_view = 2 * patient.cage[0] + device.uniform(24.0, 60.0)
    step, thick = field_of_view / _SHAPE[2], (high - low) / _SHAPE[0]
    offset = device.uniform(-6.0, 6.0, 2)
    first = -0.5 * step * (_SHAPE[2] - 1)
    grid = Grid(_SHAPE, (thick, step, step), (low, offset[0] + 4.0 + first, offset[1] + first))
    scene = paint_patient(patient, grid, vessels)
    _blur(scene.hu)
    nodules: list[Nodule] = []
    for diameter in sorted(diameters, reverse=True):
        nodules += _add_nodule(scene, nodules, diameter, places)
    others = _other_places(scene, nodules, n_others, places)
    grain = noise(device, _SHAPE) * np.float32(device.uniform(9.0, 20.0))
    hu = np.clip(scene.hu + grain * (scene.hu > -990.0), -1024.0, 3071.0)
    stored = np.rint(hu).astype(np.int16)
    if padded:
        radius = [np.arange(n) - 0.5 * (n - 1) for n in _SHAPE[1:]]
        stored[:, np.hypot(radius[0][:, None], radius[1]) > 0.5 * _SHAPE[2]] = PADDING_HU
    return NoduleStudy(stored, grid, nodules, others)


def _blur(hu: FloatArray) -> None:
    """Blur rows and columns as a scanner does, in place; it also joins the dots that thin vessels are made of."""
    for view in (hu, hu.transpose(0, 2, 1)):
        view[:, 1:-1] = 0.5 * view[:, 1:-1] + 0.25 * (view[:, 2:] + view[:, :-2])


def _in_lung(scene: Scene, places: np.ndarray, reach: float) -> np.ndarray:
    """Smallest share of lung at 26 points ``reach`` mm around each place (N, 3) of the chest box, and there."""
    around = np.array([(z, y, x) for z in (-1, 0, 1) for y in (-1, 0, 1) for x in (-1, 0, 1)], float)
    around /= np.maximum(np.linalg.norm(around, axis=1, keepdims=True), 1.0)
    steps = np.rint(around * reach / np.array(scene.grid.spacing)).astype(int)
    at = places[:, None] + steps
    there = ((at >= 0) & (at < scene.lung.shape)).all(axis=2)
    at = np.clip(at, 0, np.array(scene.lung.shape) - 1)
    share = np.where(there, scene.lung[at[..., 0], at[..., 1], at[..., 2]], 0.0)
    return share.min(axis=1)


def _free(scene: Scene, nodules: list[Nodule], places: np.ndarray, reach: float) -> np.ndarray:
    """Whether each place (N, 3) of the chest box keeps its distance from all nodules."""
    free = np.ones(len(places), bool)
    for nodule in nodules:
        away = places + [s.start for s in scene.chest] - np.array(nodule.voxel)
        distance = np.linalg.norm(away * np.array(scene.grid.spacing), axis=1)
        free &= distance > reach + 0.5 * nodule.diameter + _GAP_MM
    return free


def _add_nodule(scene: Scene, nodules: list[Nodule], diameter: float, rng: np.random.Generator) -> list[Nodule]:
    """Paint one nodule where there is room in the aerated lung; returns it, or nothing if there is no room."""
    places = np.argwhere(scene.lung > 0.95)
    places = places[rng.integers(0, len(places), 400)]
    room = _in_lung(scene, places, 0.5 * diameter + 2.0)
    # Not on a vessel: a nodule's brightest point is then its centre.
    dark = scene.chest_hu[tuple(places.T)] < _DENSE_HU
    room[~dark | ~_free(scene, nodules, places, 0.5 * diameter)] = 0.0
    best = int(np.argmax(room > 0.9)) if (room > 0.9).any() else int(np.argmax(room))
    if room[best] < 0.5:
        return []
    # A nodule smaller than a voxel would fade if it fell between several: it is centred near one.
    jitter = rng.uniform(-0.5, 0.5, 3) * (0.2 if diameter < _SMALL_MM else 1.0)
    centre = places[best] + [s.start for s in scene.chest] + jitter
    value = np.float32(40.0 + rng.uniform(-10.0, 20.0))
    spacing = np.array(scene.grid.spacing)
    reach = np.ceil(0.5 * diameter / spacing + 1.5).astype(int)
    low = np.maximum(np.rint(centre).astype(int) - reach, 0)
    high = np.minimum(np.rint(centre).astype(int) + reach + 1, scene.hu.shape)
    share = _ball_share(low, high, centre, spacing, 0.5 * diameter)
    view = scene.hu[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    np.maximum(view, view + share * (value - view), out=view)
    shown = np.flatnonzero((share > _VISIBLE_SHARE).any(axis=(1, 2))) + low[0]
    z, y, x = (float(v) for v in centre)
    return [Nodule((z, y, x), diameter, (int(shown[0]), int(shown[-1])))]


def _ball_share(
    low: np.ndarray, high: np.ndarray, centre: np.ndarray, spacing: np.ndarray, radius: float
) -> FloatArray:
    """Share of each voxel of a box that a ball with an edge one mm wide fills, by points inside the voxels."""
    inner = (np.arange(_SUBSAMPLES) + 0.5) / _SUBSAMPLES - 0.5
    axes = [
        ((np.arange(a, b)[:, None] + inner).ravel() - c) * step
        for a, b, c, step in zip(low, high, centre, spacing, strict=True)
    ]
    distance = np.sqrt(axes[0][:, None, None] ** 2 + axes[1][None, :, None] ** 2 + axes[2][None, None, :] ** 2)
    share = np.clip(radius - distance + 0.5, 0.0, 1.0)
    shape = [n for size in high - low for n in (size, _SUBSAMPLES)]
    return share.reshape(shape).mean(axis=(1, 3, 5)).astype(np.float32)


def _other_places(
    scene: Scene, nodules: list[Nodule], count: int, rng: np.random.Generator
) -> list[tuple[float, float, float]]:
    """Places in the lung without a nodule: on vessels and in the parenchyma in turn."""
    inside = scene.lung > 0.95
    dense = scene.chest_hu > _DENSE_HU
    chosen = []
    for kind in (inside & dense & (scene.chest_hu < _BONE_HU), inside & ~dense):
        places = np.argwhere(kind)
        places = places[rng.integers(0, len(places), 200)]
        chosen.append(places[_free(scene, nodules, places, 0.0)][: (count + 1) // 2])
    pairs = [place for pair in zip(*chosen, strict=False) for place in pair][:count]
    corner = [s.start for s in scene.chest]
    return [tuple((place + corner + rng.uniform(-0.5, 0.5, 3)).tolist()) for place in pairs]
