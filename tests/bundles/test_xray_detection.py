# SPDX-License-Identifier: Apache-2.0
"""The X-ray detection bundle end to end over small phantoms: its best epoch, cases, inference, processes."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path
from typing import Any

import itk
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from PIL import Image

from tests.common import REPOSITORY, last, read
from unimedi_components.data import task_transforms
from unimedi_components.errors import DataError
from unimedi_components.loading import ImageDataset, ImageLoader
from unimedi_components.metrics import Detections, detection_metrics
from unimedi_components.networks import load_network
from unimedi_components.tasks import evaluate_task
from unimedi_components.tasks.boxes import boxes_in_file

BUNDLE = "chest_xray_detection"
CONFIGS = REPOSITORY / "bundles" / BUNDLE / "configs"
EPOCHS = 4

pytestmark = pytest.mark.usefixtures("in_process")


def test_a_run_says_what_it_is_about(finished: Any, bundle: Any) -> None:
    folder, _ = finished
    datalist, metrics = read(folder / "data.json"), read(folder / "eval" / "metrics.json")
    assert metrics["true_boxes"] == sum(len(item["boxes"]) for item in datalist["test"])
    card = read(folder / "models" / "model.json")
    assert card["label_names"] == ["background", "pneumonia"]
    assert card["preprocessing"] == {"film": {"size": 48}}


def test_a_split_without_boxes_is_refused(finished: Any, bundle: Any) -> None:
    folder, _ = finished
    lists = read(folder / "data.json")
    empty = {**lists, "test": [{**item, "boxes": []} for item in lists["test"]]}
    with pytest.raises(DataError, match="no image of the test split has a box; there is nothing to find"):
        evaluate_task(folder / "models" / "model.pt", empty, bundle.data / "rsna")


def test_the_best_epoch_is_the_one_of_the_highest_map(finished: Any, bundle: Any) -> None:
    folder, _ = finished
    rows = [row for row in last(folder)["history"]["rows"] if "val_map" in row]
    scores = [row["val_map"] for row in rows]
    assert len(scores) == EPOCHS
    assert last(folder)["best"] == max(scores) > 0
    network = load_network(folder / "models" / "model.pt")
    chain = task_transforms(network.card["preprocessing"], target="boxes")
    cache = bundle.data / f"{bundle.name}-cache"  # whose 256 grey levels the epochs saw
    dataset = ImageDataset(
        read(folder / "data.json")["validation"], chain, bundle.data / "rsna", "boxes", dim=2, cache_dir=cache
    )
    (batch,) = ImageLoader(dataset, 100)
    with torch.no_grad():
        network.select_boxes(0.02, 0.5)
        found = network(batch["image"])
    parts = ([row[key].numpy() for row in found] for key in ("boxes", "scores"))
    value = detection_metrics(Detections(*parts, [boxes.numpy() for boxes in batch["boxes"]]), bootstrap=0)
    assert value["map_coco"] == pytest.approx(max(scores), abs=1e-6)
    assert all(np.isfinite(row["val_loss"]) for row in rows)


def test_validation_and_test_count_the_same_boxes(finished: Any, bundle: Any) -> None:
    """The test measured on the validation split gives the best epoch's score: neither leaves a box out."""
    folder, _ = finished
    checkpoint = folder / "models" / "model.pt"
    assert (
        load_network(checkpoint).hparams["lowest_score"]
        == read(CONFIGS / "train.json")["network_def"]["lowest_score"]
        == 0.02
    )
    options: dict[str, Any] = {"split": "validation", "bootstrap": 0, "cache_dir": bundle.data / f"{bundle.name}-cache"}
    values = evaluate_task(checkpoint, folder / "data.json", bundle.data / "rsna", **options)
    assert values["lowest_score"] == 0.02
    assert values["map_coco"] == pytest.approx(last(folder)["best"], abs=1e-6)
    # boxes below the shown threshold of 0.6 are what the score is made of
    fewer = evaluate_task(checkpoint, folder / "data.json", bundle.data / "rsna", **options, lowest_score=0.6)
    assert fewer["predicted_boxes"] < values["predicted_boxes"]


