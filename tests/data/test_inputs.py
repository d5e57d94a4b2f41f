# SPDX-License-Identifier: Apache-2.0
"""From what a user names to X-rays and volumes: files, folders, patterns, DICOM series and single DICOM files."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from unimedi_components.data import ByDimension, ct_transforms, find_images, xray_transforms
from unimedi_components.errors import DataError
from unimedi_components.loading import ImageDataset, ImageLoader

UID = "1.2.826.0.1.3680043.2.1125.1"


def write_picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(48 * 40, dtype=np.uint16).reshape(48, 40).astype(np.uint8)).save(path)
    return path


def write_volume(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.full((12, 10, 8), -1000, np.int16)
    values[3:9] = 40
    nib.save(nib.Nifti1Image(values, np.diag([2, 2, 3, 1.0])), path)
    return path


def write_dicom(path: Path, series: str, modality: str = "CT", number: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    plane = np.full((1, 10, 12), -1000 + 100 * number, np.int16)
    plane[0, 0, 0] = 40
    image = itk.image_from_array(plane if modality == "CT" else plane[0])
    image.SetOrigin([0.0, 0.0, 2.0 * number] if modality == "CT" else [0.0, 0.0])
    tags = image.GetMetaDataDictionary()
    tags["0008|0060"], tags["0008|0018"] = modality, f"{series}.{number}"
    tags["0020|000d"], tags["0020|000e"], tags["0020|0013"] = UID, series, str(number)
    writer = itk.ImageFileWriter[type(image)].New()
    image_io = itk.GDCMImageIO.New()
    image_io.KeepOriginalUIDOn()
    writer.SetImageIO(image_io)
    writer.SetInput(image)
    writer.SetFileName(str(path))
    writer.Update()
    return path


def found(*args: object) -> dict[str, tuple[str, int]]:
    return {item["id"]: (item["source"], item["dim"]) for item in find_images(*args)}  # type: ignore[arg-type]


def test_a_folder_with_everything(tmp_path: Path) -> None:
    jpg, png = write_picture(tmp_path / "a" / "x.jpg"), write_picture(tmp_path / "b" / "x.png")
    volume, other = write_volume(tmp_path / "b" / "x.nii.gz"), write_volume(tmp_path / "y.nii")
    for number in range(1, 5):
        write_dicom(tmp_path / "ct" / f"{number}.dcm", f"{UID}.1", number=number)
    one, two = (write_dicom(tmp_path / "cr" / name, f"{UID}.{name[1]}", "CR") for name in ("i2.dcm", "i3"))
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "table.csv").write_text("image,report")
    assert found(None, tmp_path) == {
        "a_x": (str(jpg), 2),
        "b_x": (str(volume), 3),
        "b_x-2": (str(png), 2),
        "cr_i2": (str(one), 2),
        "cr_i3": (str(two), 2),
        "ct": (str(tmp_path / "ct"), 3),
        "y": (str(other), 3),
    }


def test_files_patterns_and_where_they_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jpg, volume = write_picture(tmp_path / "data" / "a" / "x.jpg"), write_volume(tmp_path / "data" / "v.nii.gz")
    here = write_picture(tmp_path / "cwd" / "z.png")
    monkeypatch.chdir(tmp_path / "cwd")
    root = tmp_path / "data"
    assert found("a/x.jpg", root) == {"a_x": (str(jpg), 2)}
    assert found("**/*.jpg", root) == {"a_x": (str(jpg), 2)}
    assert found(["v.nii.gz", "a", str(volume)], root) == {"a_x": (str(jpg), 2), "v": (str(volume), 3)}
    assert found("z.png", root) == {"z": (str(here), 2)}
    assert found(str(here), tmp_path / "missing") == {"z": (str(here), 2)}
    with pytest.raises(DataError, match=r"w\.png: no such file, folder or pattern"):
        find_images(["z.png", "w.png"], root)
    (tmp_path / "empty").mkdir()
    for nothing in ([], "", ()):
        with pytest.raises(DataError, match="names nothing; give a file"):
            find_images(nothing, tmp_path)
    with pytest.raises(DataError, match="empty: no image in it"):
        find_images(str(tmp_path / "empty"))


def test_dicom_that_is_neither_xray_nor_one_series(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(1, 4):
        write_dicom(tmp_path / "mixed" / f"a{number}.dcm", f"{UID}.1", number=number)
        write_dicom(tmp_path / "mixed" / f"b{number}.dcm", f"{UID}.2", number=number)
    slice_ = write_dicom(tmp_path / "one" / "7.dcm", f"{UID}.3", number=7)
    broken = tmp_path / "broken" / "x.dcm"
    broken.parent.mkdir()
    broken.write_bytes(b"\0" * 128 + b"DICM" + b"\1" * 40)
    xray = write_dicom(tmp_path / "ok.dcm", f"{UID}.4", "DX")
    with caplog.at_level(logging.WARNING):
        items = find_images(None, tmp_path)
    assert [(item["id"], item["dim"]) for item in items] == [("mixed", 3), ("mixed-2", 3), ("ok", 2)]
    for letter, item in zip("ab", items, strict=False):
        assert item["files"] == [str(tmp_path / "mixed" / f"{letter}{number}.dcm") for number in (1, 2, 3)]
    assert items[2]["source"] == str(xray)
    text = caplog.text
    assert f"left out {slice_}: is one CT slice" in text
    assert f"left out {broken}: " in text
    assert sorted(one.file for one in items.not_read) == [str(broken), str(slice_)]


def test_the_test_split_of_a_pretraining_folder(tmp_path: Path) -> None:
    jpg = write_picture(tmp_path / "s" / "x.jpg")
    item = {"id": "study", "patient": "p", "image": "s/x.jpg", "dim": 2, "report": "clear"}
    datalist = {"training": [{**item, "id": "t", "patient": "q"}], "validation": [], "test": [item]}
    (tmp_path / "pretrain.json").write_text(json.dumps(datalist))
    (only,) = find_images(None, tmp_path)
    assert (only["id"], only["source"], only["report"]) == ("study", str(jpg), "clear")


def test_loader_keeps_dimensions_apart_and_unreadable_files_out(tmp_path: Path) -> None:
    for name in "abc":
        write_picture(tmp_path / f"{name}.png")
    for number in range(1, 9):
        write_dicom(tmp_path / "ct" / f"{number}.dcm", f"{UID}.1", number=number)
    write_volume(tmp_path / "v.nii.gz")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "c.png").write_bytes(b"")
    transform = ByDimension(xray_transforms(16), ct_transforms((8, 16, 16)))
    dataset = ImageDataset(find_images(None, tmp_path), transform, tmp_path)
    batches = list(ImageLoader(dataset, (2, 2)))
    assert [batch["id"] for batch in batches] == [["a"], ["ct", "v"]]
    assert batches[0]["film_values"] == ["value / 255"] and "film_values" not in batches[1]
    assert [batch["image"].shape for batch in batches] == [(1, 1, 16, 16), (2, 1, 8, 16, 16)]
    # The DICOM series came in as one volume, its slices in the order of their positions: they grow brighter upwards.
    means = batches[1]["image"][0, 0].mean((1, 2))
    assert (means[1:] > means[:-1]).all()
    assert sorted(Path(record.file).name for record in dataset.skipped) == ["b.png", "c.png"]
