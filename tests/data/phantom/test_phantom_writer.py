# SPDX-License-Identifier: Apache-2.0
"""The folders that are written: layout, truth, same bytes, and what happens to folders that hold things."""

import gzip
import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from tests.common import digests, phantom, read, rows, truth_of
from unimedi_components.data.phantom import FINDINGS, LAYOUTS, write_phantom
from unimedi_components.errors import DataError

PATIENTS = 12
IMAGES = (".jpg", ".jpeg", ".png", ".dcm", ".raw", ".nii.gz")


mimic = phantom("mimic_cxr", PATIENTS, 4)
bimcv = phantom("bimcv", PATIENTS, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_workers_write_the_same_bytes(layout, phantom_folder, tmp_path):
    write_phantom(layout, tmp_path / "again", 3, 4, workers=2, progress=False)
    assert digests(tmp_path / "again") == digests(phantom_folder(layout, 3, 4))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_seed_writes_other_images(layout, phantom_folder, tmp_path):
    write_phantom(layout, tmp_path, 2, 5, workers=1, progress=False)
    images = {name: digest for name, digest in digests(tmp_path).items() if name.endswith(IMAGES)}
    assert len(images) >= 2 and not set(images.values()) & set(digests(phantom_folder(layout, 3, 4)).values())


def test_mimic_layout(mimic):
    metadata = rows(mimic / "mimic-cxr-2.0.0-metadata.csv")
    assert list(metadata[0])[:3] == ["dicom_id", "subject_id", "study_id"] and "ViewPosition" in metadata[0]
    split = rows(mimic / "mimic-cxr-2.0.0-split.csv")
    assert list(split[0]) == ["dicom_id", "study_id", "subject_id", "split"]
    assert sorted({r["split"] for r in split}) == ["test", "train", "validate"]
    chexpert = rows(mimic / "mimic-cxr-2.0.0-chexpert.csv")
    assert len(chexpert) == PATIENTS and len(chexpert[0]) == 16
    truth = truth_of(mimic)
    assert len(truth) == PATIENTS
    frontal = [r for r in metadata if r["ViewPosition"] in ("AP", "PA")]
    assert {r["dicom_id"] for r in frontal} == set(truth)
    labels = {r["study_id"]: r for r in chexpert}
    for row in metadata:
        subject, study, name = row["subject_id"], row["study_id"], row["dicom_id"]
        assert len(subject) == len(study) == 8 and subject[0] == "1" and study[0] == "5"
        assert [len(part) for part in name.split("-")] == [8] * 5
        folder = mimic / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}"
        image = Image.open(folder / f"{name}.jpg")
        assert image.mode == "L" and image.size == (int(row["Columns"]), int(row["Rows"]))
        assert folder.with_suffix(".txt").read_text().lstrip().startswith("FINAL REPORT")
        if name in truth:
            entry = truth[name]
            assert entry["image"] == (folder / f"{name}.jpg").relative_to(mimic).as_posix()
            present = entry["labels"][FINDINGS.index("effusion")]
            assert labels[study]["Pleural Effusion"] == f"{present:.1f}"
            assert labels[study]["No Finding"] == ("" if any(entry["labels"]) else "1.0")


def test_bimcv_layout_and_geometry(bimcv):
    base = bimcv / "covid19_posi"
    reports = rows(base / "derivatives" / "labels" / "labels_covid19_posi.tsv", "\t")
    assert list(reports[0])[:4] == ["PatientID", "ReportID", "Report", "Labels"] and len(reports[0]) == 8
    assert len(rows(base / "participants.tsv", "\t")) == len(reports) == PATIENTS
    truth = truth_of(bimcv)
    orders = set()
    for row in reports:
        subject, session = row["PatientID"], row["ReportID"]
        assert row["Report"].startswith("Findings: ") and " Impression: " in row["Report"]
        (listed,) = rows(base / subject / f"{subject}_sessions.tsv", "\t")
        assert listed["session_id"] == session
        stem = f"{subject}_{session}_run-1_bp-chest_ct"
        path = base / subject / session / "mod-rx" / f"{stem}.nii.gz"
        assert truth[stem]["image"] == path.relative_to(bimcv).as_posix()
        assert json.loads(path.with_name(f"{stem}.json").read_text())["00080060"]["Value"] == ["CT"]
        assert gzip.decompress(path.read_bytes())[:4] == (348).to_bytes(4, "little")
        image = nib.load(path)
        orders.add("".join(nib.aff2axcodes(image.affine)))
        assert image.shape == (128, 128, truth[stem]["n_slices"]) and image.get_data_dtype() == np.int16
        assert all(2.2 < s < 3.5 for s in image.header.get_zooms()[:2]) and 5 < image.header.get_zooms()[2] < 8
        # Whatever the storage order: liver on the patient's right at the bottom, head up, spine at the back.
        canonical = nib.as_closest_canonical(image).get_fdata()
        assert (canonical[:, :, 1] > -300).mean() > (canonical[:, :, 24] > -300).mean()
        bone = np.nonzero(canonical[50:78, :, 20:30] > 250)[1]
        assert bone.mean() < 64
    assert orders == {"RAS", "LPS"}


