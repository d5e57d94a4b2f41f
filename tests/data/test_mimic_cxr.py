# SPDX-License-Identifier: Apache-2.0
"""MIMIC-CXR-JPG conversion of a hand-written raw tree, against values worked out by hand."""

from __future__ import annotations

import gzip
import io

import pytest
from PIL import Image

from unimedi_components.data.mimic_cxr import DATASET, collect
from unimedi_components.errors import DataError

THREE = "Lungs are clear. No effusion seen. Heart is normal."
METADATA = """\
dicom_id,PerformedProcedureStepDescription,ViewPosition,subject_id,study_id\r
aa-1,"CHEST (PA, LAT)",PA,10000032,50000001\r
aa-2,"CHEST (PA, LAT)",LATERAL,10000032,50000001\r
ab-1,CHEST,AP,10000032,50000002\r
ba-1,CHEST,,10000764,50000003\r
ba-2,CHEST,LL,10000764,50000003\r
ba-3,CHEST,PA,10000764,50000003\r
bb-1,CHEST,AP,10000764,50000004\r
ca-1,CHEST,PA,11000011,50000005\r
cb-1,CHEST,PA,11000011,50000006\r
cc-1,CHEST,PA,11000011,50000007\r
cd-1,CHEST,PA,11000011,50000008\r
ce-1,CHEST,PA,11000011,50000009\r
aa-1,CHEST,PA,10000032,50000001\r
"""
STUDIES = {
    ("10000032", "50000001"): f"\n FINDINGS: {THREE}\n \n IMPRESSION: 1. No acute\n process.\n",
    ("10000032", "50000002"): "\n IMPRESSION: Edema is mild. Effusion is small. Tube in place.\n",
    ("10000764", "50000003"): "\n FINDINGS: Clear. Heart is normal. No effusion.\n",
    # 50000004 has no report file
    ("11000011", "50000005"): "\n INDICATION: Cough\n \n One finding here. Two findings here. Three findings here.\n",
    ("11000011", "50000006"): f"\n FINDINGS: {THREE}\n",
    ("11000011", "50000007"): f"\n FINDINGS: {THREE}\n",
    ("11000011", "50000008"): "\n IMPRESSION: Clear.\n",
    ("11000011", "50000009"): f"\n FINDINGS: {THREE}\n",
}
LABELS = ["Atelectasis", "Cardiomegaly", "Edema"]


def write_tree(root, compress=False, reports="files"):
    """Write the raw tree: the image of study 7 is missing, that of 6 truncated, study 9 has no split."""
    split = "dicom_id,study_id,subject_id,split\n"
    buffer = io.BytesIO()
    Image.new("L", (40, 48), 90).save(buffer, "JPEG")
    for line in METADATA.split("\r\n")[1:]:
        if not line:
            continue
        name, subject, study = line.split(",")[0], line.split(",")[-2], line.split(",")[-1]
        path = root / f"files/p{subject[:2]}/p{subject}/s{study}/{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if name != "cc-1":
            path.write_bytes(buffer.getvalue()[: -200 if name == "cb-1" else None])
        if name != "ce-1":
            part = {"10000032": "train", "10000764": "validate", "11000011": "test"}[subject]
            split += f"{name},{study},{subject},{part}\n"
    for (subject, study), text in STUDIES.items():
        path = root / reports / f"p{subject[:2]}/p{subject}/s{study}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" " * 20 + "FINAL REPORT" + text)
    labels = "subject_id,study_id," + ",".join(LABELS) + "\n10000032,50000001,1.0,,-1.0\n10000032,50000002,0.0,1.0,\n"
    for kind, text in (("metadata", METADATA), ("split", split), ("chexpert", labels)):
        name = root / f"mimic-cxr-2.0.0-{kind}.csv"
        if compress:
            name.with_name(name.name + ".gz").write_bytes(gzip.compress(text.encode()))
        else:
            name.write_bytes(text.encode())
    return root


CLEAN = "lungs are clear no effusion seen heart is normal"


