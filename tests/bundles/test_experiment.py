# SPDX-License-Identifier: Apache-2.0
"""The ablation: what a finished cell is, cells side by side, and an experiment that is stopped and goes on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cells, experiment
from benchmarks.experiment import VARIANTS, Pool

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = {
    "epochs": 2,
    "data_sets": False,
    "patients": 20,
    "pool": 30,
    "eval_seed": 7,
    "pool_seed": 8,
    "seeds": [0, 1],
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def make_cell(variant: str = "ours", seed: int = 0, folder: Path = Path("out"), **settings: Any) -> dict[str, Any]:
    return experiment._cell(variant, seed, folder, {**SETTINGS, "overrides": {}, "phantoms": "p", **settings})


def test_what_a_cell_depends_on() -> None:
    cell = make_cell()
    key, trained = cells.cell_key(cell), cells.training_key(cell)
    assert (key, trained) == (cells.cell_key(make_cell()), cells.training_key(make_cell()))
    assert key != trained
    # other places and other cells beside it change nothing
    assert key == cells.cell_key(make_cell(folder=Path("elsewhere"), phantoms="q", seeds=[0]))
    # other weights
    others = [make_cell("vl"), make_cell(seed=1), make_cell(epochs=3), make_cell(overrides={"optimizer#lr": 0.1})]
    assert len({trained, *(cells.training_key(other) for other in others)}) == 5
    assert len({key, *(cells.cell_key(other) for other in others)}) == 5
    # other measurements of the same weights
    others = [make_cell(patients=21), make_cell(pool=31), make_cell(eval_seed=9), make_cell(pool_seed=9)]
    assert {cells.training_key(other) for other in others} == {trained}
    assert len({key, *(cells.cell_key(other) for other in others)}) == 5
    # the networks that are not trained are other cells
    assert len({cells.training_key(make_cell(name)) for name in ("ours", "untrained", "pixels")}) == 3


def test_all_variants_override_what_the_config_defines() -> None:
    from unimedi_components.config_check import check_config

    for name in VARIANTS:
        if all((cells.CONFIGS / f"{overlay}.json").is_file() for overlay in VARIANTS[name].overlays):
            cell = make_cell(name)
            check_config(cells.config_files(cell), cells.overrides(cell))


def test_the_command_of_a_cell() -> None:
    words = cells.train_command(make_cell("vl", 1, Path("out"), overrides={"train#sampler#batch_2d": 4}))
    config = "bundles/pretrain/configs/train.json"
    assert words[1:8] == ["-m", "monai.bundle", "run", "--config_file", config, "--seed", "1"]
    flags = dict(zip(words[6::2], words[7::2], strict=True))
    assert flags["--network_def#self_distillation"] == "False"
    assert flags["--network_def#selector"] == "random"
    assert (flags["--epochs"], flags["--train#sampler#batch_2d"]) == ("2", "4")
    assert flags["--ckpt_dir"] == str(Path("out/vl/1/models"))
    literal = cells.train_command(make_cell("literal"))
    assert literal[5] == f"['{config}','bundles/pretrain/configs/literal.json']"


def test_a_result_is_finished_only_if_whole(tmp_path: Path) -> None:
    cell = make_cell(folder=tmp_path)
    assert not cells.finished(cell)
    result = tmp_path / "ours/0/result.json"
    result.parent.mkdir(parents=True)
    result.write_text(json.dumps({"key": cells.cell_key(cell)}))
    assert cells.finished(cell)
    assert not cells.finished(make_cell(folder=tmp_path, patients=21))
    result.write_text(result.read_text()[:-3])
    assert not cells.finished(cell)


PROGRAM = """
import json, os, pathlib, sys, time
cell = json.loads(pathlib.Path(sys.argv[1]).read_text())
folder = pathlib.Path(cell["folder"])
print("pre-training, epoch 1/2", os.environ["OMP_NUM_THREADS"], flush=True)
if cell["variant"] == "vl":
    sys.exit("no such luck")
if cell["variant"] == "joint":
    time.sleep(600)
