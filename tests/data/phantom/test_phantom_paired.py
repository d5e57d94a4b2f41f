# SPDX-License-Identifier: Apache-2.0
"""The film of a CT's patient: the same anatomy and findings, and no other look than a training film's."""

import json

import numpy as np
import pytest
from PIL import Image

from unimedi_components.data.phantom import make_xray, write_phantom
from unimedi_components.data.phantom.paired import write_paired_xray
from unimedi_components.data.phantom.studies import labels_of, make_patient
from unimedi_components.data.phantom.truth import load_truth

SEED = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for layout in ("bimcv", "mimic_cxr"):
        write_phantom(layout, folder / layout, patients=6, seed=SEED, workers=1, progress=False)
    return folder


def test_the_truth_says_which_patient_a_volume_shows(root):
    studies = load_truth(root / "bimcv")["studies"]
    assert [study["phantom"] for study in studies.values()] == [("bimcv", SEED, i) for i in range(6)]
    for study in studies.values():
        _, seed, index = study["phantom"]
        patient, _ = make_patient(np.random.SeedSequence([seed, 2, index]))
        assert labels_of(patient.findings) == study["labels"]
    assert not any("phantom" in study for study in load_truth(root / "mimic_cxr")["studies"].values())


def test_the_film_is_the_patients_and_is_written_once(root, tmp_path):
    study = list(load_truth(root / "bimcv")["studies"].values())[3]
    path = write_paired_xray(tmp_path / "new" / "film.jpg", *study["phantom"])
    patient, streams = make_patient(np.random.SeedSequence([SEED, 2, 3]))
    film = make_xray(patient, streams).film
    with Image.open(path) as image:
        written = np.asarray(image)
    assert image.format == "JPEG"
    assert written.shape == film.shape
    assert np.abs(written.astype(int) - film).mean() < 3
    assert [file.name for file in path.parent.iterdir()] == ["film.jpg"]
    path.write_bytes(b"kept")
    assert write_paired_xray(path, *study["phantom"]).read_bytes() == b"kept"


def test_the_films_look_like_those_of_the_xray_layout(root, tmp_path):
    studies = load_truth(root / "bimcv")["studies"]
    own = [write_paired_xray(tmp_path / f"{name}.jpg", *study["phantom"]) for name, study in studies.items()]
    truth = json.loads((root / "mimic_cxr" / "truth.json").read_text())
    others = [root / "mimic_cxr" / study["image"] for study in truth["studies"].values()]
    levels = [np.asarray([np.asarray(Image.open(path)).mean() for path in paths]) for paths in (own, others)]
    sizes = [{max(Image.open(path).size) for path in paths} for paths in (own, others)]
    assert abs(levels[0].mean() - levels[1].mean()) < 25
    assert all(size in (256, 272, 288, 304, 320) for found in sizes for size in found)
