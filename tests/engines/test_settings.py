# SPDX-License-Identifier: Apache-2.0
"""Which settings a resumed run may change: told apart by what they do, for every bundle's own config."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from tests.common import REPOSITORY
from unimedi_components.config_check import check_config
from unimedi_components.engines import settings
from unimedi_components.engines.settings import check_settings, run_settings
from unimedi_components.errors import CheckpointError

LAST = Path("models/last.pt")
FREE = {"epochs": 99, "device": "cuda:1", "train#dataloader#num_workers": 7, "output_dir": "elsewhere", "amp": False}
FREE |= {"val_interval": 3, "ckpt_dir": "moved", "dataset_dir": "/moved", "train#trainer#max_epochs": 9, "resume": True}
#: Bundle -> (override, what it replaces), of what is trained on or from.
FIXED: dict[str, list[tuple[str, Any, str]]] = {
    "pretrain": [("dims", [2], "[2, 3]"), ("train#sampler#batch_2d", 8, "64"), ("size", "vit_b16", "tiny")],
    "chest_xray_classification": [("label_fraction", 0.1, "1.0"), ("recipe#probe#lr", 1.5, "0.01")],
    "chest_ct_classification": [("data#datalist#dataset", "luna16", "cc_ccii"), ("seed", 3, "0")],
    "chest_xray_segmentation": [("train#dataloader#batch_size", 3, "16"), ("optimizer#lr", 0.5, "0.015")],
    "chest_xray_detection": [("network_def#width", 8, "16"), ("img_size", 64, "128")],
    "abdomen_ct_segmentation": [("vol_size", [32, 24, 24], "[32, 48, 48]"), ("label_names", ["a", "b"], "")],
}


def recorded(
    monkeypatch: pytest.MonkeyPatch, bundle: str, ids: str = "abc", folder: Path = Path("models"), **changes: Any
) -> dict[str, Any]:
    """The settings of a bundle's train.json with overrides."""
    config = check_config(REPOSITORY / "bundles" / bundle / "configs" / "train.json", changes)
    if bundle != "pretrain" and "encoder_weights" not in changes:
        config["encoder_weights"] = "timm:vit_tiny"
    workflow = SimpleNamespace(parser=ConfigParser(config))
    monkeypatch.setattr(settings, "workflow_in_use", lambda: workflow)
    return run_settings(folder, SimpleNamespace(data=[{"id": id_} for id_ in ids]))


@pytest.mark.parametrize("bundle", FIXED)
def test_what_is_trained_on_or_from_stays(
    bundle: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = recorded(monkeypatch, bundle)
    torch.save(before, tmp_path / "settings.pt")
    assert torch.load(tmp_path / "settings.pt", weights_only=True) == before
    extra = {"iterations": 7} if bundle == "abdomen_ct_segmentation" else {}
    with caplog.at_level(logging.WARNING):
        check_settings(before, recorded(monkeypatch, bundle, **{**FREE, **extra}), LAST)
    assert caplog.text == ""
    for key, value, old in FIXED[bundle]:
        now = recorded(monkeypatch, bundle, **FREE, **{key: value})
        with pytest.raises(CheckpointError) as caught:
            check_settings(before, now, LAST)
        assert f"models/last.pt: its run was started with {key} {old}" in str(caught.value)
        assert f", not {value}. A resumed run goes on with the same: give --{key} " in str(caught.value)
        assert str(caught.value).endswith(", or start anew with another --ckpt_dir, without --resume")


def test_one_message_names_all_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    before = recorded(monkeypatch, "pretrain")
    with pytest.raises(CheckpointError) as caught:
        check_settings(before, recorded(monkeypatch, "pretrain", "ab", seed=1, encoder_weights="timm:vit_tiny"), LAST)
    assert str(caught.value) == (
        "models/last.pt: its run was started with seed 0, not 1, encoder_weights None, not timm:vit_tiny. A resumed "
        "run goes on with the same: give --seed 0 --encoder_weights '$None', or start anew with another --ckpt_dir, "
        "without --resume"
    )


def test_the_same_config_over_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    before, now = (recorded(monkeypatch, "chest_ct_classification", ids) for ids in ("abc", "acb"))
    first, second = (hashlib.sha256("\n".join(ids).encode()).hexdigest()[:12] for ids in ("abc", "acb"))
    message = rf"with training images 3 \(ids {first}\), not 3 \(ids {second}\)\. .*: give its own --dataset_dir and"
    with pytest.raises(CheckpointError, match=message):
        check_settings(before, now, LAST)


def test_weights_are_told_apart_by_what_they_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = [tmp_path / part / "model.pt" for part in ("one", "moved", "models")]
    for file in files:
        file.parent.mkdir()
        file.write_bytes(b"weights")

    def now(file: Path) -> dict[str, Any]:
        return recorded(
            monkeypatch, "chest_xray_detection", folder=tmp_path / "models", **{"encoder_weights": str(file)}
        )

    before = now(files[0])
    check_settings(before, now(files[1]), LAST)
    # a bundle that was given alone starts from its own weights, which the run replaces
    assert "encoder_weights" not in now(files[2])
    check_settings(before, now(files[2]), LAST)
    for file, remedy in ((files[0], "give what it was started with, or"), (files[1], f"--encoder_weights {files[0]},")):
        file.write_bytes(b"others")
        with pytest.raises(CheckpointError, match=rf"{files[0]} \(sha256 .*, not {file} \(sha256 .*{remedy}"):
            check_settings(before, now(file), LAST)


def test_other_changes_are_told_and_hold(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    bundle = "abdomen_ct_segmentation"
    before = recorded(monkeypatch, bundle)
    now = recorded(monkeypatch, bundle, **{"loss#class_balance": 0.25, "network_def#encoder#depth": 3})
    with caplog.at_level(logging.WARNING):
        check_settings(before, now, LAST)
    # one side alone may be another version's
    told = "loss#class_balance 0.25 (before: 0.5), network_def#encoder#depth 3 (before: None)"
    message = f"models/last.pt: resumed with other settings, which hold from here on: {told}"
    assert sorted(caplog.messages[0]) == sorted(message) and len(caplog.messages) == 1


def test_a_value_may_be_spelled_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    before = recorded(monkeypatch, "pretrain")
    now = recorded(
        monkeypatch, "pretrain", **{"preprocessing#xray#size": 64, "encoder_weights": "$None", "dims": (2, 3)}
    )
    check_settings(before, now, LAST)


def test_checkpoints_without_a_record_are_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_settings({}, recorded(monkeypatch, "pretrain"), LAST)
    check_settings(recorded(monkeypatch, "pretrain"), {}, LAST)
    monkeypatch.setattr(settings, "workflow_in_use", lambda: None)
    assert run_settings(Path("models")) == {}
