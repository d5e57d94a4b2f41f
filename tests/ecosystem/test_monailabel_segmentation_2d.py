# SPDX-License-Identifier: Apache-2.0
"""MONAI Label's own tasks over the X-ray segmentation bundle: inference, training, inference with what was trained."""

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
from torch.nn import functional as F

from unimedi_components.data import task_transforms
from unimedi_components.networks import load_network

pytestmark = pytest.mark.usefixtures("in_process")
NAME = "chest_xray_segmentation"
ROWS, COLUMNS = 90, 64


@pytest.fixture
def bundle(app_folder: Path, tiny_bundle: Any) -> Path:
    """The bundle in the app's `model` folder, alone: without the repository, its pretrain bundle and its data."""
    return tiny_bundle(NAME, app_folder / "model")


def write_film(folder: Path, number: int) -> tuple[Path, np.ndarray]:
    """A film with a bright rectangle, and its mask."""
    rng = np.random.default_rng(number)
    folder.mkdir(exist_ok=True)
    mask = np.zeros((ROWS, COLUMNS), np.uint8)
    y, x = rng.integers(5, 40), rng.integers(5, 30)
    mask[y : y + 40, x : x + 25] = 1
    pixels = (60 + 120 * mask + rng.normal(0, 15, mask.shape)).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder / f"{number}.png", mask


def datastore(folder: Path, count: int) -> SimpleNamespace:
    """Films with labels as the server keeps them: NIfTI that it wrote itself (columns first), or pictures."""
    items = []
    (folder / "labels").mkdir(parents=True)
    for number in range(count):
        image, mask = write_film(folder / "films", number)
        label = folder / "labels" / (f"{number}.nii.gz" if number % 2 else f"{number}.png")
        if number % 2:
            nib.save(nib.Nifti1Image(mask.T.copy(), np.eye(4)), label)
        else:
            Image.fromarray(mask).save(label)
        items.append({"image": str(image), "label": str(label)})
    return SimpleNamespace(datalist=lambda: items)


def served(task: Any, image: Path, extension: str = ".nii.gz") -> np.ndarray:
    """The mask that a request returns, rows before columns."""
    request = {"model": NAME, "image": str(image), "device": "cpu", "result_extension": extension}
    file, result = task(request)
    assert result["label_names"] == {"pneumonia": 1}
    if extension == ".png":
        return np.asarray(Image.open(file))
    return np.asarray(nib.load(file).dataobj).T


def direct(bundle: Path, image: Path) -> tuple[np.ndarray, np.ndarray]:
    """The mask by the network alone, and where it is not a matter of the last digits."""
    network = load_network(bundle / "models" / "model.pt")
    size = network.card["preprocessing"]["film"]["size"]
    prepared = Compose(task_transforms(network.card["preprocessing"]))({"image": str(image)})["image"]
    with torch.no_grad():
        small = network(prepared[None]).sigmoid()
    columns = round(COLUMNS * size / ROWS)
    left = (size - columns) // 2
    part = small[..., left : left + columns]
    large = F.interpolate(part, (ROWS, COLUMNS), mode="bilinear", align_corners=False)[0, 0]
    return (large >= 0.5).numpy(), ((large - 0.5).abs() > 1e-4).numpy()


def train(monailabel: Any, bundle: Path, items: Any, **request: Any) -> None:
    task = monailabel.BundleTrainTask(str(bundle), {})
    assert task.is_valid()
    options = {"max_epochs": 1, "val_split": 0.34, "device": "cpu", "multi_gpu": False, "pretrained": True}
    assert task({"model": bundle.name, **options, **request}, items) == {}


@pytest.mark.parametrize("extension", [".nii.gz", ".png", ".nrrd"])
def test_inference(extension: str, bundle: Path, monailabel: Any, tmp_path: Path) -> None:
    before = sorted(path.relative_to(bundle) for path in bundle.rglob("*"))
    task = monailabel.BundleInferTask(str(bundle), {})
    assert task.is_valid()
    info = task.info()
    assert (str(info["type"].value), info["dimension"], info["labels"]) == ("segmentation", 2, {"pneumonia": 1})
    image, _ = write_film(tmp_path / "films", 1)
    expected, certain = direct(bundle, image)
    assert 0.02 < expected.mean() < 0.98
    if extension == ".nrrd":
        itk = pytest.importorskip("itk")
        request = {"model": NAME, "image": str(image), "device": "cpu", "result_extension": extension}
        found = itk.array_from_image(itk.imread(task(request)[0]))
    else:
        found = served(task, image, extension)
    assert found.shape == (ROWS, COLUMNS)
    assert set(np.unique(found)) <= {0, 1}
    assert (found.astype(bool) == expected)[certain].all()
    assert sorted(path.relative_to(bundle) for path in bundle.rglob("*")) == before


def test_training_and_then_inference(bundle: Path, monailabel: Any, tmp_path: Path) -> None:
    image, truth = write_film(tmp_path / "other", 99)
    task = monailabel.BundleInferTask(str(bundle), {})
    before, weights = served(task, image), torch.load(bundle / "models" / "model.pt")
    items = datastore(tmp_path / "store", 12)
    config = bundle / "configs" / "train.json"
    content = json.loads(config.read_text())
    content["train"]["dataloader"]["batch_size"], content["optimizer"]["lr"] = 4, 0.01
    config.write_text(json.dumps(content))
    train(monailabel, bundle, items, max_epochs=12)
    after = torch.load(bundle / "models" / "model.pt")
    assert not torch.equal(after["head.weight"], weights["head.weight"])
    assert all(torch.equal(after[key], value) for key, value in weights.items() if key.startswith("encoder."))
    found = served(task, image)
    expected, certain = direct(bundle, image)
    assert (found.astype(bool) == expected)[certain].all()

    def dice(mask: np.ndarray) -> float:
        return float(2 * (mask.astype(bool) & truth.astype(bool)).sum() / (mask.sum() + truth.sum()))

    # a mask that was read or written with rows and columns exchanged could not be learned
    assert dice(found) > max(0.6, dice(before))
    metrics = json.loads((bundle / "eval" / "metrics.json").read_text())
    assert (metrics["split"], metrics["cases"], metrics["positive"]) == ("validation", 4, 4)
    assert monailabel.BundleInferTask(str(bundle), {}).config()["model_filename"] == ["model.pt"]
    # films of the datastore alone: no phantoms
    assert [path.name for path in (bundle / "data").iterdir()] == ["cache"]


def test_a_mask_of_another_size_is_named(bundle: Path, monailabel: Any, tmp_path: Path) -> None:
    items = datastore(tmp_path / "store", 9)
    Image.fromarray(np.ones((5, 7), np.uint8)).save(tmp_path / "store" / "labels" / "0.png")
    train(monailabel, bundle, items)
    message = "the mask has 7 x 5 pixels, its film 64 x 90; give the film's own mask"
    skipped = json.loads((bundle / "eval" / "skipped.json").read_text())
    assert message in json.dumps(skipped)
