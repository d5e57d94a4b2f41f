# SPDX-License-Identifier: Apache-2.0
"""The user's own line from other folders, and a mistyped key.

The run from the repository's root is the `trained` fixture itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def one_epoch(new_run: Any) -> dict[str, Any]:
    return {**new_run.overrides, "epochs": 1}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["bundle folder", "elsewhere"])
def test_run(
    place: str, one_epoch: Any, new_run: Any, trained: Any, command: Any, configs: Path, tmp_path: Path
) -> None:
    elsewhere = place == "elsewhere"
    config = configs / "train.json" if elsewhere else "configs/train.json"
    result = command(config, one_epoch, tmp_path if elsewhere else configs.parent)
    assert result.returncode == 0, result.stderr[-3000:]
    assert new_run.metrics()["split"] == "test"
    # The first epoch's data, initial weights and first loss are those of any other run.
    assert new_run.last()["history"]["rows"][0]["loss"] == trained.last()["history"]["rows"][0]["loss"]
    assert torch.load(new_run.models / "model.pt", weights_only=True).keys()
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.slow
def test_a_mistyped_override_stops_before_anything_is_written(command: Any, configs: Path, tmp_path: Path) -> None:
    folders = {name: str(tmp_path / name) for name in ("dataset_dir", "cache_dir", "ckpt_dir", "output_dir")}
    result = command(configs / "train.json", {**folders, "epoch": 3}, tmp_path)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if "error" in line.lower()]
    assert errors == ["error: unknown override '--epoch': nothing defines it; did you mean 'epochs'?"]
    assert "Traceback" not in result.stdout + result.stderr
    assert list(tmp_path.iterdir()) == []
