# SPDX-License-Identifier: Apache-2.0
"""RSNA stage 2 conversion of a hand-written raw tree and of the official numbers of rows."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import train_test_split

from unimedi_components.data.rsna import DATASET, collect
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.images.xray import XrayReader

# byte-order mark, CRLF, blanks, "nan", whole numbers with and without ".0", rows of a patient apart
LABELS = """\
\ufeffpatientId,x,y,width,height,Target\r
p12,,,,,0\r
p02,264.0,152.0,213.0,379.0,1\r
p01,,,,,0\r
 p03 ,10.5,20,30,40.25,1\r
p02,562.0,152.0,256.0,453.0,1\r
p02,264,152,213,379,1\r
p04,,,,,1\r
p05,5,5,10,10,0\r
p06,5,5,0,10,1\r
p07,-1,5,10,10,1\r
p08,5,5,10,,1\r
p09,NaN,nan,,,0\r
p01,,,,,0\r
p10,5,5,10,10,1\r
p10,,,,,0\r
p11,,,,,\r
,,,,,0\r
p13,1,2,3,4,1.0\r
p14,1,2,3,4,1\r
p15,many,2,3,4,1\r
p16,,,,,0\r
"""
CLASSES = "patientId,class\np02,Lung Opacity\np02,Lung Opacity\np01,Normal\np12,No Lung Opacity / Not Normal\n"
PATIENTS = [f"p{number:02d}" for number in range(1, 17)]
KEPT = ["p01", "p02", "p03", "p09", "p12", "p16"]
BOXES = {"p02": [[264.0, 152.0, 477.0, 531.0], [562.0, 152.0, 818.0, 605.0]], "p03": [[10.5, 20.0, 40.5, 60.25]]}
CLASS_OF = {"p01": "Normal", "p02": "Lung Opacity", "p12": "No Lung Opacity / Not Normal"}
SPLITS = ("training", "validation", "test")


def dicom(path, pixels, photometric, bits):
    """Explicit little-endian bytes of a grey film."""

    def element(group, number, vr, value):
        value += b" " * (len(value) % 2)
        size = struct.pack("<HI", 0, len(value)) if vr in (b"OB", b"OW") else struct.pack("<H", len(value))
        return struct.pack("<HH", group, number) + vr + size + value

    us = struct.Struct("<H").pack
    meta = element(2, 0x10, b"UI", b"1.2.840.10008.1.2.1\0")
    body = element(8, 0x16, b"UI", b"1.2.840.10008.5.1.4.1.1.7\0") + element(8, 0x18, b"UI", b"1.2.3\0")
    body += element(8, 0x60, b"CS", b"CR") + element(0x10, 0x20, b"LO", path.stem.encode())
    body += element(0x28, 2, b"US", us(1)) + element(0x28, 4, b"CS", photometric)
    allocated = 8 * pixels.dtype.itemsize
    numbers = {0x10: pixels.shape[0], 0x11: pixels.shape[1], 0x100: allocated, 0x101: bits, 0x102: bits - 1, 0x103: 0}
    body += b"".join(element(0x28, number, b"US", us(value)) for number, value in numbers.items())
    body += element(0x7FE0, 0x10, b"OB" if allocated == 8 else b"OW", pixels.tobytes())
    path.write_bytes(bytes(128) + b"DICM" + element(2, 0, b"UL", struct.pack("<I", len(meta))) + meta + body)


def write_tree(root, compress=False):
    """Film p13 is missing and p14 cut off."""
    (root / "stage_2_train_images").mkdir(parents=True)
    for patient in PATIENTS:
        if patient == "p13":
            continue
        path = root / "stage_2_train_images" / f"{patient}.dcm"
        dicom(path, np.arange(96, dtype=np.uint8).reshape(8, 12), b"MONOCHROME2", 8)
        if patient == "p14":
            path.write_bytes(path.read_bytes()[:-20])
    for name, text in (("stage_2_train_labels.csv", LABELS), ("stage_2_detailed_class_info.csv", CLASSES)):
        if compress:
            (root / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (root / name).write_bytes(text.encode())
    return root


def items_of(datalist):
    return {item["id"]: item for split in SPLITS for item in datalist[split]}


@pytest.mark.parametrize("compress", [False, True], ids=["csv", "csv.gz"])
def test_conversion_by_hand(tmp_path, compress):
    # the data set's own folder lies one level below ROOT
    write_tree(tmp_path / "rsna-pneumonia-detection-challenge", compress)
    datalist = DATASET.convert(tmp_path, task="detection", progress=False)
    folder = "rsna-pneumonia-detection-challenge/stage_2_train_images"
    expected = {}
    for patient in KEPT:
        expected[patient] = {"id": patient, "patient": patient, "image": f"{folder}/{patient}.dcm", "dim": 2}
        expected[patient] |= {"label": int(patient in BOXES), "boxes": BOXES.get(patient, [])}
        if patient in CLASS_OF:
            expected[patient]["class"] = CLASS_OF[patient]
    assert items_of(datalist) == expected
    meta = datalist["meta"]
    assert meta["dropped"] == {
        "no patient id": 1,
        # the second 264, 152, 213, 379 of p02 and the second row of p01
        "duplicate row": 2,
        "unusable box": 4,
        "target and boxes disagree": 4,
        "missing image": 1,
        "unreadable image": 1,
    }
    listed = meta["dropped_items"]
    table = "stage_2_train_labels.csv" + ".gz" * compress
    assert listed["duplicate row"] == ["p02", "p01"] and listed["no patient id"] == [f"{table} row 18"]
    assert listed["unusable box"] == ["p06", "p07", "p08", "p15"]
    assert listed["target and boxes disagree"] == ["p04", "p05", "p10", "p11"]
    assert listed["missing image"] == ["p13"] and listed["unreadable image"] == ["p14"]
    assert meta["task"] == "detection" and meta["split"] == "paper" and "masks" not in meta
    assert meta["label_names"] == ["background", "pneumonia"] and len(meta["sources"]) == 2


@pytest.mark.parametrize(("task", "share"), [("classification", 0.3), ("segmentation", 0.4), ("detection", 0.4)])
def test_split_comes_before_any_drop(tmp_path, task, share):
    datalist = DATASET.convert(write_tree(tmp_path), task=task, progress=False)
    training, held_out = train_test_split(PATIENTS, test_size=share, random_state=0)
    test, validation = train_test_split(held_out, test_size=0.5, random_state=0)
    for split, patients in zip(SPLITS, (training, validation, test), strict=True):
        assert [item["id"] for item in datalist[split]] == sorted(set(patients) & set(KEPT))


def test_one_source_for_all_tasks(tmp_path):
    root = write_tree(tmp_path)
    made = {task: DATASET.convert(root, task=task, progress=False) for task in ("classification", "segmentation")}
    binary, masks = items_of(made["classification"]), items_of(made["segmentation"])
    assert {name: item["label"] for name, item in binary.items()} == {name: int(name in BOXES) for name in KEPT}
    assert {name: item["boxes"] for name, item in binary.items() if "boxes" in item} == BOXES
    assert {name: item["boxes"] for name, item in masks.items()} == {name: BOXES.get(name, []) for name in KEPT}
    assert made["classification"]["meta"]["label_names"] == ["no pneumonia", "pneumonia"]
    assert made["classification"]["meta"]["task"] == "binary" and made["segmentation"]["meta"]["task"] == "segmentation"
    assert "BoxesToMaskd" in made["segmentation"]["meta"]["masks"]


def test_a_table_alone_prepares(tmp_path):
    (tmp_path / "stage_2_train_labels.csv").write_text(LABELS.replace("\r", ""))
    found = items_of(DATASET.convert(tmp_path, check_images="none", progress=False))
    assert sorted(found) == sorted([*KEPT, "p13", "p14"])
    assert found["p13"]["boxes"] == [[1.0, 2.0, 4.0, 6.0]] and "class" not in found["p01"]
    with pytest.raises(DataError, match=r"stage_2_train_images: no such folder\. Unpack stage_2_train_images\.zip"):
        collect(tmp_path)


def write_lovt(folder, test="p12,,\np03,10.5;20.0;30.0;40.25,1\n"):
    folder.mkdir(parents=True, exist_ok=True)
    boxes = "264.0;152.0;213.0;379.0|562.0;152.0;256.0;453.0,1|1"
    (folder / "train.csv").write_text(f"ID,boxes,classes\np02,{boxes}\np01,,\np04,,\n")
    (folder / "validation.csv").write_text("ID,boxes,classes\np09,,\np01,,\nq99,,\n")
    (folder / "test.csv").write_text(f"ID,boxes,classes\n{test}")


def test_tables_written_by_hand(tmp_path):
    # a separator at the end of every row, blanks behind separators, quotes behind blanks
    rows = ['"a", 10, 20, 30, "40", 1,', "b, , , , , 0,", " c,1,2,3,4,1,", "d,,,,,0,"]
    (tmp_path / "stage_2_train_labels.csv").write_text("patientId, x, y, width, height, Target\n" + "\n".join(rows))
    found = items_of(DATASET.convert(tmp_path, check_images="none"))
    assert {name: item["label"] for name, item in found.items()} == {"a": 1, "b": 0, "c": 1, "d": 0}
    assert found["a"]["boxes"] == [[10.0, 20.0, 40.0, 60.0]] and found["c"]["boxes"] == [[1.0, 2.0, 4.0, 6.0]]
    # a seventh cell with something in it is not guessed at
    (tmp_path / "stage_2_train_labels.csv").write_text("patientId,x,y,width,height,Target\na,1,2,3,4,1,9\n")
    with pytest.raises(DataError, match=r"labels\.csv: cannot be read .*the rows have 7 cells, the header line 6"):
        collect(tmp_path, check_images="none")


@pytest.mark.parametrize("own_folder", [False, True])
def test_lovt_lists(tmp_path, own_folder):
    root = write_tree(tmp_path / "set")
    write_lovt(tmp_path / "lists" if own_folder else root / "RSNA-Pneunomia-Detection")
    options = {"split_dir": tmp_path / "lists"} if own_folder else {}
    datalist = DATASET.convert(root, task="detection", split="lovt", progress=False, **options)
    assert [[item["id"] for item in datalist[split]] for split in SPLITS] == [["p02"], ["p01", "p09"], ["p03", "p12"]]
    assert items_of(datalist)["p02"]["boxes"] == BOXES["p02"]
    dropped = datalist["meta"]["dropped"]
    assert dropped["patient in another split"] == 1 and dropped["listed but not in the labels"] == 1
    # of 16 patients six are listed; of those p04 has a target without a box
    assert dropped["no official split"] == 10 and dropped["target and boxes disagree"] == 1
    assert len(datalist["meta"]["sources"]) == 5 and datalist["meta"]["split"] == "lovt"


def test_errors(tmp_path):
    root = write_tree(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"task='boxes' is unknown\. Use one of classification, segmentation, detect"):
        collect(root, task="boxes")
    with pytest.raises(ConfigError, match="split='mgca' is unknown"):
        collect(root, split="mgca")
    with pytest.raises(DataError, match=r"no training list of LoVT \(or give split_dir\)"):
        collect(root, split="lovt")
    write_lovt(root)
    (root / "train.csv").write_text("patientId,Target\np01,0\n")
    with pytest.raises(DataError, match=r"train\.csv: no column 'ID' .*Give LoVT's own lists"):
        collect(root, split="lovt")
    (root / "stage_2_train_images").rename(root / "films")
    with pytest.raises(
        DataError, match=r"images: no such folder\. .*or prepare the tables alone with --check_images none"
    ):
        collect(root)
    (root / "films").rename(root / "stage_2_train_images")
    with pytest.raises(DataError, match=r"unusable box: p06: target 1, box 5, 5, 0, 10"):
        collect(root, strict=True, progress=False)
    (root / "stage_2_train_labels.csv").write_text("patientId,x,y,width,height,Target\na,,,,,0\nb,,,,,0\n")
    with pytest.raises(DataError, match="2 patients cannot be split in three"):
        collect(root)
    (root / "stage_2_train_labels.csv").write_text("patientId,x,y,width,height,Target\n,,,,,0\n")
    with pytest.raises(DataError, match="no row names a patient"):
        collect(root)


def official_table(path):
    """26,684 patients, of which 6,012 are positive: 2,614 with one box, 3,266 with two, 119 three, 13 four."""
    counts = np.zeros(26_684, int)
    counts[:6_012] = np.repeat([1, 2, 3, 4], [2_614, 3_266, 119, 13])
    rng = np.random.default_rng(0)
    counts = rng.permutation(counts)
    names = np.array([f"{value:032x}" for value in rng.permutation(26_684) * 7919])
    rows = np.repeat(np.arange(26_684), np.maximum(counts, 1))
    frame = pd.DataFrame({"patientId": names[rows]})
    for start, column in enumerate(("x", "y", "width", "height")):
        frame[column] = np.where(counts[rows] > 0, np.arange(len(rows)) % 400 + start + 1.0, np.nan)
    frame["Target"] = (counts[rows] > 0).astype(int)
    assert len(frame) == 30_227
    frame.to_csv(path, index=False)
    return sorted(names.tolist())


@pytest.mark.parametrize(
    ("task", "held_out", "sizes"),
    [
        ("classification", 0.3, [18_678, 4_003, 4_003]),
        ("segmentation", 5337 * 2, [16_010, 5_337, 5_337]),
        ("detection", 5337 * 2, [16_010, 5_337, 5_337]),
    ],
)
def test_official_sizes(tmp_path, task, held_out, sizes):
    names = official_table(tmp_path / "stage_2_train_labels.csv")
    datalist = DATASET.convert(tmp_path, task=task, check_images="none", progress=False)
    assert [len(datalist[split]) for split in SPLITS] == sizes and not datalist["meta"]["dropped"]
    found = items_of(datalist)
    assert sum(item["label"] for item in found.values()) == 6_012
    assert sum(len(item.get("boxes", [])) for item in found.values()) == 30_227 - (26_684 - 6_012)
    training, rest = train_test_split(pd.DataFrame({"patientId": names}), test_size=held_out, random_state=0)
    test, validation = train_test_split(rest, test_size=0.5, random_state=0)
    for split, part in zip(SPLITS, (training, validation, test), strict=True):
        assert [item["id"] for item in datalist[split]] == sorted(part["patientId"])


def test_films_are_read_as_they_look(tmp_path):
    """0 is black in every film that is read, whatever the file says, at the pixel where the file has it."""
    film = np.zeros((5, 7), np.uint8)
    film[1, 2], film[4, 6], film[0, 0] = 255, 51, 102
    dicom(tmp_path / "two.dcm", film, b"MONOCHROME2", 8)
    dicom(tmp_path / "one.dcm", 255 - film, b"MONOCHROME1", 8)
    # ten bits of sixteen in use: scaled by the film's own maximum, 1000
    dicom(tmp_path / "deep.dcm", (film.astype(np.uint32) * 1000 // 255).astype(np.uint16), b"MONOCHROME2", 16)
    # twelve bits, all in use
    dicom(
        tmp_path / "deep_one.dcm", (4095 - film.astype(np.uint32) * 4095 // 255).astype(np.uint16), b"MONOCHROME1", 12
    )
    for name in ("two", "one", "deep", "deep_one"):
        found = XrayReader().get_data(str(tmp_path / f"{name}.dcm"))[0]
        assert found.shape == (5, 7) and found[1, 2] == 1 and (found > 0).sum() == 3, name
        assert found[4, 6] == pytest.approx(0.2, abs=1e-6) and found[0, 0] == pytest.approx(0.4, abs=1e-6), name
