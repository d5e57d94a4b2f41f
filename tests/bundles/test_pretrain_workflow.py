# SPDX-License-Identifier: Apache-2.0
"""The pretrain bundle end to end: train, evaluate, embed, each as MONAI's own workflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow, verify_net_in_out
from PIL import Image
from torch.nn import functional as F

from tests.common import digests
from unimedi_components import UnifiedViT, load_encoder, load_pretrained
from unimedi_components.networks import load_strict

pytestmark = pytest.mark.usefixtures("in_process")


def workflow(files: Any, kind: str, overrides: dict[str, Any]) -> ConfigWorkflow:
    return ConfigWorkflow(files, workflow_type=kind, logging_file=False, **overrides)


def flat(values: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested values by their paths, for approximate comparison."""
    if not isinstance(values, dict | list):
        return {name: values}
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    return {path: leaf for key, value in pairs for path, leaf in flat(value, f"{name}/{key}").items()}


def test_train_as_a_workflow(configs: Path, new_run: Any) -> None:
    train = workflow(
        str(configs / "train.json"), "train", {**new_run.overrides, "epochs": 1, "matmul_precision": "medium"}
    )
    train.initialize()
    assert train.check_properties() == []
    train.run()
    train.finalize()
    assert {path.name for path in new_run.models.iterdir()} == {
        *("model.pt", "model_best.pt", "unimedi.pt", "last.pt", "model.json", "report_encoder", "vocabulary")
    }
    assert new_run.last()["epoch"] == 1


def test_what_a_run_leaves(trained: Any) -> None:
    card = json.loads((trained.models / "model.json").read_text())
    state = torch.load(trained.models / "model.pt", weights_only=True)
    encoder = UnifiedViT(**card["encoder"])
    load_strict(encoder, state, "model.pt")
    assert state.keys() == encoder.state_dict().keys()
    assert all(value.isfinite().all() for value in state.values())
    full = torch.load(trained.models / "unimedi.pt", weights_only=True)
    assert all(torch.equal(full[f"encoder.{name}"], value) for name, value in state.items())
    assert not any(name.startswith(("teacher", "dino_head")) for name in full)
    best = torch.load(trained.models / "model_best.pt", weights_only=True)
    assert best.keys() == state.keys()
    network = load_pretrained(trained.models / "last.pt").network
    assert all(torch.equal(network.state_dict()[name], value) for name, value in full.items())
    volume = torch.zeros(1, 1, 16, 24, 24)
    assert load_encoder(trained.models / "model.pt")(volume, return_attention=True).attention.shape == (1, 16)


def test_what_a_run_measured(trained: Any) -> None:
    metrics = trained.metrics()
    assert metrics["split"] == "test"
    for key in ("report_recall_at_1", "report_recall_at_5", "report_recall_at_10", "slice_studies_known"):
        assert key in metrics
    history = trained.last()["history"]["rows"]
    steps = trained.last()["epoch_length"]
    assert [row["iteration"] for row in history] == list(range(1, 3 * steps + 1))
    assert {"loss", "vl", "icl", "pcl", "lr"} <= history[0].keys()
    assert [row["iteration"] for row in history if "val_recall_at_5" in row] == [steps, 2 * steps, 3 * steps]
    assert metrics["training"] == {"iterations": 3 * steps, "loss": history[-1]["loss"]}
    for name in ("loss_curves.png", "slice_selection.png", "xray_attention.png"):
        with Image.open(trained.eval / name) as image:
            assert image.width == 1200, name
    assert list(trained.eval.glob("events.out.tfevents.*"))
    said = (trained.root / "done").read_text()
    assert "pre-training, epoch 3/3" in said
    assert "100%" in said


def test_evaluate_measures_and_leaves_the_weights_alone(configs: Path, trained: Any, tmp_path: Path) -> None:
    before = digests(trained.models)
    files = [str(configs / "train.json"), str(configs / "evaluate.json")]
    overrides = {**trained.overrides, "output_dir": str(tmp_path / "eval")}
    evaluate = workflow(files, "train", overrides)
    evaluate.initialize()
    evaluate.run()
    evaluate.finalize()
    assert digests(trained.models) == before
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["metrics.json"]
    found = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    after_training = {key: value for key, value in trained.metrics().items() if key != "training"}
    assert flat(found) == pytest.approx(flat(after_training))


@pytest.mark.parametrize("checkpoint", ["model_best.pt", "unimedi.pt", "last.pt"])
def test_evaluate_any_checkpoint_and_split(
    configs: Path, trained: Any, tmp_path: Path, checkpoint: str, capsys: Any
) -> None:
    files = [str(configs / "train.json"), str(configs / "evaluate.json")]
    changes = {"split": "validation", "checkpoint": str(trained.models / checkpoint), "output_dir": str(tmp_path)}
    evaluate = workflow(files, "train", {**trained.overrides, **changes})
    evaluate.initialize()
    evaluate.run()
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["split"] == "validation"
    assert '"split": "validation"' in capsys.readouterr().out
    datalist = json.loads((trained.data / "phantom" / "pretrain.json").read_text())
    assert found["studies_2d"] + found["studies_3d"] == len(datalist["validation"])


def test_network_def_fits_the_metadata(configs: Path, trained: Any) -> None:
    verify_net_in_out(
        "network_def",
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
        device="cpu",
        checkpoint=str(trained.models / "model.pt"),
    )


def test_metadata_is_that_of_the_default_run(configs: Path) -> None:
    train = json.loads((configs / "train.json").read_text())
    formats = json.loads((configs / "metadata.json").read_text())["network_data_format"]
    assert formats["inputs"]["image"]["spatial_shape"] == train["vol_size"]
    assert formats["inputs"]["image2d"]["spatial_shape"] == [train["img_size"]] * 2
    assert formats["outputs"]["pred"]["num_channels"] == train["network_def"]["image_projection"]["out_dim"]


def test_network_def_gives_unit_embeddings(configs: Path, trained: Any) -> None:
    overrides = {"checkpoint": str(trained.models / "model.pt"), "dataset_dir": str(trained.data / "phantom")}
    infer = workflow(str(configs / "inference.json"), "infer", {**overrides, "device": "cpu"})
    infer.initialize()
    assert infer.check_properties() == []
    network, image = infer.network_def, torch.rand(2, 1, 16, 24, 24)
    pred = infer.inferer(image, network)
    expected = load_pretrained(trained.models / "model.pt").network.encode_image(image).embed
    assert torch.allclose(pred, F.normalize(expected, dim=-1), atol=1e-6)
    assert pred.shape == (2, 128)
    assert not network.training
