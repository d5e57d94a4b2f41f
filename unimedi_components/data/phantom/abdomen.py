# SPDX-License-Identifier: Apache-2.0
"""An abdominal CT phantom in the portal venous phase with sixteen labelled organs."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .abdomen_body import AIR, Trunk, grain, paint_body
from .abdomen_organs import paint_organs
from .abdomen_shapes import Canvas, Varied
from .geometry import Grid

_MATRIX = 128
_THICKNESS = {False: (4.2, 6.0), True: (4.8, 6.0)}


@dataclass(frozen=True)
class AbdomenStudy:
    """A CT of one patient.

    Args:
        hu: (nz, ny, nx) int16 Hounsfield units; z to the head, y to the back, x to the patient's left.
        organs: (nz, ny, nx) uint8, 0 or 1 + the index of the organ in `ORGANS`.
    """

    sex: str
    age: int
    hu: npt.NDArray[np.int16]
    organs: npt.NDArray[np.uint8]
    grid: Grid


def make_abdomen(seed: np.random.SeedSequence, pelvis: bool, shape: tuple[int, int, int] | None = None) -> AbdomenStudy:
    """Paint the abdomen of one patient who lies on the back.

    The field of view begins above the domes of the diaphragm and ends below the iliac crests or, with ``pelvis``, below
    the pelvic floor. Organs cannot overlap: a voxel belongs to the organ painted last of those that fill more than half
    of it. About 2 % of the patients have no gallbladder. ``shape``: (slices, rows, columns); None for 128 x 128 and
    slices of 4.2 to 6 mm.
    """
    body, organs, unlabelled, device = (np.random.default_rng(s) for s in seed.spawn(4))
    varied = Varied(body)
    sex, age = ("F" if body.random() < 0.5 else "M"), int(body.integers(22, 88))
    scale = np.array((varied.factor(0.035), varied.factor(0.045), varied.factor(0.04))) * (0.96 if sex == "F" else 1.02)
    fat = 5.0 + 30.0 * float(body.beta(1.8, 3.5))
    waves = np.concatenate((body.normal(0.0, 1.4, (3, 3)), body.normal(0.0, 0.016, (3, 3))), axis=1)
    warp = np.concatenate((waves.clip(-2.8, 2.8), body.uniform(0.0, 2 * np.pi, (3, 1))), axis=1)
    grid = _field_of_view(pelvis, shape, scale, fat, device)
    reference = Grid(grid.shape, _ratio(grid.spacing, scale), _ratio(grid.origin, scale))
    canvas = Canvas(reference, np.full(grid.shape, AIR, np.float32), np.zeros(grid.shape, np.uint8), warp)
    trunk = Trunk(reference, varied, fat)
    paint_body(canvas, trunk, Varied(unlabelled))
    paint_organs(canvas, trunk, Varied(organs), sex)
    noisy = grain(device, canvas.hu, float(device.uniform(9.0, 18.0)))
    np.clip(noisy, -1024.0, 3071.0, out=noisy)
    # Four HU per step keep the compressed file small and lie far below the noise.
    hu = np.rint(noisy * np.float32(0.25)).astype(np.int16) * np.int16(4)
    return AbdomenStudy(sex, age, hu, canvas.organs, grid)


def _ratio(values: tuple[float, float, float], scale: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    z, y, x = (float(v / s) for v, s in zip(values, scale, strict=True))
    return z, y, x


def _field_of_view(
    pelvis: bool, shape: tuple[int, int, int] | None, scale: np.ndarray, fat: float, rng: np.random.Generator
) -> Grid:
    high = scale[0] * (210.0 + rng.uniform(8.0, 22.0))
    low = scale[0] * ((-208.0 if pelvis else -4.0) - rng.uniform(0.0, 14.0))
    thick = rng.uniform(*_THICKNESS[pelvis])
    nz, ny, nx = shape or (round((high - low) / thick), _MATRIX, _MATRIX)
    width = 2 * scale[2] * (158.0 if pelvis else 143.0) + 2 * fat + rng.uniform(10.0, 34.0)
    step, offset = width / nx, rng.uniform(-5.0, 5.0, 2)
    spacing = (float(high - low) / nz, float(step), float(step))
    origin = (float(low), float(offset[0] - 0.5 * step * (ny - 1)), float(offset[1] - 0.5 * step * (nx - 1)))
    return Grid((nz, ny, nx), spacing, origin)
