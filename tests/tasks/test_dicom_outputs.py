# SPDX-License-Identifier: Apache-2.0
"""Masks, label maps and boxes read back from the DICOM that was written of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from monai.data import MetaTensor

from tests.images.conftest import Writer
from tests.images.single_files import GREY, H, W, write
from unimedi_components.data.volume_loading import LoadVolumed
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.images.volume import find_stack
from unimedi_components.tasks import SaveOrgans
from unimedi_components.tasks.dicom_outputs import check_dicom_outputs, write_boxes, write_label_map, write_mask

hd = pytest.importorskip("highdicom")


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """A film as hospitals send it, without any of the elements that may be empty."""
    tags = {"StudyInstanceUID": "1.2.4", "SeriesInstanceUID": "1.2.5", "PatientID": "7"}
    return write(tmp_path / "film.dcm", GREY, BitsStored=12, **tags)


def test_a_mask_is_a_segmentation_of_its_film(film: Path, tmp_path: Path) -> None:
    mask = np.zeros((H, W), bool)
    mask[10:20, 5:30] = True
    path = write_mask(film, mask, "pneumonia", tmp_path / "out" / "mask.dcm")
    assert path is not None
    found = pydicom.dcmread(path)
    assert (found.Modality, found.PatientID, found.StudyInstanceUID) == ("SEG", "7", "1.2.4")
    np.testing.assert_array_equal(found.pixel_array.reshape(H, W) > 0, mask)
    assert found.SegmentSequence[0].SegmentLabel == "pneumonia"
    assert found.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == "1.2.3"
    # a second run replaces the object rather than adding one
    again = write_mask(film, mask, "pneumonia", tmp_path / "again.dcm")
    assert again is not None and pydicom.dcmread(again).SOPInstanceUID == found.SOPInstanceUID
    assert write_mask(film, np.zeros_like(mask), "pneumonia", tmp_path / "none.dcm") is None


def test_boxes_are_a_report_of_their_film(film: Path, tmp_path: Path) -> None:
    boxes = [([5.0, 10.0, 30.0, 20.5], "pneumonia", 0.91), ([1.0, 2.0, 3.0, 4.0], "pneumonia", 0.4)]
    path = write_boxes(film, boxes, tmp_path / "boxes.dcm")
    assert path is not None
    report = hd.sr.srread(path)
    assert report.Modality == "SR" and report.SeriesInstanceUID != "1.2.5"
    groups = report.content.get_planar_roi_measurement_groups()
    corners = [[[5, 10], [30, 10], [30, 20.5], [5, 20.5], [5, 10]], [[1, 2], [3, 2], [3, 4], [1, 4], [1, 2]]]
    assert [group.roi.value.tolist() for group in groups] == corners
    assert [group.get_measurements()[0].value for group in groups] == pytest.approx([0.91, 0.4])
    assert groups[0].finding_type.meaning == "pneumonia"
    assert write_boxes(film, [], tmp_path / "none.dcm") is None


AFFINE = np.array([[-1.5, 0, 0, 40], [0, -2, 0, 30], [0, 0, 3, 10], [0, 0, 0, 1.0]])


def write_series(folder: Path) -> list[Path]:
    """Five slices, UIDs ending in their number from the feet."""
    files = []
    for number in (3, 0, 4, 1, 2):  # in no order
        tags = {"ImagePositionPatient": [-40, -30, 10 + 3 * number], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        tags |= {"PixelSpacing": [2, 1.5], "SliceThickness": 3, "FrameOfReferenceUID": "1.2.9", "Modality": "CT"}
        tags |= {"RescaleSlope": 1, "RescaleIntercept": -1024}
        path = write(folder / f"{number}.dcm", GREY, StudyInstanceUID="1.2.4", SeriesInstanceUID="1.2.5", **tags)
        file = pydicom.dcmread(path)
        file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}"
        file.save_as(path)
        files.append(path)
    return files


def test_a_label_map_is_a_segmentation_of_its_series(tmp_path: Path) -> None:
    files = write_series(tmp_path)
    labels, affine = np.zeros((W, H, 5), np.uint8), AFFINE.copy()
    labels[5:12, 6:20, 1:3], labels[20:30, 6:20, 4] = 1, 3
    names = ["background", "liver", "spleen", "left kidney"]
    stack = find_stack(tmp_path, files)
    assert stack is not None
    path = write_label_map(stack, labels, affine, names, tmp_path / "organs.dcm")
    assert path is not None
    found = hd.seg.segread(path)
    assert [item.SegmentLabel for item in found.SegmentSequence] == ["liver", "left kidney"]
    for number, label in ((1, 1), (2, 3)):
        planes = found.get_pixels_by_source_instance([f"1.2.3.{z}" for z in range(5)], segment_numbers=[number])
        np.testing.assert_array_equal(planes[..., 0].transpose(2, 1, 0) > 0, labels == label)
    affine[2, 3] = 100
    with pytest.raises(DataError, match="does not lie on the slices"):
        write_label_map(stack, labels, affine, names, tmp_path / "far.dcm")
    assert write_label_map(stack, 0 * labels, affine, names, tmp_path / "none.dcm") is None


@pytest.mark.parametrize("order", [range(24), range(23, -1, -1), [*range(12, 24), *range(12)]])
def test_organs_of_an_enhanced_ct(order: Any, tmp_path: Path) -> None:
    source = Writer(tmp_path).enhanced("multi.dcm", list(order))
    item = LoadVolumed("image")({"image": str(source), "id": "a", "source": str(source)})
    labels = torch.zeros(item["image"].shape)
    labels[0, 5:12, 6:14, 1:3], labels[0, 2:5, 6:9, 20] = 2, 1
    prediction = {**item, "pred": MetaTensor(labels, affine=item["image"].affine)}
    SaveOrgans(tmp_path / "out", ["background", "liver", "spleen"], figures=False, dicom=True)(prediction)
    found = hd.seg.segread(tmp_path / "out" / "a_organs.dcm")
    for number, label in ((1, 1), (2, 2)):
        frames, options = list(range(1, 25)), {"segment_numbers": [number], "assert_missing_frames_are_empty": True}
        planes = found.get_pixels_by_source_frame(pydicom.dcmread(source).SOPInstanceUID, frames, **options)
        expected = (labels[0].numpy() == label)[:, :, list(order)]
        np.testing.assert_array_equal(planes[..., 0].transpose(2, 1, 0) > 0, expected)
    measures = found.SharedFunctionalGroupsSequence[0]
    assert list(measures.PixelMeasuresSequence[0].PixelSpacing) == [2.5, 2.0]


def test_organs_of_a_series_on_request(tmp_path: Path) -> None:
    write_series(tmp_path / "in")
    item = LoadVolumed("image")({"image": str(tmp_path / "in"), "id": "a", "source": str(tmp_path / "in")})
    np.testing.assert_allclose(item["image"].affine, AFFINE)
    labels = torch.zeros(1, W, H, 5)
    labels[0, 5:12, 6:20, 1:3] = 2
    prediction = {**item, "pred": MetaTensor(labels, affine=item["image"].affine)}
    for dicom in (False, True):
        out = tmp_path / str(dicom)
        SaveOrgans(out, ["background", "liver", "spleen"], figures=False, dicom=dicom)(prediction)
        assert (out / "a_organs.nii.gz").is_file() and (out / "a_organs.dcm").is_file() == dicom
    found = hd.seg.segread(tmp_path / "True" / "a_organs.dcm")
    planes = found.get_pixels_by_source_instance([f"1.2.3.{z}" for z in range(5)])
    np.testing.assert_array_equal(planes[..., 0].transpose(2, 1, 0) > 0, labels[0].numpy() > 0)


def test_pictures_have_no_dicom_output(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    assert write_mask(tmp_path / "a.png", np.ones((4, 4), bool), "a", tmp_path / "a.dcm") is None
    assert write_boxes(tmp_path / "a.png", [([0, 0, 1, 1], "a", 0.5)], tmp_path / "a.dcm") is None


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_dicom_outputs()
    monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
    with pytest.raises(ConfigError, match=r"unimedi-components\[dicom\]"):
        check_dicom_outputs()


@pytest.mark.parametrize("name", ["SOPInstanceUID", "SeriesInstanceUID"])
def test_a_film_without_its_uid_is_passed_over(name: str, film: Path, tmp_path: Path, caplog: Any) -> None:
    file = pydicom.dcmread(film)
    delattr(file, name)
    file.save_as(film)
    assert write_mask(film, np.ones((H, W), bool), "a", tmp_path / "a.dcm") is None
    assert write_boxes(film, [([0, 0, 1, 1], "a", 0.5)], tmp_path / "a.dcm") is None
    assert f"{film}: lacks {name}, so no DICOM is written of it" in caplog.text and not (tmp_path / "a.dcm").exists()