@pytest.mark.parametrize("compress", [False, True], ids=["csv", "csv.gz"])
def test_conversion_by_hand(tmp_path, compress):
    datalist = DATASET.convert(write_tree(tmp_path, compress))
    folder = "files/p10/p10000032"
    assert datalist["training"] == [
        {
            "id": "aa-1",
            "patient": "p10000032",
            "image": f"{folder}/s50000001/aa-1.jpg",
            "dim": 2,
            # impression first; "1." is cut off
            "report": f"no acute process {CLEAN}",
            "label": [1, -2, -1],
        },
        {
            "id": "ab-1",
            "patient": "p10000032",
            "image": f"{folder}/s50000002/ab-1.jpg",
            "dim": 2,
            "report": "edema is mild effusion is small tube in place",
            "label": [0, 1, -2],
        },
    ]
    assert datalist["validation"] == datalist["test"] == []
    meta = datalist["meta"]
    assert meta["dropped"] == {
        "duplicate id": 1,
        "no view position": 1,
        "not a frontal view": 2,
        "no official split": 1,
        # study 3 has two sentences of more than one token, study 8 a single token
        "fewer than 3 sentences": 1,
        "missing report": 1,
        "no findings or impression": 1,
        "fewer than 3 tokens": 1,
        "unreadable image": 1,
        "missing image": 1,
    }
    assert meta["dropped_items"]["not a frontal view"] == ["aa-2", "ba-2"]
    assert meta["dropped_items"]["no view position"] == ["ba-1"]
    assert meta["dropped_items"]["unreadable image"] == ["cb-1"]
    assert meta["dropped_items"]["missing report"] == ["bb-1"]
    assert meta["label_names"] == LABELS
    assert sorted(name.split("-")[-1].split(".")[0] for name in meta["sources"]) == ["chexpert", "metadata", "split"]


def test_options(tmp_path):
    root = write_tree(tmp_path, reports="mimic-cxr-reports/files")
    datalist = DATASET.convert(root, min_sentences=2, fallback_sections=True, labels=False, check_images="exists")
    assert [entry["id"] for entry in datalist["validation"]] == ["ba-3"]
    found = {entry["id"]: entry["report"] for entry in datalist["test"]}
    # unchecked, the truncated image of study 6 stays; the last paragraph stands in for study 5
    assert found == {"ca-1": "one finding here two findings here three findings here", "cb-1": CLEAN}
    assert "label" not in datalist["training"][0]


def test_sectioned_csv(tmp_path):
    root = write_tree(tmp_path)
    table = root / "sections.csv"
    table.write_text(f'study,impression,findings,last_paragraph,comparison\ns50000002,,"{THREE}",,\n')
    datalist = DATASET.convert(root, sectioned_csv=table)
    assert [(entry["id"], entry["report"]) for entry in datalist["training"]] == [("ab-1", CLEAN)]
    assert datalist["meta"]["dropped"]["missing report"] == 7
    assert "sections.csv" in datalist["meta"]["sources"]


def test_strict_and_layout_errors(tmp_path):
    root = write_tree(tmp_path / "set")
    with pytest.raises(DataError, match=r"missing report: .*s50000004\.txt: no such file"):
        collect(root, strict=True)
    (root / "files/p10/p10000764/s50000004.txt").write_text(f"\n FINDINGS: {THREE}\n")
    with pytest.raises(DataError, match=r"unreadable image: .*cb-1\.jpg: truncated JPEG"):
        collect(root, strict=True)
    (root / "mimic-cxr-2.0.0-split.csv").write_text("")
    with pytest.raises(DataError, match=r"split\.csv: the file is empty"):
        collect(root)
    (root / "mimic-cxr-2.0.0-split.csv").write_text("dicom_id,splits\na,train\n")
    with pytest.raises(DataError, match="no column 'split' \\(did you mean 'splits'"):
        collect(root)


def test_no_report_folder(tmp_path):
    root = write_tree(tmp_path, reports="elsewhere")
    with pytest.raises(DataError, match=r"no report texts\. Looked for p10/p10000032/s50000001\.txt below"):
        collect(root)
    assert len(DATASET.convert(root, reports_root=root / "elsewhere")["training"]) == 2


def test_a_patient_of_two_lists_stays_in_the_last(tmp_path):
    root = write_tree(tmp_path)
    split = root / "mimic-cxr-2.0.0-split.csv"
    # of patient 10000032 one study moves from training to test; ids with blanks around them are the same
    moved = split.read_text().replace("ab-1,50000002,10000032,train", " ab-1 ,50000002,10000032,test")
    split.write_text(moved)
    datalist = DATASET.convert(root)
    assert [item["id"] for item in datalist["training"]] == []
    assert "ab-1" in [item["id"] for item in datalist["test"]]
    assert datalist["meta"]["dropped_items"]["patient in another split"] == ["aa-1"]
