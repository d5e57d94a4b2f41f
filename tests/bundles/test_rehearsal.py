# SPDX-License-Identifier: Apache-2.0
"""CUDA rehearsed: every network's step and every bundle's training, resuming, evaluation and inference, on a device
where two devices never meet unnoticed, and how often a step waits for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

REPOSITORY = Path(__file__).resolve().parents[2]
#: Waits that a step may have: losses are read once, and detection's box coder looks at its boxes.
BOUNDS = {"chest_xray_detection": 19}
TASKS = sorted(path.parents[1].name for path in REPOSITORY.glob("bundles/*_*/configs/train.json"))
ON_DEVICE = os.environ.get("UNIMEDI_TEST_DEVICE") == "rehearsal"
rehearsed = pytest.mark.skipif(not ON_DEVICE, reason="runs within test_the_rehearsal, on its device")


def program(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python program of one thread, from the repository's root."""
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **variables}
    where = {"cwd": REPOSITORY, "env": {**os.environ, **variables}}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=1500, **where)  # type: ignore[call-overload]


@pytest.mark.slow
@pytest.mark.skipif(ON_DEVICE, reason="it starts the rehearsal")
def test_the_rehearsal(tmp_path: Path) -> None:
    contract = "not refused and not readable and not metadata and not evaluate_reproduces"
    tests = [
        "tests/bundles/test_rehearsal.py",
        "tests/test_waits.py",
        "tests/bundles/test_task_contract.py",
        "-k",
        contract,
    ]
    words = ["-m", "pytest", "-p", "tests.rehearsal", "-p", "no:xdist", "-q", *tests, f"--basetemp={tmp_path}"]
    result = program(*words, UNIMEDI_TEST_DEVICE="rehearsal")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= 40, result.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(ON_DEVICE, reason="it starts the device itself")
def test_pre_training_gives_what_the_cpu_gives(trained: Any, new_run: Any) -> None:
    changes = {**new_run.overrides, "device": "rehearsal"}
    flags = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    config = str(REPOSITORY / "bundles" / "pretrain" / "configs" / "train.json")
    result = program("-m", "tests.rehearsal", "monai.bundle", "run", "--config_file", config, *flags)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    ours, cpu = (torch.load(place / "model.pt", weights_only=True) for place in (new_run.models, trained.models))
    assert ours.keys() == cpu.keys()
    for key, value in cpu.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-2, atol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


@rehearsed
def test_the_device_is_as_strict_as_a_gpu() -> None:
    from tests.rehearsal import counted

    x = torch.arange(6.0).reshape(2, 3)
    y = x.to("rehearsal")
    assert (y.device.type, (y @ y.T).cpu().tolist()) == ("rehearsal", (x @ x.T).tolist())
    for mixed in (lambda: y + x, lambda: torch.cat([x, y]), lambda: y @ x.T, lambda: torch.where(y > 1, x, y)):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            mixed()
    with counted() as found:
        (y + 1).sum().item(), y[y > 2], y.cpu(), y[0, 1] + 1, y.to("cpu", non_blocking=True)
        x.to("rehearsal"), x.to("rehearsal", non_blocking=True)
    names = sorted(name.split()[0] for name in found.elements())
    assert names == ["_local_scalar_dense", "_to_copy", "_to_copy", "copy_", "index"]
    with torch.autocast("rehearsal", dtype=torch.bfloat16):
        assert (y @ y.T).dtype is torch.bfloat16
        assert torch.softmax((y @ y.T), -1).dtype is torch.float32


@rehearsed
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", ["pretrain", *TASKS])
def test_a_steady_step_hardly_waits(name: str, tmp_path: Path, empty_run: Any, task_bundle: Any) -> None:
    from tests.rehearsal import waits

    if name == "pretrain":
        config = str(REPOSITORY / "bundles" / "pretrain" / "configs" / "train.json")
        workflow = ConfigWorkflow(
            config, workflow_type="train", logging_file=False, **{**empty_run.overrides, "epochs": 2}
        )
        workflow.initialize()
    else:
        bundle = task_bundle(name)
        workflow = bundle.workflow(bundle.overrides(tmp_path, epochs=2), "train")
    marks: list[Any] = []
    trainer = workflow.parser.get_parsed_content("train#trainer")
    for event in (Events.ITERATION_STARTED, Events.ITERATION_COMPLETED):
        trainer.add_event_handler(event, lambda: marks.append(waits.copy()))
    workflow.run()
    steps = [after - before for before, after in zip(marks[::2], marks[1::2], strict=True)]
    # the last step of pre-training measures batch statistics behind it
    steady = max(steps[len(steps) // 2 : -1] or steps[-1:], key=lambda step: step.total())
    assert steady.total() <= BOUNDS.get(name, 1), steady
