# SPDX-License-Identifier: Apache-2.0
"""What holds for the repository as a whole: versions, pins, licences, sizes, imports, the CI script."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import unimedi_components

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = sorted((REPOSITORY / "unimedi_components").rglob("*.py"))
SOURCES = [*PACKAGE, *sorted((REPOSITORY / "tests").rglob("*.py"))]
# 300 lines is where one looks again whether a file is one concept
MAX_LINES = 450
MAX_BYTES = 500_000


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


def requirements(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.splitlines() if line.strip()]


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, version = line.split("==")
            assert canonicalize_name(name) not in found, f"{name} is pinned twice"
            found[canonicalize_name(name)] = version
    return found


def tracked_files() -> list[Path]:
    if not (REPOSITORY / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    words = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    paths = [REPOSITORY / name for name in done.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_version_is_one(setup_cfg: configparser.ConfigParser) -> None:
    version = unimedi_components.__version__
    assert setup_cfg["metadata"]["version"] == "attr: unimedi_components.__version__"
    headings = re.findall(r"^## \[(.+?)\]", (REPOSITORY / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == version
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)


def test_pins_satisfy_the_ranges(setup_cfg: configparser.ConfigParser) -> None:
    pinned = pins()
    ranges = requirements(setup_cfg["options"]["install_requires"])
    ranges += requirements(setup_cfg["options.extras_require"]["dev"])
    assert len(ranges) == 41
    for requirement in ranges:
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} excludes the tested {version}"
    assert pinned["torch"] == "2.13.0"
    assert not any("+" in version for version in pinned.values())


def test_the_lowest_python_is_one(setup_cfg: configparser.ConfigParser) -> None:
    low = setup_cfg["options"]["python_requires"].removeprefix(">=")
    major, minor = low.split(".")
    said = {
        "pyproject.toml": [f'target-version = "py{major}{minor}"', f'python_version = "{low}"'],
        "Makefile": [f"sys.version_info < ({major}, {minor})", f"needs Python {low} or newer"],
        **{page: [f"Python {low} or newer"] for page in ("README.md", "docs/package.md")},
        "constraints.txt": [f"(Python {low})"],
        "setup.cfg": [f"Programming Language :: Python :: {low}\n"],
    }
    for name, texts in said.items():
        content = (REPOSITORY / name).read_text()
        assert [text for text in texts if text not in content] == [], name


def test_citation_names_the_version_and_the_paper(setup_cfg: configparser.ConfigParser) -> None:
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert cited["version"] == unimedi_components.__version__ and cited["license"] == setup_cfg["metadata"]["license"]
    assert cited["authors"] == [{"name": setup_cfg["metadata"]["author"]}]
    (paper,) = cited["references"]
    for card in REPOSITORY.glob("bundles/*/docs/README.md"):
        entry = " ".join(card.read_text().split("```bibtex")[1].split("```")[0].split())
        names = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
        assert f"title = {{{paper['title']}}}" in entry and f"author = {{{names}}}" in entry, card


def test_imports_are_declared(setup_cfg: configparser.ConfigParser) -> None:
    declared = {
        canonicalize_name(requirement.name)
        for text in (
            setup_cfg["options"]["install_requires"],
            *(
                setup_cfg["options.extras_require"][extra]
                for extra in ("dicom", "faiss", "gzip", "onnx", "serve", "timm")
            ),
        )
        for requirement in requirements(text)
    }
    distributions = packages_distributions()
    for file in PACKAGE:
        for name in imported(file) - set(sys.stdlib_module_names) - {"unimedi_components"}:
            providers = {canonicalize_name(provider) for provider in [name, *distributions.get(name, [])]}
            assert providers & declared, f"{file.relative_to(REPOSITORY)} imports {name}: add it to setup.cfg"


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_licence_is_apache() -> None:
    text = (REPOSITORY / "LICENSE").read_text()
    assert text.split("\n")[0].strip() == "Apache License"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_sources_name_the_licence() -> None:
    without = [
        str(file.relative_to(REPOSITORY))
        for file in SOURCES
        if file.read_text(encoding="utf-8").split("\n", 1)[0] != "# SPDX-License-Identifier: Apache-2.0"
    ]
    assert without == []


def test_package_files_stay_short() -> None:
    lines = {str(f.relative_to(REPOSITORY)): len(f.read_text(encoding="utf-8").splitlines()) for f in PACKAGE}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_test_files_have_names_of_their_own() -> None:
    names = [file.name for file in SOURCES if file.name.startswith("test_")]
    assert sorted(set(names)) == sorted(names)
    assert list((REPOSITORY / "tests").rglob("__init__.py")) == []


def test_no_large_file_is_tracked() -> None:
    sizes = {str(path.relative_to(REPOSITORY)): path.stat().st_size for path in tracked_files()}
    assert "LICENSE" in sizes
    assert {name: size for name, size in sizes.items() if size > MAX_BYTES} == {}


def test_ci_runs_make_test() -> None:
    script = REPOSITORY / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert "make test" in lines


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_pretrain_runs_the_users_own_line() -> None:
    done = subprocess.run(
        ["make", "-n", "--no-print-directory", "pretrain"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == (
        ".venv/bin/python -m monai.bundle run --config_file bundles/pretrain/configs/train.json"
    )


# room -> the other rooms of the package that it may import
ARROWS = {
    "images": {"arrays", "errors", "images"},
    "data": {"command_options", "data", "distributed", "errors", "files", "images", "lazy", "networks", "workflow"},
    "loading": {"data", "distributed", "errors", "images", "loading"},
    "networks": {"errors", "networks", "selection", "distributed"},
    "losses": {"errors", "losses", "networks", "distributed"},
    "metrics": {"arrays", "distributed", "errors", "losses", "metrics"},
    "retrieval": {
        *("arrays", "data", "distributed", "engines", "errors", "figures", "files", "images", "lazy", "loading"),
        *("losses", "metrics", "networks", "provenance", "retrieval", "tasks"),
    },
    "selection": set(),
    "distributed": {"errors"},
}


@pytest.mark.parametrize("room", ARROWS)
def test_imports_go_down(room: str) -> None:
    package = REPOSITORY / "unimedi_components"
    files = sorted((package / room).rglob("*.py")) or [package / f"{room}.py"]
    for file in files:
        # statements alone: code that a file writes as text is no import of its own
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        modules += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        rooms = {name.split(".")[1] for name in modules if name.startswith("unimedi_components.")}
        above = rooms - ARROWS[room]
        assert not above, f"{file.relative_to(package)} imports {', '.join(sorted(above))}"
