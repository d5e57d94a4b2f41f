# SPDX-License-Identifier: Apache-2.0
"""MONAI Label's server, started by the lines of docs/monai-label.md, over all five task bundles."""

from __future__ import annotations

import importlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests.common import own_inference
from unimedi_components.data.roi_boxes import rois_of_boxes

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("in_process")
FINDINGS = "Atelectasis, Cardiomegaly, Consolidation, Edema, Pleural Effusion"
# turned by 3-4-5 about the left-right axis
AFFINE = np.array([[-2.0, 0, 0, 40], [0, 1.2, -2.4, -30], [0, 0.9, 3.2, 10], [0, 0, 0, 1]])
BACKGROUND = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from tests.ecosystem import conftest
conftest.stand_in()
conftest.unimedi_components.bundle.bundle_root = conftest.nowhere
"""
TYPES = {
    "chest_xray_classification": ("classification", 2),
    "chest_ct_classification": ("classification", 3),
    "chest_xray_segmentation": ("segmentation", 2),
    "abdomen_ct_segmentation": ("segmentation", 3),
    "chest_xray_detection": ("detection", 2),
}


def write_studies(folder: Path) -> None:
    """Films with a bright rectangle of rows 20 to 60 and columns 10 to 40, and oblique scans with two organs."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 120, (90, 70))
        pixels[20:60, 10:40] += 130
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"film{number}.png")
    for number in range(3):
        values = rng.normal(-800, 50, (26, 30, 19)) + 900 * (organs() > 0)
        nib.save(nib.Nifti1Image(values.astype(np.int16), AFFINE), folder / f"scan{number}.nii.gz")


def organs() -> np.ndarray:
    labels = np.zeros((26, 30, 19), np.uint8)
    labels[4:14, 6:18, 4:14], labels[16:24, 10:22, 5:12] = 6, 1
    return labels


def as_json(content: Any) -> tuple[str, bytes]:
    return "label.json", json.dumps(content).encode()


def as_png(mask: np.ndarray) -> tuple[str, bytes]:
    stream = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(stream, "PNG")
    return "label.png", stream.getvalue()


def as_nifti(labels: np.ndarray) -> tuple[str, bytes]:
    return "label.nii", nib.Nifti1Image(labels, AFFINE).to_bytes()


def as_markups(**changes: Any) -> tuple[str, bytes]:
    # as 3D Slicer saves them: the axes of LPS seen from RAS
    region = {"type": "ROI", "coordinateSystem": "LPS", "orientation": [-1, 0, 0, 0, -1, 0, 0, 0, 1]}
    return as_json({"markups": [{**region, "center": [24.5, 39.5, 0], "size": [30, 40, 1], **changes}]})


film = np.zeros((90, 70))
film[20:60, 10:40] = 1
GOOD: dict[str, list[tuple[str, bytes]]] = {
    "chest_xray_classification": [
        as_json(label)
        for label in ({"Edema": 1}, {"edema": 1, "Cardiomegaly": 0}, ["Atelectasis"], "Edema", [0, 0, 0, 1, -1], [])
    ],
    "chest_ct_classification": [as_json(label) for label in ("NCP", {"cp": 1}, {"label": 2})],
    "chest_xray_segmentation": [as_png(film)] * 6,
    "abdomen_ct_segmentation": [as_nifti(organs())] * 3,
    "chest_xray_detection": [as_markups()] * 5 + [as_json({"markups": []})],
}
# of the first image, with what the answer says of it
WRONG: list[tuple[str, tuple[str, bytes], list[str]]] = [
    ("chest_xray_classification", as_json({"Oedema": 1}), ["{'Oedema': 1}", "item 'film0'", FINDINGS]),
    ("chest_xray_classification", as_json([1, 0]), ["[1, 0]", "a list of 5 values 0, 1 or -1"]),
    ("chest_ct_classification", as_json("COVID"), ["'COVID'", "item 'scan0'", "CP, NCP, Normal"]),
    ("chest_xray_segmentation", as_png(np.ones((5, 7))), ["film0.png", "the mask has 7 x 5 pixels, its film 70 x 90"]),
    ("abdomen_ct_segmentation", as_nifti(organs() * 3), ["scan0", "18", "0 to 13"]),
    ("chest_xray_detection", as_json({"boxes": []}), ["film0.json", "markups"]),
    ("chest_xray_detection", as_markups(coordinateSystem="RAS"), ["film0.json", "in LPS"]),
    ("chest_xray_detection", as_markups(orientation=[0.8, 0.6, 0, -0.6, 0.8, 0, 0, 0, 1]), ["a region is turned"]),
]


