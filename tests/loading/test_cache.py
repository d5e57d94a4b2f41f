# SPDX-License-Identifier: Apache-2.0
"""The command `cache`: what training reads afterwards, what is made again, and what other versions left."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser

from unimedi_components.__main__ import main
from unimedi_components.config_check import check_config
from unimedi_components.loading import dataset

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = {"img_size": 32, "vol_size": [8, 16, 16], "datalist#phantoms": {"mimic_cxr": 6, "bimcv": 5}}


def config(bundle: str = "pretrain") -> str:
    return str(REPOSITORY / "bundles" / bundle / "configs" / "train.json")


def flags(**changes: Any) -> list[str]:
    return [word for key, value in {**SMALL, **changes}.items() for word in (f"--{key}", str(value))]


def records(cache: Path) -> int:
    return sum(path.stat().st_size // 32 for path in cache.glob("*d-*/*.index"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of phantoms whose images are cached."""
    folder = tmp_path_factory.mktemp("cached")
    main(["cache", config(), "--workers", "2", *flags(data_dir=folder)])
    return folder


def test_training_finds_every_image_ready(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    shards = {path: path.stat().st_mtime_ns for path in (data / "cache").glob("*/*")}
    parser = ConfigParser(check_config(config(), {**SMALL, "data_dir": str(data)}))
    items = parser.get_parsed_content("items")
    count = len(items["training"]) + len(items["validation"])
    assert records(data / "cache") == count > 6

    def computes(*_: Any) -> Any:
        raise AssertionError("an image was computed")

    monkeypatch.setattr(dataset.ImageDataset, "_compute", computes)
    ready = parser.get_parsed_content("train#dataset")
    assert [ready[index]["image"].shape[0] for index in range(len(ready))] == [1] * len(items["training"])
    # a second call reads alone
    main(["cache", config(), "--workers", "0", *flags(data_dir=data)])
    said = capsys.readouterr().out
    assert f"training: {len(items['training'])} images ready, 0 unreadable" in said
    assert {path: path.stat().st_mtime_ns for path in (data / "cache").glob("*/*")} == shards


def test_a_changed_file_is_said_in_one_line_and_made_again(
    data: Path, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    parser = ConfigParser(check_config(config(), {**SMALL, "data_dir": str(data)}))
    before, films = records(data / "cache"), parser.get_parsed_content("train#dataset")
    for item in [item for item in films.data if item["dim"] == 2][:2]:
        os.utime(films.root / item["image"], (time.time() + 9,) * 2)
    caplog.clear()
    main(["cache", config(), "--workers", "0", *flags(data_dir=data)])
    said = [line.message for line in caplog.records if "changed" in line.message]
    assert len(said) == 1 and said[0].endswith(
        "files have changed since their images were cached; these are made again"
    )
    assert records(data / "cache") == before + 2


def test_what_other_versions_left_is_named_and_removed_on_demand(
    data: Path, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    cache = data / "cache"
    present = {path.name for path in cache.glob("*d-*")}
    (cache / "3d-0123456789abcdef").mkdir()
    (cache / "3d-0123456789abcdef" / "a.shard").write_bytes(b"1")
    (cache / f"{0:064x}.pt").write_bytes(b"1")
    dataset._name_older_images.cache_clear()
    words = ["cache", config(), "--workers", "0", *flags(data_dir=data)]
    main(words)
    named = f"{cache}: {0:064x}.pt and 1 more is of another version and not read; "
    assert caplog.text.count(named) == 1
    main([*words, "--clean"])
    assert re.findall(r"removed .*/(\S+)", capsys.readouterr().out) == [f"{0:064x}.pt", "3d-0123456789abcdef"]
    assert {path.name for path in cache.glob("[0-9]*")} == present


def test_task_bundles_are_cached_too(tmp_path: Path, capsys: Any) -> None:
    changes = {
        "data#datalist#phantoms": 5,
        "vol_size": [8, 16, 16],
        "data_dir": tmp_path,
        "datalist_file": tmp_path / "d.json",
    }
    words = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    main(["cache", config("abdomen_ct_segmentation"), "--workers", "0", *words])
    ready = re.findall(r"(\w+): (\d+) images ready, 0 unreadable", capsys.readouterr().out)
    assert [name for name, _ in ready] == ["training", "validation"]
    assert records(tmp_path / "cache") == sum(int(count) for _, count in ready) > 2


def test_a_config_without_a_cache_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    inference = str(REPOSITORY / "bundles" / "pretrain" / "configs" / "inference.json")
    with pytest.raises(SystemExit, match="2"):
        main(["cache", inference])
    wanted = "error: this config caches no images: it needs cache_dir, train#dataset and validate#dataset\n"
    assert capsys.readouterr().err == wanted


def test_data_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(config()).with_name("mimic_cxr_bimcv.json")
    with pytest.raises(SystemExit, match="2"):
        main(["cache", config(), str(recipe), "--data_dir", str(tmp_path)])
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'mimic_cxr'}: no such folder. ") and said.count("\n") == 1
