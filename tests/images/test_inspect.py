# SPDX-License-Identifier: Apache-2.0
"""The command inspect, and that what it says is what prepare keeps and a data set reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from unimedi_components.__main__ import main
from unimedi_components.data import ByDimension, ct_transforms, find_images, xray_transforms
from unimedi_components.data.table import collect
from unimedi_components.loading import ImageDataset

REPORT = "The heart is enlarged and the lungs are clear."


@pytest.fixture
def mixed(dicom: Any, truth: Any) -> Path:
    """A hospital's folder: two series in one folder, a scout, films, an enhanced CT, and what cannot be used."""

    def scout(number: int, file: Any) -> None:
        file.ImageType = ["DERIVED", "SECONDARY", "LOCALIZER"]

    dicom.slices(folder="ct", change=lambda n, f: setattr(f, "SeriesDescription", "Thorax Doe"))
    dicom.slices(folder="ct", series="2", start=100, places=[5.0 * z for z in range(24)])
    dicom.slices(folder="ct", start=200, places=[700], change=scout)
    dicom.slices(folder="single", series="3", places=[0])
    dicom.enhanced("enhanced.dcm", range(23, -1, -1))
    dicom.film("pa.dcm"), dicom.film("lat")
    values, affine = truth
    nib.save(nib.Nifti1Image(values + np.int16(1024), affine), dicom.folder / "stored.nii.gz")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(dicom.folder / "x.png")
    (dicom.folder / "cut.png").write_bytes((dicom.folder / "x.png").read_bytes()[:40])
    (dicom.folder / "notes.txt").write_text("no image")
    return dicom.folder


def test_table_json_and_contact_sheets(mixed: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(mixed)
    main(["inspect", str(mixed), "--json", str(tmp_path / "out.json"), "--png", str(tmp_path / "png")])
    said, written = capsys.readouterr().out, (tmp_path / "out.json").read_text()
    content = json.loads(written)
    found = {item["id"]: item for item in content["items"]}
    kinds = {name: (item["kind"], item["size"], item["spacing_mm"], len(item["files"])) for name, item in found.items()}
    assert kinds == {
        "ct": ("volume", [20, 18, 24], [2, 2.5, 5], 24),
        "ct-2": ("volume", [20, 18, 24], [2, 2.5, 3], 24),
        "enhanced": ("volume", [20, 18, 24], [2, 2.5, 3], 1),
        "lat": ("xray", [50, 60], None, 1),
        "pa": ("xray", [50, 60], None, 1),
        "x": ("xray", [64, 64], None, 1),
    }
    assert (found["ct"]["orientation"], found["ct"]["values"]) == ("LPS", [-1000, 230])
    left = {Path(one["file"]).name: one["reason"] for one in content["left_out"]}
    assert len(left) == 5 and left["notes.txt"] == "holds text, which is not read here"
    assert left["stored.nii.gz"].startswith("values 24 to 1254 are not Hounsfield units")
    assert "scout" in left["0700.dcm"] and "one CT slice" in left["0900.dcm"] and "cut.png" in left
    for name in ("ct", "ct-2", "enhanced"):
        with Image.open(tmp_path / "png" / f"{name}.png") as sheet:
            assert sheet.size == (768, 4 * 206)
    assert (tmp_path / "png" / "xrays_001.png").is_file()
    for secret in ("Doe", "MRN-4711", "20240229"):
        assert secret not in said + written
    assert "3 X-rays and 3 volumes; 5 files left out" in said
    main(["inspect", str(mixed / "ct"), "--identifiers", "--values", "False"])
    said = capsys.readouterr().out
    assert all(word in said for word in ("Doe^Jane", "MRN-4711", "20240229"))


@pytest.mark.parametrize("name", ["single", "stored.nii.gz", "notes.txt"])
def test_nothing_that_can_be_used_ends_with_code_2(name: str, mixed: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["inspect", str(mixed / name)])
    assert caught.value.code == 2 and "no X-ray or CT volume that can be used" in capsys.readouterr().err


def test_prepare_and_loading_agree_with_it(mixed: Path, truth: Any) -> None:
    for row in ("a", "b"):
        shutil.copytree(mixed / "ct", mixed / row)
    for path in (mixed / "a").iterdir():
        if path.name <= "0800.dcm" and path.name != "0700.dcm":
            path.unlink()
    rows = ["a", "b", "enhanced.dcm", "single/0900.dcm", "single", "pa.dcm", "lat", "x.png", "cut.png", "stored.nii.gz"]
    table = mixed / "cases.csv"
    table.write_text("image,report\n" + "".join(f"{row},{REPORT}\n" for row in rows))
    builder = collect(table, min_slices=2, validation_fraction=0, test_fraction=0, check_images="full", progress=False)
    kept = {item["image"]: item for item in builder.build()["training"]}
    dims = {name: item["dim"] for name, item in kept.items()}
    assert dims == {"a": 3, "enhanced.dcm": 3, "pa.dcm": 2, "lat": 2, "x.png": 2}
    # the scout that lies in the folder is none of the files
    assert kept["a"]["files"] == sorted(f"a/{900 - z:04d}.dcm" for z in range(24))[::-1]
    dropped = {reason: [drop["id"] for drop in drops] for reason, drops in builder.dropped.items()}
    assert dropped == {
        "several images": ["b"],
        "one CT slice": ["single/0900", "single"],
        "unreadable image": ["cut"],
        "not Hounsfield units": ["stored"],
    }
    transform = ByDimension(xray_transforms(16), ct_transforms((24, 18, 20)))
    dataset = ImageDataset(list(kept.values()), transform, mixed, strict=True)
    volume = next(item for item in dataset if item["id"] == "a")["image"][0].numpy()
    assert np.allclose(volume * 1000, truth[0].transpose(2, 1, 0), atol=1e-3)


def test_what_find_leaves_out_is_listed_by_the_data_set(mixed: Path) -> None:
    items = find_images(str(mixed), mixed)
    transform = ByDimension(xray_transforms(16), ct_transforms((8, 16, 16)))
    dataset = ImageDataset(items, transform, mixed)
    assert {item["id"] for item in items} == {"ct", "ct-2", "enhanced", "lat", "pa", "stored", "x", "cut"}
    for number in range(len(dataset)):
        dataset[number]
    found = {Path(record.file).name: record.reason for record in dataset.skipped}
    assert set(found) == {"0900.dcm", "0700.dcm", "cut.png", "stored.nii.gz"}
    assert "one CT slice" in found["0900.dcm"] and "not Hounsfield units" in found["stored.nii.gz"]
    told = find_images(str(mixed / "stored.nii.gz"), mixed, assume_hu=True)
    assert not isinstance(ImageDataset(told, transform, mixed)[0], tuple)


def test_links_are_followed_once_and_hidden_folders_passed_over(dicom: Any) -> None:
    dicom.slices(folder="store/p1")
    dicom.film("set/.hidden/a.dcm"), dicom.film("set/a\nb.dcm")
    for name, place in (("p1", "store/p1"), ("p2", "store/p1"), ("loop", "set"), ("lost.dcm", "gone")):
        (dicom.folder / "set" / name).symlink_to(dicom.folder / place)
    found = find_images("set", dicom.folder)
    assert [(item["id"], len(item.get("files", ()))) for item in found] == [("set_a_b", 0), ("set_p1", 24)]
    assert [(Path(one.file).name, one.reason, one.fault) for one in found.left_out] == [
        ("lost.dcm", "is a link to a file that is missing. Fetch it", True)
    ]
