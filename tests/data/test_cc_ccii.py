# SPDX-License-Identifier: Apache-2.0
"""Clean-CC-CCII conversion of a hand-written raw tree, against values worked out by hand."""

from __future__ import annotations

import gzip
import io
import json

import numpy as np
import pytest
from PIL import Image

from unimedi_components.data.cc_ccii import DATASET, collect
from unimedi_components.data.slices import slice_volume_transforms
from unimedi_components.data.transforms import ByDimension
from unimedi_components.errors import ConfigError, DataError


def png(value=90, mode="L"):
    buffer = io.BytesIO()
    Image.new(mode, (6, 4), value).save(buffer, "PNG")
    return buffer.getvalue()


def names(*numbers):
    return [f"{number:04d}.png" for number in numbers]


def write_scan(root, scan, numbers, value=90, mode="L"):
    """Slices whose grey level is `value` plus their number."""
    folder = root / "dataset_cleaned" / scan
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        level = (value + number, 3, 5) if mode == "RGB" else value + number
        (folder / f"{number:04d}.png").write_bytes(png(level, mode))
    return folder


TRAIN = {
    "CP": {"590": {"2952": names(0, 1, 2)}, "3744": {"5688": names(3, 2, 1, 0)}},
    "NCP": {
        # blocks out of place, and every other slice left out
        "963": {"2506": names(4, 0, 2), "2507": names(0, 1)},
        "16": {"1164": names(0, 1, 2)},
    },
    "Normal": {"700": {"3000": names(0, 1), "3001": names(0, 1)}},
}
TEST = {"CP": {}, "NCP": {"17": {"1166": names(0, 1, 1)}}, "Normal": {"16": {"3002": names(0)}}}


def write_tree(root, form="plain"):
    """Slice 1 of scan 1164 and scan 3001 are missing, 2507 ends with a truncated slice, 9999 is in no list."""
    write_scan(root, "CP/590/2952", range(3), 10)
    write_scan(root, "CP/3744/5688", range(4), 20)
    write_scan(root, "NCP/963/2506", range(6), 30, "RGB")
    write_scan(root, "NCP/963/2507", range(2))
    (root / "dataset_cleaned/NCP/963/2507/0001.png").write_bytes(png()[:-25])
    write_scan(root, "NCP/16/1164", (0, 2))
    write_scan(root, "NCP/17/1166", range(2), 40)
    folder = write_scan(root, "Normal/700/3000", range(2), 50)
    (folder / "Thumbs.db").write_bytes(b"not an image")
    (folder / ".0003.png").write_bytes(b"not an image either")
    write_scan(root, "Normal/16/3002", range(1))
    write_scan(root, "Normal/701/9999", range(2))
    (root / "dataset_cleaned/Normal/701/.cache").mkdir()
    for name, content in (("ct_train", TRAIN), ("ct_test", TEST)):
        text = json.dumps(content, indent=4)
        if form == "gz":
            (root / f"{name}.json.gz").write_bytes(gzip.compress(text.encode()))
        else:
            path = root / ("ct_split" if form == "folder" else "") / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"\xef\xbb\xbf" * (form == "folder") + text.replace("\n", "\r\n").encode())
    # a list of another experiment must not be taken for the official one
    (root / "ct_sub_train.json").write_text("{}")
    return root


def item(path, label, slices=None):
    own, patient, scan = path.split("/")
    found = {"id": f"{own}_{patient}_{scan}", "patient": patient, "image": f"dataset_cleaned/{path}", "dim": 3}
    return {**found, "label": label, **({"slices": slices} if slices else {})}


