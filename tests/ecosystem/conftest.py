# SPDX-License-Identifier: Apache-2.0
"""Other projects' real classes over the bundles, in an environment of their own: `make test-ecosystem`.

`.venv-ecosystem` holds what requirements.txt pins and sees all packages of `.venv` behind them. Where a package is
missing its tests are skipped, so that `make test` needs none of them.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

import unimedi_components.bundle
from unimedi_components.data import write_json
from unimedi_components.errors import ConfigError
from unimedi_components.networks import SETRPUP, UnifiedViT, ViTDet, network_card
from unimedi_components.networks.unetr import UnifiedUNETR

REPOSITORY = Path(__file__).resolve().parents[2]


def stand_in() -> tuple[str, ...]:
    """Give MONAI Label the modules that it imports by other names; returns those to be taken away again.

    It imports two drawing functions of torchvision, which these tests never call. torchvision itself is not wanted
    here: its registry build does not load beside a CPU build of torch, and takes `transformers` with it. `pydicom_seg`
    goes by the name of its build for pydicom 3, as docs/monai-label.md installs it.
    """
    # before the stand-in is there: transformers looks for torchvision when it is imported
    importlib.import_module("unimedi_components.networks")
    names = () if importlib.util.find_spec("torchvision") else ("torchvision", "torchvision.utils")
    for name in names:
        module = sys.modules[name] = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(make_grid=None, save_image=None)
    sys.modules["pydicom_seg"] = importlib.import_module("pydicom_seg_rb")
    return names


def nowhere(bundle_name: str, config_file: Any = None) -> str:
    """Find no other bundle."""
    raise ConfigError(f"bundle {bundle_name!r} not found")


@pytest.fixture(scope="session")
def monailabel() -> SimpleNamespace:
    """MONAI Label: its tasks for bundles, its command line and its server."""
    if importlib.util.find_spec("monailabel") is None:
        pytest.skip("MONAI Label is not installed; 'make test-ecosystem' installs it and runs this test")
    names = stand_in()
    try:
        from monailabel.app import app
        from monailabel.config import settings
        from monailabel.interfaces.utils.app import app_instance
        from monailabel.main import Main
        from monailabel.tasks.infer.bundle import BundleInferTask
        from monailabel.tasks.train.bundle import BundleTrainTask
    finally:
        for name in names:
            del sys.modules[name]
    return SimpleNamespace(
        BundleInferTask=BundleInferTask,
        BundleTrainTask=BundleTrainTask,
        Main=Main,
        app=app,
        app_instance=app_instance,
        settings=settings,
    )


@pytest.fixture
def app_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An app's folder, alone: without the repository, its pretrain bundle and its data."""
    _leave_repository(tmp_path, monkeypatch)
    return tmp_path


