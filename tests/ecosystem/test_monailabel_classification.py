# SPDX-License-Identifier: Apache-2.0
"""MONAI Label's own tasks over the classification bundles: inference, training, and inference with what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose
from PIL import Image

from unimedi_components.data import task_transforms
from unimedi_components.loading import ImageDataset, ImageLoader
from unimedi_components.losses import ClassificationLoss
from unimedi_components.networks import load_classifier

pytestmark = pytest.mark.usefixtures("in_process")
XRAY, CT = "chest_xray_classification", "chest_ct_classification"
LABELS = {
    XRAY: ["atelectasis", "cardiomegaly", "consolidation", "edema", "pleural effusion"],
    CT: ["cp", "ncp", "normal"],
}
each_bundle = pytest.mark.parametrize("name", [XRAY, CT])


@pytest.fixture
def bundle(name: str, app_folder: Path, untrained_bundle: Any) -> Path:
    """A bundle in the app's `model` folder."""
    return untrained_bundle(name, app_folder / "model")


def write_image(name: str, folder: Path, number: int) -> Path:
    rng = np.random.default_rng(number)
    folder.mkdir(exist_ok=True)
    if name == XRAY:
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (90, 70), dtype=np.uint8)).save(path)
    else:
        path = folder / f"{number}.nii.gz"
        nib.save(nib.Nifti1Image(rng.normal(-600, 300, (30, 28, 17)).astype(np.float32), np.diag([2, 2, 4, 1])), path)
    return path


def datastore(name: str, folder: Path, count: int) -> SimpleNamespace:
    """What a training task asks of MONAI Label's datastore: images, and label files as its viewers leave them."""
    items = []
    for number in range(count):
        image, label = write_image(name, folder, number), folder / f"{number}.json"
        findings = [number % 2, 1 - number % 2, int(number < 3), 1, 0]
        label.write_text(json.dumps({"label": findings if name == XRAY else ["CP", "NCP", "Normal"][number % 3]}))
        items.append({"image": str(image), "label": str(label), "meta": {"name": "not used"}})
    return SimpleNamespace(datalist=lambda: items)


def scores(task: Any, name: str, image: Path) -> list[float]:
    """Scores that a request returns, checked against the labels."""
    file, result = task({"model": name, "image": str(image), "device": "cpu"})
    assert file is None
    assert [entry["label"] for entry in result["prediction"]] == LABELS[name]
    assert [entry["idx"] for entry in result["prediction"]] == list(range(len(LABELS[name])))
    assert result["label_names"] == {label: index for index, label in enumerate(LABELS[name])}
    return [entry["score"] for entry in result["prediction"]]


def direct(bundle: Path, name: str, image: Path) -> list[float]:
    """Probabilities by the network alone."""
    network = load_classifier(bundle / "models" / "model.pt")
    prepared = Compose(task_transforms(network.card["preprocessing"]))({"image": str(image)})["image"]
    with torch.no_grad():
        logits = network(prepared[None])[0]
    return (logits.sigmoid() if name == XRAY else logits.softmax(0)).tolist()


def train(monailabel: Any, bundle: Path, items: Any, **request: Any) -> None:
    task = monailabel.BundleTrainTask(str(bundle), {})
    assert task.is_valid()
    options = {"max_epochs": 1, "val_split": 0.34, "device": "cpu", "multi_gpu": False, "pretrained": True}
    assert task({"model": bundle.name, **options, **request}, items) == {}


@each_bundle
def test_inference(name: str, bundle: Path, monailabel: Any, tmp_path: Path) -> None:
    before = sorted(path.relative_to(bundle) for path in bundle.rglob("*"))
    task = monailabel.BundleInferTask(str(bundle), {})
    assert task.is_valid()
    info = task.info()
    assert (str(info["type"].value), info["dimension"]) == ("classification", 2 if name == XRAY else 3)
    assert info["labels"] == {label: index for index, label in enumerate(LABELS[name])}
    for number in range(2):
        image = write_image(name, tmp_path / "images", number)
        expected = direct(bundle, name, image)
        assert scores(task, name, image) == pytest.approx(expected, abs=1e-6)
        assert max(expected) - min(expected) > 0.05
    assert sorted(path.relative_to(bundle) for path in bundle.rglob("*")) == before


