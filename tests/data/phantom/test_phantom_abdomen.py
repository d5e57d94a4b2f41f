# SPDX-License-Identifier: Apache-2.0
"""The abdominal phantom: its organs, and the BCV and AMOS folders that are written from it."""

from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.common import phantom, read, truth_of
from unimedi_components.data import amos as amos_converter
from unimedi_components.data import bcv as bcv_converter
from unimedi_components.data.phantom import amos, bcv
from unimedi_components.data.phantom.abdomen import make_abdomen
from unimedi_components.data.phantom.abdomen_files import axis_order, organ_truth, save_volume
from unimedi_components.data.phantom.abdomen_organs import HOUNSFIELD, ORGANS
from unimedi_components.data.phantom.geometry import Grid
from unimedi_components.data.phantom.writer import write_phantom
from unimedi_components.errors import DataError

PATIENTS = 20
# The stomach's gas stands apart: a median does not see it.
TOLERANCE = {"stomach": 45.0, "aorta": 32.0, "portal and splenic veins": 32.0, "inferior vena cava": 28.0}


def seed_of(number: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([11, number])


bcv_root = phantom("bcv", PATIENTS, 3)
amos_root = phantom("amos", PATIENTS, 3)


@pytest.fixture(scope="module")
def studies() -> list:
    return [make_abdomen(seed_of(number), pelvis=True) for number in range(8)]


def test_every_organ_is_there_with_its_own_brightness(studies):
    missing = Counter()
    for study in studies:
        assert study.hu.shape == study.organs.shape == study.grid.shape
        assert study.hu.dtype == np.int16 and study.organs.dtype == np.uint8
        assert 4.2 < study.grid.spacing[0] < 6.2 and 2.2 < study.grid.spacing[2] < 3.5
        for number, organ in enumerate(ORGANS, start=1):
            voxels = study.hu[study.organs == number]
            if len(voxels) < 100:
                missing[organ] += 1
                continue
            assert abs(np.median(voxels) - HOUNSFIELD[organ]) < TOLERANCE.get(organ, 20.0), organ
    assert not set(missing) - {"gallbladder"}, missing


def test_organs_lie_where_anatomy_puts_them(studies):
    for study in studies:
        grid = study.grid
        centres, tops = {}, {}
        for number, organ in enumerate(ORGANS, start=1):
            z, y, x = np.nonzero(study.organs == number)
            if len(z):
                centres[organ] = np.array((grid.z[z].mean(), grid.y[y].mean(), grid.x[x].mean()))
                tops[organ] = grid.z[z].max()
        right = ("liver", "right kidney", "right adrenal gland", "inferior vena cava")
        left = ("spleen", "left kidney", "left adrenal gland", "stomach", "aorta")
        assert all(centres[organ][2] < -5 for organ in right) and all(centres[organ][2] > 2 for organ in left)
        assert abs(centres["bladder"][2]) < 12 and abs(centres["prostate/uterus"][2]) < 15
        for side in ("right", "left"):
            assert centres[f"{side} adrenal gland"][0] > centres[f"{side} kidney"][0] + 20
            assert abs(centres[f"{side} adrenal gland"][2]) < abs(centres[f"{side} kidney"][2])
        assert tops["liver"] > tops["right kidney"] > tops["bladder"]
        below = centres["bladder"][0] - centres["prostate/uterus"][0]
        assert below > 15 if study.sex == "M" else below < 0
        litres = np.bincount(study.organs.ravel(), minlength=17) * grid.voxel_volume / 1e6
        assert 0.9 < litres[ORGANS.index("liver") + 1] < 2.6 and 0.08 < litres[1] < 0.42
        assert {study.sex for study in studies} == {"F", "M"}


def test_the_same_patient_whatever_is_asked_for():
    whole, upper = make_abdomen(seed_of(1), pelvis=True), make_abdomen(seed_of(1), pelvis=False)
    coarse = make_abdomen(seed_of(1), pelvis=True, shape=(32, 96, 96))
    again = make_abdomen(seed_of(1), pelvis=True)
    assert np.array_equal(whole.hu, again.hu) and np.array_equal(whole.organs, again.organs)
    assert (whole.sex, whole.age) == (upper.sex, upper.age) == (coarse.sex, coarse.age)
    assert coarse.hu.shape == (32, 96, 96)
    liver = ORGANS.index("liver") + 1
    litres = [np.count_nonzero(s.organs == liver) * s.grid.voxel_volume for s in (whole, upper, coarse)]
    assert max(litres) < 1.08 * min(litres)
    assert not np.isin(upper.organs, (15, 16)).any()
    assert set(np.unique(coarse.organs)) == set(range(17))


@pytest.mark.parametrize("order", ["RAS", "LPS", "SLP"])
def test_a_voxel_keeps_its_place_in_any_axis_order(order, tmp_path):
    # Voxel (z 1, y 2, x 3) lies at z = 100 + 5, y = -20 + 2*2, x = 10 + 3*3: 19 to the left, -16 to the back.
    volume = np.zeros((4, 5, 6), np.uint8)
    volume[1, 2, 3] = 2
    grid = Grid((4, 5, 6), (5.0, 2.0, 3.0), (100.0, -20.0, 10.0))
    stored, affine = save_volume(tmp_path / "new" / "a.nii.gz", volume, grid, order)
    image = nib.load(tmp_path / "new" / "a.nii.gz")
    assert "".join(nib.aff2axcodes(image.affine)) == order and image.get_data_dtype() == np.uint8
    assert image.shape == stored.shape == {"RAS": (6, 5, 4), "LPS": (6, 5, 4), "SLP": (4, 6, 5)}[order]
    assert np.array_equal(np.asarray(image.dataobj), stored)
    box = {"RAS": [[1, 1], [2, 2], [2, 2]], "LPS": [[1, 1], [2, 2], [3, 3]], "SLP": [[1, 1], [2, 2], [3, 3]]}[order]
    centre = [-19.0, 16.0, 105.0]
    assert organ_truth(stored, affine, ("a", "b")) == {
        "b": {"label": 2, "voxels": 1, "box": box, "centroid_mm": centre}
    }


def test_axis_orders_are_mixed():
    orders = Counter(axis_order(index, seed_of(index)) for index in range(100))
    assert orders["SLP"] == 10 and orders["RAS"] > 35 and orders["LPS"] > 20


def test_bcv_case_numbers():
    numbers = [bcv.case_number(index) for index in range(100)]
    assert sorted(numbers[:30]) == [*range(1, 11), *range(21, 41)]
    assert numbers[30:] == [*range(41, 61), *range(81, 131)]
    for count in (10, 17, 20, 30):
        assert abs(sum(32 <= number <= 40 for number in numbers[:count]) - 0.3 * count) < 1


@pytest.mark.parametrize("layout", ["bcv", "amos"])
def test_truth_is_what_the_files_hold(layout, request):
    root = request.getfixturevalue(f"{layout}_root")
    names = {"bcv": bcv.LABELS, "amos": amos.LABELS}[layout]
    truth, orders = truth_of(root), set()
    assert len(truth) == PATIENTS
    for entry in list(truth.values())[1::3]:
        image, mask = nib.load(root / entry["image"]), nib.load(root / entry["mask"])
        assert image.get_data_dtype() == np.int16 and mask.get_data_dtype() == np.uint8
        assert image.shape == mask.shape and np.array_equal(image.affine, mask.affine)
        codes = nib.aff2axcodes(image.affine)
        orders.add("".join(codes))
        labels = np.asarray(mask.dataobj)
        places = np.argwhere(labels)
        values = labels[tuple(places.T)]
        counts = np.bincount(labels.ravel(), minlength=len(names) + 1)
        assert len(counts) == len(names) + 1
        assert {n: counts[i] for i, n in enumerate(names, 1) if counts[i]} == {
            name: organ["voxels"] for name, organ in entry["organs"].items()
        }
        assert set(names) - set(entry["organs"]) <= {"gallbladder", "gall bladder"}
        axes = [next(i for i, code in enumerate(codes) if code in pair) for pair in ("SI", "AP", "LR")]
        for name, organ in entry["organs"].items():
            assert organ["label"] == names.index(name) + 1 and organ["voxels"] >= 20
            where = places[values == organ["label"]]
            assert [[int(v.min()), int(v.max())] for v in where.T[axes]] == organ["box"]
            centre = nib.affines.apply_affine(image.affine, where).mean(axis=0)
            assert np.allclose(centre, organ["centroid_mm"], atol=0.01)
        # Right grows with x in RAS+.
        assert entry["organs"]["right kidney"]["centroid_mm"][0] > 30 > entry["organs"]["aorta"]["centroid_mm"][0]
        assert entry["organs"]["spleen"]["centroid_mm"][0] < -40 < 20 < entry["organs"]["liver"]["centroid_mm"][0]
        volume = np.asarray(image.dataobj)
        assert abs(np.median(volume[labels == 6]) - HOUNSFIELD["liver"]) < 25
    assert orders == {"RAS", "LPS", "SLP"}


def test_the_back_is_at_the_back_in_every_file(bcv_root):
    for entry in list(truth_of(bcv_root).values())[:5]:
        volume = np.asarray(nib.as_closest_canonical(nib.load(bcv_root / entry["image"])).dataobj)
        middle = volume[54:74, :, 4:-4]
        assert np.nonzero(middle > 300)[1].mean() < 60 < np.nonzero(middle < -850)[1].mean()
        lung = volume < -700
        body = volume[:, 60, :] > -200
        assert lung[30:100, 40:90, -3].mean() > lung[30:100, 40:90, 3].mean() and body.mean() > 0.5


def test_converters_read_the_folders(bcv_root, amos_root):
    found = bcv_converter.DATASET.convert(bcv_root, progress=False)
    assert {item["id"] for part in ("training", "test") for item in found[part]} == set(truth_of(bcv_root))
    assert (len(found["training"]), len(found["test"])) == (14, 6)
    found = amos_converter.DATASET.convert(amos_root, progress=False)
    assert {item["id"] for part in ("training", "test") for item in found[part]} == set(truth_of(amos_root))
    assert (len(found["training"]), len(found["validation"]), len(found["test"])) == (14, 0, 6)
    for root, items in ((amos_root, found["training"]), (amos_root, found["test"])):
        assert all(truth_of(root)[item["id"]]["mask"] == item["mask"] for item in items)


def test_bcv_layout(bcv_root):
    expected = [f"{bcv.case_number(index):04d}" for index in range(PATIENTS)]
    raw = bcv_root / "RawData"
    assert sorted(p.name for p in (raw / "Training" / "img").iterdir()) == sorted(f"img{n}.nii.gz" for n in expected)
    assert sorted(p.name for p in (raw / "Training" / "label").iterdir()) == sorted(
        f"label{n}.nii.gz" for n in expected
    )
    assert [p.name for p in (raw / "Testing" / "img").iterdir()] == ["img0061.nii.gz"]
    assert set(truth_of(bcv_root)) == {f"img{n}" for n in expected}
    first = truth_of(bcv_root)["img0001"]
    assert first["image"] == "RawData/Training/img/img0001.nii.gz"
    assert first["mask"] == "RawData/Training/label/label0001.nii.gz"


def test_amos_layout(amos_root):
    content = read(amos_root / "dataset.json")
    assert content["modality"] == {"0": "CT"} and len(content["labels"]) == 16
    assert [content["labels"][n] for n in ("0", "4", "8", "9", "15")] == [
        "background",
        "gall bladder",
        "arota",
        "postcava",
        "prostate/uterus",
    ]
    # 20 patients: numbers 3, 6, ..., 18 to validate; patients 7 and 17 also as MRI, patient 15 also for testing.
    validation = [f"amos_{n:04d}" for n in (3, 6, 9, 12, 15, 18, 508)]
    assert [Path(e["image"]).name[:9] for e in content["validation"]] == validation
    training = [f"amos_{n:04d}" for n in (1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16, 17, 19, 20, 507)]
    assert content["training"] == [
        {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in training
    ]
    assert content["test"] == [{"image": "./imagesTs/amos_0451.nii.gz"}]
    assert (content["numTraining"], content["numTest"]) == (15, 1)
    listed = [e[key] for part in ("training", "validation", "test") for e in content[part] for key in e]
    files = [p for p in amos_root.rglob("*.nii.gz")]
    assert {f"./{p.relative_to(amos_root).as_posix()}" for p in files} == set(listed) and len(files) == len(listed)
    assert set(truth_of(amos_root)) == {n for n in training + validation if int(n[5:]) <= 500}
    mri = np.asarray(nib.load(amos_root / "imagesTr" / "amos_0507.nii.gz").dataobj)
    labels = np.asarray(nib.load(amos_root / "labelsTr" / "amos_0507.nii.gz").dataobj)
    assert mri.min() >= 0 and mri.shape == labels.shape
    assert np.median(mri[labels == 14]) > np.median(mri[labels == 1]) - 400 and np.median(mri[labels == 6]) > 200


def test_amos_has_no_room_for_more_ct_numbers(tmp_path):
    with pytest.raises(DataError, match="has numbers for 450 patients, not for 451"):
        write_phantom("amos", tmp_path, amos.MOST_PATIENTS + 1, progress=False)
    assert not list(tmp_path.iterdir())
