# SPDX-License-Identifier: Apache-2.0
"""COVIDx conversion of a hand-written raw tree, against values worked out by hand."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
from monai.transforms import Compose
from PIL import Image

from unimedi_components.data.covidx import DATASET, collect
from unimedi_components.data.transforms import xray_transforms
from unimedi_components.errors import ConfigError, DataError

TRAIN = """\
3 SARS-10.1148rg.242035193-g04mr34g0-Fig8a-day0.jpeg pneumonia cohen\r
3 SARS-10.1148rg.242035193-g04mr34g0-Fig8b-day5.jpeg PNEUMONIA cohen\r
COVID 1 COVID(1).png COVID-19 sirm\r
COVID 2 COVID(2).png COVID-19 sirm\r
\r
12 figure one  right lung.JPG covid-19 fig1\r
0004cfab 0004cfab.png normal rsna\r
0004cfab 0004cfab.png normal rsna\r
0005aaaa 0005aaaa.png Normal\r
gone gone.png normal rsna\r
cut cut.png pneumonia rsna\r
short.png normal\r
p9 odd.png tuberculosis cohen\r
ANON191 CR.1.2.840.png normal actmed\r
9 rgba.png COVID-19 bimcv\r
9 bitmap.bmp COVID-19 bimcv\r
"""
TEST = """\
ANON191 CR.1.3.999.png COVID-19 actmed
70 test image.png pneumonia cohen
t1 t1.png normal rsna
"""
FILES = {
    "train/SARS-10.1148rg.242035193-g04mr34g0-Fig8a-day0.jpeg": "L",
    "train/SARS-10.1148rg.242035193-g04mr34g0-Fig8b-day5.jpeg": "RGB",
    "train/COVID(1).png": "L",
    "train/COVID(2).png": "RGB",
    "train/figure one  right lung.JPG": "RGB",
    "train/0004cfab.png": "L",
    "train/0005aaaa.png": "L",
    "train/cut.png": "L",
    "train/CR.1.2.840.png": "L",
    "train/rgba.png": "RGBA",
    "train/bitmap.bmp": "L",
    "test/CR.1.3.999.png": "L",
    "test/test image.png": "RGB",
    "test/t1.png": "L",
}


def write_tree(root, folder="."):
    """Write the raw tree: ``gone.png`` is missing, ``cut.png`` truncated."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / "train_COVIDx9A.txt").write_bytes(("\ufeff" + TRAIN).encode())
    (root / folder / "test_COVIDx9A.txt").write_text(TEST)
    ramp = Image.fromarray(np.arange(0, 256, 4, dtype=np.uint8)[None].repeat(48, 0))
    for name, mode in FILES.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        ramp.convert(mode).save(path)
        if name == "train/cut.png":
            path.write_bytes(path.read_bytes()[:-20])
    return root


def by_id(datalist):
    splits = ("training", "validation", "test")
    return {item["id"]: (split, item) for split in splits for item in datalist[split]}


