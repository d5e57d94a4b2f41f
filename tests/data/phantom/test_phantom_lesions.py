# SPDX-License-Identifier: Apache-2.0
"""Where the truth says that a lesion is, against the difference to the same patient without lesions."""

import numpy as np
import pytest

from unimedi_components.data.phantom.anatomy import Profiles, draw_patient
from unimedi_components.data.phantom.findings import FINDINGS, FOCAL, SEVERITIES, Finding, draw_findings
from unimedi_components.data.phantom.lesions import VISIBLE_HU
from unimedi_components.data.phantom.studies import make_ct, make_patient, make_xray

SIDE = {"cardiomegaly": None, "edema": "bilateral"}
ZONE = {"cardiomegaly": None, "edema": None, "effusion": "lower", "pneumothorax": "upper"}
PAINTED = [name for name in FINDINGS if name != "cardiomegaly"]


def make(kind, name: str, severity: str, lesions: bool = True, side: str = "left"):
    size = {"small": 14.0, "moderate": 24.0, "large": 34.0}[severity] if name == "nodule" else None
    finding = Finding(name, SIDE.get(name, side), ZONE.get(name, "lower"), severity, size)
    key = [17, FINDINGS.index(name)]
    _, streams = make_patient(np.random.SeedSequence(key))
    return kind(draw_patient(np.random.default_rng(key), (finding,)), streams, lesions=lesions)


@pytest.mark.parametrize("name", PAINTED)
@pytest.mark.parametrize("severity", ["small", "large"])
def test_slices_and_boxes_equal_the_difference_to_the_lesion_free_volume(name, severity):
    study, clean = make(make_ct, name, severity), make(make_ct, name, severity, lesions=False)
    change = np.abs(study.hu.astype(int) - clean.hu)
    # Two HU of slack on each side: the stored values are multiples of four.
    sure, possible = change >= VISIBLE_HU + 2, change >= VISIBLE_HU - 2
    area = study.grid.spacing[1] * study.grid.spacing[2]
    certain = np.flatnonzero(sure.sum(axis=(1, 2)) * area >= 60)
    allowed = np.flatnonzero(possible.sum(axis=(1, 2)) * area >= 60)
    (lesion,) = study.lesions
    assert len(lesion.slices) > 0
    assert set(certain) <= set(lesion.slices) <= set(allowed)
    box = np.array(lesion.boxes)
    low, high = box[..., 0].min(axis=0), box[..., 1].max(axis=0)
    kept = sure[lesion.slices[0] : lesion.slices[-1] + 1]
    hits = [np.flatnonzero(kept.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    assert low[0] == lesion.slices[0] and high[0] == lesion.slices[-1]
    for axis in (1, 2):
        assert low[axis] <= hits[axis][0] <= low[axis] + 3 and high[axis] - 3 <= hits[axis][-1] <= high[axis]


@pytest.mark.parametrize("name", [n for n in PAINTED if n != "edema"])
def test_lesion_keeps_to_its_side(name):
    for side in ("left", "right"):
        study, clean = (make(make_ct, name, "moderate", side=side), make(make_ct, name, "moderate", False, side))
        change = (study.hu.astype(int) - clean.hu)[:, :, ::1]
        left = study.grid.x > study.patient.shift
        inside, outside = change[:, :, left], change[:, :, ~left]
        inside, outside = (inside, outside) if side == "left" else (outside, inside)
        assert np.abs(outside).max() <= 8
        assert np.abs(inside).max() > 100


@pytest.mark.parametrize("name", PAINTED)
def test_density_has_the_right_sign_and_grows_with_severity(name):
    added = []
    for severity in SEVERITIES:
        study, clean = make(make_ct, name, severity), make(make_ct, name, severity, lesions=False)
        change = study.hu.astype(float) - clean.hu
        added.append((change < -80).sum() if name == "pneumothorax" else change[change > 80].sum())
    assert 0 < added[0] < added[1] < added[2]


def test_fluid_sinks_and_air_rises():
    effusion, clean = make(make_ct, "effusion", "moderate"), make(make_ct, "effusion", "moderate", False)
    rows = np.nonzero(np.abs(effusion.hu.astype(int) - clean.hu) > 80)[1]
    assert effusion.grid.y[rows].mean() > 0.25 * effusion.patient.cage[1]  # supine: to the back
    air, clean = make(make_ct, "pneumothorax", "moderate"), make(make_ct, "pneumothorax", "moderate", False)
    rows = np.nonzero(air.hu.astype(int) - clean.hu < -80)[1]
    assert air.grid.y[rows].mean() < -0.25 * air.patient.cage[1]
    film, clean = make(make_xray, "effusion", "moderate"), make(make_xray, "effusion", "moderate", False)
    change = film.film.astype(float) - clean.film
    brighter = np.nonzero(change > 25)[0]
    assert brighter.mean() > 0.6 * film.film.shape[0]  # standing: to the base


def test_enlarged_heart_counts_the_slices_wider_than_half_the_chest():
    study = make(make_ct, "cardiomegaly", "large")
    right, left, _ = Profiles(study.patient, study.grid.z).heart(study.patient)
    wide = [i for i, w in enumerate(left - right) if w > study.patient.cage[0]]
    assert study.lesions[0].slices == wide and len(wide) >= 5


@pytest.mark.parametrize("name", ["nodule", "consolidation", "ground_glass", "effusion", "atelectasis"])
def test_film_changes_inside_the_box(name):
    film, clean = make(make_xray, name, "large"), make(make_xray, name, "large", lesions=False)
    change = np.abs(film.film.astype(float) - clean.film)
    boxes = film.film_boxes(film.lesions[0])
    inside = np.zeros(change.shape, bool)
    for x0, y0, x1, y1 in boxes:
        assert 0 <= x0 < x1 < change.shape[1] and 0 <= y0 < y1 < change.shape[0]
        inside[y0 : y1 + 1, x0 : x1 + 1] = True
    assert change[inside].mean() > 3 * change[~inside].mean()


def test_prevalence_and_count():
    drawn = [draw_findings(np.random.default_rng([3, i])) for i in range(3000)]
    for name in FINDINGS:
        assert 0.14 < np.mean([any(f.name == name for f in d) for d in drawn]) < 0.22
    counts = np.array([len(d) for d in drawn])
    assert 0.19 < np.mean(counts == 0) < 0.25 and counts.max() == 4
    for findings in drawn:
        assert [f.name for f in findings] == [n for n in FINDINGS if n in {f.name for f in findings}]
        for f in findings:
            assert (f.size is not None) == (f.name == "nodule") and (f.size is None or 12 <= f.size <= 40)


def test_a_third_to_a_half_of_the_ct_studies_is_focal():
    focal = []
    for index in range(60):
        patient, streams = make_patient(np.random.SeedSequence([23, index]))
        study = make_ct(patient, streams, shape=(48, 64, 64))
        lesion = {i for v in study.lesions for i in v.slices}
        focal.append(0 < len(lesion) <= 16)
        if patient.findings and len(patient.findings) == 1 and patient.findings[0].name in FOCAL:
            assert 0 < len(lesion) <= 20
    assert 0.3 < np.mean(focal) < 0.6
