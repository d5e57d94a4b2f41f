# SPDX-License-Identifier: Apache-2.0
"""Parameter groups by name, and the learning rate at steps worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from unimedi_components.engines import amp_dtype, build_optimizer, use_amp, warmup_cosine
from unimedi_components.engines.optim import scaled_lr
from unimedi_components.errors import ConfigError
from unimedi_components.loading import MixedBatchSampler
from unimedi_components.networks import DINOHead, ProjectionHead, ReportEncoder, UnifiedViT, UniMedI

TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 30, "num_attention_heads": 2}


def network() -> UniMedI:
    encoder = UnifiedViT(16, (8, 16, 16), patch_size=8, patch_size_3d=(4, 8, 8), embed_dim=16, depth=1, num_heads=2)
    heads = ProjectionHead(16, 24, 8), ProjectionHead(16, 24, 8)
    return UniMedI(encoder, ReportEncoder(config=TEXT), *heads, DINOHead(16, 20, 24, 12), num_slices=1)


def test_groups_by_name() -> None:
    model = network()
    optimizer = build_optimizer(model, lr=0.01, weight_decay=0.05, betas=(0.9, 0.95))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, rest = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert all(group["lr"] == 0.01 and group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)
    assert not decayed & rest
    assert decayed | rest == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("teacher") for name in decayed | rest)
    assert {
        "encoder.patch_embed.proj.weight",
        "encoder.patch_embed_3d.proj.weight",
        "encoder.blocks.0.attn.qkv.weight",
        "report_encoder.model.embeddings.word_embeddings.weight",
        "dino_head.last_layer.weight_v",
    } <= decayed
    tokens = ("cls_token", "mask_token", "pos_embed", "pos_embed_3d", "segment_embed", "depth_embed")
    assert {"log_temperature", "encoder.norm.weight", "encoder.blocks.0.mlp.fc1.bias"} <= rest
    assert {f"encoder.{name}" for name in tokens} <= rest
    assert all(name.endswith(("weight", "weight_v")) for name in decayed)


def test_only_linear_layers_inside_the_network_go_to_muon() -> None:
    model = network()
    optimizer = build_optimizer(model, lr=0.01, weight_decay=0.05, muon_lr=0.03, fused=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    *others, hidden = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert {f"encoder.blocks.0.{layer}.weight" for layer in layers} <= hidden
    assert "report_encoder.model.encoder.layer.0.attention.self.query.weight" in hidden
    assert not any(word in name for name in hidden for word in ("embed", "dino_head", "teacher", "bias"))
    assert sorted([*hidden, *set().union(*others)]) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01, 0.03]


def test_weight_decay_moves_matrices_alone() -> None:
    model = nn.Linear(2, 2)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(model.weight, start["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias, start["bias"])


def test_learning_rate_of_another_batch(caplog: pytest.LogCaptureFixture) -> None:
    sampler = MixedBatchSampler([2] * 24 + [3] * 12, batch_2d=12, batch_3d=6, num_replicas=2, rank=0)
    assert scaled_lr(2e-5, sampler, 36, "linear") == 2e-5
    assert not caplog.records
    found = [scaled_lr(2e-5, sampler, 144, rule) for rule in ("none", "linear", "sqrt")]
    assert found == pytest.approx([2e-5, 5e-6, 1e-5])
    assert len(caplog.messages) == 3
    assert caplog.messages[-1] == (
        "a step has 36 images (18 on each of 2 ranks), the learning rate 2e-05 is for 144: "
        "lr_rule 'sqrt' makes it 1e-05"
    )
    alone = MixedBatchSampler([2] * 24, batch_2d=12, batch_3d=0)
    scaled_lr(2e-5, alone, 144)
    assert caplog.messages[-1] == (
        "a step has 12 images, the learning rate 2e-05 is for 144: lr_rule 'none' leaves it at 2e-05"
    )
    with pytest.raises(ConfigError, match="lr_rule is 'cubic'; use one of none, linear, sqrt"):
        scaled_lr(2e-5, sampler, 144, "cubic")


def rates(steps: int, **kwargs: float) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = warmup_cosine(optimizer, **kwargs)  # type: ignore[arg-type]
    found = []
    for _ in range(steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_learning_rate_by_hand() -> None:
    # 10 steps of warm-up from 0.01 to 0.1, then a cosine over 30 steps
    found = rates(40, steps_per_epoch=10, epochs=4, warmup_epochs=1, start_lr=0.01, end_lr=1e-4)
    assert found[0] == pytest.approx(0.01)
    assert found[5] == pytest.approx(0.01 + 0.09 * 0.5)
    assert found[10] == pytest.approx(0.1)
    assert found[20] == pytest.approx(0.1 * (1 + math.cos(math.pi / 3)) / 2)
    assert found[25] == pytest.approx(0.05)
    # the cosine goes to 0; end_lr is its floor
    assert found[39] == pytest.approx(0.1 * (1 + math.cos(math.pi * 29 / 30)) / 2)
    assert found[40] == pytest.approx(1e-4)


def test_part_of_an_epoch_of_warm_up_and_none() -> None:
    found = rates(12, steps_per_epoch=6, epochs=2, warmup_epochs=0.5, start_lr=1e-6, end_lr=0.0)
    assert found[0] == pytest.approx(1e-6) and found[3] == pytest.approx(0.1) and found[12] == pytest.approx(0.0)
    assert rates(4, steps_per_epoch=2, epochs=2, warmup_epochs=0)[:3:2] == pytest.approx([0.1, 0.05])


def test_warm_up_must_end() -> None:
    with pytest.raises(ValueError, match=r"warmup_epochs 2 leaves nothing of 2 epochs; lower it or train longer"):
        rates(1, steps_per_epoch=3, epochs=2, warmup_epochs=2)


def test_mixed_precision_is_for_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    values = ("auto", True, "bfloat16", False)
    assert [use_amp(amp, "cuda:0") for amp in values] == [True, True, True, False]
    assert [use_amp(amp, torch.device("cpu")) for amp in values * 2] == [False] * 8
    said = [f"amp {amp}: mixed precision needs a GPU; on cpu all is computed in float32" for amp in values[1:3]]
    assert [record.message for record in caplog.records] == said


def test_the_type_of_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert amp_dtype("float16") == amp_dtype(torch.float16) == torch.float16
    assert amp_dtype("bfloat16") == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert amp_dtype() == expected
    with pytest.raises(ConfigError, match="amp is 'half'; use one of auto, True, False, bfloat16, float16"):
        amp_dtype("half")
