# SPDX-License-Identifier: Apache-2.0
"""The X-ray detection bundle end to end over small phantoms: training, resuming, evaluating, inference, processes."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import itk
import numpy as np
import pytest
import torch
from filelock import FileLock
from ignite.engine import Events
from jsonschema import validate
from monai.bundle import ConfigParser, ConfigWorkflow
from PIL import Image

from unimedi_components.data import DenseDataset, labelled_loader, task_transforms
from unimedi_components.data.phantom import write_phantom
from unimedi_components.engines.save_boxes import boxes_in_file
from unimedi_components.errors import DataError
from unimedi_components.evaluation import Detections, detection_metrics, evaluate_detector
from unimedi_components.networks import UnifiedViT, load_network

CONFIGS = Path(__file__).resolve().parents[2] / "bundles" / "chest_xray_detection" / "configs"
PATIENTS, EPOCHS = 40, 4
SIZES = {"img_size": 32, "vol_size": [8, 24, 24], "patch_size": 8, "patch_size_3d": [4, 12, 12]}
SIZES |= {"embed_dim": 16, "depth": 1, "num_heads": 2}
COMMON = {
    "size": SIZES,
    "device": "cpu",
    "epochs": EPOCHS,
    "bootstrap": 20,
    "memory_mb": 10,
    "img_size": 48,
    "pyramid_width": 8,
}
COMMON |= {"score_threshold": 0.6, "lr": 0.01}
FILES = {"metrics.json", "run.json", "cases.csv", "precision_recall.png", "boxes.png", "loss_curves.png"}

pytestmark = pytest.mark.usefixtures("in_process")


class Stop(Exception):
    """Stands for whatever ends a run before its time."""


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RSNA phantoms and a tiny pre-trained encoder, made once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    base = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "xray-detection"
    base.mkdir(exist_ok=True)
    with FileLock(base.with_suffix(".lock")):
        if not (base / "model.json").is_file():
            write_phantom("rsna", base / "rsna", PATIENTS, workers=0, progress=False)
            torch.manual_seed(0)
            encoder = UnifiedViT(**SIZES)
            torch.save(encoder.state_dict(), base / "model.pt")
            (base / "model.json").write_text(json.dumps({"format": 1, "encoder": encoder.hparams}))
    return base


def overrides(data: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    places = {"dataset_dir": data / "rsna", "cache_dir": data / "cache", "datalist_file": folder / "data.json"}
    places |= {"ckpt_dir": folder / "models", "output_dir": folder / "eval", "encoder_weights": data / "model.pt"}
    return {**COMMON, **{key: str(path) for key, path in places.items()}, "phantoms": PATIENTS, **changes}


def workflow(changes: dict[str, Any], *names: str, kind: str = "train") -> ConfigWorkflow:
    files = [str(CONFIGS / f"{name}.json") for name in names]
    made = ConfigWorkflow(files, workflow_type=kind, logging_file=False, **changes)
    made.initialize()
    return made


def train(data: Path, folder: Path, **changes: Any) -> ConfigWorkflow:
    made = workflow(overrides(data, folder, **changes), "train")
    made.run()
    made.finalize()
    return made


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def last(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "models" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, ConfigWorkflow]]:
    """A finished run."""
    folder = tmp_path_factory.mktemp("detection")
    yield folder, train(data, folder)


def test_a_run_leaves_its_files(run: Any, data: Path) -> None:
    folder, made = run
    assert made.check_properties() == []
    assert {path.name for path in (folder / "models").iterdir()} == {"model.pt", "model.json", "last.ckpt"}
    names = {path.name for path in (folder / "eval").iterdir()}
    assert {name for name in names if "tfevents" not in name} == FILES
    for name in FILES:
        if name.endswith(".png"):
            with Image.open(folder / "eval" / name) as image:
                assert image.width >= 400, name
    datalist, metrics = read(folder / "data.json"), read(folder / "eval" / "metrics.json")
    assert (metrics["split"], metrics["task"], metrics["images"]) == ("test", "detection", len(datalist["test"]))
    assert metrics["true_boxes"] == sum(len(item["boxes"]) for item in datalist["test"])
    card = read(folder / "models" / "model.json")
    assert card["label_names"] == datalist["meta"]["label_names"] == ["background", "pneumonia"]
    assert card["preprocessing"] == {"film": {"size": 48}}
    # the frozen encoder is the pre-trained one
    before = torch.load(data / "model.pt", weights_only=True)
    after = load_network(folder / "models" / "model.pt").encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_best_epoch_is_the_one_of_the_highest_map(run: Any, data: Path) -> None:
    folder, _ = run
    rows = [row for row in last(folder)["history"]["rows"] if "val_map" in row]
    scores = [row["val_map"] for row in rows]
    assert len(scores) == EPOCHS
    assert last(folder)["best"] == max(scores) > 0
    network = load_network(folder / "models" / "model.pt")
    chain = task_transforms(network.card["preprocessing"], target="boxes")
    dataset = DenseDataset(read(folder / "data.json")["validation"], chain, data / "rsna", target="boxes")
    (batch,) = labelled_loader(dataset, 100)
    with torch.no_grad():
        network.select_boxes(0.02, 0.5)
        found = network(batch["image"])
    parts = ([row[key].numpy() for row in found] for key in ("boxes", "scores"))
    value = detection_metrics(Detections(*parts, [boxes.numpy() for boxes in batch["boxes"]]), bootstrap=0)
    assert value["map_coco"] == pytest.approx(max(scores), abs=1e-6)
    assert all(np.isfinite(row["val_loss"]) for row in rows)


def test_validation_and_test_count_the_same_boxes(run: Any, data: Path) -> None:
    """The test measured on the validation split gives the best epoch's score: neither leaves a box out."""
    folder, _ = run
    checkpoint = folder / "models" / "model.pt"
    assert load_network(checkpoint).hparams["lowest_score"] == read(CONFIGS / "train.json")["lowest_score"] == 0.02
    values = evaluate_detector(
        checkpoint, folder / "data.json", data / "rsna", split="validation", cache_dir=data / "cache", bootstrap=0
    )
    assert values["lowest_score"] == 0.02
    assert values["map_coco"] == pytest.approx(last(folder)["best"], abs=1e-6)
    # boxes below the shown threshold of 0.6 are what the score is made of
    fewer = evaluate_detector(
        checkpoint, folder / "data.json", data / "rsna", split="validation", bootstrap=0, lowest_score=0.6
    )
    assert fewer["predicted_boxes"] < values["predicted_boxes"]


