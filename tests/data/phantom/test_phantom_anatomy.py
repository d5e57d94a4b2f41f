# SPDX-License-Identifier: Apache-2.0
"""Hounsfield units, sizes and sides of the painted anatomy."""

import numpy as np
import pytest

from unimedi_components.data.phantom.anatomy import Profiles, draw_patient
from unimedi_components.data.phantom.findings import Finding
from unimedi_components.data.phantom.geometry import Grid, ellipsoid, noise, separable, soft, splat
from unimedi_components.data.phantom.studies import make_ct, make_patient
from unimedi_components.data.phantom.vessels import tube


def normal_ct(index: int):
    _, streams = make_patient(np.random.SeedSequence([11, index]))
    return make_ct(draw_patient(np.random.default_rng([11, index])), streams)


@pytest.fixture(scope="module")
def study():
    return normal_ct(0)


def around(study, z: float, y: float, x: float) -> float:
    """Median HU of the 3 x 3 voxels of one slice around a place in mm."""
    grid = study.grid
    k, j, i = (int(np.argmin(np.abs(axis - v))) for axis, v in ((grid.z, z), (grid.y, y), (grid.x, x)))
    return float(np.median(study.hu[k, j - 1 : j + 2, i - 1 : i + 2]))


def test_hounsfield_units_of_known_places(study):
    patient, grid = study.patient, study.grid
    a, b = patient.cage
    profiles = Profiles(patient, grid.z)
    middle = int(np.argmin(np.abs(grid.z - 0.5 * patient.lung_height)))
    z = float(grid.z[middle])
    assert study.hu.dtype == np.int16
    assert study.hu.shape == (48, 128, 128)
    corners = study.hu[:, :3, :3].astype(int)
    assert corners.min() == corners.max() == -1000
    for side in (-1, 1):
        assert around(study, z, 0.0, side * 0.6 * a) == pytest.approx(-850, abs=60)
    heart = patient.domes[0] + 40.0
    assert around(study, heart, -0.2 * b, 0.1 * a) == pytest.approx(42, abs=25)
    assert around(study, patient.domes[0] - 40, -0.1 * b, -0.4 * a) == pytest.approx(58, abs=25)
    spine = (profiles.spine_y[middle], profiles.spine_x[middle])
    assert around(study, z, float(spine[0]), float(spine[1])) > 60
    carina = 0.8 * patient.lung_height
    assert study.hu[int(np.argmin(np.abs(grid.z - carina))), 40:90, 58:70].min() < -800
    assert (study.hu > 400).sum() > 3000


def test_lungs_are_two_and_the_heart_lies_to_the_left():
    shares = []
    for index in range(6):
        study = normal_ct(index)
        patient, grid = study.patient, study.grid
        lung = (study.hu < -600) & (study.hu > -980)
        volume = lung.sum() * grid.voxel_volume / 1e6
        assert 2.0 < volume < 8.5  # litres
        right, left, _ = Profiles(patient, grid.z).heart(patient)
        shares.append(-right.min() / (left.max() - right.min()))
        assert 0.38 < patient.ctr < 0.50
        assert (left.max() - right.min()) / (2 * patient.cage[0]) == pytest.approx(patient.ctr, abs=0.02)
    assert 0.25 < np.mean(shares) < 0.42


def test_findings_move_anatomy_and_nothing_else():
    base = draw_patient(np.random.default_rng(5))
    heart = draw_patient(np.random.default_rng(5), (Finding("cardiomegaly", None, None, "large"),))
    assert heart.cage == base.cage and heart.lung_height == base.lung_height
    assert 0.635 <= heart.ctr <= 0.68 and base.ctr < 0.5
    lifted = draw_patient(np.random.default_rng(5), (Finding("atelectasis", "right", "lower", "moderate"),))
    assert 24 <= lifted.domes[0] - base.domes[0] <= 32 and lifted.domes[1] == base.domes[1]
    pushed = draw_patient(np.random.default_rng(5), (Finding("effusion", "left", "lower", "large"),))
    assert -16 <= pushed.shift <= -8 and base.shift == 0.0


def test_ellipsoid_and_separable_equal_the_written_out_formula():
    grid = Grid((9, 11, 13), (3.0, 2.0, 1.5), (-12.0, -10.0, -9.0))
    box, field = ellipsoid(grid, (1.0, -2.0, 0.5), (6.0, 5.0, 4.0))
    for (k, j, i), value in np.ndenumerate(field):
        z, y, x = (float(ax[s.start + n]) for ax, s, n in zip((grid.z, grid.y, grid.x), box, (k, j, i), strict=True))
        expected = ((z - 1) / 6) ** 2 + ((y + 2) / 5) ** 2 + ((x - 0.5) / 4) ** 2
        assert value == pytest.approx(expected, abs=1e-5)
    whole = grid.box((-99, 99), (-99, 99), (-99, 99))
    half = np.linspace(2, 5, 9, dtype=np.float32)
    field = separable(grid, whole, (0.0, half), (4.0, half), 2.5)
    k, j, i = 3, 7, 2
    expected = abs(grid.y[j] / 4) ** 2.5 + abs((grid.x[i] - half[k]) / half[k]) ** 2.5
    assert field[k, j, i] == pytest.approx(float(expected), rel=1e-5)


def test_span_holds_exactly_the_centres_inside():
    grid = Grid((10, 4, 4), (2.5, 1.0, 1.0), (-7.0, 0.0, 0.0))
    for low, high in ((-7.0, -2.0), (-6.9, 3.1), (100.0, 200.0), (-50.0, -7.1), (0.4, 0.5)):
        picked = grid.z[grid.span(0, low, high)]
        assert picked.tolist() == [z for z in grid.z.tolist() if low <= z <= high]


def test_soft_is_half_at_the_boundary():
    values = soft(np.array([0.0, 0.95, 1.0, 1.05, 2.0], np.float32), 5.0)
    assert values.tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0], abs=1e-6)


def test_tube_and_splat_keep_the_volume():
    points, volumes = tube(np.array([(-20.0, 0.0, 0.0), (20.0, 5.0, 3.0)]), 4.0, 1.0)
    exact = np.pi * 16 * np.sqrt(40**2 + 5**2 + 3**2)
    assert volumes.sum() == pytest.approx(exact, rel=1e-4)
    grid = Grid((40, 30, 30), (2.0, 2.0, 2.0), (-39.0, -29.0, -29.0))
    _, share = splat(grid, points, volumes)
    assert share.sum() * 8.0 == pytest.approx(exact, rel=0.05)
    assert share.max() <= 1.0


def test_noise_is_standard_and_depends_on_the_generator_alone():
    first, again = (noise(np.random.default_rng(3), (20, 64, 64)) for _ in range(2))
    assert np.array_equal(first, again)
    assert first.mean() == pytest.approx(0, abs=0.05) and first.std() == pytest.approx(1, abs=0.05)
    assert noise(np.random.default_rng(3), (6, 5, 7), axis=1).shape == (6, 5, 7)
