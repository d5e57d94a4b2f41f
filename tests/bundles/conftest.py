# SPDX-License-Identifier: Apache-2.0
"""A tiny pre-training run, made once for all tests of the bundles, and the means to start further ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import monai
import pytest
import torch
from filelock import FileLock

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "bundles" / "pretrain" / "configs"
EPOCHS = 3
TINY = {
    "phantoms": {"mimic_cxr": 36, "bimcv": 36},
    "batch_2d": 4,
    "batch_3d": 4,
    "epochs": EPOCHS,
    "device": "cpu",
    # The default rounds to bfloat16 on CPUs that have it, so that other batch shapes give other digits.
    "matmul_precision": "highest",
    "img_size": 32,
    "vol_size": [16, 24, 24],
    "out_dim": 64,
    "network_def#encoder#embed_dim": 32,
    "network_def#encoder#depth": 2,
    "network_def#encoder#num_heads": 2,
    "network_def#report_encoder#config#hidden_size": 32,
    "network_def#report_encoder#config#num_hidden_layers": 1,
}


@dataclass(frozen=True)
class Run:
    """Where a run reads and writes."""

    root: Path
    data: Path

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def eval(self) -> Path:
        return self.root / "eval"

    @property
    def folders(self) -> dict[str, str]:
        """Overrides that keep the run out of the repository."""
        return {
            "dataset_dir": str(self.data / "phantom"),
            "cache_dir": str(self.data / "cache"),
            "ckpt_dir": str(self.models),
            "output_dir": str(self.eval),
        }

    @property
    def overrides(self) -> dict[str, Any]:
        """Overrides of train.json for a run of seconds."""
        return {**TINY, **self.folders}

    def metrics(self) -> dict[str, Any]:
        return json.loads((self.eval / "metrics.json").read_text())

    def last(self) -> dict[str, Any]:
        return torch.load(self.models / "last.pt", weights_only=True)


def environment() -> dict[str, str]:
    """For a program of one thread, which computes the same as any other of one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def words(config_file: Any, overrides: Mapping[str, Any]) -> list[str]:
    """The command line of `monai.bundle run` after the interpreter."""
    config = str(config_file) if not isinstance(config_file, list) else repr([str(file) for file in config_file])
    flags = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    return ["-m", "monai.bundle", "run", "--config_file", config, *flags]


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m monai.bundle run` (or another launcher) and return what it printed."""

    def run(config_file: Any, overrides: Mapping[str, Any], cwd: Path, launcher: tuple[str, ...] = ()) -> Any:
        return subprocess.run(
            [sys.executable, *launcher, *words(config_file, overrides)],
            cwd=cwd,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture(scope="session")
def started() -> Callable[..., subprocess.Popen[str]]:
    """Start `python -m monai.bundle run` with its output in a file, to be killed."""

    def start(config_file: Any, overrides: Mapping[str, Any], cwd: Path, log: Path) -> Any:
        with open(log, "w") as stream:
            program = [sys.executable, "-u", *words(config_file, overrides)]
            return subprocess.Popen(program, cwd=cwd, env=environment(), stdout=stream, stderr=subprocess.STDOUT)

    return start


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, command: Any) -> Run:
    """A finished run of three epochs: the user's own line from the repository's root, in a size of seconds."""
    base = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist have folders side by side: the first one that asks trains for all.
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    run = Run(base / "bundle-run", base / "bundle-data")
    with FileLock(base / "bundle-run.lock"):
        done = run.root / "done"
        if not done.is_file():
            result = command("bundles/pretrain/configs/train.json", run.overrides, REPOSITORY)
            assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
            done.write_text(result.stdout + result.stderr)
    return run


@pytest.fixture
def new_run(trained: Run, tmp_path: Path) -> Run:
    """Folders of a further run over the same phantoms."""
    return Run(tmp_path / "run", trained.data)


@pytest.fixture
def in_process() -> Iterator[None]:
    """For runs within the test's own process: puts back what a run changes for the whole process."""
    precision, flash = torch.get_float32_matmul_precision(), torch.backends.cuda.flash_sdp_enabled()
    deterministic, benchmark = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    path = sys.path[:]
    yield
    sys.path[:] = path
    monai.utils.set_determinism(None)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, benchmark
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_flash_sdp(flash)


@pytest.fixture(scope="session")
def configs() -> Path:
    return CONFIGS
