# SPDX-License-Identifier: Apache-2.0
"""Finding a bundle's folder from whatever folder its config is run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

import unimedi_components
from unimedi_components import bundle_root
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
    with pytest.raises(ConfigError) as error:
        bundle_root("pretrane")
    assert str(error.value) == (
        f"bundle 'pretrane' not found (looked at {tmp_path}, {tmp_path}/bundles/pretrane, "
        f"{REPOSITORY}/bundles/pretrane): pass --bundle_root PATH"
    )


def test_in_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    run_from(monkeypatch, REPOSITORY)
    config = {
        "imports": ["$import unimedi_components"],
        "bundle_root": "$unimedi_components.bundle_root('pretrain')",
    }
    parser = ConfigParser(config)
    assert parser.get_parsed_content("bundle_root") == str(REPOSITORY / "bundles" / "pretrain")
