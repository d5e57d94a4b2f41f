# SPDX-License-Identifier: Apache-2.0
"""CheXpert conversion of a hand-written raw tree, against values worked out by hand."""

from __future__ import annotations

import gzip
import io

import pytest
from PIL import Image

from unimedi_components.data.chexpert import DATASET, collect
from unimedi_components.errors import ConfigError, DataError

FOLDER = "CheXpert-v1.0-small"
HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,"
    "Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
ALL_UNCERTAIN = ",".join(["-1.0"] * 14)
TRAIN = f"""\
{HEADER}\r
CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,1.0,,,,,,,,,,,,,1.0\r
CheXpert-v1.0-small/train/patient00002/study1/view1_frontal.jpg,Male,87,Frontal,PA,{ALL_UNCERTAIN}\r
CheXpert-v1.0-small/train/patient00002/study2/view1_frontal.jpg,Male,87,Frontal,AP,0.0,,1,,,nan,-1,,NaN,,1.0,,,\r
CheXpert-v1.0-small/train/patient00002/study2/view2_lateral.jpg,Male,87,Lateral,,0.0,,1,,,nan,-1,,NaN,,1.0,,,\r
CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,,,,,,1.0,,,,,,,,\r
CheXpert-v1.0-small/train/patient00003/study1/view1_frontal.jpg,Male,40,Frontal,AP,,,,,,1.0,,,,,,,,\r
CheXpert-v1.0-small/train/patient00004/study1/view1_frontal.jpg,Male,41,Frontal,AP,,,,,,1.0,,,,,,,,\r
CheXpert-v1.0-small/train/patient00005/study1/view1_frontal.jpg,Male,42,Frontal,AP,,,,,,2.0,,,,,,,,\r
CheXpert-v1.0-small/train/nobody.jpg,Male,43,Frontal,AP,,,,,,1.0,,,,,,,,\r
CheXpert-v1.0-small/train/patient64541/study9/view1_frontal.jpg,Male,73,Frontal,AP,,,,,,1.0,,,,,,,,\r
train/patient00006/study11/view3_frontal.jpg,Unknown,0, frontal,AP,,,,,,,1.0,,-1.0,,0.0,,,\r
"""
VALID = f"""\
{HEADER}
CheXpert-v1.0-small/valid/patient64541/study1/view1_frontal.jpg,Male,73,Frontal,AP,0.0,1.0,1.0,1.0,0.0,0.0,0.0,0.0,1.0,0.0,0.0,0.0,0.0,0.0
CheXpert-v1.0-small/valid/patient64541/study1/view2_lateral.jpg,Male,73,Lateral,,0.0,1.0,1.0,1.0,0.0,0.0,0.0,0.0,1.0,0.0,0.0,0.0,0.0,0.0
"""
NAMES = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"]


