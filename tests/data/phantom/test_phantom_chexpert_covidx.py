# SPDX-License-Identifier: Apache-2.0
"""CheXpert and COVIDx phantoms: their layout, and the truth against what converter and transforms deliver."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from monai.transforms import Compose
from PIL import Image

from tests.common import SPLITS, items_of, phantom, rows, truth_of
from unimedi_components.data import chexpert, covidx
from unimedi_components.data.phantom import FINDINGS
from unimedi_components.data.phantom import chexpert as phantom_chexpert
from unimedi_components.data.phantom import covidx as phantom_covidx
from unimedi_components.data.transforms import xray_transforms

PATIENTS = 64
LOAD = Compose(xray_transforms(64))


chexpert_root = phantom("chexpert", PATIENTS, 3)
covidx_root = phantom("covidx", PATIENTS, 3)


def check_images(root: Path, datalist: dict, truth: dict[str, dict]) -> None:
    items = items_of(datalist)
    assert items.keys() == truth.keys()
    for name, item in items.items():
        assert item["image"] == truth[name]["image"]
    for item in list(items.values())[::8]:
        image = LOAD({"image": str(root / item["image"])})["image"]
        assert image.shape == (1, 64, 64) and -1 <= image.min() < image.max() <= 1


def test_chexpert_layout(chexpert_root):
    base = chexpert_root / "CheXpert-v1.0-small"
    tables = {}
    for split in ("train", "valid"):
        tables[split] = rows(base / f"{split}.csv")
        header = (base / f"{split}.csv").read_text().splitlines()[0]
        assert header == (
            "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,"
            "Lung Lesion,Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,"
            "Fracture,Support Devices"
        )
    views = Counter(row["Frontal/Lateral"] for table in tables.values() for row in table)
    assert views["Frontal"] == PATIENTS and views["Lateral"] > 0
    # every eighth patient
    assert sum(row["Frontal/Lateral"] == "Frontal" for row in tables["valid"]) == PATIENTS // 8
    for split, table in tables.items():
        for row in table:
            kind = row["Frontal/Lateral"].lower()
            assert row["Path"].startswith(f"CheXpert-v1.0-small/{split}/patient000")
            assert row["Path"].endswith(f"/study1/view{1 if kind == 'frontal' else 2}_{kind}.jpg")
            assert Image.open(chexpert_root / row["Path"]).mode == "L"
            assert row["Sex"] in ("Male", "Female") and row["Age"].isdigit()
            assert row["AP/PA"] in (("AP", "PA") if kind == "frontal" else ("",))
            cells = [row[name] for name in phantom_chexpert.LABELS]
            assert set(cells) <= ({"1.0", "0.0"} if split == "valid" else {"1.0", "0.0", "-1.0", ""})


def test_chexpert_truth(chexpert_root):
    truth = truth_of(chexpert_root)
    datalist = chexpert.DATASET.convert(chexpert_root, findings="all", progress=False)
    check_images(chexpert_root, datalist, truth)
    # 56 frontal images in train.csv, a tenth of them held out
    assert datalist["meta"]["kept"] == {"training": 50, "validation": 6, "test": 8}
    names = datalist["meta"]["label_names"]
    uncertain = Counter()
    for name, item in items_of(datalist).items():
        entry = truth[name]
        label = dict(zip(names, item["label"], strict=True))
        for column in entry["uncertain"]:
            # what the paper's policy made of -1, undone
            assert label[column] == int(column in ("Atelectasis", "Edema", "Pleural Effusion"))
            uncertain[entry["chexpert"][column]] += 1
            label[column] = entry["chexpert"][column]
        assert label == entry["chexpert"]
        found = dict(zip(FINDINGS, entry["labels"], strict=True))
        assert label["Pleural Effusion"] == found["effusion"] and label["Lung Opacity"] == found["ground_glass"]
        assert label["No Finding"] == int(not any(entry["labels"]))
    # a tenth of some 80 findings that are there, a hundredth of some 350 that are not
    assert 2 <= uncertain[1] <= 20 and uncertain[0] <= 12
    marked = items_of(chexpert.DATASET.convert(chexpert_root, findings="all", uncertain="ignore", progress=False))
    for name, item in marked.items():
        assert [names[i] for i, value in enumerate(item["label"]) if value == -1] == truth[name]["uncertain"]


def test_covidx_layout(covidx_root):
    lines = {kind: (covidx_root / f"{kind}_COVIDx9A.txt").read_text().splitlines() for kind in ("train", "test")}
    # every sixth patient
    assert len({line.split()[0] for line in lines["test"]}) == PATIENTS // 6
    assert sum(len({line.split()[0] for line in own}) for own in lines.values()) == PATIENTS
    listed = [f"{kind}/{' '.join(line.split(' ')[1:-2])}" for kind, own in lines.items() for line in own]
    on_disk = [path.relative_to(covidx_root).as_posix() for path in covidx_root.glob("t*/*")]
    assert sorted(listed) == sorted(on_disk) and len(listed) > PATIENTS
    assert {path.rsplit(".", 1)[1] for path in listed} == {"png", "jpg", "jpeg"}
    assert any(" " in path for path in listed)
    assert {line.split()[-1] for own in lines.values() for line in own} == set(phantom_covidx.SOURCES)
    modes = {Image.open(path).mode for path in covidx_root.glob("train/*")}
    assert modes == {"L", "RGB"}


def test_covidx_truth(covidx_root):
    truth = truth_of(covidx_root)
    datalist = covidx.DATASET.convert(covidx_root, progress=False)
    check_images(covidx_root, datalist, truth)
    assert datalist["meta"]["dropped"] == {}
    assert {name: item["label"] for name, item in items_of(datalist).items()} == {
        name: entry["label"] for name, entry in truth.items()
    }
    patients = {item["patient"]: item["label"] for item in items_of(datalist).values()}
    # 20 of each among the first 60, then pneumonia, COVID-19, normal, pneumonia
    assert Counter(patients.values()) == {0: 21, 1: 22, 2: 21}
    for split in SPLITS:
        assert {item["label"] for item in datalist[split]} == {0, 1, 2}
    for entry in truth.values():
        names = {finding["name"] for finding in entry["findings"]}
        assert entry["label"] == (2 if "ground_glass" in names else 1 if names else 0)
        assert entry["disease"] == ("normal", "pneumonia", "covid")[entry["label"]]
    two = covidx.DATASET.convert(covidx_root, classes="two", progress=False)
    assert {name: item["label"] for name, item in items_of(two).items()} == {
        name: int(entry["disease"] == "covid") for name, entry in truth.items()
    }


def test_films_of_one_covidx_patient_show_the_same_lesions(covidx_root):
    truth = truth_of(covidx_root)
    by_patient: dict[str, list[dict]] = {}
    for name, item in items_of(covidx.DATASET.convert(covidx_root, progress=False)).items():
        by_patient.setdefault(item["patient"], []).append(truth[name])
    pairs = [entries for entries in by_patient.values() if len(entries) == 2]
    assert pairs
    for first, second in pairs:
        keys = ("name", "side", "zone", "severity")
        assert [[f[key] for key in keys] for f in first["findings"]] == [
            [f[key] for key in keys] for f in second["findings"]
        ]
        assert (covidx_root / first["image"]).read_bytes() != (covidx_root / second["image"]).read_bytes()