def test_the_cases_say_what_the_metrics_count(finished: Any) -> None:
    """Recount `ap_40`'s hits and the boxes of the files from the table alone."""
    folder, _ = finished
    with open(folder / "eval" / "cases.csv") as file:
        rows = list(csv.DictReader(file))
    metrics, items = read(folder / "eval" / "metrics.json"), read(folder / "data.json")["test"]
    truth = {item["id"]: item["boxes"] for item in items}
    assert {row["id"] for row in rows} == set(truth)
    true = [row for row in rows if row["kind"] == "true"]
    found = [row for row in rows if row["kind"] == "predicted"]
    assert (len(true), len(found)) == (metrics["true_boxes"], metrics["predicted_boxes"])
    for row in true:
        box = [float(row[key]) for key in ("x0", "y0", "x1", "y1")]
        assert box == truth[row["id"]][int(row["matched"])]
    hits = [row for row in found if row["matched"] != "-1"]
    assert len(hits) == sum(row["score"] != "" for row in true) > 0
    assert all(float(row["iou"]) >= 0.4 - 1e-9 for row in hits)
    for row in found:
        x0, y0, x1, y1 = (float(row[key]) for key in ("x0", "y0", "x1", "y1"))
        assert -1 <= x0 < x1 <= 257
        assert -1 <= y0 < y1 <= 257


