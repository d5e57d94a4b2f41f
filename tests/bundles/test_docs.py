# SPDX-License-Identifier: Apache-2.0
"""Every command on README, pages and cards goes through the checks of the real command line; the cheap ones run."""

from __future__ import annotations

import csv
import inspect
import json
import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path
from pydoc import locate
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser
from PIL import Image

from unimedi_components.__main__ import _COMMANDS, _taker, main
from unimedi_components.bundle import parse_run_call
from unimedi_components.command_options import check_options
from unimedi_components.config_check import check_config
from unimedi_components.data.catalogue import find_dataset
from unimedi_components.errors import ConfigError
from unimedi_components.networks import UnifiedViT, create_encoder
from unimedi_components.retrieval import EmbeddingIndex, Embeddings

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))]
PAGES += sorted(str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("bundles/*/docs/README.md"))
NAME = re.compile(r"python\s+-m\s+unimedi_components\s+[a-z_]+(\s+table)?")
SECTIONS = ["Data", "System configuration", "Performance", "Limitations", "Authors", "Citation", "References"]


def text_of(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def commands(page: str) -> list[list[str]]:
    """Words of the command lines in blocks, and of those in a text that begin with `python -m`."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text_of(page), re.S) for line in shell_lines(block)]
    rest = re.sub(r"```.*?```", "", text_of(page), flags=re.S)
    # a command's name alone, as in "prepared with `python -m ... prepare table`", is none
    lines += [" ".join(line.split()) for line in re.findall(r"`(python -m [^`]+)`", rest) if not NAME.fullmatch(line)]
    # `#` within a word is part of an id
    return [shlex.split(re.sub(r"(^|\s)#\s.*", "", line)) for line in lines]


def shell_lines(block: str) -> list[str]:
    return [line for line in block.replace("\\\n", "").splitlines() if line.strip() and not line.startswith("#")]


def check_command(words: list[str]) -> bool:
    """Raise for a command that would be refused; whether there was something to check."""
    if words[0] == "make":
        targets = re.findall(r"^([a-z0-9 -]+):", text_of("Makefile"), re.M)
        assert {word for word in words[1:] if "=" not in word} <= {name for line in targets for name in line.split()}
        return True
    if "-m" not in words or not {"python", "torchrun"} & set(words):
        return False
    module, *rest = words[words.index("-m") + 1 :]
    if module == "monai.bundle" and rest[0] == "run":
        call = parse_run_call([module, *rest])
        ids = [call.options[key] for key in ("run_id", "init_id", "final_id") if key in call.options]
        check_config(call.config_files, call.overrides, run_ids=ids)
    elif module == "unimedi_components":
        check_call(rest)
    elif module in ("monai.bundle", "benchmarks.experiment"):
        bind(getattr(import_module(module), rest[0]), rest[1:])
    elif module in ("benchmarks.tables", "benchmarks.peer_dice", "benchmarks.release"):
        bind(getattr(import_module(module), module.rpartition(".")[2].removesuffix("s")), rest)
    else:
        assert module in (
            "venv",
            "pip",
            "pytest",
            "benchmarks.published",
            "benchmarks.gpu",
            "benchmarks.resume",
            "tests.rehearsal",
        ), module
    return True


def split(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Arguments by place and by name, of commands whose options all have a value."""
    places, names, words = [], {}, list(words)
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            names[name.replace("-", "_")] = value if equals else words.pop(0)
        else:
            places.append(word)
    return places, names


def bind(function: Any, words: list[str]) -> None:
    places, names = split(words)
    inspect.signature(function).bind(*places, **names)


def check_call(words: list[str]) -> None:
    command, *rest = words
    if "--help" in rest or command.startswith("-"):
        return
    places, names = split(rest)
    if command == "check":
        check_config(places, names)
        return
    check_options(command, _COMMANDS[command], list(names))
    bind(_COMMANDS[command], rest)
    taker = find_dataset(places[0]).collect if command == "prepare" else _taker(command)
    own = inspect.signature(_COMMANDS[command]).parameters
    if taker is not None:
        check_options(command, taker, [name for name in names if name not in own])


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_none_that_would_be_refused(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    checked = 0
    for words in commands(page):
        try:
            checked += check_command(words)
        except Exception as error:
            pytest.fail(f"{page}: {shlex.join(words)}: {error!r}")
    assert checked or page in ("docs/monai-label.md", "docs/paper.md")


@pytest.mark.parametrize(
    "line",
    [
        "make nothing",
        "python -m unimedi_components embed scans/ --outt a.npz",
        "python -m unimedi_components prepare table cases.csv own.json --no_such 1",
        "python -m unimedi_components serch index.npz",
        "python -m monai.bundle run --config_file bundles/pretrain/configs/train.json --epoch 2",
        "torchrun -m monai.bundle run --config_file bundles/pretrain/configs/no.json",
        "python -m monai.bundle download_large_files --bundle_path a --no_such 1",
    ],
)
def test_a_wrong_command_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises((ConfigError, AssertionError, KeyError, TypeError)):
        check_command(shlex.split(line))


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not link.startswith("https://"):
            file, _, heading = link.partition("#")
            target = (REPOSITORY / page).parent / file if file else REPOSITORY / page
            assert target.exists(), f"{page}: {link}"
            titles = re.findall(r"^#+ (.*)", target.read_text(), re.M) if heading else []
            assert not heading or heading in [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]


def test_what_the_package_index_shows_has_no_relative_link() -> None:
    assert "long_description = file: docs/package.md\n" in text_of("setup.cfg")
    assert re.findall(r"\]\((?!https://)", text_of("docs/package.md")) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("bundles/")])
