# SPDX-License-Identifier: Apache-2.0
"""The card of a task's network: what `model.json` says, and how the network is built from it again."""

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unimedi_components.errors import CheckpointError, ConfigError
from unimedi_components.networks.pretrained import CARD, read_card
from unimedi_components.networks.unified_vit import UnifiedViT
from unimedi_components.networks.weights import load_strict, read_state_dict

#: Kind of network -> what people call it, module, class. A class has `kind`, `hparams`, `card` and `encoder`.
KINDS = {
    "classifier": ("classifier", "classifier", "ImageClassifier"),
    "setr_pup": ("X-ray segmenter", "setr_pup", "SETRPUP"),
    "unetr": ("CT segmenter", "unetr", "UnifiedUNETR"),
    "vitdet": ("detector", "vitdet", "ViTDet"),
}


def network_card(
    network: nn.Module, task: str, label_names: Sequence[str], preprocessing: Mapping[str, Any], **extra: Any
) -> dict[str, Any]:
    """Describe a task's network, or the one in a distributed wrapper, so that `load_network` can build it.

    ``preprocessing``: of its images, see `data.task_transforms`.

    Raises:
        ConfigError: a classifier or a segmenter of volumes that has not one output for each name.
    """
    own: Any = getattr(network, "module", network)
    outputs = own.hparams.get("num_classes") if own.kind in ("classifier", "unetr") else None
    if outputs not in (None, 1 if task == "binary" else len(label_names)):
        raise ConfigError(f"num_classes {outputs} does not fit label_names {list(label_names)}; leave it as it is")
    card = {
        "format": 1,
        "encoder": own.encoder.hparams,
        own.kind: own.hparams,
        "task": task,
        "label_names": list(label_names),
        "preprocessing": dict(preprocessing),
        **extra,
    }
    return json.loads(json.dumps(card))


def load_network(checkpoint: str | Path, device: str | torch.device = "cpu", kind: str | None = None) -> Any:
    """A task's trained network, in evaluation mode, from `models/model.pt` with `model.json` beside it.

    ``kind``: the one of `KINDS` that is wanted; None takes any. Raises CheckpointError: a file is missing or does not
    fit, or the network is of another kind.

    Returns:
        the network; its attribute `card` holds label names, the kind of task and the images' preparation.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; train the bundle first or give another path")
    card = read_card(path)
    found = [name for name in KINDS if name in card]
    if not found or (kind is not None and kind not in found):
        wanted = "network of a task" if kind is None else KINDS[kind][0]
        has = f", but a {KINDS[found[0]][0]}" if found else ""
        raise CheckpointError(
            f"{path.with_name(CARD)}: describes no {wanted}{has}; give the model.pt of such a bundle's training"
        )
    _, module, name = KINDS[found[0]]
    build = getattr(importlib.import_module(f"unimedi_components.networks.{module}"), name)
    network = build(UnifiedViT(**card["encoder"]), **card[found[0]])
    load_strict(network, read_state_dict(path), str(path))
    network.card = card
    return network.to(device).eval()
