# SPDX-License-Identifier: Apache-2.0
"""The X-ray segmentation bundle end to end over small phantoms: its best epoch, masks, augmentation, two processes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.common import REPOSITORY, last, read
from unimedi_components.data import task_transforms
from unimedi_components.loading import ImageDataset, ImageLoader
from unimedi_components.losses import FocalDiceLoss
from unimedi_components.networks import load_network

BUNDLE = "chest_xray_segmentation"
CONFIGS = REPOSITORY / "bundles" / BUNDLE / "configs"


pytestmark = pytest.mark.usefixtures("in_process")


def test_the_card_says_how_to_build_the_network(finished: Any) -> None:
    card = read(finished[0] / "models" / "model.json")
    assert (card["task"], card["label_names"]) == ("segmentation", ["background", "pneumonia"])
    assert card["preprocessing"] == {"film": {"size": 48}}
    assert (card["setr_pup"]["variant"], card["setr_pup"]["widths"]) == ("mgca", [8, 8, 4])


def batch_of(folder: Path, bundle: Any, split: str) -> tuple[Any, dict[str, Any]]:
    network = load_network(folder / "models" / "model.pt", kind="setr_pup")
    chain = task_transforms(network.card["preprocessing"], target="mask")
    dataset = ImageDataset(read(folder / "data.json")[split], chain, bundle.data / "rsna", "mask", dim=2)
    (batch,) = ImageLoader(dataset, 1000)
    return network, batch


def test_the_best_epoch_is_the_one_of_the_lowest_validation_loss(finished: Any, bundle: Any) -> None:
    folder, _ = finished
    rows = [row for row in last(folder)["history"]["rows"] if "val_loss" in row]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    best = min(rows, key=lambda row: row["val_loss"])
    assert last(folder)["best"] == best["val_loss"]
    network, batch = batch_of(folder, bundle, "validation")
    with torch.no_grad():
        logits = network(batch["image"])
    assert float(FocalDiceLoss()(logits, batch["label"])) == pytest.approx(best["val_loss"], rel=1e-4)
    scores = [dice_by_loop(p, t) for p, t in zip(logits > 0, batch["label"] > 0.5, strict=True)]
    assert np.mean(scores) == pytest.approx(best["val_dice"], abs=1e-6)


def dice_by_loop(predicted: torch.Tensor, truth: torch.Tensor) -> float:
    found, wanted = predicted.flatten().tolist(), truth.flatten().tolist()
    if not any(wanted):
        return float(not any(found))
    return 2 * sum(a and b for a, b in zip(found, wanted, strict=True)) / (sum(found) + sum(wanted))


def test_metrics_and_cases_are_those_of_the_network(finished: Any, bundle: Any) -> None:
    folder, _ = finished
    network, batch = batch_of(folder, bundle, "test")
    with torch.no_grad():
        found = network(batch["image"]).sigmoid() >= 0.5
    truth = batch["label"] > 0.5
    scores = [dice_by_loop(p, t) for p, t in zip(found, truth, strict=True)]
    metrics = read(folder / "eval" / "metrics.json")
    assert (metrics["split"], metrics["cases"], metrics["grid"]) == ("test", len(scores), [48, 48])
    assert metrics["dice"] == pytest.approx(np.mean(scores))
    positive = [score for score, mask in zip(scores, truth, strict=True) if mask.any()]
    assert metrics["dice_positive"] == pytest.approx(np.mean(positive))
    low, high = metrics["intervals"]["dice"]
    assert low <= metrics["dice"] <= high
    with open(folder / "eval" / "cases.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["id"] for row in rows] == batch["id"]
    assert [float(row["dice"]) for row in rows] == pytest.approx(scores, abs=1e-6)
    assert [int(row["true_pixels"]) for row in rows] == truth.flatten(1).sum(1).tolist()
    assert [int(row["predicted_pixels"]) for row in rows] == found.flatten(1).sum(1).tolist()


def test_masks_are_the_boxes_of_the_files(finished: Any, bundle: Any) -> None:
    """A phantom film is a square, so that its pixels are those of the input but for the scale."""
    folder, _ = finished
    items = {item["id"]: item for item in read(folder / "data.json")["test"]}
    _, batch = batch_of(folder, bundle, "test")
    for name, mask in zip(batch["id"], batch["label"], strict=True):
        expected = np.zeros((256, 256), bool)
        for x0, y0, x1, y1 in items[name]["boxes"]:
            expected[round(y0) : round(y1), round(x0) : round(x1)] = True
        share = F.interpolate(torch.from_numpy(expected).float()[None, None], (48, 48), mode="area")[0]
        assert (mask[share > 0.99] == 1).all() and (mask[share < 0.01] == 0).all()


def test_augmentation_moves_image_and_mask_alike_and_pads_with_black(bundle: Any, finished: Any) -> None:
    _, made = finished
    chain = made.parser.get_parsed_content("train#random_transforms")
    size, seen, black = 96, 0, 0
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    disc = ((y - 40) ** 2 + (x - 60) ** 2 < 15**2).float()[None]
    for seed in range(30):
        item: Any = {"image": 0.4 * disc + 0.3, "mask": disc.clone()}
        for i, step in enumerate(chain):
            if hasattr(step, "set_random_state"):
                step.set_random_state(seed + i)
            item = step(item)
        image, mask = item["image"], item["mask"]
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        inside = (image > 0.5).float()
        assert float((inside != mask).float().mean()) < 0.01
        moved = not torch.allclose(mask, disc)
        seen += moved
        assert image.min() >= -1.0001
        black += bool((image < -0.99).any())
        # 10 degrees about the centre and a tenth of the size: the disc stays near its place
        rows, columns = (where.float().mean() for where in torch.nonzero(mask[0], as_tuple=True))
        assert abs(float(rows) - 40) < 5 and abs(float(columns) - 60) < 5
        assert 0.78 < float(mask.sum() / disc.sum()) < 1.25
    assert 8 <= seen <= 22 and black >= 5


def test_a_variant_and_a_fraction_of_the_labels(bundle: Any, tmp_path: Path) -> None:
    changes = {"variant": "original", "network_def#auxiliary": [0], "loss#dice": "log"}
    changes |= {"label_fraction": 0.5, "epochs": 1}
    made = bundle.train(tmp_path, **changes)
    training = read(tmp_path / "data.json")["training"]
    assert len(made.parser.get_parsed_content("train#dataset").data) == len(training) // 2
    network = load_network(tmp_path / "models" / "model.pt")
    assert (network.hparams["variant"], network.hparams["auxiliary"]) == ("original", [0])
    assert made.parser.get_parsed_content("validate#key_metric")["val_loss"].loss.dice == "log"


@pytest.mark.slow
def test_two_processes(bundle: Any, tmp_path: Path, command: Any) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    # an image that two ranks cannot share is left out; one Dice over each rank's batch is not that of the joint one
    same = {"epochs": 2, "train#dataloader#drop_last": True, "loss#batch": False, "lr": 0.01}
    changes = bundle.overrides(tmp_path, batch_size=4, **same)
    files = [str(CONFIGS / f"{name}.json") for name in ("train", "multi_gpu_train")]
    result = command(files, {**changes, "validate#dataloader#batch_size": 1}, tmp_path, launcher)
    assert result.returncode == 0, result.stderr[-3000:]
    assert not any(name.startswith("module.") for name in last(tmp_path)["network"])
    bundle.train(tmp_path / "one", batch_size=8, **same)
    ours, theirs = (last(folder)["history"]["rows"] for folder in (tmp_path, tmp_path / "one"))
    for key in ("val_loss", "val_dice"):
        values = [[row[key] for row in rows if key in row] for rows in (ours, theirs)]
        assert len(values[0]) == 2
        assert values[0] == pytest.approx(values[1], rel=1e-3), key
    states = [torch.load(f / "models" / "model.pt", weights_only=True) for f in (tmp_path, tmp_path / "one")]
    for name, value in states[0].items():
        assert torch.allclose(value.float(), states[1][name].float(), atol=1e-3), name
