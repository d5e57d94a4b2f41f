# SPDX-License-Identifier: Apache-2.0
"""The files of a trained network: what is written beside `model.pt`, and how a network is built from them again."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unimedi_components.errors import CheckpointError
from unimedi_components.networks.heads import ProjectionHead
from unimedi_components.networks.hub import read_json
from unimedi_components.networks.report_encoder import ReportEncoder, load_tokenizer
from unimedi_components.networks.unified_vit import UnifiedViT
from unimedi_components.networks.unimedi import UniMedI
from unimedi_components.networks.weights import load_strict, read_state_dict

CARD = "model.json"
FULL = "unimedi.pt"
TEXT = "report_encoder"


@dataclass(frozen=True)
class Pretrained:
    """A network, in evaluation mode and without teacher, with its card and what is needed to feed it."""

    network: UniMedI
    tokenizer: Any
    card: dict[str, Any]
    path: Path

    @property
    def keep_punct(self) -> bool:
        """Whether its training reports kept their punctuation; cards without the key are of runs that kept it."""
        return bool(self.card["preprocessing"].get("keep_punct", True))


def make_card(network: UniMedI, preprocessing: Mapping[str, Any], **extra: Any) -> dict[str, Any]:
    """Describe a network so that `load_pretrained` can build it: sizes, selection, and the input's preparation."""
    head = {} if network.dino_head is None else {"dino_head": network.dino_head.hparams}
    return {
        "format": 1,
        "encoder": network.encoder.hparams,
        "report_encoder": network.report_encoder.model.config.to_diff_dict(),
        "image_projection": network.image_projection.hparams,
        "text_projection": network.text_projection.hparams,
        "selection": {
            name: getattr(network, name) for name in ("num_slices", "expand", "profile_power", "pseudo_pairs")
        },
        "preprocessing": dict(preprocessing),
        **head,
        **extra,
    }


def student_state(network: UniMedI) -> dict[str, Tensor]:
    """The state dict that `unimedi.pt` holds: both towers and their projections, without teacher and DINO heads."""
    left_out = ("teacher.", "teacher_head.", "dino_head.")
    return {name: value for name, value in network.state_dict().items() if not name.startswith(left_out)}


def load_encoder(checkpoint: str | Path, device: str | torch.device = "cpu") -> UnifiedViT:
    """The vision encoder of a trained bundle's `models/model.pt`, in evaluation mode; see `load_pretrained`."""
    path = Path(checkpoint)
    card = read_card(path)
    encoder = UnifiedViT(**card["encoder"])
    load_strict(encoder, read_state_dict(path), str(path))
    encoder.card = card
    return encoder.to(device).eval()


def load_pretrained(checkpoint: str | Path, device: str | torch.device = "cpu") -> Pretrained:
    """Build the whole network, both towers, from a checkpoint in a bundle's `models` folder.

    ``checkpoint``: `model.pt`, `model_best.pt` or `unimedi.pt`. The first two hold the vision encoder alone; the report
    side is taken from the `unimedi.pt` beside them. Raises CheckpointError: a file is missing or does not fit.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; train the pretrain bundle first or give another path")
    card = read_card(path)
    network = _build(card)
    state = read_state_dict(path)
    if "cls_token" in state:
        load_strict(UnifiedViT(**card["encoder"]), state, str(path))
        full = read_state_dict(path.with_name(FULL))
        state = {**full, **{f"encoder.{name}": value for name, value in state.items()}}
    else:
        state = {n: v for n, v in state.items() if not n.startswith(("teacher.", "teacher_head.", "dino_head."))}
    load_strict(network, state, str(path))
    return Pretrained(network.to(device).eval(), load_tokenizer(path.parent / TEXT), card, path)


def untrained(pretrained: Pretrained, seed: int = 0) -> Pretrained:
    """The same network with random weights, on the same device: the baseline of every comparison."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = _build(pretrained.card)
    device = next(pretrained.network.parameters()).device
    return Pretrained(network.to(device).eval(), pretrained.tokenizer, pretrained.card, pretrained.path)


def _build(card: Mapping[str, Any]) -> UniMedI:
    return UniMedI(
        UnifiedViT(**card["encoder"]),
        ReportEncoder(config=card["report_encoder"]),
        ProjectionHead(**card["image_projection"]),
        ProjectionHead(**card["text_projection"]),
        selector="student",
        self_distillation=False,
        **card["selection"],
    )


def read_card(checkpoint: Path) -> dict[str, Any]:
    """Read `model.json` beside a checkpoint. Raises CheckpointError: missing, damaged, or of another format."""
    path = checkpoint.with_name(CARD)
    kept = f"keep {CARD} beside {checkpoint.name}, it says how the network is built"
    card = read_json(path, kept, "copy it again from the training run")
    if card.get("format") != 1:
        raise CheckpointError(f"{path}: format {card.get('format')!r} is not known to this version; expected 1")
    return card
