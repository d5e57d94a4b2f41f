# SPDX-License-Identifier: Apache-2.0
"""ONNX of tasks' networks, and `torch.export`: the numbers of torch, for any number of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.common import randomised
from unimedi_components.__main__ import main
from unimedi_components.networks import SETRPUP, EncoderOutput, ImageClassifier, UnifiedViT, ViTDet, network_card
from unimedi_components.networks.unetr import UnifiedUNETR


def encoder() -> UnifiedViT:
    sizes: dict[str, Any] = {"img_size": 16, "vol_size": (8, 16, 16), "patch_size": 8, "patch_size_3d": (4, 8, 8)}
    return UnifiedViT(**sizes, embed_dim=16, depth=2, num_heads=2)


def written(network: Any, folder: Path, **preprocessing: Any) -> Path:
    """The files that a task's training leaves, of a network none of whose parameters is at its default."""
    torch.manual_seed(0)
    torch.save(randomised(network).state_dict(), folder / "model.pt")
    (folder / "model.json").write_text(json.dumps(network_card(network, "task", ["a", "b", "c"], preprocessing)))
    return folder / "model.pt"


TASKS: dict[str, Any] = {
    "X-ray classifier": (lambda: ImageClassifier(encoder(), 3), (1, 16, 16)),
    "CT classifier": (
        lambda: ImageClassifier(encoder(), 3, 3, use_slices=True, num_slices=2, feature_norm=True),
        (1, 8, 16, 16),
    ),
    "X-ray segmenter": (lambda: SETRPUP(encoder(), widths=(8, 4, 4)), (1, 32, 32)),
    "CT segmenter": (
        lambda: UnifiedUNETR(encoder(), 3, hidden_states=(0, 1), feature_size=4, deep_supervision=True),
        (1, 8, 16, 16),
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_s_network_in_onnx(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
    build, size = TASKS[task]
    network = build()
    checkpoint = written(network, tmp_path, **({"film": {"size": 32}} if task == "X-ray segmenter" else {}))
    main(["export", str(checkpoint), str(tmp_path / "onnx"), "--format", "onnx"])
    file = tmp_path / "onnx" / "network.onnx"
    assert capsys.readouterr().out.startswith(f"{file}  within ")
    assert (tmp_path / "onnx" / "model.json").read_bytes() == (tmp_path / "model.json").read_bytes()
    session = onnxruntime.InferenceSession(str(file))
    network.eval()
    for count in (1, 5):
        image = torch.randn(count, *size)
        with torch.no_grad():
            expected = network(image)
        np.testing.assert_allclose(session.run(["pred"], {"image": image.numpy()})[0], expected, atol=1e-4)


def test_what_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = written(ViTDet(encoder()), tmp_path)
    for options, message in (
        (["--format", "onnx"], f"error: {checkpoint}: a detector finds another number of boxes in each image"),
        (["--format", "tflite"], "error: --format 'tflite' is unknown; formats are hub and onnx"),
    ):
        with pytest.raises(SystemExit):
            main(["export", str(checkpoint), str(tmp_path / "out"), *options])
        assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "out").exists()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["film", "volume", "volume with slices"])
def test_torch_export_of_the_encoder_returns_what_it_returns(kind: str) -> None:
    def inputs(count: int) -> tuple[Tensor, ...]:
        if kind == "film":
            return (torch.randn(count, 1, 16, 16),)
        volume = torch.randn(count, 1, 8, 16, 16)
        return (volume,) if kind == "volume" else (volume, torch.randn(count, 3, 1, 16, 16), torch.rand(count, 3))

    network: nn.Module = encoder().eval()
    axes = tuple({0: torch.export.Dim("batch")} for _ in inputs(2))
    program = torch.export.export(network, inputs(2), dynamic_shapes=axes)
    example = inputs(5)
    output, expected = program.module()(*example), network(*example)
    assert isinstance(output, EncoderOutput) and output.attention is None
    torch.testing.assert_close(output.cls, expected.cls)
    torch.testing.assert_close(output.patches, expected.patches)
