# SPDX-License-Identifier: Apache-2.0
"""The RSNA phantom: real layout, the same bytes again, and truth equal to what converter and transforms give."""

import json
import re

import itk
import numpy as np
import pytest

from tests.common import SPLITS, items_of, phantom, rows, truth_of
from unimedi_components.data.boxes import boxes_to_file
from unimedi_components.data.films import film_transforms
from unimedi_components.data.phantom import write_phantom
from unimedi_components.data.phantom.findings import FINDINGS, ZONES
from unimedi_components.data.phantom.rsna import CLASSES, OPACITIES, SIDE, _draw
from unimedi_components.data.rsna import DATASET
from unimedi_components.data.transforms import ByDimension
from unimedi_components.errors import DataError
from unimedi_components.images.xray import XrayReader

PATIENTS = 60


root = phantom("rsna", PATIENTS, 4)


@pytest.fixture(scope="module")
def truth(root) -> dict:
    return truth_of(root)


def test_layout(root, truth):
    labels, classes = rows(root / "stage_2_train_labels.csv"), rows(root / "stage_2_detailed_class_info.csv")
    assert list(labels[0]) == ["patientId", "x", "y", "width", "height", "Target"]
    assert list(classes[0]) == ["patientId", "class"]
    assert [row["patientId"] for row in classes] == [row["patientId"] for row in labels]
    assert {row["patientId"] for row in labels} == set(truth) and len(truth) == PATIENTS
    for row in labels:
        assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", row["patientId"])
        cells = [row[name] for name in ("x", "y", "width", "height")]
        if row["Target"] == "1":
            assert all(re.fullmatch(r"\d+\.0", cell) for cell in cells)
        else:
            assert row["Target"] == "0" and cells == [""] * 4
    assert {row["class"] for row in classes} == set(CLASSES)
    positive = [row["Target"] == "1" for row in labels]
    assert [row["class"] == "Lung Opacity" for row in classes] == positive
    assert sum(study["label"] for study in truth.values()) == PATIENTS // 2
    assert {len(study["boxes"]) for study in truth.values()} == {0, 1, 2}
    files = {path.stem for path in (root / "stage_2_train_images").iterdir()}
    assert files == set(truth)


def test_films_and_tags(root, truth):
    kinds = set()
    for name, study in truth.items():
        path = str(root / study["image"])
        reader = itk.GDCMImageIO.New(FileName=path)
        image = itk.imread(path, imageio=reader)
        tags = dict(image)
        assert tags["0010|0020"].strip() == name and tags["0008|0060"].strip() == "CR"
        assert tags["0010|0040"].strip() in ("F", "M") and 0 < int(tags["0010|1010"]) < 100
        assert tags["0018|5101"].strip() in ("AP", "PA") and tags["0028|0010"] == tags["0028|0011"] == str(SIDE)
        assert 1.0 < float(tags["0028|0030"].split("\\")[0]) < 3.0
        kinds.add(tags["0028|0004"].strip())
        film = XrayReader().get_data(path)[0]
        # whatever is 0 in the file: white spine and belly, black corners
        assert film.shape == (SIDE, SIDE) and film[150:250, 110:146].mean() > 0.6 > 0.3 > film[:4, :4].mean()
    assert kinds == {"MONOCHROME1", "MONOCHROME2"}


