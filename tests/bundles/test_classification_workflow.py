# SPDX-License-Identifier: Apache-2.0
"""The classification bundles end to end over small phantoms, and multi_gpu_train.json in two gloo processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow

from tests.common import last, read
from unimedi_components.data.chains import task_transforms
from unimedi_components.loading import ImageDataset, ImageLoader
from unimedi_components.losses import ClassificationLoss
from unimedi_components.networks import UnifiedViT
from unimedi_components.networks.classifier import load_classifier

EPOCHS = 4
COVIDX = {"data_set": "covidx", "task": "multiclass", "label_names": ["normal", "pneumonia", "COVID-19"]}

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def xray(task_bundle: Any) -> Any:
    return task_bundle("chest_xray_classification")


@pytest.fixture(scope="module")
def ct(task_bundle: Any) -> Any:
    return task_bundle("chest_ct_classification")


@pytest.fixture(scope="module")
def probe(xray: Any) -> tuple[Path, ConfigWorkflow]:
    """A finished probe of X-rays."""
    return xray.finished()


def encoder_changed(folder: Path, bundle: Any) -> set[str]:
    """Tensors of the trained encoder that differ from the pre-trained one's."""
    before = torch.load(bundle.encoder, weights_only=True)
    after = load_classifier(folder / "models" / "model.pt").encoder.state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_best_epoch_is_the_one_of_the_lowest_validation_loss(probe: Any, xray: Any) -> None:
    folder, _ = probe
    rows = [row for row in last(folder)["history"]["rows"] if "val_loss" in row]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    losses = [row["val_loss"] for row in rows]
    assert min(losses) < losses[-1]
    assert last(folder)["best"] == min(losses)
    network = load_classifier(folder / "models" / "model.pt")
    chain = task_transforms(network.card["preprocessing"])
    items = read(folder / "data.json")["validation"]
    known = {"label_names": network.card["label_names"], "task": "multilabel", "dim": 2}
    dataset = ImageDataset(items, chain, xray.data / "chexpert", "label", **known)
    (batch,) = ImageLoader(dataset, 100)
    with torch.no_grad():
        found = ClassificationLoss("multilabel")(network(batch["image"]), batch["label"])
    assert float(found) == pytest.approx(min(losses), rel=1e-4)
    newest = last(folder)["network"]
    assert not torch.equal(newest["head.weight"], network.head.weight)


def test_a_seed_repeats_a_run(probe: Any, xray: Any, checkpoint_differences: Any, tmp_path: Path) -> None:
    folder, _ = probe
    xray.train(tmp_path)
    assert checkpoint_differences(last(tmp_path), last(folder)) == []
    xray.train(tmp_path, seed=1, epochs=1)
    assert not torch.equal(last(tmp_path)["network"]["head.weight"], last(folder)["network"]["head.weight"])


def test_a_resumed_fine_tuning_equals_one_that_was_never_interrupted(
    xray: Any, checkpoint_differences: Any, tmp_path: Path
) -> None:
    folder, again = tmp_path / "whole", tmp_path / "interrupted"
    xray.train(folder, "fine_tune", batch_size=16)
    xray.interrupted(again, 2, "fine_tune", batch_size=16)
    assert last(again)["epoch"] == 2
    xray.train(again, "fine_tune", batch_size=16, resume=True)
    assert checkpoint_differences(last(again), last(folder)) == []
    assert last(again)["early_stop"]["best_score"] == pytest.approx(-last(folder)["best"])
    best = [torch.load(run / "models" / "model.pt", weights_only=True) for run in (again, folder)]
    assert checkpoint_differences(*best) == []
    assert read(again / "eval" / "metrics.json") == read(folder / "eval" / "metrics.json")


def test_the_probe_stops_where_its_loss_rises(probe: Any) -> None:
    state = last(probe[0])
    assert state["epoch"] == EPOCHS
    assert state["early_stop"]["best_score"] == pytest.approx(-state["best"])
    assert state["early_stop"]["counter"] > 0
    assert read(probe[0] / "models" / "model.json")["preprocessing"] == {"xray": {"size": 32}}


