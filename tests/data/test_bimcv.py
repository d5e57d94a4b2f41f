# SPDX-License-Identifier: Apache-2.0
"""BIMCV conversion of a hand-written raw tree, against values worked out by hand."""

from __future__ import annotations

import gzip
import json
import struct

import nibabel as nib
import numpy as np
import pytest

from unimedi_components.data.bimcv import DATASET, collect
from unimedi_components.errors import DataError

REPORT = "ground glass in both lungs . no pleural effusion is seen . the heart is normal ."
CLEAN = "ground glass in both lungs no pleural effusion is seen the heart is normal"
SPANISH = "opacidades en vidrio deslustrado en ambos pulmones . sin derrame pleural . corazon de tamano normal ."
COLUMNS = (
    "PatientID\tReportID\tReport\tLabels\tLocalizations\tLabelsLocalizationsBySentence\tlabelCUIS\tLocalizationsCUIS"
)


def volume(num_slices, stored=False):
    plane = np.full((24, 24), -1000, np.int16)
    plane[6:18, 4:20] = 40
    return np.repeat(plane[..., None], num_slices, axis=2) + np.int16(1024 * stored)


def series(root, name, num_slices=22, stored=False, spacing=2.0, image_type=None, zero_affine=False):
    """Write ``sub-S1_ses-E1_run-1_bp-chest_ct``-like series with its json."""
    subject, session = name.split("_")[:2]
    folder = root / subject / session / "mod-rx"
    folder.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(volume(num_slices, stored), np.diag([1, 1, spacing, 1.0]))
    path = folder / f"{name}.nii.gz"
    nib.save(image, path)
    if zero_affine:
        content = bytearray(gzip.decompress(path.read_bytes()))
        struct.pack_into("<12f", content, 280, *[0.0] * 12)
        path.write_bytes(gzip.compress(bytes(content)))
    if image_type:
        tags = {"00080060": {"vr": "CS", "Value": ["CT"]}, "00080008": {"vr": "CS", "Value": image_type}}
        (folder / f"{name}.json").write_text(json.dumps(tags))


