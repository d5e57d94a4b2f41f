# SPDX-License-Identifier: Apache-2.0
"""multi_gpu_train.json under torchrun, with two gloo processes on the CPU, against one process."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from unimedi_components import distributed, load_encoder
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.loading import rank_share, sampler

REPOSITORY = Path(__file__).resolve().parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.fixture(scope="module")
def two_ranks(trained: Any, command: Any, configs: Path, tmp_path_factory: Any) -> tuple[Any, dict[str, Any], str]:
    """A finished run of two processes, its overrides but for its folders, and what it said."""
    folder = tmp_path_factory.mktemp("two-ranks")
    # data of its own: the first rank writes them, the other one waits
    run = type(trained)(folder / "run", folder / "data")
    half = {name: trained.overrides[name] // 2 for name in ("train#sampler#batch_2d", "train#sampler#batch_3d")}
    changes = {**trained.overrides, **half, "network_def#accumulation": 2}
    result = command(overlaid(configs), {**changes, **run.folders}, folder, TORCHRUN)
    assert result.returncode == 0, result.stderr[-3000:]
    return run, changes, result.stdout + result.stderr


def children(pid: int) -> list[int]:
    """Processes that another one started."""
    stats = {path.parent.name: path.read_text() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()}
    return [int(name) for name, stat in stats.items() if int(stat.rpartition(")")[2].split()[1]) == pid]


def overlaid(configs: Path) -> list[Path]:
    return [configs / "train.json", configs / "multi_gpu_train.json"]


@pytest.mark.slow
def test_two_processes_train_as_one(trained: Any, two_ranks: Any) -> None:
    new_run, _, said = two_ranks
    ours, theirs = new_run.last(), trained.last()
    assert ours["epoch_length"] == theirs["epoch_length"]
    rows, expected = ours["history"]["rows"], theirs["history"]["rows"]
    assert len(rows) == len(expected)
    for key in ("loss", "vl", "icl", "pcl"):
        assert rows[0][key] == pytest.approx(expected[0][key], abs=1e-4), key
        assert rows[2][key] == pytest.approx(expected[2][key], abs=2e-2), key
    state = torch.load(new_run.models / "model.pt", weights_only=True)
    assert state.keys() == torch.load(trained.models / "model.pt", weights_only=True).keys()
    assert not any(name.startswith("module.") for name in (*state, *ours["network"]))
    load_encoder(new_run.models / "model.pt")
    assert new_run.metrics().keys() == trained.metrics().keys()
    assert (new_run.eval / "loss_curves.png").is_file()
    # One rank speaks, writes events and evaluates.
    assert said.count("Key metric: val_recall_at_5") == said.count("Epoch[1] Metrics") + 2 == 3
    datalist = json.loads((new_run.data / "phantom" / "pretrain.json").read_text())
    assert len(datalist["validation"]) >= 2


@pytest.mark.slow
def test_killed_ranks_resume_bit_for_bit(
    two_ranks: Any, command: Any, started: Any, configs: Path, tmp_path: Path, checkpoint_differences: Any
) -> None:
    whole, changes, _ = two_ranks
    run = type(whole)(tmp_path / "run", whole.data)
    talkative = tmp_path / "talkative.json"
    stats = {"_target_": "monai.handlers.StatsHandler", "tag_name": "loss", "output_transform": "$lambda x: x['loss']"}
    talkative.write_text(json.dumps({"+train#handlers": [stats]}))
    log, files = tmp_path / "log.txt", overlaid(configs)
    process = started([*files, talkative], {**changes, **run.folders}, tmp_path, log, TORCHRUN)
    limit = time.monotonic() + 240
    while (
        process.poll() is None and time.monotonic() < limit and not re.search(r"Epoch: 2/3, Iter: 1/", log.read_text())
    ):
        time.sleep(0.005)
    for pid in (process.pid, *children(process.pid)):
        os.kill(pid, signal.SIGKILL)
    assert process.wait() == -9, log.read_text()[-3000:]
    assert run.last()["epoch"] == 1
    result = command(files, {**changes, **run.folders, "resume": True}, tmp_path, TORCHRUN)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resumed after epoch 1 of 3" in result.stdout + result.stderr
    assert checkpoint_differences(run.last(), whole.last()) == []
    assert run.metrics() == whole.metrics()


@pytest.mark.slow
def test_two_nodes_of_slurm_train_as_two_ranks_of_one(
    two_ranks: Any, bundle_words: Any, configs: Path, tmp_path: Path, checkpoint_differences: Any
) -> None:
    """The script of the page itself, between two nodes that are this machine."""
    whole, changes, _ = two_ranks
    run = type(whole)(tmp_path / "run", whole.data)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = (REPOSITORY / "docs" / "multi-gpu.md").read_text()
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", page, re.S)
    config = shlex.join(bundle_words(overlaid(configs), {**changes, **run.folders})[3:])
    for old, new in (
        (r"--nproc_per_node=8", "--nproc_per_node=1 --local_addr=127.0.0.1"),
        (r":29500", f":{port}"),
        (r'--config_file ".*?"', config),
    ):
        script, count = re.subn(old, lambda _, new=new: new, script, flags=re.S)
        assert count == 1, old
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    (stubs / "scontrol").write_text("#!/bin/bash\necho 127.0.0.1\n")
    # one task on each node
    (stubs / "srun").write_text('#!/bin/bash\n"$@" & "$@" & wait -n && wait -n\n')
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    activate = tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("")
    places = os.pathsep.join((str(stubs), str(Path(sys.executable).parent), os.environ["PATH"]))
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    variables = {"PATH": places, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **slurm}
    where: dict[str, Any] = {"cwd": tmp_path, "env": {**os.environ, **variables}, "timeout": 300}
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, **where)
    assert result.returncode == 0, result.stderr[-3000:]
    assert checkpoint_differences(run.last(), whole.last()) == []


@pytest.mark.slow
def test_a_fault_behind_the_start_is_one_line(trained: Any, command: Any, configs: Path, tmp_path: Path) -> None:
    changes = {**trained.overrides, **trained.folders, "ckpt_dir": str(tmp_path), "img_size": 33}
    result = command(overlaid(configs), changes, tmp_path, (*TORCHRUN[:-1], "--nproc_per_node=1"))
    assert result.returncode != 0
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "an image of 33x33 cannot be cut into patches of" in line and "config_parser.py" not in result.stderr


def test_without_torchrun_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"needs torchrun \(RANK is not set\)"):
        distributed.start("cpu")


def test_ranks_share_items_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(sampler, "current_rank", lambda rank=rank: rank)
        shares.append(rank_share(list(range(8))))
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]
    with pytest.raises(DataError, match="2 items cannot be shared by 3 ranks"):
        rank_share([1, 2])


def test_overlays_of_all_bundles_are_one() -> None:
    """Each bundle carries its own; what they hold beside the share of validation is the same."""
    files = sorted(REPOSITORY.glob("bundles/*/configs/multi_gpu_train.json"))
    contents = [json.loads(file.read_text()) for file in files]
    shares = [[key for key in content if key.startswith("validate#")] for content in contents]
    assert len(files) == 6 and all(len(share) == 1 for share in shares)
    own = [
        {key: value for key, value in content.items() if key not in share}
        for content, share in zip(contents, shares, strict=True)
    ]
    assert all(content == own[0] for content in own)
    # ranks may have different numbers of validation batches: no collective in their forward passes
    assert own[0]["network"]["broadcast_buffers"] is False