@pytest.mark.parametrize("folder", [".", "labels"])
def test_conversion_by_hand(tmp_path, folder):
    datalist = DATASET.convert(write_tree(tmp_path, folder), validation_fraction=0, progress=False)
    found = by_id(datalist)
    assert {name: (item["patient"], item["image"], item["label"]) for name, (_, item) in found.items()} == {
        name.split("/")[1]: (patient, name, label)
        for name, patient, label in (
            ("train/SARS-10.1148rg.242035193-g04mr34g0-Fig8a-day0.jpeg", "3", 1),
            ("train/SARS-10.1148rg.242035193-g04mr34g0-Fig8b-day5.jpeg", "3", 1),
            # the blank of these two belongs to the patient, that of the next to the file
            ("train/COVID(1).png", "COVID 1", 2),
            ("train/COVID(2).png", "COVID 2", 2),
            ("train/figure one  right lung.JPG", "12", 2),
            ("train/0004cfab.png", "0004cfab", 0),
            ("train/0005aaaa.png", "0005aaaa", 0),
            ("train/rgba.png", "9", 2),
            ("train/bitmap.bmp", "9", 2),
            ("test/CR.1.3.999.png", "ANON191", 2),
            ("test/test image.png", "70", 1),
            ("test/t1.png", "t1", 0),
        )
    }
    assert {split for name, (split, _) in found.items() if (tmp_path / "train" / name).exists()} == {"training"}
    assert [item["id"] for item in datalist["test"]] == ["CR.1.3.999.png", "t1.png", "test image.png"]
    meta = datalist["meta"]
    assert meta["dropped_items"] == {
        "duplicate id": ["0004cfab.png"],
        "malformed line": ["train_COVIDx9A.txt:12"],
        "unknown class": ["train_COVIDx9A.txt:13"],
        "patient in another split": ["CR.1.2.840.png"],
        "missing image": ["gone.png"],
        "unreadable image": ["cut.png"],
    }
    assert (meta["task"], meta["label_names"]) == ("multiclass", ["normal", "pneumonia", "COVID-19"])
    assert (meta["list_version"], meta["classes"]) == ("9A", "three")
    prefix = "" if folder == "." else f"{folder}/"
    assert sorted(meta["sources"]) == [f"{prefix}test_COVIDx9A.txt", f"{prefix}train_COVIDx9A.txt"]


def test_images_of_every_kind_load_alike(tmp_path):
    datalist = DATASET.convert(write_tree(tmp_path), progress=False)
    load = Compose(xray_transforms(32))
    first = None
    for _, item in by_id(datalist).values():
        image = load({"image": str(tmp_path / item["image"])})["image"]
        assert image.shape == (1, 32, 32) and -1 <= image.min() < image.max() <= 1
        first = image if first is None else first
        # JPEG rounds, the others are exact
        assert (image - first).abs().max() < 0.05


def test_two_classes(tmp_path):
    root = write_tree(tmp_path)
    datalist = DATASET.convert(root, classes="two", progress=False)
    assert {name: item["label"] for name, (_, item) in by_id(datalist).items() if "." in name} == {
        "SARS-10.1148rg.242035193-g04mr34g0-Fig8a-day0.jpeg": 0,
        "SARS-10.1148rg.242035193-g04mr34g0-Fig8b-day5.jpeg": 0,
        "COVID(1).png": 1,
        "COVID(2).png": 1,
        "figure one  right lung.JPG": 1,
        "0004cfab.png": 0,
        "0005aaaa.png": 0,
        "rgba.png": 1,
        "bitmap.bmp": 1,
        "CR.1.3.999.png": 1,
        "test image.png": 0,
        "t1.png": 0,
    }
    assert datalist["meta"]["task"] == "binary" and datalist["meta"]["label_names"] == ["negative", "positive"]
    (root / "train_COVIDx9B.txt").write_text("9 rgba.png positive bimcv\n0004cfab 0004cfab.png negative rsna\n")
    (root / "test_COVIDx9B.txt").write_text("t1 t1.png negative rsna\n")
    datalist = DATASET.convert(root, classes="two", list_version="9b", progress=False)
    assert {name: item["label"] for name, (_, item) in by_id(datalist).items()} == {
        "rgba.png": 1,
        "0004cfab.png": 0,
        "t1.png": 0,
    }
    with pytest.raises(
        DataError,
        match=r"test_COVIDx9B\.txt: a binary list .*three classes are asked for\. Put train_COVIDx9A\.txt .*"
        "or give --classes two",
    ):
        collect(root, list_version="9B")


