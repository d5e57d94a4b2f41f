# SPDX-License-Identifier: Apache-2.0
"""`make gpu` on a CPU at toy size: parts that are stopped, go on, fail and are not run twice, and what they leave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Part, parts
from unimedi_components.bundle import parse_run_call
from unimedi_components.config_check import check_config
from unimedi_components.plan import network_of_config, state_bytes, step_cost


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu.gpu(out=str(tmp_path / "out"))
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert said.startswith("error: torch ") and said.endswith(
        "finds no GPU; 'make gpu GPU=cpu' rehearses without one\n"
    )


@pytest.mark.slow
def test_the_chain_at_toy_size(tmp_path: Path, capsys: Any) -> None:
    places: dict[str, Any] = {"device": "cpu", "out": str(tmp_path / "out"), "work": str(tmp_path / "work")}
    chosen = "data,cache,pretrain,evaluate,page"
    out, models = tmp_path / "out", tmp_path / "work" / "pretrain" / "models"
    with pytest.raises(SystemExit) as stop:
        gpu.gpu(**places, only="data,cache,pretrain", part_minutes=0.0)
    # the training was stopped behind its first epoch, and lost nothing
    assert stop.value.code == 3 and "left, call again: pretrain" in capsys.readouterr().err
    assert torch.load(models / "last.pt", weights_only=True)["epoch"] == 1
    assert json.loads((out / "parts" / "pretrain.json").read_text())["code"] is None
    gpu.gpu(**places, only=chosen)
    assert torch.load(models / "last.pt", weights_only=True)["epoch"] == 2
    assert "resumed after epoch 1 of 2" in (out / "logs" / "pretrain.log").read_text()
    ran = capsys.readouterr().out
    assert [line.partition(":")[0] for line in ran.splitlines() if " done after " in line] == [
        "pretrain",
        "evaluate",
        "page",
    ]
    result = json.loads((out / "results.json").read_text())
    assert (
        set(result["parts"]) == set(chosen.split(",")) and {"commit", "machine", "device", "versions"} < result.keys()
    )
    assert result["versions"]["torch"] == torch.__version__
    assert {bar["part"] for bar in result["bars"]} == {"data"}
    assert "report_recall_at_5" in json.loads((out / "evaluation.json").read_text())
    assert (out / "page" / "index.html").is_file() and (out / "pretrain" / "loss_curves.png").is_file()
    gpu.gpu(**places, only=chosen)
    again = capsys.readouterr().out
    assert again == f"{out / 'results.json'}: 5 of 5 parts done\n"


def fake(monkeypatch: pytest.MonkeyPatch, *made: Part) -> None:
    monkeypatch.setattr(gpu, "parts", lambda *_: list(made))


def test_a_failed_part_is_tried_again_and_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    mark = tmp_path / "mark"
    fails = f"import pathlib, sys; sys.exit(0 if pathlib.Path({str(mark)!r}).exists() else 5)"
    fake(monkeypatch, Part("first", ("-c", fails)), Part("second", ("-c", "print('here')")))
    places: dict[str, Any] = {"device": "cpu", "out": str(tmp_path / "out"), "work": str(tmp_path / "work")}
    with pytest.raises(SystemExit) as stop:
        gpu.gpu(**places)
    said = capsys.readouterr()
    assert stop.value.code == 1 and said.err == "failed: first\n" and "first: failed (5), see " in said.out
    assert (tmp_path / "out" / "logs" / "second.log").read_text() == "here\n"
    mark.touch()
    gpu.gpu(**places)
    assert "second" not in capsys.readouterr().out


def test_no_part_outlives_its_time_or_the_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    endless = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    monkeypatch.setattr(gpu, "HARD_S", 1.0)
    fake(monkeypatch, Part("endless", ("-c", endless)), Part("next", ("-c", ""), minutes=0.001))
    places: dict[str, Any] = {"device": "cpu", "out": str(tmp_path / "out"), "work": str(tmp_path / "work")}
    with pytest.raises(SystemExit) as stop:
        gpu.gpu(**places)
    assert stop.value.code == 1 and "endless: failed (-15)" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "HARD_S", 540)
    fake(monkeypatch, Part("short", ("-c", "")), Part("next", ("-c", ""), minutes=5))
    with pytest.raises(SystemExit) as stop:
        gpu.gpu(**{**places, "out": str(tmp_path / "other")}, minutes=2)
    # there are less than the five minutes left that the second one takes
    assert stop.value.code == 3 and capsys.readouterr().err == "left, call again: next\n"
    fake(monkeypatch, Part("endless", ("-c", endless)))
    with pytest.raises(SystemExit) as stop:
        gpu.gpu(**{**places, "out": str(tmp_path / "third")}, minutes=0.02)
    # it was the call's end
    assert stop.value.code == 3 and "endless: stopped after " in capsys.readouterr().out


def test_results_are_few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "MOST_BYTES", 1000)
    file = tmp_path / "out" / "big.json"
    fake(monkeypatch, Part("big", ("-c", f"open({str(file)!r}, 'w').write('1' * 2000)"), result=None))
    with pytest.raises(SystemExit, match=r"has more than 0 MB; the largest files are .*big\.json \(0 MB\)"):
        gpu.gpu(device="cpu", out=str(tmp_path / "out"), work=str(tmp_path / "work"))


def test_every_program_takes_its_options(tmp_path: Path) -> None:
    """On both devices, configs and overrides go through the check of the real command line."""
    for device in ("cuda", "cpu"):
        for part in parts(device, tmp_path, tmp_path):
            if part.name not in ("cache", "pretrain"):
                continue
            options = part.words[next(i for i, word in enumerate(part.words) if word.startswith("--")) :]
            check_config(list(gpu.CONFIGS), parse_run_call(["program", "run", *options]).overrides)


def test_the_training_fits_twenty_minutes_of_an_h100() -> None:
    config = check_config(list(gpu.CONFIGS))
    network = network_of_config(config)
    sampler = config["train"]["sampler"]
    cost = step_cost(network, sampler["batch_2d"], sampler["batch_3d"], config["preprocessing"]["max_length"])
    patients = config["datalist"]["phantoms"]
    assert sum(patients.values()) == 20_000
    steps = config["epochs"] * patients["mimic_cxr"] // sampler["batch_2d"]
    # at a tenth of the card's peak
    assert steps * cost.flops / (0.1 * 989e12) < 20 * 60
    assert state_bytes(network) + cost.activations + cost.passing < 0.9 * 80 * 2**30


def test_it_is_a_command() -> None:
    words = [sys.executable, "-m", "benchmarks.gpu", "--help"]
    assert "part_minutes" in subprocess.run(words, capture_output=True, text=True, check=True).stderr