def write_tree(root, compress=False):
    """Write the raw tree: the image of patient 3 is missing, that of patient 4 truncated."""
    buffer = io.BytesIO()
    Image.new("L", (40, 48), 90).save(buffer, "JPEG")
    for text in (TRAIN, VALID):
        for line in text.splitlines()[1:]:
            path = root / line.split(",")[0].removeprefix(f"{FOLDER}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            if "patient00003" not in path.parts:
                path.write_bytes(buffer.getvalue()[: -200 if "patient00004" in path.parts else None])
    for name, text in (("train", "\ufeff" + TRAIN), ("valid", VALID)):
        data = text.encode()
        (root / f"{name}.csv{'.gz' if compress else ''}").write_bytes(gzip.compress(data) if compress else data)
    return root


def labels_of(datalist, split="training"):
    return {item["id"]: item["label"] for item in datalist[split]}


@pytest.mark.parametrize("compress", [False, True], ids=["csv", "csv.gz"])
def test_conversion_by_hand(tmp_path, compress):
    write_tree(tmp_path / FOLDER, compress)
    datalist = DATASET.convert(tmp_path, validation_images=0, progress=False)
    assert datalist["training"] == [
        {
            "id": "patient00001_study1_view1_frontal",
            "patient": "patient00001",
            "image": f"{FOLDER}/train/patient00001/study1/view1_frontal.jpg",
            "dim": 2,
            "label": [0, 0, 0, 0, 0],
        },
        {
            "id": "patient00002_study1_view1_frontal",
            "patient": "patient00002",
            "image": f"{FOLDER}/train/patient00002/study1/view1_frontal.jpg",
            "dim": 2,
            # five times -1: positive for atelectasis, edema and effusion
            "label": [1, 0, 0, 1, 1],
        },
        {
            "id": "patient00002_study2_view1_frontal",
            "patient": "patient00002",
            "image": f"{FOLDER}/train/patient00002/study2/view1_frontal.jpg",
            "dim": 2,
            "label": [0, 1, 0, 0, 1],
        },
        {
            "id": "patient00006_study11_view3_frontal",
            "patient": "patient00006",
            "image": f"{FOLDER}/train/patient00006/study11/view3_frontal.jpg",
            "dim": 2,
            "label": [1, 0, 1, 0, 0],
        },
    ]
    assert datalist["validation"] == []
    assert labels_of(datalist, "test") == {"patient64541_study1_view1_frontal": [1, 1, 0, 0, 0]}
    meta = datalist["meta"]
    assert meta["dropped_items"] == {
        "not a frontal view": ["patient64541_study1_view2_lateral", "patient00002_study2_view2_lateral"],
        "no patient in the path": [f"{FOLDER}/train/nobody.jpg"],
        "duplicate id": ["patient00001_study1_view1_frontal"],
        "unknown label": ["patient00005_study1_view1_frontal"],
        "patient in another split": ["patient64541_study9_view1_frontal"],
        "missing image": ["patient00003_study1_view1_frontal"],
        "unreadable image": ["patient00004_study1_view1_frontal"],
    }
    assert (meta["task"], meta["label_names"]) == ("multilabel", NAMES)
    assert (meta["uncertain"], meta["findings"]) == ("paper", "competition")
    ending = ".gz" if compress else ""
    assert sorted(meta["sources"]) == [f"{FOLDER}/train.csv{ending}", f"{FOLDER}/valid.csv{ending}"]


def test_root_is_the_data_set_itself(tmp_path):
    write_tree(tmp_path)
    datalist = DATASET.convert(tmp_path, validation_images=0, progress=False)
    assert datalist["training"][0]["image"] == "train/patient00001/study1/view1_frontal.jpg"
    assert all((tmp_path / item["image"]).is_file() for item in datalist["training"] + datalist["test"])


@pytest.mark.parametrize(
    ("policy", "uncertain", "second"),
    [
        ("paper", [1, 0, 0, 1, 1], [0, 1, 0, 0, 1]),
        ("ones", [1, 1, 1, 1, 1], [0, 1, 1, 0, 1]),
        ("zeros", [0, 0, 0, 0, 0], [0, 1, 0, 0, 1]),
        ("ignore", [-1, -1, -1, -1, -1], [0, 1, -1, 0, 1]),
    ],
)
def test_policies_for_uncertain_labels(tmp_path, policy, uncertain, second):
    datalist = DATASET.convert(write_tree(tmp_path), uncertain=policy, validation_images=0, progress=False)
    labels = labels_of(datalist)
    assert labels["patient00002_study1_view1_frontal"] == uncertain
    assert labels["patient00002_study2_view1_frontal"] == second
    assert datalist["meta"]["uncertain"] == policy
    assert ("-1" in datalist["meta"]["label_values"]) == (policy == "ignore")


def test_all_findings(tmp_path):
    datalist = DATASET.convert(write_tree(tmp_path), findings="all", validation_images=0, progress=False)
    assert datalist["meta"]["label_names"] == HEADER.split(",")[5:]
    labels = labels_of(datalist)
    assert labels["patient00001_study1_view1_frontal"] == [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert labels["patient00002_study1_view1_frontal"] == [0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 0]
    assert labels_of(datalist, "test") == {
        "patient64541_study1_view1_frontal": [0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    }


def write_csvs(root, patients):
    """Write csv files alone: patient n has 1 + n % 4 frontal images and one lateral, ten patients are in valid."""
    for split, first, last in (("train", 1, patients), ("valid", 64541, 64550)):
        lines = [HEADER]
        for number in range(first, last + 1):
            for view in range(1, 2 + number % 4):
                place = f"{FOLDER}/{split}/patient{number:05d}/study1/view{view}_frontal.jpg"
                lines.append(f"{place},Male,50,Frontal,AP{',' * 14}")
            lines.append(f"{FOLDER}/{split}/patient{number:05d}/study1/view9_lateral.jpg,Male,50,Lateral,{',' * 14}")
        (root / f"{split}.csv").write_text("\n".join(lines))
    return root


def test_5000_images_are_held_out_by_patient(tmp_path):
    # 4,800 patients, 1,200 of each number of images: 1,200 * (1 + 2 + 3 + 4) = 12,000 frontal images
    root = write_csvs(tmp_path, 4800)
    datalist = DATASET.convert(root, check_images="none", progress=False)
    # of ten patients from 64541 on, two or three of each: 2+3+4+1+2+3+4+1+2+3
    assert datalist["meta"]["kept"] == {"training": 7000, "validation": 5000, "test": 25}
    assert datalist["meta"]["dropped"] == {"not a frontal view": 4810}
    patients = {split: {item["patient"] for item in datalist[split]} for split in ("training", "validation", "test")}
    assert not patients["training"] & patients["validation"] and len(patients["test"]) == 10
    held = {item["patient"]: 0 for item in datalist["validation"]}
    for item in datalist["validation"]:
        held[item["patient"]] += 1
    assert all(count == 1 + int(patient[-5:]) % 4 for patient, count in held.items())
    again = DATASET.convert(root, check_images="none", progress=False)
    other = DATASET.convert(root, check_images="none", progress=False, seed=7)
    assert again == datalist and other["validation"] != datalist["validation"]
    assert other["meta"]["kept"] == datalist["meta"]["kept"]


def test_small_sets_hold_out_a_tenth_and_a_missing_image_moves_nothing(tmp_path):
    # 40 patients, 100 frontal images
    root = write_csvs(tmp_path, 40)
    listed = DATASET.convert(root, check_images="none", progress=False)
    assert listed["meta"]["kept"] == {"training": 90, "validation": 10, "test": 25}
    assert DATASET.convert(root, check_images="none", validation_images=30, progress=False)["meta"]["kept"] == {
        "training": 70,
        "validation": 30,
        "test": 25,
    }
    for split in ("training", "test"):
        for item in listed[split]:
            (root / item["image"]).parent.mkdir(parents=True, exist_ok=True)
            (root / item["image"]).touch()
    found = DATASET.convert(root, check_images="exists", progress=False)
    assert found["training"] == listed["training"] and found["validation"] == []
    assert found["meta"]["dropped"]["missing image"] == 10


def test_errors(tmp_path):
    root = write_tree(tmp_path / "set")
    with pytest.raises(DataError, match=r"missing image: .*patient00003/study1/view1_frontal\.jpg: no such file"):
        collect(root, strict=True, num_workers=1, progress=False)
    with pytest.raises(ConfigError, match=r"uncertain='one' is unknown\. did you mean 'ones'.*Use one of paper, ones"):
        collect(root, uncertain="one")
    with pytest.raises(ConfigError, match=r"findings='five' is unknown.*Use one of competition, all"):
        collect(root, findings="five")
    with pytest.raises(ConfigError, match="validation_images=-1 is negative"):
        collect(root, validation_images=-1)
    (root / "valid.csv").unlink()
    with pytest.raises(DataError, match=r"no table of CheXpert's validation set.*Looked for valid\.csv"):
        collect(root)
    (root / "valid.csv").write_text(VALID.replace("Edema", "Oedema"))
    with pytest.raises(DataError, match=r"valid\.csv: no column 'Edema' \(did you mean 'Oedema'"):
        collect(root)


def test_no_usable_row(tmp_path):
    """A table of other paths is an account of drops, not a traceback."""
    root = write_tree(tmp_path)
    (root / "train.csv").write_text(f"{HEADER}\nimages/0001.jpg,Male,50,Frontal,AP{',' * 14}\n")
    datalist = DATASET.convert(root, progress=False)
    assert datalist["meta"]["kept"] == {"training": 0, "validation": 0, "test": 1}
    assert datalist["meta"]["dropped_items"]["no patient in the path"] == ["images/0001.jpg"]
