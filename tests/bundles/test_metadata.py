# SPDX-License-Identifier: Apache-2.0
"""Each bundle's metadata, licence and logging: what MONAI's own checks and the model zoo ask for."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from monai.bundle import verify_metadata
from monai.bundle.workflows import _apply_logging_file
from packaging.requirements import Requirement

import unimedi_components
from unimedi_components.config_check import check_config

REPOSITORY = Path(__file__).resolve().parents[2]
SCHEMA = Path(__file__).with_name("meta_schema_20240725.json")
BUNDLES = sorted(path.parents[1] for path in REPOSITORY.glob("bundles/*/configs/metadata.json"))
each_bundle = pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)


def read(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "configs" / "metadata.json").read_text())


def test_the_pretrain_bundle_is_there() -> None:
    assert REPOSITORY / "bundles" / "pretrain" in BUNDLES


@each_bundle
def test_metadata_follows_monais_schema(bundle: Path) -> None:
    verify_metadata(meta_file=str(bundle / "configs" / "metadata.json"), filepath=SCHEMA)


BREAKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "'required_packages_version' is a required property": lambda m: m.pop("required_packages_version"),
    "'inputs' is a required property": lambda m: m["network_data_format"].pop("inputs"),
    "'spatial_shape' is a required property": lambda m: m["network_data_format"]["inputs"]["image"].pop(
        "spatial_shape"
    ),
    "is not of type 'object'": lambda m: m.update(supported_apps=["monai-label"]),
}


@pytest.mark.parametrize("message", BREAKS)
def test_the_schema_refuses(message: str, tmp_path: Path) -> None:
    metadata = deepcopy(read(REPOSITORY / "bundles" / "pretrain"))
    BREAKS[message](metadata)
    file = tmp_path / "metadata.json"
    file.write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=message):
        verify_metadata(meta_file=str(file), filepath=SCHEMA)


@each_bundle
def test_versions(bundle: Path) -> None:
    metadata = read(bundle)
    assert metadata["version"] in metadata["changelog"]
    assert metadata["required_packages_version"]["unimedi-components"] == unimedi_components.__version__
    pins = {}
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins[pin.name] = str(pin.specifier).removeprefix("==")
    required = metadata["required_packages_version"]
    given = {name: version for name, version in required.items() if name != "unimedi-components"}
    assert given == {name: pins[name] for name in given}
    assert metadata["monai_version"] == pins["monai"]
    assert metadata["pytorch_version"] == pins["torch"]
    assert metadata["numpy_version"] == pins["numpy"]


@each_bundle
def test_names_that_monai_reads(bundle: Path) -> None:
    formats = read(bundle)["network_data_format"]
    assert next(iter(formats["inputs"])) == "image"
    assert next(iter(formats["outputs"])) == "pred"


@each_bundle
def test_licence_is_the_repositorys(bundle: Path) -> None:
    assert (bundle / "LICENSE").read_bytes() == (REPOSITORY / "LICENSE").read_bytes()


@each_bundle
def test_monai_accepts_the_logging_file(bundle: Path) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    switched_off = {name: getattr(log, "disabled", False) for name, log in logging.root.manager.loggerDict.items()}
    try:
        _apply_logging_file(str(bundle / "configs" / "logging.conf"))
        assert root.level == logging.INFO
        assert [type(handler) for handler in root.handlers] == [logging.StreamHandler]
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        for name, disabled in switched_off.items():
            logging.getLogger(name).disabled = disabled


def leaves(value: Any) -> Iterator[str]:
    """Keys and texts of a config."""
    for part in value.items() if isinstance(value, dict) else enumerate(value):
        for word in part:
            if isinstance(word, dict | list):
                yield from leaves(word)
            elif isinstance(word, str):
                yield word


CONFIGS = sorted(path for path in REPOSITORY.glob("bundles/*/configs/*.json") if path.stem != "metadata")
each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parents[1].name}-{path.stem}")


@each_config
def test_configs_stay_readable(path: Path) -> None:
    """Few keys and handlers, expressions of a line, and nothing that is named by its place in a list."""
    config = json.loads(path.read_text())
    assert path.stem not in ("train", "inference", "evaluate") or len(config) <= 35
    assert len(config.get("train", {}).get("handlers", ())) <= 5
    words = list(leaves(config))
    assert [word for word in words if word[:1] == "$" and len(word) > 80] == []
    assert [word for word in words if re.search(r"\w(#|::)\d+(\W|$)", word)] == []


@each_config
def test_yaml_says_the_same(path: Path, tmp_path: Path) -> None:
    own = tmp_path / f"{path.stem}.yaml"
    own.write_text(yaml.safe_dump(json.loads(path.read_text()), sort_keys=False))
    base = path.with_name("train.json") if path.with_name("train.json").is_file() else path.with_name("evaluate.json")
    if path.stem in ("train", "inference") or path == base:
        assert check_config(own) == check_config(path)
    else:
        assert check_config([base, own]) == check_config([base, path])