def test_choice_of_lists(tmp_path):
    (tmp_path / "labels").mkdir()
    for version in ("7A", "8A", "10A", "6", "10B", "11B"):
        for kind in ("train", "test"):
            name = "negative" if version[-1] in "6B" else "normal"
            text = f"{kind}{version} {kind}{version}.png {name} rsna\n".encode()
            folder = tmp_path / ("labels" if version == "10A" else ".")
            ending = ".txt.gz" if version == "10A" else ".txt"
            (folder / f"{kind}_COVIDx{version}{ending}").write_bytes(gzip.compress(text) if version == "10A" else text)
    # a list without its other half is never chosen
    (tmp_path / "train_COVIDx12A.txt").write_text("a a.png normal rsna\n")

    def chosen(**options):
        datalist = DATASET.convert(tmp_path, check_images="none", progress=False, **options)
        assert datalist["training"][0]["id"] == f"train{datalist['meta']['list_version']}.png"
        return datalist["meta"]["list_version"]

    assert chosen() == "10A"
    assert chosen(list_version="7A") == "7A"
    assert chosen(list_version=6, classes="two") == "6"
    with pytest.raises(
        DataError, match=r"no pair of lists train_COVIDx12A\.txt and test_COVIDx12A\.txt \(lists there: "
    ):
        collect(tmp_path, list_version="12A")
    for path in (*tmp_path.rglob("*A.txt"), *tmp_path.rglob("*.gz")):
        path.unlink()
    assert chosen(classes="two") == "11B"
    with pytest.raises(DataError, match=r"test_COVIDx11B\.txt: a binary list"):
        collect(tmp_path)


def test_lists_of_the_kaggle_archive(tmp_path):
    (tmp_path / "train.txt").write_text("1 a.png positive cohen\n")
    (tmp_path / "test.txt").write_text("2 b.png negative rsna\n")
    (tmp_path / "licence.txt").write_text("all kinds of words here\n")
    datalist = DATASET.convert(tmp_path, classes="two", check_images="none", progress=False)
    assert [datalist[split][0]["label"] for split in ("training", "test")] == [1, 0]
    assert datalist["meta"]["list_version"] == "UNVERSIONED"
    with pytest.raises(DataError, match=r"test\.txt: a binary list"):
        collect(tmp_path)


def test_validation_is_a_tenth_of_the_patients_of_each_class(tmp_path):
    """200 normal, 100 pneumonia and 60 COVID-19 patients, these with three images each."""
    lines = [f"n{index} n{index}.png normal rsna" for index in range(200)]
    lines += [f"p{index} p{index}.png pneumonia rsna" for index in range(100)]
    lines += [f"c{index} c{index} day {day}.png COVID-19 stonybrook" for index in range(60) for day in range(3)]
    (tmp_path / "train_COVIDx9A.txt").write_text("\n".join(lines))
    (tmp_path / "test_COVIDx9A.txt").write_text("t t.png normal rsna\n")
    datalist = DATASET.convert(tmp_path, check_images="none", progress=False)
    counts = [sum(item["label"] == label for item in datalist["validation"]) for label in range(3)]
    assert counts == [20, 10, 6 * 3]
    assert datalist["meta"]["kept"] == {"training": 432, "validation": 48, "test": 1}
    # images that are not there move no other item
    (tmp_path / "train").mkdir()
    for item in datalist["training"][:100]:
        (tmp_path / item["image"]).touch()
    found = DATASET.convert(tmp_path, check_images="exists", progress=False)
    assert found["training"] == datalist["training"][:100] and found["meta"]["dropped"] == {"missing image": 381}


def test_errors(tmp_path):
    root = write_tree(tmp_path / "set")
    with pytest.raises(DataError, match=r"missing image: .*gone\.png: no such file"):
        collect(root, strict=True, num_workers=1, progress=False)
    with pytest.raises(ConfigError, match=r"classes='tree' is unknown\. did you mean 'three'.*Use one of three, two"):
        collect(root, classes="tree")
    (root / "test_COVIDx9A.txt").write_text("\n")
    with pytest.raises(DataError, match=r"test_COVIDx9A\.txt: no line reads 'patient file class source'"):
        collect(root)
    (root / "test_COVIDx9A.txt").write_bytes(b"\xff\xfe\x00t")
    with pytest.raises(DataError, match=r"test_COVIDx9A\.txt: cannot be read as a list .*Download it again"):
        collect(root)
