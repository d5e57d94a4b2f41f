# SPDX-License-Identifier: Apache-2.0
"""MONAI Label over a DICOMweb archive, Debian's Orthanc on the loopback address: images from it, masks back to it."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from PIL import Image

from tests.common import own_inference
from tests.images.single_files import write

pytestmark = pytest.mark.usefixtures("in_process")
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
# turned by 3-4-5 about the left-right axis; RAS
AFFINE = np.array([[-2.0, 0, 0, 40], [0, -1.2, 2.4, 30], [0, 0.9, 3.2, 10], [0, 0, 0, 1]])
ORGANS = "abdomen_ct_segmentation"
STUDY, SCAN, FILM, OTHER = "1.2.826.1", "1.2.826.1.1", "1.2.826.1.2", "1.2.826.1.3"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an empty Orthanc."""
    if shutil.which("Orthanc") is None or not PLUGIN.is_file():
        pytest.skip("Orthanc is not installed; 'apt-get install orthanc orthanc-dicomweb' does")
    folder = tmp_path_factory.mktemp("orthanc")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = {
        "StorageDirectory": str(folder),
        "IndexDirectory": str(folder),
        "HttpPort": port,
        "DicomServerEnabled": False,
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True},
    }
    (folder / "orthanc.json").write_text(json.dumps(config))
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(["Orthanc", str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        for _ in range(300):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def send(archive: str, file: Path) -> None:
    with urllib.request.urlopen(urllib.request.Request(f"{archive}/instances", file.read_bytes())) as answer:
        assert json.load(answer)["Status"] == "Success"


def ids(series: str, number: int, sop_class: str) -> dict[str, Any]:
    return {
        "StudyInstanceUID": STUDY,
        "SeriesInstanceUID": series,
        "SOPInstanceUID": f"{series}.{number + 1}",
        "FrameOfReferenceUID": f"{STUDY}.9",
        "SOPClassUID": sop_class,
        "PatientID": "7",
        "InstanceNumber": number + 1,
    }


def write_scan(folder: Path, series: str) -> None:
    """A CT of 26 x 30 x 19 voxels."""
    folder.mkdir()
    values = np.random.default_rng(0).normal(-800, 50, (26, 30, 19))
    values[4:14, 6:18, 4:14] += 900
    lps = np.diag([-1, -1, 1, 1]) @ AFFINE
    for number in range(19):
        tags = {
            **ids(series, number, "1.2.840.10008.5.1.4.1.1.2"),
            "Modality": "CT",
            "ImagePositionPatient": [float(v) for v in (lps @ [0, 0, number, 1])[:3]],
            "ImageOrientationPatient": [*(lps[:3, 0] / 2.0), *(lps[:3, 1] / 1.5)],
            "PixelSpacing": [1.5, 2.0],
            "SliceThickness": 4.0,
            "RescaleSlope": 1,
            "RescaleIntercept": -1024,
        }
        pixels = np.round(values[..., number].T + 1024).clip(0, 4000).astype(np.uint16)
        write(folder / f"{number:02}.dcm", pixels, **tags)


def write_film(path: Path) -> None:
    """A film of inverted greys with a bright rectangle, half a millimetre a pixel."""
    pixels = np.random.default_rng(1).integers(0, 1000, (90, 70)).astype(np.uint16)
    pixels[20:60, 10:40] += 2500
    tags = {"Modality": "DX", "PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "PixelSpacing": [0.5, 0.5]}
    write(path, 4095 - pixels, **ids(FILM, 0, "1.2.840.10008.5.1.4.1.1.1.1"), **tags)


@pytest.fixture(scope="module")
def client(archive: str, serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server over the archive, with two scans and a film in it."""
    folder = tmp_path_factory.mktemp("dicomweb")
    write_scan(folder / "scan", SCAN)
    write_scan(folder / "other", OTHER)
    write_film(folder / "film" / "0.dcm")
    for file in sorted(folder.glob("*/*.dcm")):
        send(archive, file)
    settings = {"DICOMWEB_CACHE_PATH": str(folder / "cache"), "DICOMWEB_SEARCH_FILTER": {}}
    (folder / "app").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        # what `source monai-label/bin/activate` does: MONAI Label calls dcmqi by its name, or downloads it
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        named = {f"MONAI_LABEL_{name}": value for name, value in settings.items()}
        with serve(folder / "app", f"{archive}/dicom-web", **named) as client:
            client.folder = folder
            yield client


def infer(client: Any, name: str, image: str, output: str, **params: Any) -> Any:
    place = {"image": image, "output": output}
    answer = client.post(f"/infer/{name}", params=place, data={"params": json.dumps(params)})
    assert answer.status_code == 200, answer.text
    return answer


def model(client: Any, name: str) -> Path:
    """The folder of a bundle that the server serves."""
    return client.folder / "app" / "apps" / "monaibundle" / "model" / name


def test_organs_of_a_series_have_its_geometry_and_come_as_dicom_seg(client: Any, tmp_path: Path) -> None:
    (tmp_path / "organs.nii.gz").write_bytes(infer(client, ORGANS, SCAN, "image").content)
    volume = nib.load(tmp_path / "organs.nii.gz")
    assert volume.shape == (26, 30, 19)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-4)
    labels = np.asarray(volume.dataobj)
    (file,) = own_inference(model(client, ORGANS), client.folder / "scan", tmp_path / "own").glob("*_organs.nii.gz")
    expected = nib.load(file)
    np.testing.assert_allclose(expected.affine, AFFINE, atol=1e-4)
    assert np.mean(np.asarray(expected.dataobj) == labels) > 0.999
    present = [int(label) for label in np.unique(labels) if label]
    # the first names of a list are those of other organs
    assert len(present) > 2 and present != list(range(1, len(present) + 1))
    names = client.get("/info/").json()["models"][ORGANS]["labels"]
    info = [{"name": name, "model_name": "UniMedI"} for name in names]
    answer = infer(client, ORGANS, SCAN, "dicom_seg", label_info=info)
    segmentation = pydicom.dcmread(io.BytesIO(answer.content))
    assert (segmentation.Modality, segmentation.StudyInstanceUID, segmentation.PatientID) == ("SEG", STUDY, "7")
    assert segmentation.SeriesDescription == "UniMedI"
    numbers = [names[segment.SegmentLabel] for segment in segmentation.SegmentSequence]
    assert numbers == present
    lps, rows = np.diag([-1, -1, 1, 1]) @ AFFINE, segmentation.pixel_array
    found = np.zeros_like(labels)
    for frame, where in zip(rows, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
        position = np.asarray(where.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        (z,) = np.flatnonzero(np.abs(lps[:3, 2:3] * range(19) + lps[:3, 3:] - position[:, None]).max(0) < 1e-3)
        segment = where.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        found[..., z][frame.T > 0] = numbers[segment - 1]
    np.testing.assert_array_equal(found, labels)


def test_scores_and_mask_of_a_film_are_those_of_its_dicom(client: Any, tmp_path: Path) -> None:
    film = client.folder / "film" / "0.dcm"
    name = "chest_xray_classification"
    scores = [entry["score"] for entry in infer(client, name, FILM, "json").json()["prediction"]]
    table = pd.read_csv(own_inference(model(client, name), film, tmp_path / "scores") / "predictions.csv")
    assert scores == pytest.approx(table.filter(like="probability_").to_numpy()[0], abs=1e-5)
    name = "chest_xray_segmentation"
    (tmp_path / "mask.nii.gz").write_bytes(infer(client, name, FILM, "image").content)
    mask = nib.load(tmp_path / "mask.nii.gz")
    np.testing.assert_allclose(mask.affine, np.diag([-0.5, -0.5, 1, 1]))
    found = np.asarray(mask.dataobj)
    (picture,) = (own_inference(model(client, name), film, tmp_path / "mask") / "masks").iterdir()
    assert 0 < np.count_nonzero(found) < found.size
    np.testing.assert_array_equal(found.reshape(70, 90).T > 0, np.asarray(Image.open(picture)) > 0)


def test_labels_go_to_the_archive_as_dicom_seg_and_train(client: Any, archive: str, tmp_path: Path) -> None:
    labels = np.zeros((26, 30, 19), np.uint8)
    labels[4:14, 6:18, 4:14], labels[20:24, 20:26, 5:12] = 6, 1
    info = {"label_info": [{"name": "spleen"}, {"name": "liver"}]}
    file = ("label.nii.gz", gzip.compress(nib.Nifti1Image(labels, AFFINE).to_bytes()))
    for series in (SCAN, OTHER):
        place, params = {"image": series, "tag": "final"}, {"params": json.dumps(info)}
        answer = client.put("/datastore/label", params=place, files={"label": file}, data=params)
        assert answer.status_code == 200, answer.text
    query = f"{archive}/dicom-web/series?Modality=SEG"
    with urllib.request.urlopen(query) as found:
        assert [series["0020000D"]["Value"] for series in json.load(found)] == [[STUDY]] * 2
    models = client.folder / "app" / "apps" / "monaibundle" / "model" / ORGANS / "models" / "model.pt"
    before = torch.load(models)
    options = {"max_epochs": 1, "val_split": 0.5, "multi_gpu": False}
    answer = client.post(f"/train/{ORGANS}", params={"run_sync": "true"}, json=options)
    assert (answer.status_code, answer.json()) == (200, {}), answer.text
    assert not torch.equal(torch.load(models)["out.conv.conv.weight"], before["out.conv.conv.weight"])
    # read back from the archive, whose segments are numbered anew, a label map would name other organs
    for cached in (client.folder / "cache").glob("*/labels/final/*.nii*"):
        cached.unlink()
    answer = client.post(f"/train/{ORGANS}", params={"run_sync": "true"}, json=options)
    assert answer.status_code == 400, answer.text
    assert ".nrrd" in answer.json()["detail"]
