# SPDX-License-Identifier: Apache-2.0
"""A network as a training run leaves it, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from unimedi_components.data.datalist import write_json
from unimedi_components.data.vocabulary import build_wordpiece
from unimedi_components.metrics.bootstrap import Measures
from unimedi_components.networks import ProjectionHead, ReportEncoder, UnifiedViT, UniMedI, load_tokenizer
from unimedi_components.networks.pretrained import make_card, student_state


@pytest.fixture(scope="session")
def leave_network() -> Callable[..., Path]:
    """Write the files of a tiny network that reads reports; the path of its `model.pt`."""

    def write(models: Path, reports: Sequence[str], depth: int = 2, extra: Any = (), **preprocessing: Any) -> Path:
        tokenizer = load_tokenizer(build_wordpiece(reports, models / "vocabulary", vocab_size=300))
        sizes: dict[str, Any] = {"img_size": 32, "vol_size": (16, 32, 32), "patch_size_3d": (4, 16, 16)}
        torch.manual_seed(0)
        network = UniMedI(
            UnifiedViT(**sizes, embed_dim=32, depth=depth, num_heads=2),
            ReportEncoder(config={"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": len(tokenizer)}),
            ProjectionHead(32, 32, 16),
            ProjectionHead(32, 32, 16),
            selector="student",
            self_distillation=False,
            num_slices=2,
        )
        read = {"xray": {"size": 32}, "ct": {"spatial_size": [16, 32, 32]}, "max_length": 64, **preprocessing}
        write_json(make_card(network, read, **dict(extra)), models / "model.json")
        torch.save(network.encoder.state_dict(), models / "model.pt")
        torch.save(student_state(network), models / "unimedi.pt")
        tokenizer.save_pretrained(models / "report_encoder")
        return models / "model.pt"

    return write


@pytest.fixture(scope="session")
def kept_by() -> Callable[..., dict[str, Any]]:
    """What a measure adds to `Measures` without resamples."""

    def values(measure: Callable[..., None], *args: Any, **options: Any) -> dict[str, Any]:
        kept = Measures()
        measure(kept, *args, **options)
        return kept.content()

    return values