class Server:
    """Requests as docs/monai-label.md makes them."""

    def __init__(self, client: Any, folder: Path) -> None:
        self.client, self.folder = client, folder

    def bundle(self, name: str) -> Path:
        return self.folder / "apps" / "monaibundle" / "model" / name

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return torch.load(self.bundle(name) / "models" / "model.pt")

    def infer(self, name: str, image: str, output: str) -> Any:
        return self.client.post(f"/infer/{name}", params={"image": image, "output": output}, data={"params": "{}"})

    def train(self, name: str, run_sync: str | None = "true") -> Any:
        options = {"max_epochs": 1, "val_split": 0.34, "multi_gpu": False}
        return self.client.post(f"/train/{name}", params={"run_sync": run_sync} if run_sync else {}, json=options)

    def label(self, name: str, labels: list[tuple[str, bytes]]) -> None:
        for number, label in enumerate(labels):
            image = f"{'film' if TYPES[name][1] == 2 else 'scan'}{number}"
            place = {"image": image, "tag": "final"}
            answer = self.client.put("/datastore/label", params=place, files={"label": label}, data={"params": "{}"})
            assert answer.json() == {"image": image, "label": image}

    def forget(self) -> None:
        store = self.client.get("/datastore/", params={"output": "all"}).json()["objects"]
        for image in (name for name, entry in store.items() if "final" in entry["labels"]):
            assert self.client.delete("/datastore/label", params={"id": image, "tag": "final"}).status_code == 200


