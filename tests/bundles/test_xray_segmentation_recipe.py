# SPDX-License-Identifier: Apache-2.0
"""rsna.json resolved without data or weights: the numbers of supplement 7.2, and MGCA's where the paper is silent."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from unimedi_components.config_check import check_config
from unimedi_components.data.rsna import TASKS

CONFIGS = Path(__file__).resolve().parents[2] / "bundles" / "chest_xray_segmentation" / "configs"


@pytest.fixture(scope="module")
def recipe() -> ConfigParser:
    parser = ConfigParser(deepcopy(check_config([CONFIGS / "train.json", CONFIGS / "rsna.json"])))
    parser.update({"encoder_weights": "none", "device": "meta", "train#dataloader": range(100)})
    return parser


@pytest.fixture(scope="module")
def batch_size() -> int:
    return check_config([CONFIGS / "train.json", CONFIGS / "rsna.json"])["train"]["dataloader"]["batch_size"]


@pytest.fixture(scope="module")
def network(recipe: ConfigParser) -> Any:
    with torch.device("meta"):
        return recipe.get_parsed_content("network_def")


def test_optimisation(recipe: ConfigParser, network: Any, batch_size: int) -> None:
    optimizer = recipe.get_parsed_content("optimizer")
    assert type(optimizer) is torch.optim.AdamW
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4}
    assert max(group["weight_decay"] for group in optimizer.param_groups) == 1e-6
    scheduler = recipe.get_parsed_content("lr_scheduler")
    for _ in range(3):
        assert set(scheduler.get_last_lr()) == {5e-4}
        optimizer.step()
        scheduler.step()
    assert (recipe["epochs"], recipe["train#run#patience"], batch_size) == (50, 10, 16)
    assert list(recipe["validate"]["key_metric"]) == ["val_loss"]


def test_loss(recipe: ConfigParser) -> None:
    loss = recipe.get_parsed_content("loss")
    assert (loss.alpha, loss.focal.gamma, loss.dice) == (10, 2, "linear")


def test_network(network: Any) -> None:
    assert network.hparams["freeze_encoder"] and network.hparams["variant"] == "mgca"
    assert network.hparams["widths"] == [512, 256, 128, 64] and network.hparams["align_corners"]
    learning = {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert learning == {"tokens", "stages", "head"}
    keys = ("img_size", "vol_size", "patch_size", "patch_size_3d", "embed_dim", "depth", "num_heads")
    assert [network.encoder.hparams[key] for key in keys] == [
        (224, 224), (32, 128, 128), (16, 16), (4, 16, 16), 768, 12, 12
    ]  # fmt: skip


def test_images_and_augmentation(recipe: ConfigParser) -> None:
    assert recipe.get_parsed_content("preprocessing") == {"film": {"size": 224}}
    chain = list(recipe.get_parsed_content("train#preprocessing"))
    deterministic = list(recipe.get_parsed_content("validate#preprocessing"))
    assert [type(step) for step in chain[: len(deterministic)]] == [type(step) for step in deterministic]
    shift, affine, back = chain[len(deterministic) :]
    assert affine.prob == 0.5
    parameters = affine.rand_affine.rand_affine_grid
    assert parameters.rotate_range == (math.radians(10),) and parameters.scale_range == ((-0.1, 0.1),)
    assert (parameters.translate_range, parameters.shear_range) == ((None,), (None,))
    assert shift.shifter.offset == -back.shifter.offset == 1


def test_split_of_the_official_patients(recipe: ConfigParser) -> None:
    assert recipe["data#datalist#task"] == "segmentation"
    # 16,010 / 5,337 / 5,337 of 26,684: tests/data/test_rsna.py
    assert TASKS["segmentation"] == ("segmentation", 0.4)
    assert recipe["data#datalist#phantoms"] is None and recipe["data#datalist#dataset"] == "rsna"
    assert recipe["label_names"] == ["background", "pneumonia"]
