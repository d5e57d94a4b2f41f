# SPDX-License-Identifier: Apache-2.0
"""multi_gpu_train.json under torchrun, with two gloo processes on the CPU, against one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unimedi_components import distributed, load_encoder
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.loading import rank_share, sampler

REPOSITORY = Path(__file__).resolve().parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.mark.slow
def test_two_processes_train_as_one(trained: Any, command: Any, configs: Path, tmp_path: Path) -> None:
    # Data of its own: the first rank writes them, the other one waits.
    new_run = type(trained)(tmp_path / "run", tmp_path / "data")
    files = [configs / "train.json", configs / "multi_gpu_train.json"]
    half = {name: trained.overrides[name] // 2 for name in ("train#sampler#batch_2d", "train#sampler#batch_3d")}
    half["network_def#accumulation"] = 2
    result = command(files, {**new_run.overrides, **half}, tmp_path, TORCHRUN)
    assert result.returncode == 0, result.stderr[-3000:]
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
    said = result.stdout + result.stderr
    assert said.count("Key metric: val_recall_at_5") == said.count("Epoch[1] Metrics") + 2 == 3
    datalist = json.loads((new_run.data / "phantom" / "pretrain.json").read_text())
    assert len(datalist["validation"]) >= 2


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
