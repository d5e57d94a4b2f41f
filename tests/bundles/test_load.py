# SPDX-License-Identifier: Apache-2.0
"""`monai.bundle.load` and MONAI's exports of every bundle, from a folder that holds nothing, beside no repository."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import torch
from monai.data import load_net_with_metadata
from torch import nn

from tests.common import fault_of
from unimedi_components.bundle import user_fault
from unimedi_components.data import write_json
from unimedi_components.retrieval import Embedder

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
NAMES = sorted(path.name for path in BUNDLES.iterdir() if (path / "configs").is_dir())
# neither those of train.json nor those of the metadata
SIZES: dict[str, Any] = {"img_size": 32, "vol_size": (8, 24, 24), "patch_size": 8, "patch_size_3d": (4, 12, 12)}
SIZES |= {"embed_dim": 16, "depth": 2, "num_heads": 2}

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, write_weights: Any) -> Path:
    """All bundles with weights of tiny networks; retrieval carries the pretrain bundle's."""
    folder = tmp_path_factory.mktemp("downloaded")
    for name in NAMES:
        models = folder / name / "models"
        shutil.copytree(BUNDLES / name / "configs", folder / name / "configs")
        train = folder / name / "configs" / "train.json"
        if train.is_file():
            write_json({**json.loads(train.read_text()), "size": SIZES}, train)
        write_weights(name, models, SIZES, 2 if "classification" in name else 3)
    return folder


@pytest.fixture
def zoo(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to change, while the current folder is empty and MONAI's download folder too."""
    shutil.copytree(made, tmp_path / "zoo")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "zoo"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def weights(bundle: Path, name: str = "model.pt") -> dict[str, torch.Tensor]:
    return torch.load(bundle / "models" / name, weights_only=True)


def assert_is(network: Any, state: dict[str, torch.Tensor]) -> None:
    held = network if isinstance(network, dict) else network.state_dict()
    assert held.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in held.items())


@pytest.mark.parametrize("workflow", ["train", "inference"])
@pytest.mark.parametrize("name", NAMES)
def test_load_gives_the_trained_network(name: str, workflow: str, zoo: Path) -> None:
    before = files(zoo.parent)
    network = monai.bundle.load(name, bundle_dir=zoo, workflow_type=workflow, device="cpu")
    assert_is(network, weights(zoo / name))
    # retrieval has no training, and so no train.json: MONAI says so and returns the state dict
    assert isinstance(network, nn.Module) != (name == "report_retrieval" and workflow == "train")
    assert files(zoo.parent) == before


