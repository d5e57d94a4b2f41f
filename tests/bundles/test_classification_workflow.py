# SPDX-License-Identifier: Apache-2.0
"""The classification bundles end to end over small phantoms, and multi_gpu_train.json in two gloo processes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from PIL import Image

from unimedi_components.data.chains import task_transforms
from unimedi_components.data.labelled import LabelledDataset, labelled_loader
from unimedi_components.data.phantom import write_phantom
from unimedi_components.losses import ClassificationLoss
from unimedi_components.networks import UnifiedViT
from unimedi_components.networks.classifier import load_classifier

REPOSITORY = Path(__file__).resolve().parents[2]
XRAY, CT = "chest_xray_classification", "chest_ct_classification"
PATIENTS = {"chexpert": 32, "covidx": 18, "cc_ccii": 18}
SIZES = {"img_size": 32, "vol_size": [8, 24, 24], "patch_size": 16, "patch_size_3d": [4, 12, 12]}
SIZES |= {"embed_dim": 16, "depth": 1, "num_heads": 2}
EPOCHS = 4
# a rate at which the validation loss rises and falls, so that the best epoch is not the last
COMMON = {
    "size": SIZES,
    "device": "cpu",
    "epochs": EPOCHS,
    "bootstrap": 20,
    "memory_mb": 10,
    "probe_lr": 0.5,
    "probe_weight_decay": 0.0,
}
FILES = {"metrics.json", "run.json", "cases.csv", "roc.png", "confusion.png", "loss_curves.png"}
COVIDX = {"data_set": "covidx", "task": "multiclass", "label_names": ["normal", "pneumonia", "COVID-19"]}

pytestmark = pytest.mark.usefixtures("in_process")


class Stop(Exception):
    """Stands for whatever ends a run before its time."""


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms of each data set, and a tiny pre-trained encoder, made once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    base = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "classification"
    base.mkdir(exist_ok=True)
    with FileLock(base.with_suffix(".lock")):
        if not (base / "model.json").is_file():
            for name, patients in PATIENTS.items():
                write_phantom(name, base / name, patients, workers=0, progress=False)
            torch.manual_seed(0)
            encoder = UnifiedViT(**SIZES)
            torch.save(encoder.state_dict(), base / "model.pt")
            (base / "model.json").write_text(json.dumps({"format": 1, "encoder": encoder.hparams}))
    return base


def configs(bundle: str, *names: str) -> list[str]:
    return [str(REPOSITORY / "bundles" / bundle / "configs" / f"{name}.json") for name in names]


def overrides(bundle: str, data: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    name = changes.get("data_set", "chexpert" if bundle == XRAY else "cc_ccii")
    size = {"img_size": SIZES["img_size"]} if bundle == XRAY else {"vol_size": SIZES["vol_size"]}
    places = {"dataset_dir": data / name, "cache_dir": data / "cache", "datalist_file": folder / "data.json"}
    places |= {"ckpt_dir": folder / "models", "output_dir": folder / "eval", "encoder_weights": data / "model.pt"}
    paths = {key: str(path) for key, path in places.items()}
    return {**COMMON, **size, **paths, "phantoms": PATIENTS[name], **changes}


def workflow(files: list[str], changes: dict[str, Any]) -> ConfigWorkflow:
    made = ConfigWorkflow(files, workflow_type="train", logging_file=False, **changes)
    made.initialize()
    return made


def train(bundle: str, data: Path, folder: Path, *overlays: str, **changes: Any) -> ConfigWorkflow:
    made = workflow(configs(bundle, "train", *overlays), overrides(bundle, data, folder, **changes))
    made.run()
    made.finalize()
    return made


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def last(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "models" / "last.ckpt", weights_only=True)


def encoder_changed(folder: Path, data: Path) -> set[str]:
    """Tensors of the trained encoder that differ from the pre-trained one's."""
    before = torch.load(data / "model.pt", weights_only=True)
    after = load_classifier(folder / "models" / "model.pt").encoder.state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def probe(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, ConfigWorkflow]]:
    """A finished probe of X-rays."""
    folder = tmp_path_factory.mktemp("probe")
    yield folder, train(XRAY, data, folder)


