# SPDX-License-Identifier: Apache-2.0
"""The command line: what it passes on, and one line per fault."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fire.parser import DefaultParseValue
from PIL import Image

import unimedi_components
from unimedi_components.__main__ import main
from unimedi_components.command_options import exact_words
from unimedi_components.errors import DataError
from unimedi_components.lazy import importing


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stand-ins for the functions behind the commands; what they were called with."""
    record: list[tuple[Any, ...]] = []

    def write_phantom(layout: str, out: str, patients: int, seed: int, workers: int | None) -> None:
        record.append(("phantom", layout, out, patients, seed, workers))

    def prepare(dataset: str, root: str, out: str, fraction: float, seed: int, strict: bool = False) -> None:
        if root == "missing":
            raise DataError("missing: no such folder; name the data set's root")
        record.append(("prepare", dataset, root, out, fraction, seed, strict))

    def evaluate(checkpoint: str, patients: int, seed: int, json: str | None, device: str = "cpu") -> None:
        record.append(("evaluate", checkpoint, patients, seed, json, device))

    for name, function in {
        "data.phantom": write_phantom,
        "data.prepare": prepare,
        "retrieval.evaluate": evaluate,
    }.items():
        module = types.ModuleType(f"unimedi_components.{name}")
        setattr(module, function.__name__, function)
        module.__dict__["LAYOUTS"] = ("mimic_cxr", "bimcv")
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return record


def failure(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a failing command prints; its exit code must be 2."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_commands_pass_their_arguments_on(calls: list[tuple[Any, ...]]) -> None:
    main(["phantom", "bimcv", "out", "--patients", "3", "--seed=7", "--workers", "2"])
    main(["phantom", "all", "2024"])
    main(["prepare", "table", "own.csv", "list.json", "--fraction", "0.1", "--strict"])
    main(["prepare", "table", "['a.csv','b.csv']", "list.json"])
    main(["evaluate", "model.pt", "--patients", "4", "--json", "m.json", "--device", "cuda"])
    main(["evaluate", "model.pt", "--json=m.json"])
    main(["evaluate", "model.pt"])
    assert calls == [
        ("phantom", "bimcv", "out", 3, 7, 2),
        ("phantom", "mimic_cxr", "2024/mimic_cxr", 200, 0, None),
        ("phantom", "bimcv", "2024/bimcv", 200, 0, None),
        ("prepare", "table", "own.csv", "list.json", 0.1, 42, True),
        ("prepare", "table", ["a.csv", "b.csv"], "list.json", None, 42, False),
        ("evaluate", "model.pt", 4, 1000, "m.json", "cuda"),
        ("evaluate", "model.pt", 200, 1000, "m.json", "cpu"),
        ("evaluate", "model.pt", 200, 1000, None, "cpu"),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["phantm"], "unknown command 'phantm'; did you mean 'phantom'?"),
        (
            ["train"],
            "unknown command 'train'; there are: phantom, prepare, datasets, evaluate, inspect, embed, index, search, "
            "zero_shot, serve, report, export, check, cache, plan",
        ),
        (
            ["phantom", "all", "o", "--patient", "3"],
            "unknown option '--patient' of 'phantom'; did you mean '--patients'?",
        ),
        (
            ["phantom", "all", "o", "--zoom=3"],
            "unknown option '--zoom' of 'phantom'; it takes --layout, --out, --patients, --seed, --workers",
        ),
        (["phantom", "all", "o", "0"], "--patients must be a whole number of at least 1, got 0"),
        (["phantom", "all", "o", "few"], "--patients must be a whole number of at least 1, got 'few'"),
        (["phantom", "all", "o", "--seed", "-1"], "--seed must be a whole number of at least 0, got -1"),
        (["prepare", "table", "r", "o", "--fraction", "10"], "--fraction must be in (0, 1], got 10"),
        (
            ["prepare", "table", "r", "o", "--strickt"],
            "unknown option '--strickt' of 'prepare'; did you mean '--strict'?",
        ),
        (["prepare", "table", "missing", "o"], "missing: no such folder; name the data set's root"),
        (["check", "none.json"], "config file 'none.json' does not exist"),
    ],
)
def test_faults_are_one_line(
    words: list[str], message: str, calls: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert failure(words, capsys) == f"error: {message}\n"
    assert calls == []


@pytest.mark.parametrize("words", [["inspect", "a.png", "--json"], ["inspect", "a.png", "--png"]])
def test_a_place_that_cannot_be_written_is_named_with_a_remedy(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder below a file stands for a read-only disk, which root does not meet."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64)).save("a.png")
    said = failure([*words, str(tmp_path / "a.png" / "out" / "x")], capsys)
    assert said.startswith(f"error: {tmp_path / 'a.png'}") and said.count("\n") == 1
    assert said.endswith(". Name a file or folder that can be written\n")


def test_words_arrive_as_they_stand() -> None:
    words = ["effusion, left", "1.50", "[a]", "a # b", "'x'", "--finding=a, b", "--k=3", "--text", "3", "True", "a: b"]
    quoted = exact_words(words)
    assert [DefaultParseValue(word) for word in quoted[:5]] == words[:5]
    assert quoted[5:] == ["--finding='a, b'", "--k=3", "--text", "3", "True", "a: b"]


def test_missing_argument_is_a_usage_error(calls: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    message = failure(["phantom", "all"], capsys)
    assert "The function received no value for the required argument: out" in message
    assert calls == []


def test_debug_keeps_the_exception(calls: list[tuple[Any, ...]]) -> None:
    with pytest.raises(DataError):
        main(["prepare", "table", "missing", "o", "--debug"])


def test_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "train.json"
    base.write_text(json.dumps({"epochs": 1, "run": "$print(@epochs)"}))
    main(["check", str(base), "--epochs", "2"])
    assert capsys.readouterr().out == f"ok: 2 keys in {base}\n"
    assert failure(["check", str(base), "--epoch", "2"], capsys) == (
        "error: unknown override '--epoch': nothing defines it; did you mean 'epochs'?\n"
    )


def test_version_and_light_import() -> None:
    code = "import sys, unimedi_components.__main__ as m; m.main(['--version']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [unimedi_components.__version__, "False"]


def test_names_are_loaded_when_used() -> None:
    assert unimedi_components.errors.DataError is DataError
    assert {"bundle_root", "check_run", "engines"} <= set(dir(unimedi_components))
    for name in unimedi_components.__all__:
        assert getattr(unimedi_components, name) is not None
    with pytest.raises(AttributeError, match="module 'unimedi_components' has no attribute 'nothing'"):
        _ = unimedi_components.nothing


def test_the_collector_waits_for_imports_alone() -> None:
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()
