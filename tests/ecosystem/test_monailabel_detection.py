# SPDX-License-Identifier: Apache-2.0
"""MONAI Label's own tasks over the detection bundle: inference, training, and inference with what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from monai.transforms import Compose
from PIL import Image

from unimedi_components.data import task_transforms
from unimedi_components.networks import load_network

pytestmark = pytest.mark.usefixtures("in_process")
NAME = "chest_xray_detection"


@pytest.fixture
def bundle(app_folder: Path, tiny_bundle: Any) -> Path:
    """The bundle in the app's `model` folder, alone: without the repository, its pretrain bundle and its data."""
    return tiny_bundle(NAME, app_folder / "model")


def write_film(folder: Path, number: int, shape: tuple[int, int] = (90, 70)) -> tuple[Path, list[float]]:
    """A film of noise with a bright rectangle, and its box."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 120, shape)
    x, y = (int(rng.integers(0, size - 22)) for size in (shape[1], shape[0]))
    pixels[y : y + 22, x : x + 18] += 130
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return folder / f"{number}.png", [x, y, x + 18, y + 22]


def datastore(folder: Path, count: int) -> SimpleNamespace:
    """What a training task asks of MONAI Label's datastore: films, and regions of interest as Slicer saves them."""
    items = []
    for number in range(count):
        image, (x0, y0, x1, y1) = write_film(folder, number)
        label = folder / f"{number}.json"
        # pixels of a picture are millimetres, their centres at whole numbers
        roi = {"center": [(x0 + x1) / 2 - 0.5, (y0 + y1) / 2 - 0.5, 0.0], "size": [x1 - x0, y1 - y0, 1.0]}
        rois = [] if number % 4 == 3 else [{"type": "ROI", "coordinateSystem": "LPS", **roi}]
        label.write_text(json.dumps({"markups": rois}))
        items.append({"image": str(image), "label": str(label), "meta": {"name": "not used"}})
    return SimpleNamespace(datalist=lambda: items)


def direct(bundle: Path, image: Path, threshold: float) -> list[dict[str, Any]]:
    """Boxes by the network alone, as regions in the world of a picture, width by height pixels."""
    network = load_network(bundle / "models" / "model.pt", kind="vitdet")
    network.select_boxes(threshold, 0.5)
    prepared = Compose(task_transforms(network.card["preprocessing"]))({"image": str(image)})["image"]
    with torch.no_grad():
        (found,) = network(prepared[None])
    with Image.open(image) as film:
        width, height = film.size
    scale, size = max(width, height) / 128, 128
    # the short side is padded evenly to a square
    left = (size - round(width / scale)) // 2
    top = (size - round(height / scale)) // 2
    rois = []
    for x0, y0, x1, y1 in found["boxes"].tolist():
        x0, x1 = (min(max(scale * (v - left), 0), width) for v in (x0, x1))
        y0, y1 = (min(max(scale * (v - top), 0), height) for v in (y0, y1))
        rois.append([(x0 + x1) / 2 - 0.5, (y0 + y1) / 2 - 0.5, 0, x1 - x0, y1 - y0, 1])
    return rois


def test_inference(bundle: Path, monailabel: Any, tmp_path: Path) -> None:
    before = sorted(path.relative_to(bundle) for path in bundle.rglob("*"))
    task = monailabel.BundleInferTask(str(bundle), {})
    assert task.is_valid()
    info = task.info()
    assert (str(info["type"].value), info["dimension"], info["labels"]) == ("detection", 2, {"pneumonia": 0})
    for number, shape in enumerate([(90, 70), (64, 128)]):
        image, _ = write_film(tmp_path / "images", number, shape)
        file, result = task({"model": NAME, "image": str(image), "device": "cpu"})
        expected = direct(bundle, image, 0.3)
        assert len(expected) > 3
        # resizing rounds the short side to whole pixels
        assert np.allclose(result["box"], expected, atol=0.6)
        assert result["label"] == [0] * len(expected)
        assert result["label_names"] == {"pneumonia": 0}
        markups = json.loads(Path(file).read_text())["markups"]
        assert [[*row["center"], *row["size"]] for row in markups] == result["box"]
        assert {row["coordinateSystem"] for row in markups} == {"LPS"}
    assert sorted(path.relative_to(bundle) for path in bundle.rglob("*")) == before


def test_training_learns_the_regions(bundle: Path, monailabel: Any, tmp_path: Path) -> None:
    items = datastore(tmp_path / "images", 12)
    task = monailabel.BundleTrainTask(str(bundle), {})
    assert task.is_valid()
    assert task.config()["model_filename"] == ["model.pt"]
    served = monailabel.BundleInferTask(str(bundle), {})
    image = tmp_path / "images" / "0.png"
    _, old = served({"model": NAME, "image": str(image), "device": "cpu"})
    request = {"model": NAME, "val_split": 0.34, "device": "cpu", "multi_gpu": False, "pretrained": True}
    losses = []
    for _ in range(2):
        assert task({**request, "max_epochs": 2}, items) == {}
        (state,) = (path for path in (bundle / "models").iterdir() if path.stem == "last")
        losses.append(torch.load(state)["history"]["rows"][0]["loss"])
    # the second training starts from the first one's weights
    assert losses[1] < losses[0]
    metrics = json.loads((bundle / "eval" / "metrics.json").read_text())
    assert (metrics["split"], metrics["unit"]) == ("validation", "pixels of the files")
    with open(bundle / "eval" / "cases.csv") as file:
        true = [line.split(",") for line in file if ",true," in line]
    assert len(true) == metrics["true_boxes"] > 0
    for row in true:
        assert [float(v) for v in row[4:8]] == pytest.approx(write_film(tmp_path / "again", int(row[0]))[1], abs=0.01)
    # the running server takes up the new weights
    _, new = served({"model": NAME, "image": str(image), "device": "cpu"})
    assert new["box"] != old["box"]
    assert np.allclose(new["box"] or np.zeros((0, 6)), np.reshape(direct(bundle, image, 0.3), (-1, 6)), atol=0.6)