def test_a_probe_leaves_its_files(probe: Any, data: Path) -> None:
    folder, made = probe
    assert made.check_properties() == []
    assert {path.name for path in (folder / "models").iterdir()} == {"model.pt", "model.json", "last.ckpt"}
    names = {path.name for path in (folder / "eval").iterdir()}
    assert {name for name in names if "tfevents" not in name} == FILES
    assert any("tfevents" in name for name in names)
    for name in FILES:
        if name.endswith(".png"):
            with Image.open(folder / "eval" / name) as image:
                assert image.width >= 400, name
    datalist = read(folder / "data.json")
    metrics = read(folder / "eval" / "metrics.json")
    assert (metrics["split"], metrics["task"], metrics["cases"]) == ("test", "multilabel", len(datalist["test"]))
    assert len((folder / "eval" / "cases.csv").read_text().splitlines()) == 1 + len(datalist["test"])
    card = read(folder / "models" / "model.json")
    assert card["label_names"] == datalist["meta"]["label_names"] == metrics["label_names"]
    assert card["preprocessing"] == {"xray": {"size": 32}}
    assert encoder_changed(folder, data) == set()


def test_the_best_epoch_is_the_one_of_the_lowest_validation_loss(probe: Any, data: Path) -> None:
    folder, _ = probe
    rows = [row for row in last(folder)["history"]["rows"] if "val_loss" in row]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    losses = [row["val_loss"] for row in rows]
    assert min(losses) < losses[-1]
    assert last(folder)["best"] == min(losses)
    network = load_classifier(folder / "models" / "model.pt")
    chain = task_transforms(network.card["preprocessing"])
    items = read(folder / "data.json")["validation"]
    dataset = LabelledDataset(items, chain, data / "chexpert", network.card["label_names"], "multilabel", 2)
    (batch,) = labelled_loader(dataset, 100)
    with torch.no_grad():
        found = ClassificationLoss("multilabel")(network(batch["image"]), batch["label"])
    assert float(found) == pytest.approx(min(losses), rel=1e-4)
    newest = last(folder)["network"]
    assert not torch.equal(newest["head.weight"], network.head.weight)


def test_evaluate_reproduces_the_runs_metrics(probe: Any, data: Path, tmp_path: Path, capsys: Any) -> None:
    folder, _ = probe
    changes = overrides(XRAY, data, folder, output_dir=str(tmp_path / "eval"))
    made = workflow(configs(XRAY, "train", "evaluate"), changes)
    made.run()
    assert {path.name for path in (tmp_path / "eval").iterdir()} == FILES - {"loss_curves.png", "run.json"}
    assert read(tmp_path / "eval" / "metrics.json") == read(folder / "eval" / "metrics.json")
    assert '"split": "test"' in capsys.readouterr().out
    assert (tmp_path / "eval" / "cases.csv").read_bytes() == (folder / "eval" / "cases.csv").read_bytes()


def test_a_seed_repeats_a_run(probe: Any, data: Path, tmp_path: Path) -> None:
    folder, _ = probe
    train(XRAY, data, tmp_path)
    assert differences(last(tmp_path), last(folder)) == []
    train(XRAY, data, tmp_path, seed=1, epochs=1)
    assert not torch.equal(last(tmp_path)["network"]["head.weight"], last(folder)["network"]["head.weight"])


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


@pytest.mark.parametrize("kind", ["probe", "fine_tune"])
def test_a_resumed_run_equals_one_that_was_never_interrupted(kind: str, probe: Any, data: Path, tmp_path: Path) -> None:
    overlays = ["fine_tune"] if kind == "fine_tune" else []
    if kind == "probe":
        folder = probe[0]
    else:
        folder = tmp_path / "whole"
        train(XRAY, data, folder, *overlays, batch_size=16)
    changes = {"batch_size": 16} if overlays else {}
    again = tmp_path / "interrupted"
    made = workflow(configs(XRAY, "train", *overlays), overrides(XRAY, data, again, **changes))

    def stop(engine: Any) -> None:
        raise Stop

    made.parser.get_parsed_content("train#trainer").add_event_handler(Events.EPOCH_COMPLETED(once=2), stop)
    with pytest.raises(Exception) as caught:
        made.run()
    assert isinstance(caught.value, Stop) or isinstance(caught.value.__cause__, Stop)
    assert last(again)["epoch"] == 2
    train(XRAY, data, again, *overlays, resume=True, **changes)
    assert last(again)["epoch"] == EPOCHS
    assert differences(last(again), last(folder)) == []
    assert last(again)["early_stop"]["best_score"] == pytest.approx(-last(folder)["best"])
    assert kind == "fine_tune" or last(again)["early_stop"]["counter"] > 0
    best = [torch.load(run / "models" / "model.pt", weights_only=True) for run in (again, folder)]
    assert differences(*best) == []
    assert read(again / "eval" / "metrics.json") == read(folder / "eval" / "metrics.json")