def _leave_repository(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(unimedi_components.bundle, "bundle_root", nowhere)
    patch.delenv("UNIMEDI_DATA", raising=False)
    patch.chdir(folder)


@pytest.fixture(scope="session")
def serve(monailabel: SimpleNamespace, tiny_bundle: Callable[[str, Path], Path]) -> Callable[..., Any]:
    """Start MONAI Label's server in a folder by the lines of docs/monai-label.md, over tiny bundles."""

    @contextlib.contextmanager
    def started(folder: Path, studies: str, **settings: Any) -> Iterator[TestClient]:
        page = (REPOSITORY / "docs" / "monai-label.md").read_text(encoding="utf-8").replace("\\\n", "")
        (apps,) = re.findall(r"^monailabel apps .*", page, re.M)
        (reasons,) = re.findall(r"^echo .*", page, re.M)
        (line,) = re.findall(r"^monailabel start_server .*", page, re.M)
        main = monailabel.Main()
        with pytest.MonkeyPatch.context() as patch:
            _leave_repository(folder, patch)
            # what the command line sets
            for name in ("PATH", "PYTHONPATH"):
                patch.setenv(name, os.environ.get(name, ""))
            for name, value in {"MONAI_LABEL_DATASTORE_AUTO_RELOAD": False, **settings}.items():
                patch.setattr(monailabel.settings, name, value)
            for name in ("SERVER_PORT", "APP_DIR", "STUDIES", "APP_CONF"):
                patch.setattr(monailabel.settings, f"MONAI_LABEL_{name}", None)
            main.action_apps(main.args_parser().parse_args(shlex.split(apps)[1:]))
            subprocess.run(["bash", "-c", reasons], check=True)
            args = main.args_parser().parse_args(shlex.split(line)[1:])
            args.studies = studies
            for name in dict(args.conf)["models"].split(","):
                tiny_bundle(name, folder / "apps" / "monaibundle" / "model")
            main.start_server_validate_args(args)
            main.start_server_init_settings(args)
            with TestClient(monailabel.app, raise_server_exceptions=False) as client:
                yield client

    return started


def _tiny_setr(train: dict[str, Any]) -> tuple[torch.nn.Module, str, dict[str, Any]]:
    # the default's decoder is made for a trained encoder: this one is random, so that the decoder must do the work
    sizes = {"vol_size": [8, 32, 32], "embed_dim": 32, "depth": 2, "num_heads": 2}
    train |= {"size": sizes, "preprocessing": {"film": {"size": 80}}}
    train["network_def"]["widths"] = [64, 32, 16, 8]
    network = SETRPUP(UnifiedViT(64, **sizes), widths=train["network_def"]["widths"])
    torch.nn.init.normal_(network.head.weight, std=20.0)
    film = torch.full((1, 1, 80, 80), -0.5)
    film[..., 20:60, 20:60] = 0.5
    with torch.no_grad():
        # about half of a film is found
        network.head.bias.sub_(network.eval()(film + 0.1 * torch.randn(film.shape)).median())
    return network, "segmentation", train["preprocessing"]


def _tiny_detector(train: dict[str, Any]) -> tuple[torch.nn.Module, str, dict[str, Any]]:
    train["size"] = size = {"vol_size": [8, 32, 32], "embed_dim": 32, "depth": 1, "num_heads": 2}
    encoder, made = UnifiedViT(64, **size), train["network_def"]
    options = {name: made[name] for name in ("scales", "last_pool", "head_convs", "aspect_ratios")}
    anchors = [[0.18 * 128, 0.25 * 128]] * len(made["scales"])
    network = ViTDet(encoder, 1, width=made["width"], anchor_sizes=anchors, **options)
    torch.nn.init.normal_(network.classification_head.cls_logits.weight, std=0.1)
    torch.nn.init.zeros_(network.classification_head.cls_logits.bias)
    return network, "detection", {"film": {"size": train["img_size"]}}


def _tiny_unetr(train: dict[str, Any]) -> tuple[torch.nn.Module, str, dict[str, Any]]:
    train["network_def"] |= {"feature_size": 4, "hidden_states": [0, 1]}
    train["train"]["repeated"]["steps"] = 4
    train["evaluation"] |= {"figures": 0, "bootstrap": 10}
    train["size"] = size = {"patch_size_3d": [4, 12, 12], "embed_dim": 32, "depth": 2, "num_heads": 2}
    kept = ("normalize_states", "norm", "res_block", "deep_supervision", "residual_scores", "background_prior")
    options = {name: train["network_def"][name] for name in kept}
    encoder = UnifiedViT(64, train["vol_size"], **size)
    network = UnifiedUNETR(encoder, 14, hidden_states=(0, 1), feature_size=4, **options)
    torch.nn.init.normal_(network.out.conv.conv.weight, std=5.0)
    organs = {"spatial_size": train["vol_size"], "spacing": None, "window": (-175, 250), "num_classes": 14}
    return network, "segmentation", {"organs": organs}


_MAKERS = {
    "chest_xray_segmentation": _tiny_setr,
    "chest_xray_detection": _tiny_detector,
    "abdomen_ct_segmentation": _tiny_unetr,
}


@pytest.fixture(scope="session")
def tiny_bundle(untrained_bundle: Callable[..., Path]) -> Callable[[str, Path], Path]:
    """Copy a task bundle into a folder, with random weights and sizes of seconds."""

    def make(name: str, folder: Path) -> Path:
        if "classification" in name:
            return untrained_bundle(name, folder)
        shutil.copytree(REPOSITORY / "bundles" / name / "configs", folder / name / "configs")
        file = folder / name / "configs" / "train.json"
        train = json.loads(file.read_text())
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network, task, preprocessing = _MAKERS[name](train)
        write_json(train, file)
        (folder / name / "models").mkdir()
        torch.save(network.state_dict(), folder / name / "models" / "model.pt")
        card = network_card(network, task, train["label_names"], preprocessing)
        write_json(card, folder / name / "models" / "model.json")
        return folder / name

    return make