def test_load_without_a_folder_or_a_workflow(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (zoo.parent / "hub").mkdir()
    zoo.rename(zoo.parent / "hub" / "bundle")
    network: Any = monai.bundle.load("pretrain", device="cpu")
    assert isinstance(network, Embedder)
    assert_is(network, weights(zoo.parent / "hub" / "bundle" / "pretrain"))
    image = torch.rand(1, 1, 8, 24, 24)
    with torch.no_grad():
        assert torch.equal(network(image), Embedder(zoo.parent / "hub/bundle/pretrain/models/model.pt", "cpu")(image))


@pytest.mark.parametrize("workflow", ["train", "inference"])
def test_load_of_another_file(workflow: str, zoo: Path) -> None:
    state = {name: value + 1 for name, value in weights(zoo / "pretrain").items()}
    torch.save(state, zoo / "pretrain" / "models" / "model_best.pt")
    options: dict[str, Any] = {"bundle_dir": zoo, "workflow_type": workflow, "device": "cpu"}
    assert_is(monai.bundle.load("pretrain", model_file="models/model_best.pt", **options), state)


def fault(name: str, **options: Any) -> str:
    return fault_of(monai.bundle.load, name, device="cpu", **options)


@pytest.mark.parametrize("workflow", ["train", "inference"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "report_retrieval"])
def test_load_refuses_what_does_not_fit(name: str, workflow: str, zoo: Path) -> None:
    state = weights(zoo / name)
    state.pop(next(key for key in state if key.endswith("cls_token")))
    torch.save(state, zoo / name / "models" / "model.pt")
    before = files(zoo.parent)
    message = fault(name, bundle_dir=zoo, workflow_type=workflow)
    assert f"{len(state)} of {len(state) + 1} tensors fit" in message or "model.pt" in message
    assert files(zoo.parent) == before


def test_an_override_of_the_network_fits_or_is_refused(zoo: Path) -> None:
    name = "chest_xray_classification"
    # sizes and classes of train.json, not of the checkpoint
    assert "tensors fit ImageClassifier" in fault(name, bundle_dir=zoo, net_override={"dropout": 0.5})
    options: dict[str, Any] = {"bundle_dir": zoo, "device": "cpu"}
    fits = {"num_classes": 2, "feature_norm": False, "dropout": 0.5}
    network: Any = monai.bundle.load(name, net_override=fits, **options)
    assert_is(network, weights(zoo / name))
    assert network.dropout.p == 0.5
    message = fault("pretrain", bundle_dir=zoo, net_override={"num_slices": 1})
    assert "leave net_override out" in message and 'workflow_type="inference"' in message
    network = monai.bundle.load("pretrain", workflow_type="inference", net_override={"use_slices": False}, **options)
    assert network.use_slices is False


def test_retrieval_takes_the_weights_that_it_carries(zoo: Path) -> None:
    options: dict[str, Any] = {"bundle_dir": zoo, "workflow_type": "inference", "device": "cpu"}
    carried: Any = monai.bundle.load("report_retrieval", **options)
    image = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(carried(image), Embedder(zoo / "report_retrieval/models/model.pt", "cpu")(image))
    shutil.rmtree(zoo / "report_retrieval" / "models")
    workflow = monai.bundle.ConfigWorkflow(
        str(zoo / "report_retrieval/configs/inference.json"), workflow_type="inference", logging_file=False
    )
    workflow.initialize()
    assert_is(workflow.network_def, weights(zoo / "pretrain"))


@pytest.mark.parametrize("name", ["pretrain", "report_retrieval"])
def test_export_of_the_embedding_network(name: str, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(zoo / name)
    monai.bundle.ckpt_export(config_file="configs/inference.json")
    exported, metadata, _ = load_net_with_metadata("models/model.ts")
    network = Embedder("models/model.pt", "cpu")
    for count in (1, 3):
        for size in ((32, 32), (8, 24, 24)):
            image = torch.rand(count, 1, *size) * 2 - 1
            with torch.no_grad():
                torch.testing.assert_close(exported(image), network(image), atol=1e-5, rtol=0)
    assert "pred" in metadata["network_data_format"]["outputs"]
    names = {key for key, _ in exported.named_parameters()}
    assert names and not any("report_encoder" in key or "text_projection" in key for key in names)
    assert (network.network.report_encoder, network.network.text_projection) != (None, None)


def test_export_from_the_command_line(zoo: Path) -> None:
    words = ["ckpt_export", "network_def", "--config_file", str(zoo / "pretrain/configs/inference.json")]
    words += ["--ckpt_file", str(zoo / "pretrain/models/model.pt"), "--filepath", "exported.ts"]
    done = subprocess.run([sys.executable, "-m", "monai.bundle", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    exported = torch.jit.load("exported.ts")
    image = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            exported(image), Embedder(zoo / "pretrain/models/model.pt", "cpu")(image), atol=1e-5, rtol=0
        )


# a detector gives boxes, which MONAI's check cannot read
@pytest.mark.parametrize("name", [name for name in NAMES if name != "chest_xray_detection"])
def test_checks_of_the_network_from_elsewhere(name: str, zoo: Path) -> None:
    """The bundle that the config lies in is the one that is read."""
    configs = zoo / name / "configs"
    metadata = json.loads((configs / "metadata.json").read_text())
    formats = metadata["network_data_format"]
    image = formats["inputs"]["image"]
    image["spatial_shape"] = list(SIZES["vol_size"]) if len(image["spatial_shape"]) == 3 else [64, 64]
    network: Any = monai.bundle.load(name, bundle_dir=zoo, workflow_type="inference", device="cpu")
    with torch.no_grad():
        formats["outputs"]["pred"]["num_channels"] = network(torch.zeros(1, 1, *image["spatial_shape"])).shape[1]
    (configs / "metadata.json").write_text(json.dumps(metadata))
    monai.bundle.verify_net_in_out(
        "network_def",
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
        device="cpu",
    )


def test_an_export_writes_no_phantoms(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(zoo / "pretrain")
    before = files(zoo.parent)
    with pytest.raises(Exception) as info:
        monai.bundle.ckpt_export(config_file="configs/train.json")
    message = user_fault(info.value)
    assert message is not None and "no phantoms are written; give the network of configs/inference.json" in message
    assert files(zoo.parent) == before
