# SPDX-License-Identifier: Apache-2.0
"""A team's own tables: mixed images, labels, splits, and each kind of bad row."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from unimedi_components.data.prepare import prepare
from unimedi_components.data.table import DATASET, collect
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.images.checks import CTLimits, check_ct
from unimedi_components.images.volume import read_volume_header

REPORT = "No effusion is seen."


def xray(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((32, 24)).save(path)
    return path


def ct(path, offset=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = np.full((22, 22, 21), -1000 + offset, np.int16)
    volume[5:15, 5:15] = 40 + offset
    nib.save(nib.Nifti1Image(volume, np.diag([1, 1, 2, 1.0])), path)
    return path


def dicom_series(folder, num_slices=21):
    """Write a small CT series with RescaleIntercept -1024 through ITK."""
    itk = pytest.importorskip("itk")
    folder.mkdir(parents=True)
    uid = "1.2.826.0.1.3680043.2.1125.1.1"
    for index in range(num_slices):
        plane = np.full((1, 20, 20), -1000, np.int16)
        plane[0, 4:16, 4:16] = 40
        image = itk.image_from_array(plane)
        image.SetSpacing([1.5, 1.5, 2.0])
        image.SetOrigin([0.0, 0.0, 2.0 * index])
        tags = image.GetMetaDataDictionary()
        for key, value in {
            "0008|0060": "CT",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{uid}.1.{index + 1}",
            "0020|000d": uid,
            "0020|000e": f"{uid}.1",
            "0020|0013": str(index + 1),
            "0028|1052": "-1024",
            "0028|1053": "1",
        }.items():
            tags[key] = value
        writer = itk.ImageFileWriter[type(image)].New()
        image_io = itk.GDCMImageIO.New()
        image_io.KeepOriginalUIDOn()
        writer.SetImageIO(image_io)
        writer.SetInput(image)
        writer.SetFileName(str(folder / f"slice{index:03d}.dcm"))
        writer.Update()
    return folder


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def test_mixed_table_by_hand(tmp_path):
    xray(tmp_path / "a" / "x.jpg")
    xray(tmp_path / "a" / "x.png")
    ct(tmp_path / "v" / "c.nii.gz")
    (tmp_path / "a" / "cut.jpg").write_bytes((tmp_path / "a" / "x.jpg").read_bytes()[:-40])
    ct(tmp_path / "v" / "raw.nii.gz", offset=1024)
    table = write(
        tmp_path / "own.csv",
        [
            " Image ,REPORT,Patient,split,label",
            f"a/x.jpg,{REPORT},p1,train,edema|effusion",
            f"./a/x.png,{REPORT},p1,Training,",
            f"v/c.nii.gz,{REPORT},p2,val,nodule",
            f"{tmp_path}/a/x.jpg,{REPORT},p1,train,",
            f"a/cut.jpg,{REPORT},p3,test,",
            f"a/gone.jpg,{REPORT},p3,test,",
            f"v/raw.nii.gz,{REPORT},p3,test,",
            "a/x2.jpg, ,p3,test,",
            f",{REPORT},p3,test,",
        ],
    )
    xray(tmp_path / "a" / "x2.jpg")
    datalist = DATASET.convert(table)
    assert datalist["training"] == [
        {
            "id": "a/x",
            "patient": "p1",
            "image": "a/x.jpg",
            "dim": 2,
            "report": "no effusion is seen",
            "label": [1, 1, 0],
        },
        # x.png has the same stem, so its id is its whole name
        {"id": "a/x.png", "patient": "p1", "image": "a/x.png", "dim": 2, "report": "no effusion is seen"},
    ]
    assert [(entry["id"], entry["dim"], entry["label"]) for entry in datalist["validation"]] == [("v/c", 3, [0, 0, 1])]
    meta = datalist["meta"]
    assert meta["root"] == str(tmp_path)
    assert meta["label_names"] == ["edema", "effusion", "nodule"]
    assert meta["dropped"] == {
        "no image": 1,
        "duplicate image": 1,
        "unreadable image": 1,
        "missing image": 1,
        "not Hounsfield units": 1,
        "empty report": 1,
    }
    builder = collect(table)
    assert builder.dropped["missing image"][0]["detail"].endswith(f"gone.jpg: no such file ({table}, row 7)")


def test_several_tables_share_a_root_and_split_by_patient_and_kind(tmp_path):
    for index in range(10):
        xray(tmp_path / "xr" / "img" / f"{index}.jpg")
        ct(tmp_path / "ct" / f"{index}.nii")
    # patients 0 and 1 of the X-rays share a file's patient; every CT is its own
    first = write(
        tmp_path / "xr" / "x.csv", ["image,report,patient", *(f"img/{i}.jpg,{REPORT},p{max(i, 1)}" for i in range(10))]
    )
    second = write(tmp_path / "ct" / "c.csv", ["image,report", *(f"{i}.nii,{REPORT}" for i in range(10))])
    datalist = DATASET.convert(f"{first},{second}")
    assert datalist["meta"]["root"] == str(tmp_path)
    assert sorted(datalist["meta"]["sources"]) == ["ct/c.csv", "xr/x.csv"]
    dims = {split: sorted(item["dim"] for item in datalist[split]) for split in ("validation", "test")}
    for split in ("validation", "test"):
        assert dims[split].count(3) == 1
        assert len({item["patient"] for item in datalist[split] if item["dim"] == 2}) == 1
    assert sum(datalist["meta"]["kept"].values()) == 20
    assert DATASET.convert((str(first), str(second))) == datalist == DATASET.convert([first, second])
    assert DATASET.convert([first, second], seed=7)["test"] != datalist["test"]


def test_integer_labels_masks_and_ids(tmp_path):
    for name in ("a", "b"):
        xray(tmp_path / f"{name}.png")
    xray(tmp_path / "mask" / "a.png")
    table = write(tmp_path / "t.csv", ["image,report,label,id", f"a.png,{REPORT},3,first", f"b.png,{REPORT},0,"])
    kept = DATASET.convert(table)["training"]
    assert [(item["id"], item["label"]) for item in kept] == [("b", [0]), ("first", [3])]
    write(table, ["image,report,label", f"a.png,{REPORT},mask/a.png", f"b.png,{REPORT},"])
    kept = DATASET.convert(table)["training"]
    assert kept[0]["mask"] == "mask/a.png" and "label" not in kept[0] and "mask" not in kept[1]


def test_names_as_windows_writes_them(tmp_path):
    xray(tmp_path / "x" / "a.png"), xray(tmp_path / "x\\b.png")
    (tmp_path / "t.csv").write_text(f"image,report\nx\\a.png,{REPORT}\nx\\b.png,{REPORT}\n")
    datalist = collect(tmp_path / "t.csv", validation_fraction=0, test_fraction=0).build()
    # the one whose own name holds a backslash keeps it
    assert [item["image"] for item in datalist["training"]] == ["x/a.png", "x\\b.png"]


def test_dicom_series_folder(tmp_path):
    folder = dicom_series(tmp_path / "series")
    header = read_volume_header(folder)
    assert (header.shape, header.spacing) == ((20, 20, 21), (1.5, 1.5, 2.0))
    # 40 HU of soft tissue comes back through the rescale intercept
    assert check_ct(folder, CTLimits(min_megabytes=0)) is None
    table = write(tmp_path / "t.csv", ["image,report", f"series,{REPORT}"])
    assert DATASET.convert(table)["training"][0]["image"] == "series"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "the file is empty"),
        (["image,report"], "the table holds no rows"),
        (["image,reports", "a,b"], r"no column 'report' \(did you mean 'reports'\? .*report_column"),
        (["file,report", "a,b"], r"no column 'image' \(the file has 'file', 'report'\)"),
        (
            ["image,report,patient,split", f"a.png,{REPORT},p7,train", f"b.png,{REPORT},p7,test"],
            r"row 3: patient 'p7' is in two splits, training \(.*row 2\) and test\. Put all rows",
        ),
        (["image,report,split", f"a.png,{REPORT},trainig"], "split 'trainig' is unknown. did you mean 'training'"),
    ],
)
def test_bad_tables(tmp_path, lines, message):
    for name in ("a", "b"):
        xray(tmp_path / f"{name}.png")
    table = tmp_path / "own.csv"
    table.write_text("\n".join(lines))
    with pytest.raises(DataError, match=message) as caught:
        collect(table)
    assert str(table) in str(caught.value)


def test_missing_table_folder_and_options(tmp_path):
    with pytest.raises(DataError, match=r"gone\.csv: no such file"):
        collect(tmp_path / "gone.csv")
    with pytest.raises(DataError, match=r"is a folder\. Give the csv file"):
        collect(tmp_path)
    with pytest.raises(ConfigError, match="language='de'"):
        collect(tmp_path / "a.csv", language="de")


def test_language_column_names_and_partial_splits(tmp_path):
    for name in ("a", "b", "c"):
        xray(tmp_path / f"{name}.png")
    spanish = "Derrame pleural en ambos pulmones."
    table = write(
        tmp_path / "t.csv", ["file,text,split", f"a.png,{REPORT},train", f"b.png,{spanish},train", f"c.png,{REPORT},"]
    )
    names = {"image_column": "file", "report_column": "text"}
    datalist = DATASET.convert(table, **names)
    assert datalist["meta"]["dropped"] == {"report not English": 1, "no split": 1}
    assert [item["id"] for item in DATASET.convert(table, language="any", **names)["training"]] == ["a", "b"]
    assert DATASET.convert(table, min_sentences=2, **names)["meta"]["dropped"]["fewer than 2 sentences"] == 2


@pytest.mark.skipif("UNIMEDI_REAL_DATA" not in os.environ, reason="UNIMEDI_REAL_DATA does not name the real images")
def test_real_tables(tmp_path, capsys):
    root = Path(os.environ["UNIMEDI_REAL_DATA"])
    tables = [root / "xray_text" / "xray_text.csv", root / "ct3d" / "ct3d.csv"]
    prepare("table", tables, tmp_path / "own.json", strict=True)
    datalist = json.loads((tmp_path / "own.json").read_text())
    dims = {split: [item["dim"] for item in datalist[split]] for split in ("training", "validation", "test")}
    assert (sum(own.count(2) for own in dims.values()), sum(own.count(3) for own in dims.values())) == (173, 11)
    assert all(own.count(2) > 0 and own.count(3) > 0 for own in dims.values())
    assert datalist["meta"]["dropped"] == {}
    crops = [item["patient"] for own in dims for item in datalist[own] if item["id"].startswith("ct3d/lidc_0314")]
    assert crops == ["lidc_0314", "lidc_0314"]
    masks = [item["mask"] for own in dims for item in datalist[own] if "mask" in item]
    assert len(masks) == 9 and all((root / mask).is_file() for mask in masks)
    assert "kept" in capsys.readouterr().out


def write_labels(folder, rows, header="image,findings,patient"):
    for line in rows:
        Image.linear_gradient("L").resize((16, 16)).save(folder / line.split(",")[0])
    (folder / "t.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "t.csv"


@pytest.mark.parametrize(
    ("task", "names", "labels"),
    [
        ("multilabel", None, {"a": [1, 0, 1], "b": [0, 1, 0], "c": [1, 0, 0]}),
        ("multilabel", "mass,edema", {"a": [1, 1], "b": [0, 0], "c": [0, 1]}),
        # what a command line makes of mass,edema
        ("multilabel", "('mass', 'edema')", {"a": [1, 1], "b": [0, 0], "c": [0, 1]}),
    ],
)
def test_tables_of_labels_alone(tmp_path, task, names, labels, caplog):
    """Without reports; alphabetical order, or the order that is asked for."""
    table = write_labels(tmp_path, ["a.png,mass|edema,p1", "b.png, healthy ,p2", "c.png,edema,p3", "d.png,,p4"])
    builder = collect(table, label_column="findings", task=task, label_names=names, progress=False)
    items = {item["id"]: item for split in builder.items.values() for item in split}
    assert {name: item["label"] for name, item in items.items()} == labels
    assert not any("report" in item for item in items.values())
    assert builder.meta["task"] == task
    assert builder.meta["label_names"] == (["mass", "edema"] if names else ["edema", "healthy", "mass"])
    assert [drop["id"] for drop in builder.dropped["no label"]] == ["d"]
    said = ["labels that are none of label_names count as no finding: 'healthy' (1)"] if names else []
    assert caplog.messages == said


def test_classes_by_name_and_by_number(tmp_path):
    table = write_labels(tmp_path, ["a.png,ill,p1", "b.png,well,p2"])
    options = {"label_column": "findings", "progress": False}

    def labels(**more):
        items = [item for split in collect(table, **options, **more).items.values() for item in split]
        return {item["id"]: item["label"] for item in items}

    assert labels(task="multiclass") == {"a": 0, "b": 1}
    assert labels(task="binary", label_names="well,ill") == {"a": 1, "b": 0}
    with pytest.raises(DataError, match="a: label 'ill' is none of the classes well, sick"):
        labels(task="multiclass", label_names="well,sick")
    with pytest.raises(ConfigError, match="task='classes' is unknown"):
        labels(task="classes")
    with pytest.raises(ConfigError, match="label_names needs task"):
        labels(label_names="well,ill")
    write_labels(tmp_path, ["a.png,2,p1", "b.png,10,p2"])
    assert labels(task="multiclass") == {"a": 0, "b": 1}
    assert labels(task="multiclass", label_names="zero,one,2,10") == {"a": 2, "b": 3}
