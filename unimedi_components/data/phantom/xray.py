# SPDX-License-Identifier: Apache-2.0
"""Film from volume: Beer-Lambert projection, detector and display curve."""

import numpy as np
from PIL import Image

from .anatomy import Patient, Profiles
from .geometry import FloatArray, Grid, noise
from .skeleton import RIB_THICKNESS, rib_profile

MU_WATER = 0.019
"""Linear attenuation of water in 1/mm for a chest exposure (about 70 keV)."""
_BONE_GAIN = 0.8


def attenuation(hu: FloatArray) -> FloatArray:
    """Linear attenuation in 1/mm of Hounsfield units: mu_water (1 + HU / 1000), more above 150 HU for bone."""
    return MU_WATER * (1.0 + hu / 1000.0 + _BONE_GAIN * np.maximum(hu - 150.0, 0.0) / 1000.0)


def path_length(hu: FloatArray, grid: Grid, axis: int = 1) -> FloatArray:
    """Line integral P of the attenuation along parallel rays, as in Beer-Lambert's law I = I0 exp(-P).

    ``axis``: 1 for a frontal film (rays from front to back), 2 for a lateral one.

    Returns:
        (nz, nx) or (nz, ny), dimensionless.
    """
    count, step = hu.shape[axis], grid.spacing[axis]
    soft_part = hu.sum(axis=axis)
    bone = np.maximum(hu, np.float32(150.0)).sum(axis=axis) - np.float32(150.0 * count)
    total = count + soft_part / 1000.0 + _BONE_GAIN * bone / 1000.0
    return (MU_WATER * step * total).astype(np.float32)


def enlarge(image: FloatArray, shape: tuple[int, int]) -> FloatArray:
    """Bicubic resize of a float image (H, W)."""
    resized = Image.fromarray(image).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(resized, np.float32)


def rib_shadow(patient: Patient, z: FloatArray, x: FloatArray) -> FloatArray:
    """Extra line integral of the ribs at the film's own resolution, (len(z), len(x)).

    Each ray crosses the shell of the rib cage at the back and at the front; it meets more bone where the
    shell is tangential, up to the chord of the shell's rim.
    """
    p = Profiles(patient, z)
    power = p.power
    across = np.abs(x[None, :] - p.cage_x[:, None])
    outer_a, outer_b = p.cage_a + RIB_THICKNESS, p.cage_b + RIB_THICKNESS

    def half_chord(a: FloatArray, b: FloatArray) -> FloatArray:
        inner = np.clip(1.0 - (across / a[:, None]) ** power, 0.0, 1.0)
        return b[:, None] * inner ** (1.0 / power)

    outer, inner = half_chord(outer_a, outer_b), half_chord(p.cage_a, p.cage_b)
    bone = MU_WATER * 1.9 * np.minimum(outer - inner, 12.0)
    depth = 0.5 * (outer + inner) / patient.cage[1]
    angle = np.arctan2(across / patient.cage[0], depth).astype(np.float32)
    rows = z[:, None]
    return bone * (rib_profile(patient, rows, angle) + rib_profile(patient, rows, np.float32(np.pi) - angle))


def develop(path: FloatArray, rng: np.random.Generator, portable: bool = False) -> np.ndarray:
    """Detector and display: scatter, quantum noise, logarithm, window, gamma, vignette; bone is white.

    ``portable``: a bedside film has more scatter and noise and less contrast.
    """
    primary = np.exp(-path)
    small = enlarge(primary, (max(path.shape[0] // 16, 2), max(path.shape[1] // 16, 2)))
    scatter = enlarge(small, path.shape)
    share = rng.uniform(0.16, 0.24) if portable else rng.uniform(0.06, 0.14)
    signal = np.maximum((1 - share) * primary + share * np.maximum(scatter, 0.0), 1e-4)
    grain = rng.uniform(0.010, 0.018) * (1.6 if portable else 1.0)
    signal *= 1.0 + grain * noise(rng, path.shape) * np.sqrt(0.06 / (signal + 0.02))
    density = -np.log(np.maximum(signal, 1e-4))
    inner = density[density.shape[0] // 8 : -density.shape[0] // 6, density.shape[1] // 6 : -density.shape[1] // 6]
    low, high = np.percentile(inner[::3, ::3], (1.0, 99.2))
    low -= (high - low) * rng.uniform(0.10, 0.20)
    high += (high - low) * rng.uniform(0.0, 0.12)
    level = np.clip((density - low) / (high - low), 0.0, 1.15)
    level = level ** rng.uniform(0.85, 1.15)
    level = 1.0 - np.exp(-1.9 * level)
    level /= 1.0 - np.exp(-1.9)
    rows, columns = (np.linspace(-1.0, 1.0, n, dtype=np.float32) for n in path.shape)
    radius = rows[:, None] ** 2 + columns[None, :] ** 2
    level *= 1.0 - rng.uniform(0.0, 0.06) * radius
    return np.clip(level * rng.uniform(226, 248) + rng.uniform(2, 10), 0, 255).astype(np.uint8)
