# SPDX-License-Identifier: Apache-2.0
"""ONNX files of a trained network: its encoder and both towers, or a task's network, each checked as it is written."""

import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimedi_components.errors import CheckpointError, ConfigError
from unimedi_components.networks.cards import KINDS, load_network
from unimedi_components.networks.export import example
from unimedi_components.networks.pretrained import CARD, TEXT, load_pretrained, read_card

#: How far onnxruntime's outputs may lie from torch's.
TOLERANCE = 1e-4
_OF_ANY_LENGTH = ("input_ids", "attention_mask")


class _Part(nn.Module):
    """One file: inputs of two images or reports, what is computed of them, and names for what comes out."""

    def __init__(self, call: Callable[..., Any], inputs: dict[str, Tensor], *outputs: str) -> None:
        super().__init__()
        self.call, self.inputs, self.outputs = call, inputs, outputs

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(*inputs)


def write_onnx(checkpoint: str | Path, folder: str | Path) -> dict[Path, float]:
    """Write a trained network as ONNX files that take any number of images, with its card beside them.

    A pre-training run gives `encoder_2d`, `encoder_3d` and `encoder_joint` (a volume with its slices), and the towers
    `image_2d`, `image_3d` (which selects a volume's slices) and `report`, whose outputs are unit vectors of one space;
    its tokenizer lies in `report_encoder`. A task gives `network`. Images are of the training's size; `model.json` says
    how they are prepared. Raises CheckpointError: files are missing or do not fit, or an output differs by more than
    `TOLERANCE`; ConfigError: the extra `[onnx]` is missing, or the network is a detector.

    Args:
        checkpoint: `models/model.pt` of any bundle but detection.
        folder: to write to.

    Returns:
        files, and how far onnxruntime's outputs lie from torch's at most, on other inputs than the export's.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"ONNX needs {error.name}: pip install 'unimedi-components[onnx]'") from error
    path, place = Path(checkpoint), Path(folder)
    task = bool(KINDS.keys() & read_card(path).keys())
    parts = _task(path) if task else _towers(path)
    place.mkdir(parents=True, exist_ok=True)
    shutil.copy(path.with_name(CARD), place)
    if not task:
        shutil.copytree(path.with_name(TEXT), place / TEXT)
    return {file: _write(part, file) for name, part in parts.items() if (file := place / f"{name}.onnx")}


def _task(path: Path) -> dict[str, _Part]:
    network = load_network(path)
    if network.kind == "vitdet":
        raise ConfigError(
            f"{path}: a detector finds another number of boxes in each image, which has no ONNX form here"
        )
    return {"network": _Part(network, {"image": torch.rand_like(example(network))}, "pred")}


def _towers(path: Path) -> dict[str, _Part]:
    network = load_pretrained(path).network
    encoder, slices = network.encoder, network.num_slices

    def tokens(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        output = encoder(*inputs, return_attention=True)
        return output.cls, output.patches, output.attention

    def embed(image: Tensor) -> Tensor:
        return F.normalize(network.encode_image(image).embed, dim=-1)

    def report(*inputs: Tensor) -> Tensor:
        return F.normalize(network.encode_text(*inputs), dim=-1)

    channels, names = encoder.patch_embed.proj.in_channels, ("cls", "patches", "attention")
    film = {"image": torch.rand(2, channels, *encoder.img_size)}
    volume = {"image": torch.rand(2, channels, *encoder.vol_size)}
    chosen = {"slices": torch.rand(2, slices, channels, *encoder.img_size), "slice_position": torch.rand(2, slices)}
    words = {
        "input_ids": torch.randint(network.report_encoder.model.config.vocab_size, (2, 8)),
        "attention_mask": (torch.arange(8) < torch.tensor([[6], [8]])).long(),
        "modality": torch.tensor([0, 1]),
    }
    return {
        "encoder_2d": _Part(tokens, film, *names),
        "encoder_3d": _Part(tokens, volume, *names),
        "encoder_joint": _Part(tokens, {**volume, **chosen}, *names),
        "image_2d": _Part(embed, film, "embed"),
        "image_3d": _Part(embed, volume, "embed"),
        "report": _Part(report, words, "embed"),
    }


@torch.no_grad()
def _write(part: _Part, file: Path) -> float:
    import onnxruntime

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=512)
    axes = tuple({0: batch, 1: length} if name in _OF_ANY_LENGTH else {0: batch} for name in part.inputs)
    # torch's exporter warns of its own deprecated calls, and that it does not find torchvision
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            part.eval(),
            tuple(part.inputs.values()),
            str(file),
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            dynamic_shapes=(axes,),
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    # three rows instead of two, and shorter reports
    inputs = {name: torch.cat([value.flip(0), value[:1]]) for name, value in part.inputs.items()}
    inputs |= {name: inputs[name][:, :7] for name in _OF_ANY_LENGTH if name in inputs}
    expected = part(*inputs.values())
    outputs = onnxruntime.InferenceSession(str(file)).run(None, {name: value.numpy() for name, value in inputs.items()})
    pairs = zip(outputs, [expected] if isinstance(expected, Tensor) else expected, strict=True)
    difference = max(float((torch.from_numpy(got) - wanted).abs().max()) for got, wanted in pairs)
    if not difference <= TOLERANCE:
        raise CheckpointError(f"{file}: differs from torch by {difference:.1e}, more than {TOLERANCE}; do not use it")
    return difference