def test_cards_have_the_sections_of_the_zoos_template(page: str) -> None:
    titles = re.findall(r"^## (.*)", text_of(page), re.M)
    assert [title for title in titles if title in SECTIONS] == SECTIONS
    assert "data_license.txt" in text_of(page)


def test_switches_beside_the_paper_are_keys_of_the_config() -> None:
    """The last column of each table names config keys, and the tables' files and functions are there."""
    configs = [str(REPOSITORY / "bundles/pretrain/configs" / name) for name in ("train.json", "mimic_cxr_bimcv.json")]
    parser = ConfigParser(check_config(configs))
    rows = [line.split(" | ") for line in text_of("docs/paper.md").splitlines() if line.startswith("| ")]
    named = [name for row in rows for name in re.findall(r"`([\w#]+)`", row[-1])]
    left = {"chest_ct_classification", "use_slices", "network_def#use_slices", "prepare"}
    assert len(named) > 40
    for name in set(named) - left:
        scope, _, last = name.rpartition("#")
        if name not in parser:
            assert scope, f"{name} is no key of train.json"
            target = locate(parser[scope]["_target_"])
            target = UnifiedViT if target is create_encoder else target
            assert last in inspect.signature(target).parameters, name
    for name in re.findall(r"`([a-z_/]+\.py)`", text_of("docs/paper.md")):
        assert (REPOSITORY / "unimedi_components" / name).is_file(), name
    selection = import_module("unimedi_components.selection")
    for name in re.findall(r"`selection\.(\w+)`", text_of("docs/paper.md")):
        assert callable(getattr(selection, name))


def test_own_data_runs_as_it_stands(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained.models, "bundles/pretrain/models")
    rng = np.random.default_rng(0)
    Path("scans").mkdir()
    rows = []
    for number in range(12):
        name = f"scans/film{number}.png"
        Image.fromarray(rng.integers(0, 255, (80, 70), dtype=np.uint8)).save(name)
        report = f"The heart is normal in size. No pneumothorax is seen. Study {number} is read."
        rows.append({"image": name, "report": report, "patient": f"p{number}"})
    nib.save(
        nib.Nifti1Image(rng.normal(-600, 300, (30, 28, 24)).astype(np.float32), np.diag([2, 2, 4, 1])), "scans/a.nii.gz"
    )
    with open("cases.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    before_training = text_of("docs/own-data.md").split("\n## 4. ")[0]
    lines = [line for block in re.findall(r"```bash\n(.*?)```", before_training, re.S) for line in shell_lines(block)]
    assert len(lines) == 8
    for line in lines:
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "unimedi_components"]
        main(words[3:])
    found = Embeddings.load("embeddings.npz")
    assert sorted(entry["dim"] for entry in found.entries) == [2] * 12 + [3]
    assert EmbeddingIndex.load("images.npz").embeddings.model == found.model
    kinds = [entry["kind"] for entry in EmbeddingIndex.load("cases.npz").embeddings.entries]
    assert kinds.count("image") == kinds.count("report") == 12
    assert len(json.loads(Path("neighbours.json").read_text())) == 14
    assert len(Path("findings.csv").read_text().splitlines()) == 14
    assert capsys.readouterr().err.count("error") == 0