@pytest.mark.parametrize("form", ["plain", "folder", "gz"])
def test_conversion_by_hand(tmp_path, form):
    builder = collect(write_tree(tmp_path, form), validation_fraction=0, num_workers=1, progress=False)
    datalist = builder.build()
    assert datalist["training"] == [
        item("CP/3744/5688", 0, names(3, 2, 1, 0)),
        item("CP/590/2952", 0),
        item("NCP/963/2506", 1, names(4, 0, 2)),
        item("Normal/700/3000", 2),
    ]
    assert datalist["validation"] == []
    assert datalist["test"] == [item("NCP/17/1166", 1), item("Normal/16/3002", 2)]
    meta = datalist["meta"]
    assert meta["task"] == "multiclass" and meta["label_names"] == ["CP", "NCP", "Normal"]
    assert meta["split"] == "official" and len(meta["sources"]) == 2
    assert meta["dropped_items"] == {
        "not in the split lists": ["Normal_701_9999"],
        "unreadable image": ["NCP_963_2507"],
        "missing image": ["Normal_700_3001"],
        # a scan of patient 16 is in the test list
        "patient in another split": ["NCP_16_1164"],
    }
    assert meta["missing_slices"] == {"NCP_16_1164": 1} and meta["repeated_slices"] == {"NCP_17_1166": 1}
    assert builder.remedies == [
        "1 listed slices of 1 kept scans are missing and were left out.",
        "1 listed slices of 1 kept scans are repeated and were counted once.",
    ]


def test_delivered_volume_is_the_listed_one(tmp_path):
    datalist = DATASET.convert(write_tree(tmp_path), validation_fraction=0, progress=False)
    items = {entry["id"]: entry for entry in datalist["training"]}

    def levels(name, depth, **options):
        transform = ByDimension((), slice_volume_transforms((depth, 4, 6), **options))
        path = str(tmp_path / items[name]["image"])
        image = transform({**items[name], "image": path})["image"]
        assert image.shape == (1, depth, 4, 6)
        return ((image[0, :, 1, 2] + 1) * 127.5).round().tolist()

    # the first of the list is nearest to the head and comes last
    assert levels("CP_590_2952", 3) == [12, 11, 10]
    assert levels("CP_3744_5688", 4) == [20, 21, 22, 23]
    assert levels("CP_3744_5688", 4, first_slice="foot") == [23, 22, 21, 20]
    # of the colour slices the first channel counts
    assert levels("NCP_963_2506", 3) == [32, 30, 34]
    assert levels("NCP_963_2506", 6) == [32, 32, 30, 30, 34, 34]


def test_slices_by_number_and_untouched_files(tmp_path):
    root = write_tree(tmp_path)
    numbered = DATASET.convert(root, slice_order="number", validation_fraction=0, progress=False)["training"]
    assert numbered[:3] == [item("CP/3744/5688", 0), item("CP/590/2952", 0), item("NCP/963/2506", 1, names(0, 2, 4))]
    (tmp_path / "lists").mkdir()
    for name in ("ct_train.json", "ct_test.json"):
        (root / name).rename(tmp_path / "lists" / name)
    alone = DATASET.convert(tmp_path / "lists", check_images="none", validation_fraction=0, progress=False)
    assert alone["meta"]["kept"] == {"training": 6, "validation": 0, "test": 2}
    # patient 16 alone is dropped; folders are not looked at, so every item says its slices
    assert alone["meta"]["dropped"] == {"patient in another split": 1}
    assert [entry["slices"] for entry in alone["test"]] == [names(0, 1), names(0)]
    assert alone["training"][0]["image"] == "CP/3744/5688"


def test_dataset_cleaned_as_root_finds_lists_beside_it(tmp_path):
    root = write_tree(tmp_path)
    datalist = DATASET.convert(root / "dataset_cleaned", progress=False, validation_fraction=0)
    assert [entry["image"] for entry in datalist["test"]] == ["NCP/17/1166", "Normal/16/3002"]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("ct_train.json", "ct_test.json"):
        (root / name).rename(moved / name)
    again = DATASET.convert(root / "dataset_cleaned", split_dir=moved, progress=False, validation_fraction=0)
    assert again["training"] == datalist["training"] and again["test"] == datalist["test"]