def write_inputs(folder: Path, data: Path) -> None:
    """Films of odd sizes in three formats, one of the phantoms, and a file that is none."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    itk.imwrite(itk.image_from_array(rng.integers(0, 4000, (317, 211)).astype(np.uint16)), str(folder / "odd.dcm"))
    Image.fromarray(rng.integers(0, 255, (90, 170), dtype=np.uint8)).save(folder / "wide.png")
    turned = Image.fromarray(rng.integers(0, 255, (60, 80), dtype=np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif)
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n no film")
    shutil.copy(next((data / "rsna" / "stage_2_train_images").iterdir()), folder / "phantom.dcm")


def test_inference_gives_boxes_in_pixels_of_the_files(finished: Any, bundle: Any, tmp_path: Path) -> None:
    folder, _ = finished
    write_inputs(tmp_path / "in", bundle.data)
    changes = {"ckpt_dir": str(folder / "models"), "output_dir": str(tmp_path / "out"), "device": "cpu"}
    changes |= {"inputs": str(tmp_path / "in"), "score_threshold": 0.05}
    made = bundle.workflow(changes, "inference", kind="infer")
    assert made.check_properties() == []
    made.run()
    result = read(tmp_path / "out" / "predictions.json")
    assert [Path(row["file"]).name for row in result["skipped"]] == ["bad.png"]
    rows = {row["id"]: row for row in result["predictions"]}
    sizes = {name: (row["width"], row["height"]) for name, row in rows.items()}
    assert sizes == {"odd": (211, 317), "wide": (170, 90), "turned": (60, 80), "phantom": (256, 256)}
    network = load_network(folder / "models" / "model.pt")
    network.select_boxes(0.05, 0.5)
    chain = task_transforms(network.card["preprocessing"], keep_meta=True)
    names = {"odd": "odd.dcm", "wide": "wide.png", "turned": "turned.jpg", "phantom": "phantom.dcm"}
    total = 0
    for name, (width, height) in sizes.items():
        item: Any = {"image": str(tmp_path / "in" / names[name])}
        for transform in chain:
            item = transform(item)
        with torch.no_grad():
            (found,) = network(item["image"][None])
        boxes = [row["box"] for row in rows[name]["boxes"]]
        # the long side fills the input, the short side lies in its middle
        scale = max(width, height) / 48
        pad = [(48 - round(size / scale)) // 2 for size in (width, height)]
        stretch = [size / round(size / scale) for size in (width, height)]
        expected = (found["boxes"].double().numpy() - np.tile(pad, 2)) * np.tile(stretch, 2)
        expected = np.clip(expected, 0, np.tile([width, height], 2))
        assert np.allclose(boxes, expected, atol=0.01), name
        assert [row["score"] for row in rows[name]["boxes"]] == pytest.approx(found["scores"].tolist(), abs=1e-5)
        total += len(boxes)
        with Image.open(tmp_path / "out" / f"{name}.png") as image:
            assert image.width > 200
    with open(tmp_path / "out" / "predictions.csv") as file:
        assert len(list(csv.DictReader(file))) == total > 8
    assert np.allclose(boxes_in_file([[-5, 10, 60, 20.0]], torch.eye(4), 50, 15), [[0, 10, 50, 15]])


def test_the_overlay_has_the_papers_numbers() -> None:
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in ("train", "rsna")])
    parser.update({"encoder_weights": "none", "network_def#encoder#depth": 1, "bundle_root": "/nowhere"})
    network = parser.get_parsed_content("network_def")
    assert (network.encoder.embed_dim, network.encoder.img_size, network.freeze_encoder) == (768, (224, 224), True)
    assert (network.pyramid.out_channels, network.pyramid.num_levels, network.detector.num_anchors_per_loc) == (
        256,
        5,
        9,
    )
    assert len(network.classification_head.conv) == 12
    paper = {
        **{"train#run#max_grad_norm": None, "optimizer#lr": 5e-4, "optimizer#weight_decay": 1e-6},
        **{"lr_scheduler#power": 0.0, "epochs": 50, "train#run#patience": 10, "train#dataloader#batch_size": 16},
        **{"data#datalist#phantoms": None, "train#augment#flip_prob": 0.0, "train#augment#zoom_prob": 0.0},
    }
    assert {key: parser[key] for key in paper} == paper


@pytest.mark.slow
def test_two_processes(bundle: Any, tmp_path: Path, command: Any) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    same = {"epochs": 2, "train#dataloader#drop_last": True, "validate#dataloader#batch_size": 1, "lr": 1e-3}
    changes = bundle.overrides(tmp_path, batch_size=4, **same)
    files = [CONFIGS / "train.json", CONFIGS / "multi_gpu_train.json"]
    result = command(files, changes, tmp_path, launcher)
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["last.ckpt", "model.json", "model.pt"]
    assert not any(name.startswith("module.") for name in last(tmp_path)["network"])
    rows = [row for row in last(tmp_path)["history"]["rows"] if "val_loss" in row]
    # what both ranks measured together is what one process measures with the final weights
    made = bundle.workflow(bundle.overrides(tmp_path, resume=True, epochs=2), "train")
    network = made.parser.get_parsed_content("network")
    network.load_state_dict(last(tmp_path)["network"])
    evaluator = made.parser.get_parsed_content("validate#evaluator")
    evaluator.run()
    for name in ("val_loss", "val_map"):
        assert evaluator.state.metrics[name] == pytest.approx(rows[-1][name], rel=1e-4), name


@pytest.mark.skipif("UNIMEDI_REAL_DATA" not in os.environ, reason="set UNIMEDI_REAL_DATA to a folder of real studies")
def test_boxes_of_real_films_can_be_learned(bundle: Any, tmp_path: Path) -> None:
    """Eight NIH films with opacity boxes: trained on and measured on themselves."""
    root = Path(os.environ["UNIMEDI_REAL_DATA"]) / "xray_nih"
    with open(root / "boxes.csv") as file:
        table = list(csv.DictReader(file))
    films: dict[str, list[list[float]]] = {}
    for row in table:
        x, y, w, h = (float(row[key]) for key in ("x", "y", "w", "h"))
        films.setdefault(row["image"], []).append([x, y, x + w, y + h])
    items = [{"id": name, "patient": name, "image": name, "dim": 2, "boxes": films[name]} for name in sorted(films)[:8]]
    bundle.train(
        tmp_path,
        dataset_dir=str(root),
        phantoms="$None",
        epochs=120,
        batch_size=8,
        img_size=96,
        lr=5e-3,
        patience="$None",
        **{"train#dataset#data": items, "validate#dataset#data": items, "train#augment#flip_prob": 0.0},
        **{"train#augment#zoom_prob": 0.0, "network_def#width": 32, "network_def#head_convs": 1},
        **{"network_def#anchor_sizes": "$[[12, 24], [24, 48]]"},
    )
    metrics = read(tmp_path / "eval" / "metrics.json")
    assert metrics["true_boxes"] == sum(len(item["boxes"]) for item in items)
    assert metrics["ap_40"] > 0.8
