# SPDX-License-Identifier: Apache-2.0
"""Every network in a training step: it asks for no value, since each question makes a GPU wait and its queue run dry,
and half precision leaves its gradients what they are.

On the CPU PyTorch dispatches the operators that a GPU would wait for too. `UNIMEDI_TEST_DEVICE` names another device:
"cuda", or "rehearsal" with `pytest -p tests.rehearsal`, where mixing devices is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

from unimedi_components import selection
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

DEVICE = torch.device(os.environ.get("UNIMEDI_TEST_DEVICE", "cpu"))
SIZES: dict[str, Any] = {"img_size": 32, "vol_size": (8, 32, 32), "embed_dim": 24, "depth": 2, "num_heads": 2}
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "bincount"}
INDEXED = {"index", "index_put_", "_index_put_impl_"}
#: Ahead of what takes their mean or scale away, so that they change nothing.
NULL = ("dino_head.mlp.4.bias", "_projection.hidden.bias", "_projection.output.bias", "stem.layer.conv3.conv.weight")
Case = tuple[nn.Module, Callable[[], Tensor]]


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
    optimizer = build_optimizer(network, 1e-3, 0.05, fused=DEVICE.type != "rehearsal")
    for _ in range(2):
        with counter() as counted:
            optimizer.zero_grad()
            loss().backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            if isinstance(network, UniMedI):
                network.update_teacher(0.9)
    return counted.names if isinstance(counted, Waits) else [place.split()[0] for place in counted.elements()]


def counter() -> Any:
    """What counts waits: the rehearsed device itself, where it is there."""
    if DEVICE.type != "rehearsal":
        return Waits()
    from tests.rehearsal import counted

    return counted()


def differing(count: int, *size: int) -> Tensor:
    """Images that a network tells apart: of noise alone all features are alike, but for rounding, which the
    normalisation over a small batch of them would bring to unit variance."""
    return torch.randn(count, 1, *size) + 2 * torch.randn(count, 1, *[4] * len(size)).repeat(
        1, 1, *(side // 4 for side in size)
    )


def pretraining(
    mask_mode: str = "drop", selector: str = "teacher", targets: str = "sinkhorn", accumulation: int = 1
) -> Case:
    projections = [ProjectionHead(24, 32, 16, norm="batch_per_modality") for _ in range(2)]
    text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    network = UniMedI(
        UnifiedViT(**SIZES, grad_checkpointing=accumulation > 1),
        ReportEncoder(config={**text, "max_position_embeddings": 32}),
        *projections,
        DINOHead(24, 64, 32, 16, center_kinds=5),
        num_slices=1,
        mask_mode=mask_mode,
        selector=selector,
        accumulation=accumulation,
    ).to(DEVICE)
    objective = UniMediLoss(out_dim=64, targets=targets, within_modality=True).to(DEVICE)
    mask = torch.ones(20, 9, dtype=torch.int64)
    mask[2:, 6:] = 0
    batch = {"image2d": differing(12, 32, 32), "image3d": differing(8, 8, 32, 32)}
    batch |= {"input_ids": torch.randint(0, 50, (20, 9)), "attention_mask": mask}
    batch = {key: value.to(DEVICE) for key, value in batch.items()}
    return network, lambda: objective(network(batch))


def classification(use_slices: bool = True) -> Case:
    network = ImageClassifier(
        UnifiedViT(**SIZES), 2, spatial_dims=3, freeze_encoder=False, use_slices=use_slices, num_slices=1
    ).to(DEVICE)
    image, label = torch.randn(3, 1, 8, 32, 32).to(DEVICE), torch.tensor([0, 1, 1]).to(DEVICE)
    return network, lambda: nn.functional.cross_entropy(network(image), label)


def xray_segmentation() -> Case:
    network = SETRPUP(UnifiedViT(**SIZES), widths=[8] * 4, freeze_encoder=False).to(DEVICE)
    image, label = torch.randn(2, 1, 32, 32).to(DEVICE), torch.rand(2, 1, 32, 32).to(DEVICE)

    def loss() -> Tensor:
        scores = network(image)
        scores = scores if isinstance(scores, Tensor) else scores[0]
        return nn.functional.binary_cross_entropy_with_logits(scores, label)

    return network, loss


def ct_segmentation() -> Case:
    encoder = UnifiedViT(**{**SIZES, "depth": 4})
    network = UnifiedUNETR(encoder, 3, hidden_states=(0, 1, 2), feature_size=4, freeze_encoder=False).to(DEVICE)
    image, label = torch.randn(1, 1, 8, 32, 32).to(DEVICE), torch.randint(0, 3, (1, 1, 8, 32, 32)).to(DEVICE)
    objective = OrganLoss(class_balance=0.5).to(DEVICE)
    return network, lambda: objective(network(image), label)


def detection(count: int = 3) -> Case:
    network = ViTDet(UnifiedViT(**SIZES), width=16, head_convs=1, freeze_encoder=False).to(DEVICE)
    boxes, labels = torch.tensor([[4.0, 6.0, 30.0, 28.0]]), torch.zeros(1, dtype=torch.int64)
    targets = [{"boxes": boxes[: i % 2].to(DEVICE), "labels": labels[: i % 2].to(DEVICE)} for i in range(1, count + 1)]
    image = torch.randn(count, 1, 32, 32).to(DEVICE)
    return network, lambda: DetectionLoss()(network(image, targets))


CASES: dict[str, Callable[[], Case]] = {
    "pretraining": pretraining,
    "pretraining_by_student": lambda: pretraining("mask_token", "student", "center"),
    "pretraining_in_parts": lambda: pretraining(accumulation=2),
    "classification": lambda: classification(False),
    "classification_with_slices": classification,
    "xray_segmentation": xray_segmentation,
    "ct_segmentation": ct_segmentation,
    "detection": lambda: detection(1),
    "detection_of_four": lambda: detection(4),
    "detection_of_sixteen": lambda: detection(16),
}


def test_the_counter_counts() -> None:
    x = torch.arange(6.0)
    with Waits() as counted:
        float(x[0]), x[x > 3], x.nonzero(), x[torch.tensor([1, 2])]
    assert counted.names == ["_local_scalar_dense", "index", "nonzero"]


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_for_nothing(name: str) -> None:
    torch.manual_seed(0)
    network, loss = CASES[name]()
    names = waits(network.train(), loss)
    # MONAI's box coder copies its weights and looks whether its boxes are boxes, the same whatever the batch
    looks = 10 if name.startswith("detection") else 0
    assert [x for x in names if x != "copy_"] == ["_local_scalar_dense"] * looks and len(names) <= 1.2 * looks


def kept(made: list[Tensor], choose: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """A choice, added to those made."""
    made.append(choose(*args, **options))
    return made[-1]


def repeated(made: list[Tensor], *_: Any, **__: Any) -> Tensor:
    """The next of the choices made."""
    return made.pop(0)


@pytest.mark.parametrize("name", ["xray_segmentation", "ct_segmentation", "detection"])
def test_decoders_compute_in_float32_where_half_precision_is_bfloat16(name: str) -> None:
    network, loss = CASES[name]()
    found: set[tuple[bool, torch.dtype]] = set()
    for part, module in network.named_modules():
        if isinstance(module, nn.Linear | _ConvNd):
            inside = part.startswith("encoder")
            module.register_forward_hook(lambda *call, inside=inside: found.add((inside, call[-1].dtype)))
    for dtype, decoded in ((torch.bfloat16, torch.float32), (torch.float16, torch.float16)):
        found.clear()
        with torch.autocast(DEVICE.type, dtype=dtype):
            loss()
        assert found == {(True, dtype), (False, decoded)}


def positive(x: Tensor) -> Tensor:
    """On which side of zero values are."""
    return x.detach() > 0


def rectified(choose: Callable[..., Tensor], x: Tensor, negative_slope: float = 0.0, inplace: bool = False) -> Tensor:
    """`relu` and `leaky_relu` with the sides that are chosen."""
    return torch.where(choose(x), x, negative_slope * x)


#: A case whose gradients are those of another one.
LIKE_ANOTHER = "pretraining_in_parts"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in CASES if name != LIKE_ANOTHER])
def test_half_precision_keeps_every_gradient(
    name: str, dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as GradScaler does, lest float16 loses what is small
    scale = 2.0 ** (8 if name.startswith("pretraining") else 14)
    # slices and masked tokens of nearly the same score may change places, and what is nearly zero its side of the kink
    # in a ReLU: the first pass chooses for both
    chosen: dict[str, list[Tensor]] = {"select_slices": [], "keep_tokens": [], "positive": []}
    gradients = []
    for enabled in (False, True):
        again = repeated if enabled else kept
        for key in ("select_slices", "keep_tokens"):
            monkeypatch.setattr(selection, key, partial(again, chosen[key], getattr(selection, key)))
        for place in (nn.functional, torch):
            monkeypatch.setattr(place, "relu", partial(rectified, partial(again, chosen["positive"], positive)))
        monkeypatch.setattr(nn.functional, "leaky_relu", nn.functional.relu)
        torch.manual_seed(seed)
        network, loss = CASES[name]()
        network.train()
        torch.manual_seed(seed + 1)
        with torch.autocast(DEVICE.type, dtype=dtype, enabled=enabled):
            value = loss()
        (value.float() * scale).backward()
        assert torch.isfinite(value).all()
        found = {key: x.grad for key, x in network.named_parameters() if x.grad is not None}
        gradients.append({key: x.cpu().flatten() / scale for key, x in found.items()})
    full, half = gradients
    assert full.keys() == half.keys() and full
    assert all(torch.isfinite(x).all() for x in half.values())
    largest = max(x.norm() for x in full.values())
    # what a norm behind it cancels, such as a bias, has a gradient of rounding alone, in float32 too
    counted = [key for key, x in full.items() if x.norm() > 1e-8 * largest and not key.endswith(NULL)]
    cosines = {key: float(torch.cosine_similarity(full[key], half[key], dim=0)) for key in counted}
    assert min(cosines.values()) >= 0.98, sorted(cosines.items(), key=lambda item: item[1])[:5]