@pytest.mark.parametrize("name", [XRAY])
def test_inference_of_a_dicom_film(name: str, bundle: Path, monailabel: Any, tmp_path: Path) -> None:
    import itk

    pixels = np.random.default_rng(5).integers(0, 4000, (80, 64)).astype(np.uint16)
    image = itk.image_from_array(pixels)
    image.GetMetaDataDictionary()["0008|0060"] = "DX"
    itk.imwrite(image, str(tmp_path / "film.dcm"))
    task = monailabel.BundleInferTask(str(bundle), {})
    found = scores(task, name, tmp_path / "film.dcm")
    assert found == pytest.approx(direct(bundle, name, tmp_path / "film.dcm"), abs=1e-6)


@pytest.mark.parametrize("name", [CT])
def test_inference_of_a_folder_of_slices(name: str, bundle: Path, monailabel: Any, tmp_path: Path) -> None:
    (tmp_path / "scan").mkdir()
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 255, (50, 50), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "scan" / f"{number}.png")
    task = monailabel.BundleInferTask(str(bundle), {})
    assert scores(task, name, tmp_path / "scan") == pytest.approx(direct(bundle, name, tmp_path / "scan"), abs=1e-6)


@each_bundle
def test_training_and_then_inference(name: str, bundle: Path, monailabel: Any, tmp_path: Path) -> None:
    image = write_image(name, tmp_path / "images", 99)
    task = monailabel.BundleInferTask(str(bundle), {})
    before, weights = scores(task, name, image), torch.load(bundle / "models" / "model.pt")
    card = json.loads((bundle / "models" / "model.json").read_text())
    train(monailabel, bundle, datastore(name, tmp_path / "images", 9))
    after = torch.load(bundle / "models" / "model.pt")
    assert not torch.equal(after["head.weight"], weights["head.weight"])
    # a probe: the encoder that MONAI Label loaded stays
    assert all(torch.equal(after[key], value) for key, value in weights.items() if key.startswith("encoder."))
    written = json.loads((bundle / "models" / "model.json").read_text())
    assert {key: written[key] for key in ("task", "label_names", "preprocessing")} == {
        key: card[key] for key in ("task", "label_names", "preprocessing")
    }
    # the server's task takes up what was trained, and every file that it offers as a model is one
    now = scores(task, name, image)
    assert now == pytest.approx(direct(bundle, name, image), abs=1e-6)
    assert now != pytest.approx(before, abs=1e-6)
    assert monailabel.BundleInferTask(str(bundle), {}).config()["model_filename"] == ["model.pt"]
    metrics = json.loads((bundle / "eval" / "metrics.json").read_text())
    assert (metrics["split"], metrics["cases"]) == ("validation", 3)
    # images of the datastore alone: no phantoms
    assert [path.name for path in (bundle / "data").iterdir()] == ["cache"]


@each_bundle
def test_head_is_trained_on_the_features_of_the_loaded_encoder(
    name: str, bundle: Path, monailabel: Any, tmp_path: Path, untrained_bundle: Any
) -> None:
    """The run starts from one encoder, then MONAI Label loads the bundle's model with another one."""
    other = untrained_bundle(name, tmp_path / "other", seed=7)
    config = bundle / "configs" / "train.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "encoder_weights": str(other / "models" / "model.pt")}))
    items = datastore(name, tmp_path / "images", 9)
    train(monailabel, bundle, items, max_epochs=2)
    network = load_classifier(bundle / "models" / "model.pt")
    chain, names = task_transforms(network.card["preprocessing"]), network.card["label_names"]
    held_out = items.datalist()[6:]
    settings = {"label_names": names, "task": network.card["task"], "dim": network.spatial_dims}
    dataset = ImageDataset(held_out, chain, tmp_path, "label", cache_dir=tmp_path / "cache", **settings)
    (batch,) = ImageLoader(dataset, 9)
    with torch.no_grad():
        loss = ClassificationLoss(network.card["task"])(network(batch["image"]), batch["label"])
    (state,) = (path for path in (bundle / "models").iterdir() if path.stem == "last")
    assert torch.load(state)["best"] == pytest.approx(float(loss), abs=1e-5)


@each_bundle
def test_a_second_training_starts_from_the_first(name: str, bundle: Path, monailabel: Any, tmp_path: Path) -> None:
    items = datastore(name, tmp_path / "images", 9)
    task = monailabel.BundleTrainTask(str(bundle), {})
    request = {"model": name, "val_split": 0.34, "device": "cpu", "multi_gpu": False, "max_epochs": 1}
    assert task.config()["model_filename"] == ["model.pt"]
    bests = []
    for _ in range(2):
        task({**request}, items)
        (state,) = (path for path in (bundle / "models").iterdir() if path.stem == "last")
        rows = torch.load(state)["history"]["rows"]
        bests.append(rows[0]["loss"])
    assert bests[1] < bests[0]