@pytest.fixture
def root(tmp_path):
    top = tmp_path / "covid19_posi"
    # two acquisitions, a localizer with many slices, and a series with more slices in stored values
    series(top, "sub-S03001_ses-E00001_run-1_bp-chest_ct", 24, image_type=["ORIGINAL", "PRIMARY", "AXIAL"])
    series(top, "sub-S03001_ses-E00001_run-1_bp-chest_acq-2_ct", 24)
    series(top, "sub-S03001_ses-E00001_run-2_bp-chest_ct", 40, image_type=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    series(top, "sub-S03001_ses-E00001_run-3_bp-chest_ct", 30, stored=True)
    series(top, "sub-S03001_ses-E00002_run-1_bp-chest_ct", 25, zero_affine=True)
    series(top, "sub-S03001_ses-E00002_run-2_bp-chest_ct", 22)
    series(top, "sub-S03002_ses-E00003_run-1_bp-chest_ct", 8)
    series(top, "sub-S03003_ses-E00004_run-1_bp-chest_ct", spacing=250.0)
    series(top, "sub-S03004_ses-E00005_run-1_bp-chest_ct")
    series(top, "sub-S03005_ses-E00006_run-1_bp-chest_ct")
    series(top, "sub-S03006_ses-E00007_run-1_bp-chest_ct")
    series(top, "sub-S03007_ses-E00008_run-1_bp-chest_ct")
    xray = top / "sub-S03008" / "ses-E00009" / "mod-rx"
    xray.mkdir(parents=True)
    (xray / "sub-S03008_ses-E00009_run-1_bp-chest_vp-pa_dx.png").write_bytes(b"png")
    return tmp_path


ROWS = [
    ("sub-S03001", "ses-E00001", REPORT),
    ("sub-S03001", "ses-E00001", "a second report . of the same . session here ."),
    ("sub-S03001", "ses-E00002", REPORT),
    ("sub-S03002", "ses-E00003", REPORT),
    ("sub-S03003", "ses-E00004", REPORT),
    ("sub-S03004", "ses-E00005", "the lungs are clear . the heart is normal ."),
    ("sub-S03999", "ses-E00006", REPORT),
    ("sub-S03007", "ses-E00008", SPANISH),
]


LABELS = {
    "ses-E00001": "['pneumonia', 'Pleural  effusion', 'loc left']",
    "ses-E00002": "",
    "ses-E00003": "pneumonia, nodule",
    "ses-E00005": "['pneumonia']",
}


def write_labels(root, name="labels_covid19_posi.tsv", rows=ROWS):
    folder = root / "covid19_posi" / "derivatives" / "labels"
    folder.mkdir(parents=True, exist_ok=True)
    cells = [LABELS.get(session, "['normal']") for _, session, _ in rows]
    lines = [COLUMNS] + ["\t".join([*row, cell, "[]", "[]", "[]", "[]"]) for row, cell in zip(rows, cells, strict=True)]
    (folder / name).write_text("\r\n".join(lines) + "\r\n", newline="")


DROPPED = {
    "session without CT": 1,
    "no report": 1,
    "report of another patient": 1,
    "report not English": 1,
    "fewer than 3 sentences": 1,
    "scout": 1,
    "not Hounsfield units": 1,
    "other series of the session": 1,
    "zero affine": 1,
    "fewer than 20 slices": 1,
    "spacing out of range": 1,
}


@pytest.mark.filterwarnings("ignore:.*not English", "ignore:.*no list of names")
@pytest.mark.parametrize("name", ["labels_covid19_posi.tsv", "labels_covid_posi.tsv"])
@pytest.mark.parametrize("inside", [False, True], ids=["parent", "covid19_posi"])
def test_conversion_by_hand(root, name, inside):
    write_labels(root, name)
    datalist = DATASET.convert(root / "covid19_posi" if inside else root, min_megabytes=0.0)
    prefix = "" if inside else "covid19_posi/"
    assert datalist["training"] == [
        {
            "id": f"sub-S03001_{session}_run-{run}_bp-chest_ct",
            "patient": "sub-S03001",
            "image": f"{prefix}sub-S03001/{session}/mod-rx/sub-S03001_{session}_run-{run}_bp-chest_ct.nii.gz",
            "dim": 3,
            "report": CLEAN,
            **label,
        }
        # an empty cell says nothing
        for session, run, label in (("ses-E00001", 1, {"label": [1, 0, 1, 1]}), ("ses-E00002", 2, {}))
    ]
    assert datalist["meta"]["label_names"] == ["loc left", "normal", "pleural effusion", "pneumonia"]
    assert datalist["meta"]["dropped"] == DROPPED
    items = datalist["meta"]["dropped_items"]
    assert items["other series of the session"] == ["sub-S03001_ses-E00001_run-1_bp-chest_acq-2_ct"]
    assert items["scout"] == ["sub-S03001_ses-E00001_run-2_bp-chest_ct"]
    assert items["not Hounsfield units"] == ["sub-S03001_ses-E00001_run-3_bp-chest_ct"]
    assert items["zero affine"] == ["sub-S03001_ses-E00002_run-1_bp-chest_ct"]
    assert items["report of another patient"] == ["sub-S03005_ses-E00006"]
    assert items["no report"] == ["sub-S03006_ses-E00007"]
    assert items["report not English"] == ["sub-S03007_ses-E00008"]


@pytest.mark.filterwarnings("ignore:.*not English")
def test_cells_that_are_no_lists_are_counted(root):
    write_labels(root)
    with pytest.warns(UserWarning, match=r"1 cells under Labels .*first sub-S03002 ses-E00003: 'pneumonia, nodule'"):
        DATASET.convert(root, min_megabytes=0.0)


@pytest.mark.filterwarnings("ignore:.*no list of names")
def test_bimcv_r_is_preferred_and_its_pairs_are_checked(root):
    write_labels(root, rows=[(*row[:2], SPANISH) for row in ROWS])
    rows = [
        ("S03001", "E00001", "sub-S03001/ses-E00001/mod-rx/sub-S03001_ses-E00001_run-1_bp-chest_ct.nii.gz"),
        # the file of session 5 stands beside the report of session 6, and the other way round
        ("sub-S03005", "ses-E00006", "sub-S03004_ses-E00005_run-1_bp-chest_ct.nii.gz"),
        ("sub-S03004", "ses-E00005", "sub-S03005_ses-E00006_run-1_bp-chest_ct.nii.gz"),
        ("sub-S03007", "ses-E00008", "sub-S03007_ses-E00008_run-1_bp-chest_ct.nii.gz"),
    ]
    table = "PatientID,ReportID,path,Report\n" + "".join(f"{','.join(row)},{REPORT}\n" for row in rows)
    (root / "BIMCV-R.csv").write_text(table)
    builder = collect(root, min_megabytes=0.0)
    kept = {entry["id"].rsplit("_run", 1)[0] for items in builder.items.values() for entry in items}
    assert kept == {"sub-S03001_ses-E00001", "sub-S03007_ses-E00008"}
    wrong = builder.dropped["report of another patient"]
    assert [drop["id"] for drop in wrong] == ["sub-S03004_ses-E00005", "sub-S03005_ses-E00006"]
    assert "is paired with the report of sub-S03005 ses-E00006" in wrong[0]["detail"]
    assert "report not English" not in builder.dropped
    # the Spanish table beside it still gives the labels
    assert list(builder.sources) == ["BIMCV-R.csv", "covid19_posi/derivatives/labels/labels_covid19_posi.tsv"]
    labelled = {entry["id"][:21]: entry.get("label") for items in builder.items.values() for entry in items}
    assert labelled == {"sub-S03001_ses-E00001": [1, 0, 1, 1], "sub-S03007_ses-E00008": [0, 1, 0, 0]}
    assert len(builder.dropped["no report"]) == 4


def test_strict_raises_at_the_first_broken_volume(root):
    write_labels(root)
    with pytest.raises(
        DataError, match=r"not Hounsfield units: .*E00001_run-3_bp-chest_ct\.nii\.gz: values 24 to 1064"
    ):
        collect(root, min_megabytes=0.0, strict=True)


def test_spanish_tables_warn_and_take_short_reports_with_them(root):
    short = "torax normal . pulmones normales . mediastino normal ."
    write_labels(root, rows=[*((*row[:2], SPANISH) for row in ROWS[:-1]), ("sub-S03007", "ses-E00008", short)])
    with pytest.warns(UserWarning, match="6 reports are not English and were dropped .*Put BIMCV-R.csv"):
        builder = collect(root, min_megabytes=0.0)
    assert not any(builder.items.values())
    # alone among English reports, the same short text is not recognised and stays
    write_labels(root, rows=[*ROWS[:-1], ("sub-S03007", "ses-E00008", short)])
    kept = DATASET.convert(root, min_megabytes=0.0)
    assert [item["patient"] for item in kept["training"]].count("sub-S03007") == 1


def test_split_by_patient(root):
    write_labels(root, rows=ROWS[:3])
    top = root / "covid19_posi"
    rows = []
    for index in range(40):
        subject, session = f"sub-S1{index:04d}", f"ses-E1{index // 2 * 2:04d}"
        rows.append((subject, session, REPORT))
        folder = top / subject / session / "mod-rx"
        folder.mkdir(parents=True)
        source = top / "sub-S03001/ses-E00001/mod-rx/sub-S03001_ses-E00001_run-1_bp-chest_ct.nii.gz"
        (folder / f"{subject}_{session}_run-1_bp-chest_ct.nii.gz").write_bytes(source.read_bytes())
    write_labels(root, rows=rows)
    first = DATASET.convert(root, min_megabytes=0.0, validation_fraction=0.1, test_fraction=0.05)
    assert first["meta"]["kept"] == {"training": 34, "validation": 4, "test": 2}
    other = DATASET.convert(root, min_megabytes=0.0, validation_fraction=0.1, test_fraction=0.05, seed=1)
    assert {i["id"] for i in first["validation"]} != {i["id"] for i in other["validation"]}


def test_layout_errors(root):
    with pytest.raises(DataError, match=r"no report table\. Looked for BIMCV-R\.csv"):
        collect(root)
    table = root / "translated.csv"
    table.write_text("PatientID,ReportID,Reports\na,b,c\n")
    with pytest.raises(DataError, match=r"no column 'Report' \(did you mean 'Reports'.*text_column"):
        collect(root, report_csv=table)
    assert not any(collect(root, report_csv=table, text_column="Reports").items.values())
