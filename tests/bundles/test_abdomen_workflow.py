# SPDX-License-Identifier: Apache-2.0
"""The abdomen bundle end to end over small phantoms: training, its best epoch, overlays, two gloo processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from tests.common import REPOSITORY, last, read
from unimedi_components.data import amos, bcv
from unimedi_components.networks import load_network

BUNDLE = "abdomen_ct_segmentation"
CONFIGS = REPOSITORY / "bundles" / BUNDLE / "configs"

pytestmark = pytest.mark.usefixtures("in_process")


def test_a_run_leaves_its_files(finished: Any, bundle: Any) -> None:
    folder, made = finished
    assert made.check_properties() == []
    assert {path.name for path in (folder / "models").iterdir()} == {"model.pt", "model.json", "last.ckpt"}
    datalist = read(folder / "data.json")
    assert {split: len(datalist[split]) for split in ("training", "validation", "test")} == {
        "training": 4,
        "validation": 0,
        "test": 1,
    }
    case = datalist["test"][0]["id"]
    names = {path.name for path in (folder / "eval").iterdir() if "tfevents" not in path.name}
    assert names == {"metrics.json", "run.json", "cases.csv", "loss_curves.png", f"{case}.png"}
    metrics = read(folder / "eval" / "metrics.json")
    assert (metrics["split"], metrics["cases"], metrics["skipped_files"]) == ("test", 1, 0)
    assert metrics["label_names"] == ["background", *bcv.ORGANS] == list(made.parser["label_names"])
    lines = (folder / "eval" / "cases.csv").read_text().splitlines()
    assert lines[0] == "id,patient,organ,dice,surface_dice,hd95_mm,voxels,predicted_voxels"
    truth = np.asarray(nib.load(bundle.data / "bcv" / datalist["test"][0]["mask"]).dataobj)
    assert [int(line.split(",")[6]) for line in lines[1:]] == [int((truth == i + 1).sum()) for i in range(13)]


def test_training_moves_all_that_the_task_reads(finished: Any, bundle: Any) -> None:
    folder, _ = finished
    before = torch.load(bundle.encoder, weights_only=True)
    after = load_network(folder / "models" / "model.pt", kind="unetr").encoder.state_dict()
    still = {name for name, value in before.items() if torch.equal(value, after[name])}
    # what volumes alone never meet
    assert still == {"mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias", "depth_embed"}
    rows = last(folder)["history"]["rows"]
    # four cases, repeated for about six steps in each epoch
    assert len(rows) == 2 * 8
    assert {"loss", "dice", "ce", "lr"} <= rows[0].keys()
    halves = [np.mean([row["loss"] for row in part]) for part in (rows[:8], rows[8:])]
    assert halves[1] < halves[0]


def test_without_validation_the_newest_epoch_counts(finished: Any, checkpoint_differences: Any) -> None:
    folder, _ = finished
    state = last(folder)
    assert state["best"] is None
    assert checkpoint_differences(state["network"], torch.load(folder / "models" / "model.pt", weights_only=True)) == []


def test_the_best_epoch_of_a_split_with_validation_cases(bundle: Any, tmp_path: Path) -> None:
    names = ["background", *amos.ORGANS]
    options = {"data_set": "amos", "label_names": names, "lr": 0.02, "epochs": 2, "bootstrap": 0}
    bundle.train(tmp_path, **options, **{"data#datalist#split": "official"})
    rows = [row["val_dice"] for row in last(tmp_path)["history"]["rows"] if "val_dice" in row]
    assert len(rows) == 2
    assert last(tmp_path)["best"] == max(rows)
    metrics = read(tmp_path / "eval" / "metrics.json")
    assert metrics["split"] == "validation"
    assert list(metrics["dice"]) == list(amos.ORGANS)


def test_amos_reports_the_last_weights_on_cases_that_chose_nothing(
    bundle: Any, checkpoint_differences: Any, tmp_path: Path
) -> None:
    names = ["background", *amos.ORGANS]
    bundle.train(tmp_path, data_set="amos", label_names=names, lr=0.02, epochs=2, bootstrap=0)
    state = last(tmp_path)
    assert state["best"] is None and not any("val_dice" in row for row in state["history"]["rows"])
    assert (
        checkpoint_differences(state["network"], torch.load(tmp_path / "models" / "model.pt", weights_only=True)) == []
    )
    metrics = read(tmp_path / "eval" / "metrics.json")
    truth = read(bundle.data / "amos" / "dataset.json")
    assert (metrics["split"], metrics["cases"]) == ("test", len(truth["validation"]))


@pytest.mark.parametrize("iterations", [3, 13])
def test_iterations_end_a_run_within_an_epoch(bundle: Any, tmp_path: Path, iterations: int) -> None:
    made = bundle.train(tmp_path, iterations=iterations, epochs=read(CONFIGS / "train.json")["epochs"], bootstrap=0)
    state, steps = last(tmp_path), len(made.parser.get_parsed_content("train#dataloader"))
    assert steps == 8 and state["epoch_length"] == 8
    rows = state["history"]["rows"]
    assert [(row["iteration"], row["epoch"]) for row in rows] == [(i + 1, i // 8 + 1) for i in range(iterations)]
    # the schedule ends with them: the last step is taken at the rate of what is left of it
    assert rows[-1]["lr"] == pytest.approx(made.parser["optimizer#lr"] * (1 / iterations) ** 0.9)
    weights = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert all(torch.equal(weights[key], value) for key, value in state["network"].items())


def test_crops_and_sliding_windows(bundle: Any, tmp_path: Path) -> None:
    """The paper's way in a small size: spacing, random crops, windows over the volume."""
    overlay = read(CONFIGS / "bcv.json")
    keys = ("train#crop", "preprocessing#organs#spatial_size", "network_def#deep_supervision", "loss#class_balance")
    changes = {**{key: overlay[key] for key in keys}, "preprocessing#organs#spacing": [12.0, 8.0, 8.0]}
    made = bundle.train(tmp_path, **changes, epochs=1, label_fraction=0.5)
    batch = next(iter(made.parser.get_parsed_content("train#dataloader")))
    assert batch["image"].shape == batch["label"].shape == (1, 1, 8, 24, 24)
    assert len(made.parser.get_parsed_content("train#dataset").data) == 2
    card = read(tmp_path / "models" / "model.json")
    assert card["preprocessing"]["organs"]["spacing"] == [12.0, 8.0, 8.0]
    assert card["preprocessing"]["organs"]["spatial_size"] is None
    assert read(tmp_path / "eval" / "metrics.json")["mean_dice"] is not None