@pytest.fixture(scope="module")
def running(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("label")
    write_studies(folder / "studies")
    with serve(folder, str(folder / "studies")) as client:
        yield Server(client, folder)


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    yield running
    running.forget()


def served(server: Server, name: str, tmp_path: Path) -> np.ndarray:
    """What a request returns, which must be what the bundle returns by itself."""
    kind, dim = TYPES[name]
    image = server.folder / "studies" / ("film0.png" if dim == 2 else "scan0.nii.gz")
    answer = server.infer(name, image.name.partition(".")[0], "json" if kind == "classification" else "image")
    assert answer.status_code == 200, answer.text
    out = own_inference(server.bundle(name), image, tmp_path / f"out{len(list(tmp_path.iterdir()))}")
    if kind == "classification":
        found = np.array([entry["score"] for entry in answer.json()["prediction"]])
        table = pd.read_csv(out / "predictions.csv")
        expected = table.filter(like="probability_")
        names = [column.removeprefix("probability_").lower() for column in expected]
        assert [entry["label"] for entry in answer.json()["prediction"]] == names
        assert found == pytest.approx(expected.to_numpy()[0], abs=1e-5)
        return found
    if kind == "detection":
        regions = json.loads(answer.content)["markups"]
        boxes = pd.read_csv(out / "predictions.csv")[["x0", "y0", "x1", "y1"]].to_numpy()
        found = np.array([[*region["center"], *region["size"]] for region in regions])
        assert len(found) > 3 and np.allclose(found, rois_of_boxes(image, boxes), atol=2e-3)
        return found
    if dim == 2:
        found = np.asarray(Image.open(io.BytesIO(answer.content)))
        assert found.shape == (90, 70) and 0 < np.count_nonzero(found) < found.size
        assert np.array_equal(found > 0, np.asarray(Image.open(out / "masks" / "film0.png")) > 0)
        return found
    (tmp_path / "served.nii.gz").write_bytes(answer.content)
    volume = nib.load(tmp_path / "served.nii.gz")
    assert volume.shape == (26, 30, 19) and np.allclose(volume.affine, AFFINE, atol=1e-4)
    found = np.asarray(volume.dataobj)
    assert len(np.unique(found)) > 2
    assert np.array_equal(found, np.asarray(nib.load(out / "scan0_organs.nii.gz").dataobj))
    return found


def test_info(server: Server) -> None:
    info = server.client.get("/info/").json()
    found = {name: (model["type"], model["dimension"]) for name, model in info["models"].items()}
    assert found == TYPES
    assert set(info["trainers"]) == set(TYPES)
    assert info["models"]["chest_xray_classification"]["labels"]["edema"] == 3
    assert info["datastore"] == {"total": 9, "completed": 0, "label_tags": {}}


@pytest.mark.parametrize("name", TYPES)
def test_inference_training_and_inference(name: str, server: Server, tmp_path: Path) -> None:
    before, weights = served(server, name, tmp_path), server.weights(name)
    server.label(name, GOOD[name])
    answer = server.train(name)
    assert (answer.status_code, answer.json()) == (200, {}), answer.text
    after = server.weights(name)
    assert after.keys() == weights.keys()
    assert any(not torch.equal(after[key], value) for key, value in weights.items())
    # the server takes up what was trained
    now = served(server, name, tmp_path)
    assert now.shape != before.shape or not np.array_equal(now, before)


@pytest.mark.parametrize(("name", "label", "reasons"), WRONG)
def test_a_wrong_label_is_answered_with_the_reason(
    name: str, label: tuple[str, bytes], reasons: list[str], server: Server
) -> None:
    weights = server.weights(name)
    server.label(name, [label, *GOOD[name][1:]])
    answer = server.train(name)
    assert answer.status_code == 400, answer.text
    for reason in reasons:
        assert reason in answer.json()["detail"]
    assert all(torch.equal(server.weights(name)[key], value) for key, value in weights.items())


def test_training_in_the_background(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the process that trains is made ready as this one is
    (tmp_path / "sitecustomize.py").write_text(BACKGROUND)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    tasks = importlib.import_module("monailabel.utils.async_tasks.utils")
    name = "chest_xray_classification"

    def trained(first: tuple[str, bytes]) -> tuple[bool, str, str]:
        weights = server.weights(name)
        server.label(name, [first, *GOOD[name][1:]])
        assert server.train(name, run_sync=None).json()["status"] == "SUBMITTED"
        # MONAI Label's one worker comes to this when the training is over
        tasks.background_executors["train"].submit(int).result()
        task = server.client.get("/train/").json()
        changed = any(not torch.equal(server.weights(name)[key], value) for key, value in weights.items())
        return changed, task["status"], task["details"][-1]

    changed, status, last = trained(as_json({"Oedema": 1}))
    assert (changed, status) == (False, "ERROR") and "{'Oedema': 1}" in last and FINDINGS in last
    changed, status, last = trained(GOOD[name][0])
    assert (changed, status) == (True, "DONE"), last


def test_a_deleted_label_is_forgotten_before_a_training(monailabel: Any, server: Server) -> None:
    name = "chest_xray_classification"
    server.label(name, [as_json({"Oedema": 1}), *GOOD[name][1:]])
    with pytest.MonkeyPatch.context() as patch:
        # as by default: the server watches the folder, but no JSON files in it
        patch.setattr(monailabel.app_instance().datastore(), "_auto_reload", True)
        assert server.client.delete("/datastore/label", params={"id": "film0", "tag": "final"}).status_code == 200
        assert server.client.get("/info/").json()["datastore"]["completed"] == 6
        answer = server.train(name)
    assert (answer.status_code, answer.json()) == (200, {}), answer.text
    assert server.client.get("/info/").json()["datastore"]["completed"] == 5


def test_an_image_of_another_kind_is_answered_with_the_reason(server: Server) -> None:
    answer = server.infer("chest_ct_classification", "film0", "json")
    assert answer.status_code == 400
    assert "film0.png" in answer.json()["detail"]
