# SPDX-License-Identifier: Apache-2.0
"""Other projects' real classes over the bundles, in an environment of their own: `make test-ecosystem`.

`.venv-ecosystem` holds what requirements.txt pins and sees all packages of `.venv` behind them. Where a package is
missing its tests are skipped, so that `make test` needs none of them.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import unimedi_components.bundle
from unimedi_components.errors import ConfigError


@pytest.fixture(scope="session")
def monailabel() -> SimpleNamespace:
    """MONAI Label's tasks for bundles.

    It imports two drawing functions of torchvision, which these tasks never call. torchvision itself is not wanted
    here: its registry build does not load beside a CPU build of torch, and takes `transformers` with it.
    """
    if importlib.util.find_spec("monailabel") is None:
        pytest.skip("MONAI Label is not installed; 'make test-ecosystem' installs it and runs this test")
    # before the stand-in is there: transformers looks for torchvision when it is imported
    importlib.import_module("unimedi_components.networks")
    names = () if importlib.util.find_spec("torchvision") else ("torchvision", "torchvision.utils")
    for name in names:
        stand_in = types.ModuleType(name)
        stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
        stand_in.__dict__.update(make_grid=None, save_image=None)
        sys.modules[name] = stand_in
    try:
        from monailabel.tasks.infer.bundle import BundleInferTask
        from monailabel.tasks.train.bundle import BundleTrainTask
    finally:
        for name in names:
            del sys.modules[name]
    return SimpleNamespace(BundleInferTask=BundleInferTask, BundleTrainTask=BundleTrainTask)


@pytest.fixture
def app_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An app's folder, alone: without the repository, its pretrain bundle and its data."""

    def nowhere(bundle_name: str, config_file: Any = None) -> str:
        raise ConfigError(f"bundle {bundle_name!r} not found")

    monkeypatch.setattr(unimedi_components.bundle, "bundle_root", nowhere)
    monkeypatch.delenv("UNIMEDI_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path