def test_another_data_set_and_a_fraction_of_its_labels(data: Path, tmp_path: Path) -> None:
    made = train(XRAY, data, tmp_path, **COVIDX, label_fraction=0.5, epochs=1, patience="$None")
    training = read(tmp_path / "data.json")["training"]
    patients = {item["patient"] for item in training}
    used = made.parser.get_parsed_content("train#dataset").data
    assert len({item["patient"] for item in used}) == int(len(patients) / 2 + 0.5)
    assert {item["id"] for item in used} < {item["id"] for item in training}
    metrics = read(tmp_path / "eval" / "metrics.json")
    assert metrics["task"] == "multiclass"
    assert list(metrics["auroc"]) == COVIDX["label_names"]
    assert load_classifier(tmp_path / "models" / "model.pt").head.out_features == 3


def test_fine_tuning_ct_moves_the_encoder_and_the_probe_does_not(data: Path, tmp_path: Path) -> None:
    train(CT, data, tmp_path / "probe", epochs=1)
    assert encoder_changed(tmp_path / "probe", data) == set()
    made = train(CT, data, tmp_path / "fine", "fine_tune", epochs=1, use_slices=True, batch_size=8)
    moved = encoder_changed(tmp_path / "fine", data)
    assert set(UnifiedViT(**SIZES).state_dict()) - moved == {"mask_token"}
    network = load_classifier(tmp_path / "fine" / "models" / "model.pt")
    assert (network.use_slices, network.num_slices, network.freeze_encoder) == (True, 2, False)
    rows = last(tmp_path / "fine")["history"]["rows"]
    # polynomial decay of power 0.9 over the run's steps
    steps = len(rows)
    assert [row["lr"] for row in rows] == pytest.approx([1e-3 * (1 - i / steps) ** 0.9 for i in range(steps)])
    assert {row["lr"] for row in last(tmp_path / "probe")["history"]["rows"]} == {0.5}
    assert read(tmp_path / "fine" / "models" / "model.json")["preprocessing"].keys() == {"slices", "ct"}
    assert made.check_properties() == []


def test_missing_weights_give_one_message_before_any_data_is_made(command: Any, tmp_path: Path) -> None:
    changes = {"encoder_weights": tmp_path / "model.pt", "dataset_dir": tmp_path / "data", "device": "cpu"}
    result = command(configs(CT, "train")[0], {**changes, "ckpt_dir": tmp_path / "models"}, tmp_path)
    assert result.returncode == 2
    assert [line for line in result.stderr.splitlines() if "error" in line] == [
        f"error: {tmp_path}/model.pt: no pre-trained encoder. Train one with 'make pretrain', give other weights with "
        "--encoder_weights, or --encoder_weights none for random initialisation"
    ]
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes(data: Path, tmp_path: Path, command: Any) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    # an image that two ranks cannot share is left out; the ranks have two and one batches of validation
    same = {"epochs": 2, "train#dataloader#drop_last": True, "validate#dataloader#batch_size": 1}
    changes = overrides(XRAY, data, tmp_path, batch_size=4, **same)
    result = command(configs(XRAY, "train", "multi_gpu_train"), changes, tmp_path, launcher)
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["last.ckpt", "model.json", "model.pt"]
    assert not any(name.startswith("module.") for name in last(tmp_path)["network"])
    said = result.stdout + result.stderr
    assert said.count("Epoch[1] Metrics") == said.count("Epoch[2] Metrics") == 1
    # the joint batches, their statistics and the metrics over both ranks are those of one process with twice the batch
    train(XRAY, data, tmp_path / "one", batch_size=8, **same)
    ours, theirs = (last(folder)["history"]["rows"] for folder in (tmp_path, tmp_path / "one"))
    assert len(ours) == len(theirs)
    for key in ("val_loss", "val_score"):
        values = [[row[key] for row in rows if key in row] for rows in (ours, theirs)]
        assert len(values[0]) == 2
        assert values[0] == pytest.approx(values[1], rel=1e-3), key
    weights = [load_classifier(folder / "models" / "model.pt").head.weight for folder in (tmp_path, tmp_path / "one")]
    assert torch.allclose(*weights, atol=1e-3)