def test_checks_and_limits(tmp_path):
    root = write_tree(tmp_path)
    (root / "dataset_cleaned/CP/3744/5688/0002.png").write_bytes(png()[:-25])
    (root / "dataset_cleaned/CP/590/2952/0000.png").write_bytes(b"")
    unreadable = {
        check: collect(root, check_images=check, progress=False, num_workers=1).dropped.get("unreadable image", [])
        for check in ("exists", "quick", "full")
    }
    assert [drop["id"] for drop in unreadable["exists"]] == []
    # quick looks at the first and last slice only
    assert sorted(drop["id"] for drop in unreadable["quick"]) == ["CP_590_2952", "NCP_963_2507"]
    assert sorted(drop["id"] for drop in unreadable["full"]) == ["CP_3744_5688", "CP_590_2952", "NCP_963_2507"]
    dropped = collect(root, check_images="exists", min_slices=3, progress=False).dropped
    assert {drop["id"] for drop in dropped["fewer than 3 slices"]} == {
        "NCP_963_2507",
        "NCP_17_1166",
        "Normal_700_3000",
        "Normal_16_3002",
    }
    assert {drop["id"] for drop in dropped["missing image"]} == {"NCP_16_1164", "Normal_700_3001"}
    assert dropped["missing image"][0]["detail"].endswith("NCP/16/1164: 2 of 3 slices are there. Fetch the scan again")
    with pytest.raises(DataError, match=r"missing image: .*NCP/16/1164: 1 listed slices are not there"):
        collect(root, strict=True, check_images="exists", validation_fraction=0, progress=False)
    with pytest.raises(ConfigError, match=r"slice_order='name' is unknown\. Use one of listed, number"):
        collect(root, slice_order="name")
    with pytest.raises(ConfigError, match=r"check_images='fast' is unknown"):
        collect(root, check_images="fast")


def listed(first, count, scans=1):
    """Patients first, first + 1, ... with scans of one slice."""
    return {str(p): {str(10 * p + s): names(0) for s in range(scans)} for p in range(first, first + count)}


def test_validation_is_stratified_seeded_or_official(tmp_path):
    train = {"CP": listed(100, 20, scans=2), "NCP": listed(200, 30), "Normal": listed(300, 10)}
    part = {"CP": listed(100, 4, scans=2), "NCP": listed(200, 6), "Normal": listed(300, 2)}
    (tmp_path / "ct_train.json").write_text(json.dumps(train))
    (tmp_path / "ct_test.json").write_text(json.dumps({"CP": listed(150, 5), "NCP": {}, "Normal": {}}))
    options = {"check_images": "none", "progress": False}

    def patients(split, **more):
        return {entry["patient"] for entry in DATASET.convert(tmp_path, **options, **more)[split]}

    with pytest.raises(DataError, match=r"no ct_val\*\.json for official_validation"):
        DATASET.convert(tmp_path, official_validation=True, **options)
    drawn = patients("validation")
    # a tenth of the patients of each class: 2, 3, 1
    assert sorted(name[0] for name in drawn) == ["1", "1", "2", "2", "2", "3"]
    assert patients("validation") == drawn != patients("validation", seed=7)
    (tmp_path / "ct_val_part.json").write_text(json.dumps(part))
    assert patients("validation") == drawn
    official = DATASET.convert(tmp_path, official_validation=True, **options)
    assert {entry["patient"] for entry in official["validation"]} == {*listed(100, 4), *listed(200, 6), *listed(300, 2)}
    assert official["meta"]["kept"] == {"training": 64, "validation": 16, "test": 5}
    assert official["meta"]["validation"] == "official"
    # the repository's other folder: the validation list is not in the training list
    rest = {label: {k: v for k, v in own.items() if k not in part[label]} for label, own in train.items()}
    (tmp_path / "ct_train.json").write_text(json.dumps(rest))
    assert DATASET.convert(tmp_path, official_validation=True, **options)["training"] == official["training"]
    assert patients("validation") == drawn


