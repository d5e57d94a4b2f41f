# SPDX-License-Identifier: Apache-2.0
"""UniMedI in the sizes that the benchmarks measure: the paper's, a smaller one, and one for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unimedi_components.networks import DINOHead, ProjectionHead, ReportEncoder, UniMedI, create_encoder

__all__ = ["SIZES", "batch", "gradient_difference", "gradients", "network"]

_BERT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 28996}
#: Encoder, report encoder, DINO head (prototypes, hidden, bottleneck), slices k and words of a report.
SIZES: dict[str, dict[str, Any]] = {
    "vit_b16": {"encoder": {"size": "vit_b16"}, "text": _BERT, "head": (8192, 2048, 256), "k": 4, "words": 112},
    "vit_s16": {
        "encoder": {"size": "vit_s16"},
        "text": {**_BERT, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6},
        "head": (4096, 1024, 128),
        "k": 4,
        "words": 112,
    },
    "quick": {
        "encoder": {
            **{"img_size": 32, "vol_size": (8, 32, 32), "patch_size": 8, "patch_size_3d": (2, 8, 8)},
            **{"embed_dim": 48, "depth": 2, "num_heads": 2},
        },
        "text": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50},
        "head": (256, 64, 16),
        "k": 2,
        "words": 12,
    },
}


def network(size: str, device: torch.device | str = "cpu", prototypes: int | None = None, **options: Any) -> UniMedI:
    """A network in training mode, without dropout in the report encoder, with random weights of a fixed seed.

    Args:
        size: a name in `SIZES`.
        device: to put it on.
        prototypes: K of the DINO head in place of the size's.
        options: of `UniMedI`.
    """
    torch.manual_seed(0)
    sizes = SIZES[size]
    default, hidden, bottleneck = sizes["head"]
    encoder = create_encoder(**sizes["encoder"])
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    report_encoder = ReportEncoder(config={**sizes["text"], **dropout})
    projection, common = (2048, 128) if size != "quick" else (32, 16)
    return (
        UniMedI(
            encoder,
            report_encoder,
            ProjectionHead(encoder.embed_dim, projection, common),
            ProjectionHead(report_encoder.width, projection, common),
            DINOHead(encoder.embed_dim, prototypes or default, hidden, bottleneck),
            **{"num_slices": sizes["k"], **options},
        )
        .train()
        .to(device)
    )


def batch(size: str, images: int, volumes: int, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Random X-rays, volumes and reports of a network's size."""
    torch.manual_seed(seed)
    encoder = create_encoder(**SIZES[size]["encoder"])
    words, vocabulary = SIZES[size]["words"], SIZES[size]["text"]["vocab_size"]
    made = {
        "image2d": torch.rand(images, 1, *encoder.img_size) * 2 - 1,
        "image3d": torch.rand(volumes, 1, *encoder.vol_size) * 2 - 1,
        "input_ids": torch.randint(5, vocabulary, (images + volumes, words)),
        "attention_mask": torch.ones(images + volumes, words, dtype=torch.long),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of a module's gradients."""
    return {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}


def gradient_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of two sets of gradients over the largest gradient; infinite if names differ."""
    if found.keys() != expected.keys():
        return float("inf")
    size = max(float(tensor.abs().max()) for tensor in expected.values())
    return max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items()) / size
