# SPDX-License-Identifier: Apache-2.0
"""kill -9 in the middle of an epoch, resume: the weights of a run that was never interrupted, bit for bit."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ITERATION = re.compile(r"Epoch: (\d+)/\d+, Iter: (\d+)/(\d+)")


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Where two checkpoints differ."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [place]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{place}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [found for key in a for found in differences(a[key], b[key], f"{place}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{place}/{i}")]
    return [] if a == b else [f"{place}: {a!r} {b!r}"]


def kill_in_epoch(process: Any, log: Path, epoch: int, step: int) -> tuple[int, int]:
    """Kill -9 once the log shows this step; returns the last step that it shows."""
    limit = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < limit:
        seen = ITERATION.findall(log.read_text())
        if seen and (int(seen[-1][0]), int(seen[-1][1])) >= (epoch, step):
            break
        time.sleep(0.005)
    process.kill()
    process.wait()
    last = ITERATION.findall(log.read_text())[-1]
    return int(last[0]), int(last[1])


@pytest.mark.slow
def test_resumed_weights_equal_those_of_an_uninterrupted_run(
    trained: Any, new_run: Any, command: Any, started: Any, configs: Path, tmp_path: Path
) -> None:
    steps = trained.last()["epoch_length"]
    talkative = tmp_path / "talkative.json"
    handler = {
        "_target_": "monai.handlers.StatsHandler",
        "tag_name": "loss",
        "output_transform": "$lambda x: x['loss']",
    }
    talkative.write_text(json.dumps({"+train#handlers": [handler]}))
    log = tmp_path / "log.txt"
    process = started([configs / "train.json", talkative], new_run.overrides, tmp_path, log)
    epoch, step = kill_in_epoch(process, log, epoch=2, step=2)
    assert process.returncode == -9, log.read_text()[-3000:]
    assert epoch == 2
    assert step < steps
    assert new_run.last()["epoch"] == 1
    assert not (new_run.eval / "metrics.json").exists()
    result = command(configs / "train.json", {**new_run.overrides, "resume": True}, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resumed after epoch 1 of 3" in result.stdout + result.stderr
    for name in ("model.pt", "unimedi.pt", "model_best.pt", "last.pt"):
        ours, theirs = (torch.load(run.models / name, weights_only=True) for run in (new_run, trained))
        assert differences(ours, theirs) == [], name
    assert new_run.metrics() == trained.metrics()
    assert not list(new_run.models.glob("*.tmp*"))