def test_truth_points_at_the_lesion_in_the_file(tmp_path):
    write_phantom("bimcv", tmp_path, 40, 6, workers=1, progress=False)
    truth, checked = read(tmp_path / "truth.json"), set()
    assert {k: truth[k] for k in ("layout", "seed", "patients", "version")} == {
        "layout": "bimcv",
        "seed": 6,
        "patients": 40,
        "version": 2,
    }
    assert truth["findings"] == list(FINDINGS)
    for study in truth["studies"].values():
        names = [f["name"] for f in study["findings"]]
        assert study["labels"] == [int(n in names) for n in FINDINGS]
        union = sorted({i for f in study["findings"] if f["slices"] for i in range(f["slices"][0], f["slices"][1] + 1)})
        assert set(study["lesion_slices"]) <= set(union)
        dense = [f for f in study["findings"] if f["name"] in ("nodule", "consolidation")]
        if not dense:
            continue
        image = nib.load(tmp_path / study["image"])
        volume = np.asarray(image.dataobj)
        for box in dense[0]["boxes"]:
            (z0, z1), (y0, y1), (x0, x1) = box
            centre = volume[(x0 + x1) // 2, (y0 + y1) // 2, (z0 + z1) // 2]
            assert centre > -300
            checked.add(nib.aff2axcodes(image.affine)[0])
    assert checked == {"R", "L"}


def test_complete_folder_is_left_alone_and_half_a_folder_is_written_anew(mimic, tmp_path):
    before = (mimic / "truth.json").stat().st_mtime_ns
    assert not write_phantom("mimic_cxr", mimic, PATIENTS, 4, progress=False).fresh
    assert (mimic / "truth.json").stat().st_mtime_ns == before
    root = tmp_path / "killed"
    write_phantom("mimic_cxr", root, 3, 1, workers=1, progress=False)
    whole = digests(root)
    (root / "truth.json").unlink()
    (root / ".phantom-partial.json").write_text("{}")
    next(root.rglob("*.jpg")).write_bytes(b"cut")
    assert write_phantom("mimic_cxr", root, 3, 1, workers=1, progress=False).fresh
    assert digests(root) == whole


def test_foreign_folders_and_bad_arguments_are_refused(mimic, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="not empty and holds no phantom set"):
        write_phantom("bimcv", tmp_path, 2)
    assert (tmp_path / "mine.txt").read_text() == "keep"
    differing = (
        rf"another phantom set \(seed: has 4, asked for 5, patients: has {PATIENTS}, asked for 1\); ask for that"
    )
    with pytest.raises(DataError, match=differing):
        write_phantom("mimic_cxr", mimic, 1, 5)
    with pytest.raises(DataError, match="is a file"):
        write_phantom("bimcv", tmp_path / "mine.txt", 2)
    with pytest.raises(DataError, match=r"unknown phantom layout 'mimic'.*bimcv, .*mimic_cxr"):
        write_phantom("mimic", tmp_path / "new", 2)
    with pytest.raises(DataError, match="at least 1"):
        write_phantom("bimcv", tmp_path / "new", 0)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "truth.json").write_text("[")
    with pytest.raises(DataError, match=r"truth\.json: not a phantom's truth file"):
        write_phantom("bimcv", tmp_path / "broken", 2)


def test_layouts_have_codes_of_their_own():
    codes = [layout.code for layout in LAYOUTS.values()]
    assert len(set(codes)) == len(codes)