def test_missing_scans_do_not_move_others(tmp_path):
    root = write_tree(tmp_path)
    for index in range(12):
        write_scan(root, f"CP/{800 + index}/{index}", range(1))
    TRAIN_MORE = {**TRAIN, "CP": {**TRAIN["CP"], **{str(800 + i): {str(i): names(0)} for i in range(12)}}}
    (root / "ct_train.json").write_text(json.dumps(TRAIN_MORE))
    before = DATASET.convert(root, progress=False, validation_fraction=0.3)
    gone = before["validation"][0]
    for path in (root / gone["image"]).iterdir():
        path.unlink()
    after = DATASET.convert(root, progress=False, validation_fraction=0.3)
    assert after["validation"] == before["validation"][1:] and after["training"] == before["training"]


def test_without_lists_the_split_is_seeded_and_said(tmp_path):
    for label, first in (("CP", 100), ("NCP", 200), ("Normal", 300)):
        for patient in range(first, first + 10):
            write_scan(tmp_path, f"{label}/{patient}/{patient}0", range(2))
    builder = collect(tmp_path, progress=False)
    datalist = builder.build()
    # of 10 patients of a class 2 are for test; a tenth of the other 8 rounds to 1
    assert datalist["meta"]["kept"] == {"training": 21, "validation": 3, "test": 6}
    assert sorted(entry["label"] for entry in datalist["test"]) == [0, 0, 1, 1, 2, 2]
    assert datalist["meta"]["split"] == "seeded" and datalist["meta"]["sources"] == {}
    assert builder.remedies[0].startswith("There are no split lists (ct_train.json, ct_test.json): a seeded 20%")
    assert datalist["test"] != DATASET.convert(tmp_path, seed=1, progress=False)["test"]
    assert len(DATASET.convert(tmp_path, test_fraction=0.4, progress=False)["test"]) == 12


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ct_train.json", "{", r"ct_train\.json: cannot be read as a split list \("),
        ("ct_train.json", '{"CP": {"1": {}, "1": {}}}', r"cannot be read as a split list \('1' stands twice"),
        ("ct_train.json", '["CP"]', r"ct_train\.json: is not \{class: \{patient: \{scan: "),
        ("ct_train.json", '{"CP": {"1": ["0000.png"]}}', r"is not \{class: \{patient: \{scan: "),
        ("ct_train.json", '{"CP": {"1": {"2": "0000.png"}}}', r"CP/1/2 has no list of file names"),
        (
            "ct_test.json",
            '{"Pneumonia": {"1": {"2": []}}}',
            r"ct_test\.json: unknown class 'Pneumonia'; the classes are CP",
        ),
        ("ct_test.json", None, r"no list of the test scans\. Looked for ct_test\*\.json"),
        ("ct_train.json", None, r"no list of the training scans\. Looked for ct_train\*\.json"),
    ],
)
def test_broken_lists_are_named(tmp_path, name, text, message):
    root = write_tree(tmp_path)
    (root / name).unlink() if text is None else (root / name).write_text(text)
    with pytest.raises(DataError, match=message):
        collect(root, progress=False)


def test_wrong_root_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no scans\. Looked for \{CP,NCP,Normal\}/PATIENT/SCAN"):
        collect(tmp_path)
    with pytest.raises(DataError, match=r"no split list"):
        collect(write_tree(tmp_path), split_dir=tmp_path / "dataset_cleaned")


def test_volumes_of_the_listed_scans_are_float_in_range(tmp_path):
    root = write_tree(tmp_path)
    transform = ByDimension((), slice_volume_transforms())
    for entry in DATASET.convert(root, progress=False, validation_fraction=0)["training"]:
        image = transform({**entry, "image": str(root / entry["image"])})["image"].numpy()
        assert image.shape == (1, 32, 128, 128) and image.dtype == np.float32
        assert image.min() >= -1 and image.max() <= 1