@pytest.mark.parametrize("name", ["bcv", "amos"])
def test_overlays_hold_the_papers_numbers(name: str) -> None:
    parser = ConfigParser(read(CONFIGS / "train.json"))
    parser.update(read(CONFIGS / f"{name}.json"))
    paper = {
        **{"vol_size": [48, 224, 224], "size": "vit_b16", "freeze_encoder": False, "iterations": 25000},
        **{"preprocessing#organs#spatial_size": None, "preprocessing#organs#spacing": [3.0, 0.76, 0.76]},
        **{"train#dataloader#batch_size": 2, "train#run#max_grad_norm": 12.0, "train#augment#prob": 0.3},
        **{"train#augment#flip_prob": 0.5, "optimizer#lr": 1e-4, "optimizer#encoder_lr": 1e-4},
        **{"optimizer#weight_decay": 1e-5, "lr_scheduler#warmup_iters": 0, "loss#class_balance": 0.0},
        **{"network_def#deep_supervision": False, "network_def#background_prior": None},
        **{"network_def#hidden_states": [3, 6, 9], "network_def#normalize_states": False},
        **{"network_def#residual_scores": False, "network_def#feature_size": 16},
    }
    assert {key: parser[key] for key in paper} == paper
    organs = {"bcv": bcv.ORGANS, "amos": amos.ORGANS}[name]
    assert parser["label_names"] == ["background", *organs]
    assert parser["data#datalist#dataset"] == name and parser["data#datalist#phantoms"] is None
    # neither protocol chooses an epoch on the cases that it reports
    assert parser["data#datalist"].get("split") == {"bcv": None, "amos": "paper"}[name]
    random = [step["_target_"].rsplit(".", 1)[-1] for step in parser["train#random_transforms"]]
    # the list of the supplement, 7.2
    assert set(random) == {
        "RandSimilarityd",
        "RandFlipd",
        "RandGaussianNoised",
        "RandGaussianSmoothd",
        "RandShiftIntensityd",
        "RandScaleIntensityd",
        "RandSimulateLowResolutiond",
        "RandAdjustContrastd",
    }


@pytest.mark.slow
def test_two_processes(bundle: Any, tmp_path: Path, command: Any) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    fixed = {"train#repeated#times": 1, "train#dataloader#drop_last": True, "train#random_transforms": []}
    changes = bundle.overrides(tmp_path, **fixed)
    result = command(bundle.files("train", "multi_gpu_train"), changes, tmp_path, launcher)
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["last.ckpt", "model.json", "model.pt"]
    # one process with twice the batch takes the same steps
    bundle.train(tmp_path / "one", batch_size=2, **fixed)
    ours, theirs = (last(folder)["network"] for folder in (tmp_path, tmp_path / "one"))
    assert ours.keys() == theirs.keys()
    assert len(last(tmp_path)["history"]["rows"]) == len(last(tmp_path / "one")["history"]["rows"]) == 4
    assert all(torch.allclose(value, theirs[name], atol=2e-3) for name, value in ours.items())
