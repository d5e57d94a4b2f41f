# SPDX-License-Identifier: Apache-2.0
"""Finding a bundle's folder from whatever folder its config is run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow

import unimedi_components
from unimedi_components import bundle_root, encoder_weights
from unimedi_components.errors import ConfigError

REPOSITORY = Path(unimedi_components.__file__).resolve().parents[1]
MONAI_MAIN = "/site-packages/monai/bundle/__main__.py"


def make_bundle(folder: Path, asks_for: str) -> Path:
    (folder / "configs").mkdir(parents=True)
    config = {"bundle_root": f"$unimedi_components.bundle_root('{asks_for}')"}
    (folder / "configs" / "train.json").write_text(json.dumps(config))
    return folder


def run_from(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [MONAI_MAIN, "run", *words])


@pytest.mark.parametrize(
    "words", [("--config_file", "{}"), ("--config_file={}",), ("--config_file", "['{}','x.json']")]
)
def test_absolute_config_file_from_elsewhere(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_bundle(tmp_path / "clone" / "bundles" / "pretrain", "pretrain")
    run_from(monkeypatch, tmp_path, *(word.format(root / "configs" / "train.json") for word in words))
    assert bundle_root("pretrain") == str(root)


def test_relative_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_bundle(tmp_path / "bundles" / "pretrain", "pretrain")
    for folder, file in {
        tmp_path: "bundles/pretrain/configs/train.json",
        root: "configs/train.json",
        root / "configs": "train.json",
    }.items():
        run_from(monkeypatch, folder, "--config_file", file)
        assert bundle_root("pretrain") == str(root)


def test_without_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_bundle(tmp_path / "bundles" / "pretrain", "pretrain")
    run_from(monkeypatch, root)
    assert bundle_root("pretrain") == str(root)
    run_from(monkeypatch, tmp_path)
    assert bundle_root("pretrain") == str(root)
    run_from(monkeypatch, tmp_path / "bundles")
    assert bundle_root("pretrain") == str(REPOSITORY / "bundles" / "pretrain")
    assert bundle_root("pretrain", str(root / "configs" / "train.json")) == str(root)


def test_renamed_copy_keeps_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_bundle(tmp_path / "bundles" / "pretrain", "pretrain")
    copy = make_bundle(tmp_path / "my_experiment", "pretrain")
    run_from(monkeypatch, tmp_path, "--config_file", "my_experiment/configs/train.json")
    assert bundle_root("pretrain") == str(copy)


def test_another_bundles_config_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_bundle(tmp_path / "bundles" / "pretrain", "pretrain")
    make_bundle(tmp_path / "bundles" / "chest_xray_classification", "chest_xray_classification")
    run_from(monkeypatch, tmp_path, "--config_file", "bundles/chest_xray_classification/configs/train.json")
    assert bundle_root("pretrain") == str(root)


def test_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_from(monkeypatch, tmp_path)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    with pytest.raises(ConfigError) as error:
        bundle_root("pretrane")
    assert str(error.value) == (
        f"bundle 'pretrane' not found (looked at {tmp_path}, {tmp_path}/bundles/pretrane, "
        f"{tmp_path}/hub/bundle/pretrane, {REPOSITORY}/bundles/pretrane): pass --bundle_root PATH"
    )


def test_in_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    run_from(monkeypatch, REPOSITORY)
    config = {"imports": ["$import unimedi_components"], "bundle_root": "$unimedi_components.bundle_root('pretrain')"}
    parser = ConfigParser(config)
    assert parser.get_parsed_content("bundle_root") == str(REPOSITORY / "bundles" / "pretrain")


def workflow_over(config_file: Path) -> ConfigWorkflow:
    made = ConfigWorkflow(str(config_file), workflow_type=None, logging_file=False)
    made.initialize()
    return made


def test_a_workflow_reads_the_bundle_that_its_config_lies_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    run_from(monkeypatch, tmp_path / "empty")
    for folder in ("bundles", "zoo"):
        root = make_bundle(tmp_path / folder / "pretrain", "pretrain")
        config = {
            "imports": ["$import unimedi_components"],
            "bundle_root": "$unimedi_components.bundle_root('pretrain')",
        }
        (root / "configs" / "inference.json").write_text(json.dumps({**config, "run": "@bundle_root"}))
        made = workflow_over(root / "configs" / "inference.json")
        assert made.run() == [str(root)]
        assert bundle_root("pretrain") != str(root)


def test_pretrain_beside_the_running_bundle_then_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    run_from(monkeypatch, tmp_path / "empty")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    downloaded = make_bundle(tmp_path / "hub" / "bundle" / "pretrain", "pretrain")
    task = make_bundle(tmp_path / "zoo" / "chest_ct_classification", "chest_ct_classification")
    config = {
        "imports": ["$import unimedi_components"],
        "run": [
            "$unimedi_components.bundle_root('pretrain')",
            "$unimedi_components.encoder_weights('elsewhere/models')",
        ],
    }
    (task / "configs" / "train.json").write_text(json.dumps(config))
    made = workflow_over(task / "configs" / "train.json")
    assert made.run() == [str(downloaded), str(downloaded / "models" / "model.pt")]
    assert encoder_weights(str(task / "models")) == str(downloaded / "models" / "model.pt")
    beside = make_bundle(tmp_path / "zoo" / "pretrain", "pretrain")
    assert made.run() == [str(beside), str(beside / "models" / "model.pt")]
    # as in MONAI Label, which gives the bundle's folder and no command line
    assert encoder_weights(str(task / "models")) == str(beside / "models" / "model.pt")
    assert bundle_root("pretrain") == str(downloaded)
    run_from(monkeypatch, tmp_path / "empty", "--config_file", str(task / "configs" / "train.json"))
    assert bundle_root("pretrain") == str(beside)


def test_a_bundle_that_carries_weights_prefers_them(tmp_path: Path) -> None:
    pretrained = make_bundle(tmp_path / "pretrain", "pretrain") / "models" / "model.pt"
    models = tmp_path / "report_retrieval" / "models"
    assert encoder_weights(str(models), prefer_own=True) == str(pretrained)
    models.mkdir(parents=True)
    (models / "model.pt").touch()
    assert encoder_weights(str(models), prefer_own=True) == str(models / "model.pt")
