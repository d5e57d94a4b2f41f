# SPDX-License-Identifier: Apache-2.0
"""AMOS22 conversion of a hand-written raw tree, against values worked out by hand."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from unimedi_components.data.amos import DATASET, collect
from unimedi_components.errors import ConfigError, DataError

AFFINE = np.array([[0.7, 0, 0, -9], [0, 0.7, 0, 4], [0, 0, 5, 2], [0, 0, 0, 1.0]])
LABELS = {
    "0": "background",
    "1": "spleen",
    "2": "right kidney",
    "3": "left kidney",
    "4": "gall bladder",
    "5": "esophagus",
    "6": "liver",
    "7": "stomach",
    "8": "arota",
    "9": "postcava",
    "10": "pancreas",
    "11": "right adrenal gland",
    "12": "left adrenal gland",
    "13": "duodenum",
    "14": "bladder",
    "15": "prostate/uterus",
}


def entry(number, part, label=True):
    image = f"./images{part}/amos_{number:04d}.nii.gz"
    return {"image": image, **({"label": image.replace("images", "labels")} if label else {})}


def write_list(root, content, name="dataset.json"):
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("\ufeff" + json.dumps(content, indent=1).replace("\n", "\r\n"), newline="")
    return root


def write_volumes(root, entries, organ=15):
    image = np.full((12, 10, 8), -1000, np.int16)
    image[2:-2, 2:-2] = 40
    mask = np.zeros((12, 10, 8), np.uint8)
    mask[4, 5, 3] = organ
    for found in entries:
        for key, array in (("image", image), ("label", mask)):
            if key in found:
                path = root / found[key]
                path.parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(array, AFFINE), path)


@pytest.mark.parametrize("above", ["", "amos22"])
def test_conversion_by_hand(tmp_path, above):
    root = tmp_path / above
    training = [entry(number, "Tr") for number in (1, 4, 500, 501, 507)]
    validation = [entry(number, "Va") for number in (8, 600)]
    test = ["./imagesTs/amos_0002.nii.gz", entry(3, "Ts"), entry(11, "Ts"), entry(12, "Ts", False)]
    content = {"name": "AMOS", "labels": LABELS, "training": training, "validation": validation, "test": test}
    write_list(root, content)
    write_volumes(root, [*training[:3], validation[0], test[2]])
    datalist = DATASET.convert(tmp_path, split="official")
    prefix = f"{above}/" if above else ""
    assert datalist["training"][0] == {
        "id": "amos_0001",
        "patient": "amos_0001",
        "image": f"{prefix}imagesTr/amos_0001.nii.gz",
        "mask": f"{prefix}labelsTr/amos_0001.nii.gz",
        "dim": 3,
    }
    assert [item["id"] for item in datalist["training"]] == ["amos_0001", "amos_0004", "amos_0500"]
    assert [item["id"] for item in datalist["validation"]] == ["amos_0008"]
    assert [item["id"] for item in datalist["test"]] == ["amos_0011"]
    meta = datalist["meta"]
    assert meta["dropped_items"] == {
        "not CT": ["amos_0501", "amos_0507", "amos_0600"],
        "no label map": ["amos_0002", "amos_0003", "amos_0012"],
    }
    assert meta["task"] == "segmentation" and len(meta["label_names"]) == 16
    assert [meta["label_names"][index] for index in (0, 4, 8, 15)] == [
        "background",
        "gall bladder",
        "aorta",
        "prostate/uterus",
    ]
    assert meta["own_spelling"] == {"aorta": "arota"}
    assert list(meta["sources"]) == [f"{prefix}dataset.json"]
    # the cases that the paper reports on choose no epoch: they are the test split, and nothing is for validation
    paper = DATASET.convert(tmp_path)
    assert paper["training"] == datalist["training"] and paper["test"] == datalist["validation"]
    assert paper["validation"] == [] and paper["meta"]["split"] == "paper"
    assert paper["meta"]["dropped_items"] == {**meta["dropped_items"], "not in the paper's split": ["amos_0011"]}
    with pytest.raises(ConfigError, match=r"split='papre' is unknown.*paper"):
        DATASET.convert(tmp_path, split="papre")


def test_official_numbers(tmp_path):
    """200 and 100 CT volumes among 40 and 20 MRI volumes; no file is opened."""
    training = [entry(number, "Tr") for number in (*range(1, 401, 2), *range(501, 541))]
    validation = [entry(number, "Va") for number in (*range(2, 202, 2), *range(541, 561))]
    write_list(tmp_path, {"labels": LABELS, "training": training, "validation": validation})
    meta = DATASET.convert(tmp_path, check_images="none")["meta"]
    assert meta["kept"] == {"training": 200, "validation": 0, "test": 100}
    assert meta["dropped"] == {"not CT": 60}


def test_faults_and_collisions(tmp_path):
    training = [entry(number, "Tr") for number in (1, 2, 3, 4, 5, 1, 6)]
    training += ["imagesTr/amos_0007.nii.gz", {"image": "imagesTr/case9.nii.gz", "label": "labelsTr/case9.nii.gz"}]
    validation = [entry(6, "Va"), entry(8, "Va")]
    write_list(tmp_path, {"training": training, "validation": validation, "test": []})
    write_volumes(tmp_path, [*training[:7], *validation])
    (tmp_path / "imagesTr/amos_0002.nii.gz").unlink()
    (tmp_path / "labelsTr/amos_0003.nii.gz").unlink()
    write_volumes(tmp_path, [training[3]], organ=16)
    nib.save(nib.Nifti1Image(np.zeros((12, 10, 8), np.uint8), np.eye(4)), tmp_path / "labelsTr/amos_0005.nii.gz")
    datalist = DATASET.convert(tmp_path, split="official")
    assert [item["id"] for item in datalist["training"]] == ["amos_0001"]
    assert [item["id"] for item in datalist["validation"]] == ["amos_0006", "amos_0008"]
    assert datalist["validation"][0]["image"] == "imagesVa/amos_0006.nii.gz"
    assert datalist["meta"]["dropped_items"] == {
        "duplicate id": ["amos_0001"],
        "no label map": ["amos_0007"],
        "no case number": ["case9"],
        "missing image": ["amos_0002"],
        "missing mask": ["amos_0003"],
        "unknown label values": ["amos_0004"],
        "mask and image differ in geometry": ["amos_0005"],
        "patient in another split": ["amos_0006"],
    }
    with pytest.raises(DataError, match=r"missing image: .*imagesTr/amos_0002\.nii\.gz: no such file"):
        collect(tmp_path, strict=True, num_workers=1)


def swapped(first, second):
    return {**LABELS, first: LABELS[second], second: LABELS[first]}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (swapped("2", "3"), 'label 2 is "left kidney" where AMOS22 has "right kidney"'),
        (
            {key: LABELS[key] for key in LABELS if key != "15"},
            'label 15 is "missing" where AMOS22 has "prostate/uterus"',
        ),
        ({**LABELS, "16": "colon"}, 'label 16 is "colon" where AMOS22 has "no label"'),
        (list(LABELS.values()), '"labels" is not a mapping'),
    ],
)
def test_other_labels_are_refused(tmp_path, labels, message):
    write_list(tmp_path, {"labels": labels, "training": [entry(1, "Tr")]})
    with pytest.raises(DataError) as info:
        collect(tmp_path, check_images="none")
    assert f"{tmp_path}/dataset.json: {message}" in str(info.value)


@pytest.mark.parametrize(
    "labels",
    [
        {**LABELS, "8": "Aorta"},
        {key: LABELS[key] for key in LABELS if key != "0"},
        {name: int(number) for number, name in LABELS.items()},
        {**LABELS, "11": "right_adrenal_gland "},
    ],
    ids=["corrected", "without background", "names first", "underscores"],
)
def test_same_labels_in_other_words(tmp_path, labels):
    write_list(tmp_path, {"labels": labels, "training": [entry(1, "Tr")]})
    assert DATASET.convert(tmp_path, check_images="none")["meta"]["kept"]["training"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"training": [', "cannot be read as JSON"),
        ("[1]", 'has no list "training"'),
        ('{"training": []}', 'has no list "training"'),
        ('{"training": {"image": "a"}}', '"training" is not a list'),
        ('{"training": [{"label": "a"}]}', 'training[0] is {"label": "a"}'),
        ('{"training": ["a", 3]}', "training[1] is 3"),
        ('{"training": ["a", ""]}', 'training[1] is ""'),
        ('{"training": ["/data/amos_0001.nii.gz"]}', "paths below the folder of this file"),
        ('{"training": [{"image": "a", "label": "../b"}]}', "paths below the folder of this file"),
    ],
)
def test_malformed_lists(tmp_path, content, message):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(DataError) as info:
        collect(tmp_path)
    assert f"{tmp_path}/dataset.json: " in str(info.value) and message in str(info.value)
