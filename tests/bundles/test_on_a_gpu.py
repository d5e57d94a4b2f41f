# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can tell: its numbers beside the CPU's, mixed precision that resumes, and how often a step waits."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = REPOSITORY / "bundles" / "pretrain" / "configs" / "train.json"

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


def runs(trained: Any, folder: Path, data: Path, command: Any, **changes: Any) -> Any:
    run = type(trained)(folder, data)
    result = command(TRAIN, {**run.overrides, "device": "cuda", **changes}, REPOSITORY)
    assert result.returncode == 0, result.stderr[-3000:]
    return run


def test_float32_gives_what_the_cpu_gives(empty_run: Any, command: Any, tmp_path: Path) -> None:
    places = {
        name: runs(empty_run, tmp_path / name, empty_run.data, command, device=name, amp=False)
        for name in ("cpu", "cuda")
    }
    states = [torch.load(run.models / "model.pt", weights_only=True) for run in places.values()]
    for key, value in states[0].items():
        torch.testing.assert_close(
            states[1][key], value, rtol=1e-2, atol=1e-3, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("amp", ["auto", "float16"])
def test_mixed_precision_trains_and_resumes(empty_run: Any, command: Any, tmp_path: Path, amp: str) -> None:
    run = runs(empty_run, tmp_path / "run", empty_run.data, command, amp=amp, epochs=2)
    card = json.loads((run.models / "model.json").read_text())
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert card["amp_dtype"] == ("bfloat16" if amp == "auto" and native else "float16")
    runs(empty_run, run.root, run.data, command, amp=amp, epochs=3, resume=True)
    last = run.last()
    assert last["epoch"] == 3 and all(math.isfinite(row["loss"]) for row in last["history"]["rows"])
    # a computer without a GPU reads it
    assert all(value.device.type == "cpu" for value in last["network"].values())


@pytest.mark.usefixtures("in_process")
def test_a_steady_step_of_pre_training_waits_once(empty_run: Any) -> None:
    changes = {**empty_run.overrides, "epochs": 2, "device": "cuda"}
    workflow = ConfigWorkflow(str(TRAIN), workflow_type="train", logging_file=False, **changes)
    workflow.initialize()
    trainer = workflow.parser.get_parsed_content("train#trainer")
    counts: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for event in (Events.ITERATION_STARTED, Events.ITERATION_COMPLETED):
            trainer.add_event_handler(event, lambda: counts.append(sum("synchroniz" in str(w.message) for w in caught)))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            workflow.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    steps = [after - before for before, after in zip(counts[::2], counts[1::2], strict=True)]
    # the last step measures batch statistics behind it
    assert max(steps[len(steps) // 2 : -1]) <= 1, steps
