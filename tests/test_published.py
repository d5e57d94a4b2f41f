# SPDX-License-Identifier: Apache-2.0
"""What README and cards quote is what `results/published` holds."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import experiment
from benchmarks.published import documents, refreshed

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    measure = {"mean": 0.83149, "sd": 0.0123, "values": {"0": 0.8}}
    content = {
        "variants": {"ours": {"title": "UniMedI", "a": measure}, "vl": {"title": "VL", "b": {**measure, "sd": None}}}
    }
    (tmp_path / "experiment_small.json").write_text(json.dumps(content))
    return tmp_path


def test_documents_quote_what_was_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert len(documents()) == 8
    for document in documents():
        text = document.read_text(encoding="utf-8")
        assert refreshed(text) == text, f"{document}: run 'python -m benchmarks.published'"


@pytest.mark.parametrize(
    ("stale", "fresh"), [("0.832", "0.831"), ("0.9", "0.8"), ("83.2%", "83.1%"), ("80%", "83%"), ("-1.25", "0.83")]
)
def test_a_number_keeps_its_decimals(folder: Path, stale: str, fresh: str) -> None:
    note = "<!-- published: experiment_small.json#variants/ours/a/mean -->"
    text = f"a probe of {{}}{note}, not 0.832 <!-- another -->"
    assert refreshed(text.format(stale), folder) == text.format(fresh)
    assert refreshed(text.format(fresh), folder) == text.format(fresh)


def test_a_table_is_written_anew(folder: Path) -> None:
    start = "<!-- published table: experiment_small.json ours,vl a=AUROC, X-rays,b -->\n"
    start = start.replace(", X-rays", " of X-rays")
    rows = "| variant | AUROC of X-rays | b |\n|---|---|---|\n| UniMedI | 0.831 ± 0.012 | - |\n| VL | - | 0.831 |\n"
    text = f"before\n{start}| old |\n<!-- published end -->\nafter"
    assert refreshed(text, folder) == f"before\n{start}{rows}<!-- published end -->\nafter"


@pytest.mark.parametrize("place", ["experiment_full.json#a", "experiment_small.json#variants/theirs/a/mean"])
def test_what_was_not_published_cannot_be_quoted(folder: Path, place: str) -> None:
    with pytest.raises(SystemExit, match="not published"):
        refreshed(f"0.8<!-- published: {place} -->", folder)


def test_publish_copies_numbers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "experiment" / "small"
    (source / "ours" / "0" / "models").mkdir(parents=True)
    (source / "ours" / "0" / "models" / "model.pt").write_bytes(b"weights")
    (source / "experiment.json").write_text("{}")
    (source / "experiment.csv").write_text("variant\n")
    for name in ("table1.csv", "table1.json", "table1.md", "notes.csv"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(experiment, "PUBLISHED", tmp_path / "published")
    experiment.publish("small", str(tmp_path / "experiment"), str(tmp_path))
    names = {"experiment_small.json", "experiment_small.csv", "table1.csv", "table1.json"}
    assert {path.name for path in (tmp_path / "published").iterdir()} == names
    with pytest.raises(SystemExit, match="run 'make experiment EXPERIMENT=full' first"):
        experiment.publish("full", str(tmp_path / "experiment"), str(tmp_path))


@pytest.mark.skipif(shutil.which("git") is None or not (REPOSITORY / ".git").exists(), reason="not a git checkout")
def test_git_keeps_what_is_published_and_nothing_else_of_results() -> None:
    def ignored(name: str) -> bool:
        words = ["git", "-c", "safe.directory=*", "check-ignore", "-q", name]
        return subprocess.run(words, cwd=REPOSITORY, check=False).returncode == 0

    assert not ignored("results/published/experiment_small.json")
    assert ignored("results/experiment/small/experiment.json")
    assert ignored("results/table1.csv")
    assert {path.suffix for path in REPOSITORY.glob("results/published/*")} <= {".csv", ".json"}