def test_another_data_set_and_a_fraction_of_its_labels(xray: Any, tmp_path: Path) -> None:
    made = xray.train(tmp_path, **COVIDX, label_fraction=0.5, epochs=1, patience="$None")
    training = read(tmp_path / "data.json")["training"]
    patients = {item["patient"] for item in training}
    used = made.parser.get_parsed_content("train#dataset").data
    assert len({item["patient"] for item in used}) == int(len(patients) / 2 + 0.5)
    assert {item["id"] for item in used} < {item["id"] for item in training}
    metrics = read(tmp_path / "eval" / "metrics.json")
    assert metrics["task"] == "multiclass"
    assert list(metrics["auroc"]) == COVIDX["label_names"]
    assert load_classifier(tmp_path / "models" / "model.pt").head.out_features == 3


def test_fine_tuning_ct_moves_the_encoder_and_the_probe_does_not(ct: Any, tmp_path: Path) -> None:
    ct.train(tmp_path / "probe", epochs=1)
    assert encoder_changed(tmp_path / "probe", ct) == set()
    made = ct.train(tmp_path / "fine", "fine_tune", epochs=1, batch_size=8, **{"network_def#use_slices": True})
    moved = encoder_changed(tmp_path / "fine", ct)
    assert set(UnifiedViT(**ct.sizes).state_dict()) - moved == {"mask_token"}
    network = load_classifier(tmp_path / "fine" / "models" / "model.pt")
    assert (network.use_slices, network.num_slices, network.freeze_encoder) == (True, 2, False)
    rows = last(tmp_path / "fine")["history"]["rows"]
    # polynomial decay of power 0.9 over the run's steps
    steps = len(rows)
    assert [row["lr"] for row in rows] == pytest.approx([1e-3 * (1 - i / steps) ** 0.9 for i in range(steps)])
    assert {row["lr"] for row in last(tmp_path / "probe")["history"]["rows"]} == {0.5}
    assert read(tmp_path / "fine" / "models" / "model.json")["preprocessing"].keys() == {"slices", "ct"}
    assert made.check_properties() == []


def test_missing_weights_give_one_message_before_any_data_is_made(ct: Any, command: Any, tmp_path: Path) -> None:
    changes = {"encoder_weights": tmp_path / "model.pt", "dataset_dir": tmp_path / "data", "device": "cpu"}
    result = command(ct.files("train")[0], {**changes, "ckpt_dir": tmp_path / "models"}, tmp_path)
    assert result.returncode == 2
    assert [line for line in result.stderr.splitlines() if "error" in line] == [
        f"error: {tmp_path}/model.pt: no pre-trained encoder. Train one with 'make pretrain', give other weights with "
        "--encoder_weights, or --encoder_weights none for random initialisation"
    ]
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes(xray: Any, tmp_path: Path, command: Any) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    # an image that two ranks cannot share is left out; the ranks have two and one batches of validation
    same = {"epochs": 2, "train#dataloader#drop_last": True, "validate#dataloader#batch_size": 1}
    changes = xray.overrides(tmp_path, batch_size=4, **same)
    result = command(xray.files("train", "multi_gpu_train"), changes, tmp_path, launcher)
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["last.ckpt", "model.json", "model.pt"]
    assert not any(name.startswith("module.") for name in last(tmp_path)["network"])
    said = result.stdout + result.stderr
    assert said.count("Epoch[1] Metrics") == said.count("Epoch[2] Metrics") == 1
    # the joint batches, their statistics and the metrics over both ranks are those of one process with twice the batch
    xray.train(tmp_path / "one", batch_size=8, **same)
    ours, theirs = (last(folder)["history"]["rows"] for folder in (tmp_path, tmp_path / "one"))
    assert len(ours) == len(theirs)
    for key in ("val_loss", "val_score"):
        values = [[row[key] for row in rows if key in row] for rows in (ours, theirs)]
        assert len(values[0]) == 2
        assert values[0] == pytest.approx(values[1], rel=1e-3), key
    weights = [load_classifier(folder / "models" / "model.pt").head.weight for folder in (tmp_path, tmp_path / "one")]
    assert torch.allclose(*weights, atol=1e-3)
