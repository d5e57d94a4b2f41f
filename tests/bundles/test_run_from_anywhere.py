# SPDX-License-Identifier: Apache-2.0
"""The user's own line from other folders, a mistyped key, and the log that a run leaves.

The run from the repository's root is the `trained` fixture itself.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow

from unimedi_components.errors import DataError


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
    log = (new_run.eval / "run.log").read_text().splitlines()
    assert log[0].startswith("$ ") and "-m monai.bundle run --config_file" in log[0]
    assert sum("Epoch[1] Complete" in line for line in log) == sum("Epoch[1] Complete" in x for x in ran(result)) > 0
    assert any("Epoch[1] Metrics -- val_loss_vl: " in line for line in log)
    assert log[-1].endswith(f" - INFO - {new_run.eval / 'metrics.json'}: what was measured")


def ran(result: Any) -> list[str]:
    return (result.stdout + result.stderr).splitlines()


def test_a_fault_is_kept_in_the_log_of_a_run_that_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "train.json"
    content = {"imports": ["$import unimedi_components"], "output_dir": str(tmp_path / "eval"), "run": ["$@output_dir"]}
    config.write_text(json.dumps({**content, "initialize": ["$unimedi_components.check_run()"]}))
    monkeypatch.setattr(sys, "argv", ["monai/bundle/__main__.py", "run", "--config_file", str(config)])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "monai.bundle", "run", "--config_file", str(config)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(logging.getLogger(), "handlers", logging.getLogger().handlers[:])
    monkeypatch.delenv("UNIMEDI_DEBUG", raising=False)

    def fault(error: Exception) -> None:
        try:
            raise error
        except DataError as raised:
            with pytest.raises(SystemExit):
                sys.excepthook(type(raised), raised, raised.__traceback__)

    ConfigWorkflow(str(config), workflow_type="train", logging_file=False).initialize()
    fault(DataError("nothing has begun"))
    assert not (tmp_path / "eval").exists()
    logging.getLogger("ignite").warning("epoch 1")
    fault(DataError("a.png: torn"))
    first, second, *rest = (tmp_path / "eval" / "run.log").read_text().splitlines()
    assert first == f"$ python -m monai.bundle run --config_file {config}"
    assert second.endswith(" - ignite - WARNING - epoch 1")
    assert rest[0].endswith(" - unimedi_components - ERROR - a.png: torn")
    assert rest[-1] == "unimedi_components.errors.DataError: a.png: torn"


@pytest.mark.slow
def test_a_mistyped_override_stops_before_anything_is_written(command: Any, configs: Path, tmp_path: Path) -> None:
    folders = {name: str(tmp_path / name) for name in ("dataset_dir", "cache_dir", "ckpt_dir", "output_dir")}
    result = command(configs / "train.json", {**folders, "epoch": 3}, tmp_path)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if "error" in line.lower()]
    assert errors == ["error: unknown override '--epoch': nothing defines it; did you mean 'epochs'?"]
    assert "Traceback" not in result.stdout + result.stderr
    assert list(tmp_path.iterdir()) == []
