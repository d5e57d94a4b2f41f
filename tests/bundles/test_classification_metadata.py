# SPDX-License-Identifier: Apache-2.0
"""MONAI's own checks, export and loading of the classification bundles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import torch
from monai.data import load_net_with_metadata

from unimedi_components.bundle import user_fault
from unimedi_components.errors import CheckpointError
from unimedi_components.networks import ImageClassifier, UnifiedViT, load_classifier

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ("chest_xray_classification", "chest_ct_classification")
each_bundle = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def bundle(name: str, tmp_path: Path, untrained_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with weights below `bundles` of the current folder, as in a checkout."""
    made = untrained_bundle(name, tmp_path / "bundles")
    monkeypatch.chdir(tmp_path)
    return made


def configs(name: str) -> dict[str, Any]:
    folder = REPOSITORY / "bundles" / name / "configs"
    return {kind: json.loads((folder / f"{kind}.json").read_text()) for kind in ("train", "inference", "metadata")}


def image_size(name: str) -> tuple[int, ...]:
    train = configs(name)["train"]
    return (train["preprocessing"]["xray"]["size"],) * 2 if "xray" in name else tuple(train["vol_size"])


@each_bundle
def test_network_takes_and_gives_what_metadata_says(name: str, bundle: Path) -> None:
    files = {"meta_file": str(bundle / "configs/metadata.json"), "config_file": str(bundle / "configs/inference.json")}
    monai.bundle.verify_net_in_out("network_def", **files, device="cpu")
    metadata = json.loads(Path(files["meta_file"]).read_text())
    metadata["network_data_format"]["outputs"]["pred"]["num_channels"] += 1
    Path(files["meta_file"]).write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="output channel number"):
        monai.bundle.verify_net_in_out("network_def", **files, device="cpu")


@each_bundle
def test_export_with_its_default_options(name: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle)
    monai.bundle.ckpt_export(config_file="configs/inference.json")
    network, metadata, extra = load_net_with_metadata("models/model.ts", more_extra_files=("inference.json",))
    eager = load_classifier(bundle / "models" / "model.pt")
    for count in (1, 2, 5):
        image = torch.rand(count, 1, *image_size(name)) * 2 - 1
        with torch.no_grad():
            expected = eager(image)
            assert torch.allclose(network(image), expected, atol=1e-5)
        assert expected.shape == (count, eager.hparams["num_classes"])
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"]["0"] == eager.card["label_names"][0]
    assert json.loads(extra["inference.json"])["network_def"]["checkpoint"] == "@checkpoint"


@pytest.mark.parametrize("options", [{}, {"use_slices": True, "num_slices": 2}, {"feature_norm": True}])
@pytest.mark.parametrize("freeze", [True, False])
def test_script_of_a_network_in_training(options: dict[str, Any], freeze: bool) -> None:
    torch.manual_seed(0)
    encoder = UnifiedViT(32, (8, 32, 32), embed_dim=24, depth=2, num_heads=2)
    network = ImageClassifier(encoder, 3, 3, freeze_encoder=freeze, dropout=0.5, **options)
    network.train()
    script = torch.jit.script(network)
    assert network.training and network.head.training
    state = {key: value.clone() for key, value in network.state_dict().items()}
    network.eval()
    for count in (1, 3):
        image = torch.rand(count, 1, 8, 32, 32) * 2 - 1
        assert torch.allclose(script(image), network(image), atol=1e-5)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


@each_bundle
def test_load_fills_every_tensor(name: str, bundle: Path) -> None:
    network = monai.bundle.load(name, bundle_dir="bundles", workflow_type="inference", device="cpu")
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert isinstance(network, ImageClassifier)
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


@each_bundle
def test_load_from_another_place(name: str, bundle: Path, tmp_path: Path) -> None:
    shutil.move(tmp_path / "bundles", tmp_path / "moved")
    checkpoint = tmp_path / "moved" / name / "models" / "model.pt"
    options: dict[str, Any] = {"bundle_dir": tmp_path / "moved", "workflow_type": "inference", "device": "cpu"}
    network = monai.bundle.load(name, **options, net_override={"checkpoint": str(checkpoint)})
    state = torch.load(checkpoint, weights_only=True)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


@each_bundle
def test_load_refuses_weights_that_do_not_fit(name: str, bundle: Path) -> None:
    file = bundle / "models" / "model.pt"
    state = torch.load(file, weights_only=True)
    state["head.weight"] = state["head.weight"][:1]
    torch.save(state, file)
    with pytest.raises(Exception) as info:
        monai.bundle.load(name, bundle_dir="bundles", workflow_type="inference", device="cpu")
    message = user_fault(info.value)
    assert message is not None and CheckpointError.__name__ not in message
    assert "tensors fit ImageClassifier; other shape: head.weight: (1, 32) in the file" in message