(folder / "result.json").write_text(json.dumps({"measures": {"probe_auroc_2d": 0.75}}))
"""


def test_cells_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [make_cell(name, seed, tmp_path) for seed in (0, 1) for name in ("ours", "vl", "vl_sd")]
    pool = Pool(chosen, 2, (sys.executable, "-c", PROGRAM))
    assert pool.run() == ["vl/0", "vl/1"]
    out = capsys.readouterr().out
    assert "ours/1 finished" in out
    assert "probe_auroc_2d 0.750" in out
    assert "vl/0 failed after 0 s: no such luck" in out or "no such luck" in out
    assert "[6/6] expected end" in out
    log = (tmp_path / "ours/0/log.txt").read_text()
    assert log.split()[-1] == str(max(1, (os.cpu_count() or 1) // 2))


def test_an_interruption_ends_the_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool([make_cell("joint", 0, tmp_path)], 1, (sys.executable, "-c", PROGRAM))
    started = []

    def interrupt(seconds: float) -> None:
        started.extend(process for process, _, _ in pool.running)
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.run()
    assert [process.returncode for process in started] == [-signal.SIGTERM]


def test_expected_end_follows_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool([make_cell("ours", seed, tmp_path) for seed in (0, 1, 2)], 1)
    guess = experiment._guess(pool.waiting[0])
    assert f"in {3 * guess / 60:.0f} min" in pool._status()
    # a cell that took half of the guess
    pool.waiting.pop()
    pool.guessed, pool.measured = guess, guess / 2
    assert f"[1/3] expected end {time.strftime('%H:%M', time.localtime(time.time() + guess))}" in pool._status()


def test_unknown_names() -> None:
    with pytest.raises(SystemExit, match="unknown size 'big'; choose from: small, full"):
        experiment.run(size="big")
    with pytest.raises(SystemExit, match="unknown variant 'our'"):
        experiment.run(variants="our")


def tiny(trained: Any, **more: Any) -> dict[str, Any]:
    """Options of an experiment over the phantoms of the tiny run."""
    kept = {key: value for key, value in trained.overrides.items() if key not in ("ckpt_dir", "output_dir", "epochs")}
    return {**kept, "epochs": 2, "patients": 24, "pool": 24, "workers": 2, **more}


@pytest.mark.slow
def test_a_tiny_experiment(trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "experiment"
    options = tiny(trained, seeds=(0, 1), variants="ours,untrained,pixels", out=str(out))
    experiment.run("small", **options)
    folder = out / "small"
    content = json.loads((folder / "experiment.json").read_text())
    assert list(content["variants"]) == ["ours", "untrained", "pixels"]
    assert [(cell["variant"], cell["seed"]) for cell in content["cells"]] == [
        (name, seed) for seed in (0, 1) for name in ("ours", "untrained", "pixels")
    ]
    ours, pixels = content["variants"]["ours"], content["variants"]["pixels"]
    results = {seed: json.loads((folder / f"ours/{seed}/result.json").read_text()) for seed in (0, 1)}
    for key in ("probe_auroc_2d", "probe_auroc_3d_100pct", "slice_precision", "report_recall_at_5"):
        values = [results[seed]["measures"][key] for seed in (0, 1)]
        assert ours[key]["mean"] == pytest.approx(sum(values) / 2, abs=1e-5)
        assert ours[key]["values"] == pytest.approx({"0": values[0], "1": values[1]}, abs=1e-5)
    low, high = results[0]["measures"]["intervals"]["probe_auroc_2d_100pct"]
    assert 0 <= low < high <= 1
    # pixels are the same for every seed; which labels a probe gets is the seed's
    assert pixels["probe_auroc_2d"]["sd"] == 0
    assert pixels["probe_auroc_2d_100pct"]["sd"] == 0
    assert "slice_precision" not in pixels
    # networks that are not trained have another start for every seed
    starts = [torch.load(folder / f"untrained/{seed}/models/model.pt", weights_only=True) for seed in (0, 1)]
    assert not torch.equal(starts[0]["cls_token"], starts[1]["cls_token"])
    assert (folder / "page/index.html").is_file()
    with open(folder / "experiment.csv", newline="") as stream:
        rows = {(row["variant"], row["measure"]): row for row in csv.DictReader(stream)}
    assert float(rows["ours", "slice_precision"]["mean"]) == pytest.approx(ours["slice_precision"]["mean"])

    # again: nothing to do; without a result the cell is measured, not trained
    capsys.readouterr()
    experiment.run("small", **options)
    assert "6 cells, 6 finished" in capsys.readouterr().out
    trained_at = (folder / "ours/0/models/last.pt").stat().st_mtime_ns
    (folder / "ours/0/result.json").unlink()
    experiment.run("small", page=False, table=str(tmp_path / "table7"), **options)
    assert (tmp_path / "table7.md").read_text().splitlines()[2].startswith("| + attentive slices (ours) | 0.")
    assert (folder / "ours/0/models/last.pt").stat().st_mtime_ns == trained_at
    again = json.loads((folder / "ours/0/result.json").read_text())
    assert again["measures"] == results[0]["measures"]
    assert again["command"] == results[0]["command"]


@pytest.mark.slow
def test_stopped_and_started_again(trained: Any, tmp_path: Path) -> None:
    options = tiny(trained, seeds="[0]", variants="ours", page=False, epochs=3)
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "benchmarks.experiment", "run", *flags, "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    models = stopped / "small/ours/0/models"
    with subprocess.Popen([*command, str(stopped)], env=environment, stdout=subprocess.DEVNULL) as process:
        limit = time.monotonic() + 600
        while not (models / "last.pt").is_file() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait()
    assert torch.load(models / "last.pt", weights_only=True)["epoch"] < 3
    for out in (stopped, whole):
        subprocess.run([*command, str(out)], env=environment, check=True)
    log = (stopped / "small/ours/0/log.txt").read_text()
    assert "resumed after epoch" in log
    results = [json.loads((out / "small/ours/0/result.json").read_text())["measures"] for out in (stopped, whole)]
    assert {**results[0], "checkpoint": ""} == {**results[1], "checkpoint": ""}