@pytest.mark.parametrize("task", ["classification", "segmentation", "detection"])
def test_converter_gives_the_truth(root, truth, task):
    datalist = DATASET.convert(root, task=task, check_images="full", strict=True, progress=False)
    assert datalist["meta"]["dropped"] == {}
    assert all(len(datalist[split]) >= PATIENTS // 10 for split in SPLITS)
    found = items_of(datalist)
    assert set(found) == set(truth)
    for name, study in truth.items():
        item = found[name]
        assert item["image"] == study["image"] and item["label"] == study["label"] and item["class"] == study["class"]
        assert item.get("boxes", []) == study["boxes"]


def test_transforms_give_the_truth(root, truth):
    datalist = DATASET.convert(root, task="segmentation", progress=False)
    # the film's own size, and half of it
    whole, half = (
        {target: ByDimension(film_transforms(size, target=target)) for target in ("mask", "boxes")}
        for size in (SIDE, SIDE // 2)
    )
    for item in list(items_of(datalist).values())[::3]:
        start = {**item, "image": str(root / item["image"])}
        mask = np.zeros((SIDE, SIDE), np.float32)
        for x0, y0, x1, y1 in truth[item["id"]]["boxes"]:
            mask[y0:y1, x0:x1] = 1
        assert np.array_equal(whole["mask"](start)["mask"][0].numpy(), mask)
        assert whole["boxes"](start)["boxes"].tolist() == truth[item["id"]]["boxes"]
        # the centre of a pixel of the half is the corner that four pixels of the film share: the last decides
        assert np.array_equal(half["mask"](start)["mask"][0].numpy(), mask[1::2, 1::2])
        small = half["boxes"](start)
        assert boxes_to_file(small["boxes"], small["affine"]).tolist() == truth[item["id"]]["boxes"]


def test_look_alikes_come_alone_and_beside_opacities():
    """Who has what, over draws of 600 patients each: shares as the module says, every other finding in both."""
    positive, negative = ([_draw(np.random.default_rng([7, i]), kind) for i in range(600)] for kind in (True, False))
    others = set(FINDINGS) - set(OPACITIES)
    assert {f.name for found in negative for f in found} == others
    assert np.mean([not found for found in negative]) == pytest.approx(0.35, abs=0.06)
    assert {f.name for found in positive for f in found} == set(FINDINGS)
    mixed = [found for found in positive if len(found) > 1]
    # half of them, less those whose other findings would hide the opacity
    assert 0.35 < len(mixed) / len(positive) < 0.5
    for found in positive:
        ((opacity,), rest) = ([f for f in found if (f.name in OPACITIES) is kind] for kind in (True, False))
        assert opacity.severity in ("moderate", "large") and opacity.zone in ZONES
        assert [f.name for f in found] == sorted((f.name for f in found), key=FINDINGS.index)
        for other in rest:
            same_place = other.zone == opacity.zone and set(other.sides) & set(opacity.sides)
            assert other.name in ("cardiomegaly", "edema") or not same_place


def test_a_set_of_the_earlier_version_is_refused(root, tmp_path):
    """Films of the first version had few look-alikes: they must not be taken for those of this one."""
    truth = json.loads((root / "truth.json").read_text())
    assert truth["version"] == 2
    (tmp_path / "truth.json").write_text(json.dumps({**truth, "version": 1}))
    with pytest.raises(
        DataError, match=r"another phantom set \(version: has 1, asked for 2\); .*choose another folder"
    ):
        write_phantom("rsna", tmp_path, PATIENTS, 4, workers=1, progress=False)


def test_boxes_hold_the_opacities(root, truth):
    """Films with and without the opacity differ inside the boxes; here: boxes are brighter than their mirror."""
    brighter = []
    for study in truth.values():
        names = [finding["name"] for finding in study["findings"]]
        assert bool(study["boxes"]) == bool(set(names) & set(OPACITIES))
        assert len({tuple(box) for box in study["boxes"]}) == len(study["boxes"])
        for x0, y0, x1, y1 in study["boxes"]:
            assert 0 <= x0 < x1 <= SIDE and 0 <= y0 < y1 <= SIDE
        if len(study["boxes"]) == 1 and len(names) == 1:
            film = XrayReader().get_data(str(root / study["image"]))[0]
            ((x0, y0, x1, y1),) = study["boxes"]
            brighter.append(film[y0:y1, x0:x1].mean() > film[y0:y1, SIDE - x1 : SIDE - x0].mean())
    assert len(brighter) >= 8 and np.mean(brighter) >= 0.75
