# SPDX-License-Identifier: Apache-2.0
"""One command per table of the paper: rows and means over seeds; and the weights that a task bundle starts from."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import tables
from benchmarks.pixels import pixel_probabilities
from unimedi_components import bundle
from unimedi_components.errors import ConfigError
from unimedi_components.retrieval.probe import LogisticProbe

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.usefixtures("in_process")
def test_a_table_from_phantoms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIMEDI_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(logging, "disable", lambda level: None)
    sizes = {"seeds": (0, 1), "fractions": (0.5, 1.0), "phantoms": 24, "epochs": 1}
    tables.table(9, str(tmp_path / "table9"), encoder_weights="none", **sizes)
    with open(tmp_path / "table9.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    # two metrics of every fraction, encoder (and the pixels beside them) and seed
    assert len(rows) == 2 * 2 * 3 * 2
    assert list(rows[0]) == list(tables.COLUMNS)
    assert {(row["data_set"], row["data"], row["training"]) for row in rows} == {("covidx", "phantom", "probe")}
    assert all(0 <= float(row["low"]) <= float(row["high"]) <= 1 for row in rows if row["low"])
    # both encoders are random here, so a seed gives the same twice
    cells = {(r["label_fraction"], r["seed"], r["metric"], r["encoder"]): r["value"] for r in rows}
    for fraction, seed, metric, _ in cells:
        value = cells[fraction, seed, metric, "random"]
        assert value == cells[fraction, seed, metric, "random"] == cells[fraction, seed, metric, "UniMedI"]
    text = (tmp_path / "table9.md").read_text().splitlines()
    assert text[0] == "| data | training | metric | encoder | 50% of the labels | 100% of the labels |"
    values = [float(cells["1.0", seed, "accuracy", "random"]) for seed in ("0", "1")]
    spread = abs(values[0] - values[1]) / 2**0.5
    assert text[2].startswith("| covidx (phantom) | probe | accuracy | random | ")
    assert text[2].endswith(f" | {sum(values) / 2:.3f} ± {spread:.3f} |")
    pixels = {cells["1.0", seed, "macro_auroc", "pixels"] for seed in ("0", "1")}
    assert all(0 <= float(value) <= 1 for value in pixels)
    assert any(line.startswith("| covidx (phantom) | probe | macro_auroc | pixels | ") for line in text)


def test_an_interrupted_table_leaves_the_finished_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[dict[str, Any]] = []

    def one_run(cell: Any, overrides: dict[str, Any], pixels: bool) -> tuple[str, dict[str, Any]]:
        if done:
            raise KeyboardInterrupt
        done.append(overrides)
        return "phantom", {"mean_dice": 0.5, "intervals": {"mean_dice": [0.4, 0.6]}}

    monkeypatch.setattr(tables, "run_bundle", one_run)
    monkeypatch.setattr(logging, "disable", lambda level: None)
    with pytest.raises(KeyboardInterrupt):
        tables.table(6, str(tmp_path / "table6"), seeds=3)
    assert done == [{"encoder_weights": "none", "label_fraction": 0.2, "seed": 3}]
    assert (tmp_path / "table6.csv").read_text().splitlines()[1:] == [
        "6,bcv,phantom,UNETR,random,0.2,3,mean_dice,0.5,0.4,0.6"
    ]


def test_pixels_are_probed_for_each_kind_of_label() -> None:
    rng = np.random.default_rng(0)
    x, x_test = rng.normal(size=(60, 6)), rng.normal(size=(5, 6))
    patients = [f"p{i // 2}" for i in range(60)]
    classes = np.repeat([0, 2], 30)
    x[classes == 2] += 1.0
    found = pixel_probabilities(x, classes, patients, x_test, "multiclass", 3)
    probe = LogisticProbe().fit(x, classes, np.unique(patients, return_inverse=True)[1])
    np.testing.assert_allclose(found[:, [0, 2]], probe.probabilities(x_test))
    assert (found[:, 1] == 0).all()
    binary = pixel_probabilities(x, classes // 2, patients, x_test, "binary", 2)
    np.testing.assert_allclose(binary[:, 0], found[:, 2])
    # of the findings one is as above where it is known, one is never there
    labels = np.stack([classes // 2, np.zeros(60, int)], axis=1)
    uncertain = np.concatenate([labels, np.full((4, 2), -1)])
    x, patients = np.concatenate([x, rng.normal(size=(4, 6))]), [*patients, "a", "b", "c", "d"]
    several = pixel_probabilities(x, uncertain, patients, x_test, "multilabel", 2)
    np.testing.assert_allclose(several, np.stack([found[:, 2], np.full(5, 0.5)], axis=1))


def test_an_unknown_table() -> None:
    with pytest.raises(SystemExit, match="table 7 is none of 1, 2, 3, 4, 5, 6, 8, 9"):
        tables.table(7)


def test_every_data_set_of_a_table_has_its_overlays() -> None:
    for cells in tables.TABLES.values():
        for cell in cells:
            folder = REPOSITORY / "bundles" / cell.bundle / "configs"
            assert all((folder / f"{name}.json").is_file() for name in ("train", *cell.overlays, cell.data_set))


def make(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def test_the_weights_that_a_task_bundle_starts_from(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(bundle, "bundle_root", lambda name: str(tmp_path / name))
    own, pretrained = tmp_path / "task" / "models", tmp_path / "pretrain" / "models" / "model.pt"
    # neither is there: the name of the one that is missing
    assert bundle.encoder_weights(str(own)) == str(pretrained)
    make(own / "model.pt")
    with caplog.at_level(logging.WARNING):
        assert bundle.encoder_weights(str(own)) == str(own / "model.pt")
    assert f"{pretrained}: not there; starting from the encoder in {own / 'model.pt'}" in caplog.text
    make(pretrained)
    assert bundle.encoder_weights(str(own)) == str(pretrained)


def test_a_task_bundle_given_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise ConfigError(f"bundle '{name}' not found")

    monkeypatch.setattr(bundle, "bundle_root", missing)
    monkeypatch.chdir(tmp_path)
    assert bundle.encoder_weights(str(tmp_path)) == str(Path("bundles", "pretrain", "models", "model.pt"))
    assert bundle.encoder_weights(str(make(tmp_path / "model.pt").parent)) == str(tmp_path / "model.pt")