def test_the_cases_say_what_the_metrics_count(run: Any) -> None:
    """Recount `ap_40`'s hits and the boxes of the files from the table alone."""
    folder, _ = run
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


def test_evaluate_reproduces_the_runs_metrics(run: Any, data: Path, tmp_path: Path, capsys: Any) -> None:
    folder, _ = run
    made = workflow(overrides(data, folder, output_dir=str(tmp_path / "eval")), "train", "evaluate")
    made.run()
    assert {path.name for path in (tmp_path / "eval").iterdir()} == FILES - {"loss_curves.png", "run.json"}
    for name in ("metrics.json", "cases.csv"):
        assert (tmp_path / "eval" / name).read_bytes() == (folder / "eval" / name).read_bytes(), name
    assert '"split": "test"' in capsys.readouterr().out


def test_data_for_another_task_or_without_boxes_is_refused(run: Any, data: Path) -> None:
    folder, _ = run
    checkpoint, lists = folder / "models" / "model.pt", read(folder / "data.json")
    other = {**lists, "meta": {**lists["meta"], "task": "segmentation"}}
    with pytest.raises(
        DataError, match="trained for the detection labels background, pneumonia, but the datalist holds the"
    ):
        evaluate_detector(checkpoint, other, data / "rsna")
    empty = {**lists, "test": [{**item, "boxes": []} for item in lists["test"]]}
    with pytest.raises(DataError, match="there is nothing to find"):
        evaluate_detector(checkpoint, empty, data / "rsna")
    with pytest.raises(DataError, match="no 2D item in the test or validation split"):
        evaluate_detector(checkpoint, {**lists, "test": [], "validation": []}, data / "rsna")


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Where two checkpoints differ."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [place]
    if isinstance(a, dict) and isinstance(b, dict):
        names = [*a, *(name for name in b if name not in a)]
        return [found for name in names for found in differences(a.get(name), b.get(name), f"{place}/{name}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{place}/{i}")]
    return [] if a == b else [f"{place}: {a!r} {b!r}"]


def test_a_resumed_run_equals_one_that_was_never_interrupted(run: Any, data: Path, tmp_path: Path) -> None:
    folder, _ = run
    made = workflow(overrides(data, tmp_path), "train")

    def stop(engine: Any) -> None:
        raise Stop

    made.parser.get_parsed_content("train#trainer").add_event_handler(Events.EPOCH_COMPLETED(once=2), stop)
    with pytest.raises(Exception) as caught:
        made.run()
    assert isinstance(caught.value, Stop) or isinstance(caught.value.__cause__, Stop)
    assert last(tmp_path)["epoch"] == 2
    train(data, tmp_path, resume=True)
    assert differences(last(tmp_path), last(folder)) == []
    best = [torch.load(place / "models" / "model.pt", weights_only=True) for place in (tmp_path, folder)]
    assert differences(*best) == []
    assert read(tmp_path / "eval" / "metrics.json") == read(folder / "eval" / "metrics.json")


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
    (folder / "bad.png").write_bytes(b"no film")
    shutil.copy(next((data / "rsna" / "stage_2_train_images").iterdir()), folder / "phantom.dcm")


