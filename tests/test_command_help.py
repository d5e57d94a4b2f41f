# SPDX-License-Identifier: Apache-2.0
"""Every command and data set says what it takes."""

from __future__ import annotations

import inspect
import shlex

import pytest

from unimedi_components.__main__ import _COMMANDS, main
from unimedi_components.data.catalogue import DATASETS
from unimedi_components.retrieval import Embedder


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    main(words)
    return capsys.readouterr().out


@pytest.mark.parametrize("command", _COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_every_command(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = said([command, flag], capsys)
    assert text.startswith(f"usage: python -m unimedi_components {command} ")
    for name, parameter in inspect.signature(_COMMANDS[command]).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            written = name.upper() if parameter.default is parameter.empty else f"--{name}"
            (line,) = [line for line in text.splitlines() if line.startswith(f"  {written} ")]
            assert len(line.split()) > 2, f"{written} is not described"
    (example,) = [line for line in text.splitlines() if line.startswith("example: ")]
    assert shlex.split(example)[1:5] == ["python", "-m", "unimedi_components", command]
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("command", ["embed", "index", "zero_shot"])
def test_further_options_are_listed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = said([command, "--help"], capsys)
    assert {"batch_2d", "strict"} < set(inspect.signature(Embedder.images).parameters)
    for name in ("batch_2d", "batch_3d", "num_workers", "strict"):
        assert f"\n  --{name} " in text


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("words", [["prepare", "{}", "--help"], ["prepare", "--help", "{}"]])
def test_help_of_every_data_set(name: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = said([word.format(name) for word in words], capsys)
    for option in inspect.signature(DATASETS[name].collect).parameters:
        assert option == "root" or f"\n  --{option} " in text
    assert f"\nexample: python -m unimedi_components prepare {name} " in text
    assert f"{name}: {DATASETS[name].title}" in text


def test_overview(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"]):
        text = said(words, capsys)
        assert all(f"\n{command} " in text for command in _COMMANDS)
    text = said(["prepare", "--help"], capsys)
    assert all(f"\n  {name} " in text for name in DATASETS)


def test_help_of_an_unknown_data_set_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["prepare", "mimc", "--help"])
    assert stop.value.code == 2 and "did you mean 'mimic_cxr'" in capsys.readouterr().err
