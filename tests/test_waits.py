# SPDX-License-Identifier: Apache-2.0
"""A training step asks for no value: each question makes a GPU wait, and its queue run dry.

Counted on the CPU, where PyTorch dispatches the same operators: numbers taken out of tensors, and shapes that depend on
values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unimedi_components.engines import build_optimizer
from unimedi_components.losses import DetectionLoss, UniMediLoss
from unimedi_components.losses.organs import OrganLoss
from unimedi_components.networks import (
    SETRPUP,
    DINOHead,
    ImageClassifier,
    ProjectionHead,
    ReportEncoder,
    UnifiedViT,
    UniMedI,
    ViTDet,
)
from unimedi_components.networks.unetr import UnifiedUNETR

SIZES: dict[str, Any] = {"img_size": 32, "vol_size": (8, 32, 32), "embed_dim": 24, "depth": 2, "num_heads": 2}
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "bincount"}
INDEXED = {"index", "index_put_", "_index_put_impl_"}


class Waits(TorchDispatchMode):
    """Names of the operators that would make a GPU wait."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in INDEXED and any(isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1])
        if name in WAITING or by_mask:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def waits(network: nn.Module, loss: Callable[[], Tensor]) -> list[str]:
    """Those of the second step: the first makes tables and the optimizer's state."""
    optimizer = build_optimizer(network, 1e-3, 0.05, fused=True)
    for _ in range(2):
        with Waits() as counted:
            optimizer.zero_grad()
            loss().backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            if isinstance(network, UniMedI):
                network.update_teacher(0.9)
    return counted.names


def test_the_counter_counts() -> None:
    x = torch.arange(6.0)
    with Waits() as counted:
        float(x[0]), x[x > 3], x.nonzero(), x[torch.tensor([1, 2])]
    assert counted.names == ["_local_scalar_dense", "index", "nonzero"]


@pytest.mark.parametrize("targets", ["sinkhorn", "center"])
@pytest.mark.parametrize(("mask_mode", "selector"), [("drop", "teacher"), ("mask_token", "student")])
def test_pre_training(mask_mode: str, selector: str, targets: str) -> None:
    torch.manual_seed(0)
    projections = [ProjectionHead(24, 32, 16, norm="batch_per_modality") for _ in range(2)]
    text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    network = UniMedI(
        UnifiedViT(**SIZES),
        ReportEncoder(config={**text, "max_position_embeddings": 32}),
        *projections,
        DINOHead(24, 64, 32, 16, center_kinds=5),
        num_slices=1,
        mask_mode=mask_mode,
        selector=selector,
    ).train()
    objective = UniMediLoss(out_dim=64, targets=targets, within_modality=True)
    mask = torch.ones(7, 9, dtype=torch.int64)
    mask[2:, 6:] = 0
    batch = {"image2d": torch.randn(4, 1, 32, 32), "image3d": torch.randn(3, 1, 8, 32, 32)}
    batch |= {"input_ids": torch.randint(0, 50, (7, 9)), "attention_mask": mask}
    assert waits(network, lambda: objective(network(batch))) == []


@pytest.mark.parametrize("use_slices", [False, True])
def test_classification(use_slices: bool) -> None:
    network = ImageClassifier(
        UnifiedViT(**SIZES), 2, spatial_dims=3, freeze_encoder=False, use_slices=use_slices, num_slices=1
    ).train()
    image, label = torch.randn(3, 1, 8, 32, 32), torch.tensor([0, 1, 1])
    assert waits(network, lambda: nn.functional.cross_entropy(network(image), label)) == []


def test_xray_segmentation() -> None:
    network = SETRPUP(UnifiedViT(**SIZES), widths=[8] * 4, freeze_encoder=False).train()
    image, label = torch.randn(2, 1, 32, 32), torch.rand(2, 1, 32, 32)

    def loss() -> Tensor:
        found = network(image)
        found = found if isinstance(found, Tensor) else found[0]
        return nn.functional.binary_cross_entropy_with_logits(found, label)

    assert waits(network, loss) == []


def test_ct_segmentation() -> None:
    network = UnifiedUNETR(
        UnifiedViT(**{**SIZES, "depth": 4}), 3, hidden_states=(0, 1, 2), feature_size=4, freeze_encoder=False
    ).train()
    image, label = torch.randn(1, 1, 8, 32, 32), torch.randint(0, 3, (1, 1, 8, 32, 32))
    objective = OrganLoss(class_balance=0.5)
    assert waits(network, lambda: objective(network(image), label)) == []


@pytest.mark.parametrize("count", [1, 4])
def test_detection_asks_the_same_whatever_the_batch(count: int) -> None:
    torch.manual_seed(0)
    network = ViTDet(UnifiedViT(**SIZES), width=16, head_convs=1, freeze_encoder=False).train()
    boxes, labels = torch.tensor([[4.0, 6.0, 30.0, 28.0]]), torch.zeros(1, dtype=torch.int64)
    targets = [{"boxes": boxes[: i % 2], "labels": labels[: i % 2]} for i in range(1, count + 1)]
    image = torch.randn(count, 1, 32, 32)
    # MONAI's box coder looks whether its boxes are boxes
    assert waits(network, lambda: DetectionLoss()(network(image, targets))) == ["_local_scalar_dense"] * 10