def test_inference_gives_boxes_in_pixels_of_the_files(run: Any, data: Path, tmp_path: Path) -> None:
    folder, _ = run
    write_inputs(tmp_path / "in", data)
    changes = {"ckpt_dir": str(folder / "models"), "output_dir": str(tmp_path / "out"), "device": "cpu"}
    changes |= {"inputs": str(tmp_path / "in"), "score_threshold": 0.05}
    made = workflow(changes, "inference", kind="infer")
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


def test_nothing_readable_is_one_error(run: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no film")
    changes = {"ckpt_dir": str(run[0] / "models"), "output_dir": str(tmp_path / "out"), "device": "cpu"}
    made = workflow({**changes, "inputs": str(tmp_path / "bad.png")}, "inference", kind="infer")
    with pytest.raises(Exception) as caught:
        made.run()
    said = f"{caught.value} {caught.value.__cause__}"
    assert "none of 1 inputs could be read" in said


def test_the_metadata_fits_the_schema_and_the_configs() -> None:
    metadata, train_config = read(CONFIGS / "metadata.json"), read(CONFIGS / "train.json")
    validate(metadata, read(Path(__file__).with_name("meta_schema_20240725.json")))
    image = metadata["network_data_format"]["inputs"]["image"]
    assert image["spatial_shape"] == [train_config["img_size"]] * 2
    (output,) = metadata["network_data_format"]["outputs"].values()
    assert list(output["channel_def"].values()) == train_config["label_names"][1:]


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
    assert parser.get("max_grad_norm") is None
    values = {name: parser.get(name) for name in ("lr", "weight_decay", "lr_power", "epochs", "patience", "batch_size")}
    assert values == {
        "lr": 5e-4,
        "weight_decay": 1e-6,
        "lr_power": 0.0,
        "epochs": 50,
        "patience": 10,
        "batch_size": 16,
    }
    assert (parser.get("phantoms"), parser.get("flip_prob"), parser.get("zoom_prob")) == (None, 0.0, 0.0)


@pytest.mark.slow
def test_two_processes(data: Path, tmp_path: Path, command: Any) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    same = {"epochs": 2, "train#dataloader#drop_last": True, "validate#dataloader#batch_size": 1, "lr": 1e-3}
    changes = overrides(data, tmp_path, batch_size=4, **same)
    files = [CONFIGS / "train.json", CONFIGS / "multi_gpu_train.json"]
    result = command(files, changes, tmp_path, launcher)
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["last.ckpt", "model.json", "model.pt"]
    assert not any(name.startswith("module.") for name in last(tmp_path)["network"])
    rows = [row for row in last(tmp_path)["history"]["rows"] if "val_loss" in row]
    # what both ranks measured together is what one process measures with the final weights
    made = workflow(overrides(data, tmp_path, resume=True, epochs=2), "train")
    network = made.parser.get_parsed_content("network")
    network.load_state_dict(last(tmp_path)["network"])
    evaluator = made.parser.get_parsed_content("validate#evaluator")
    evaluator.run()
    for name in ("val_loss", "val_map"):
        assert evaluator.state.metrics[name] == pytest.approx(rows[-1][name], rel=1e-4), name


@pytest.mark.skipif("UNIMEDI_REAL_DATA" not in os.environ, reason="set UNIMEDI_REAL_DATA to a folder of real studies")
def test_boxes_of_real_films_can_be_learned(data: Path, tmp_path: Path) -> None:
    """Eight NIH films with opacity boxes: trained on and measured on themselves."""
    root = Path(os.environ["UNIMEDI_REAL_DATA"]) / "xray_nih"
    with open(root / "boxes.csv") as file:
        table = list(csv.DictReader(file))
    films: dict[str, list[list[float]]] = {}
    for row in table:
        x, y, w, h = (float(row[key]) for key in ("x", "y", "w", "h"))
        films.setdefault(row["image"], []).append([x, y, x + w, y + h])
    items = [{"id": name, "patient": name, "image": name, "dim": 2, "boxes": films[name]} for name in sorted(films)[:8]]
    train(
        data,
        tmp_path,
        dataset_dir=str(root),
        phantoms="$None",
        epochs=120,
        batch_size=8,
        img_size=96,
        pyramid_width=32,
        head_convs=1,
        lr=5e-3,
        flip_prob=0.0,
        zoom_prob=0.0,
        patience="$None",
        anchor_sizes="$[[12, 24], [24, 48]]",
        **{"train#dataset#data": items, "validate#dataset#data": items},
    )
    metrics = read(tmp_path / "eval" / "metrics.json")
    assert metrics["true_boxes"] == sum(len(item["boxes"]) for item in items)
    assert metrics["ap_40"] > 0.8
