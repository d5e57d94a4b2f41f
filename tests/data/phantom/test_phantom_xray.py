# SPDX-License-Identifier: Apache-2.0
"""Beer-Lambert projection against closed forms, and what a film looks like."""

import numpy as np
import pytest

from unimedi_components.data.phantom.anatomy import draw_patient
from unimedi_components.data.phantom.geometry import Grid
from unimedi_components.data.phantom.studies import make_patient, make_xray
from unimedi_components.data.phantom.xray import MU_WATER, attenuation, develop, path_length, rib_shadow


def film_of(index: int, lateral: bool = False):
    _, streams = make_patient(np.random.SeedSequence([29, index]))
    return make_xray(draw_patient(np.random.default_rng([29, index])), streams, lateral=lateral)


@pytest.mark.parametrize("axis", [1, 2])
def test_slab_equals_the_closed_form(axis):
    grid = Grid((4, 30, 20), (3.0, 5.0, 2.0), (0.0, 0.0, 0.0))
    hu = np.full(grid.shape, -1000.0, np.float32)
    hu[1, 10:16, 4:12] = 0.0  # water, 30 mm by 16 mm
    hu[2, 10:16, 4:12] = -850.0  # lung
    path = path_length(hu, grid, axis)
    thickness = {1: 30.0, 2: 16.0}[axis]
    middle = {1: 6, 2: 12}[axis]
    assert path[0] == pytest.approx(0.0, abs=1e-5)
    assert path[1, middle] == pytest.approx(MU_WATER * thickness, rel=1e-5)
    assert path[2, middle] == pytest.approx(MU_WATER * 0.15 * thickness, rel=1e-3)
    assert np.exp(-path[1, middle]) == pytest.approx(np.exp(-0.019 * thickness), rel=1e-5)


def test_projection_is_the_integral_of_the_attenuation():
    rng = np.random.default_rng(0)
    grid = Grid((5, 7, 6), (3.0, 4.0, 2.0), (0.0, 0.0, 0.0))
    hu = rng.uniform(-1000, 900, grid.shape).astype(np.float32)
    expected = np.zeros((5, 6))
    for k, j, i in np.ndindex(*grid.shape):
        expected[k, i] += 4.0 * float(attenuation(hu[k : k + 1, j, i])[0])
    assert path_length(hu, grid) == pytest.approx(expected, rel=1e-4)


def test_attenuation_of_air_water_and_bone():
    values = attenuation(np.array([-1000.0, 0.0, 150.0, 650.0]))
    assert values == pytest.approx(MU_WATER * np.array([0.0, 1.0, 1.15, 1.65 + 0.8 * 0.5]), abs=1e-7)


def test_ribs_alternate_down_the_lateral_chest():
    patient = draw_patient(np.random.default_rng(1))
    z, x = np.linspace(0, 200, 400, dtype=np.float32), np.array([-0.7 * patient.cage[0]], np.float32)
    shadow = rib_shadow(patient, z, x)[:, 0]
    bone = shadow > 0.5 * shadow.max()
    edges = np.count_nonzero(np.diff(bone.astype(int)) == 1)
    assert 200 / patient.rib_pitch * 0.7 <= edges <= 2 * 200 / patient.rib_pitch + 2


def test_more_matter_is_whiter_and_air_is_black():
    path = np.tile(np.linspace(0, 5, 200, dtype=np.float32), (200, 1))
    film = develop(path, np.random.default_rng(0)).astype(float)
    columns = film[60:140].mean(axis=0)
    assert columns[0] < 30 and columns[-1] > 190
    smooth = columns.reshape(20, 10).mean(axis=1)
    assert (np.diff(smooth[1:]) > -2).all()


def test_film_shows_dark_lungs_white_mediastinum_heart_on_the_image_right():
    for index in range(4):
        study = film_of(index)
        film, patient, grid = study.film.astype(float), study.patient, study.grid
        assert film.shape[0] <= 320 and 256 <= max(film.shape) <= 320

        def at(z, x, film=film, grid=grid):
            row = round((grid.z[-1] - z) / (grid.z[-1] - grid.z[0]) * (film.shape[0] - 1))
            column = round((x - grid.x[0]) / (grid.x[-1] - grid.x[0]) * (film.shape[1] - 1))
            return film[row - 6 : row + 7, column - 6 : column + 7].mean()

        a, height = patient.cage[0], patient.lung_height
        lungs = [at(0.6 * height, side * 0.55 * a) for side in (-1, 1)]
        assert max(lungs) + 50 < at(0.6 * height, 0.0)
        assert at(-45.0, -0.4 * a) > max(lungs) + 60
        # The same distance from the midline: heart on the patient's left, lung on the right.
        low = np.mean(patient.domes) + 25
        assert at(low, 0.42 * a) > at(low, -0.42 * a) + 15


def test_lateral_film_is_made_on_request():
    study = film_of(0, lateral=True)
    assert study.lateral is not None and study.lateral.dtype == np.uint8
    assert study.lateral.shape[0] == study.film.shape[0]
    frontal = film_of(0)
    assert frontal.lateral is None and np.array_equal(frontal.film, study.film)
