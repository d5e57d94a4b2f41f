# SPDX-License-Identifier: Apache-2.0
"""The plan of a run against what torch counts in a real step: FLOPs, and the bytes that autograd keeps."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unimedi_components.__main__ import main
from unimedi_components.config_check import check_config
from unimedi_components.engines import build_optimizer
from unimedi_components.losses import UniMediLoss
from unimedi_components.networks import DINOHead, ProjectionHead, ReportEncoder, UnifiedViT, UniMedI, create_encoder
from unimedi_components.plan import GIB, describe, network_of_config, state_bytes, step_cost
from unimedi_components.plan_task import TaskStep, task_needs

CONFIGS = Path(__file__).parents[1] / "bundles" / "pretrain" / "configs"
CT = CONFIGS.parents[1] / "chest_ct_classification" / "configs"
TOKENS = 20
#: What the overlays' volumes, films and decoders fit, and is counted in no time.
SMALL = {"patch_size": 16, "patch_size_3d": (4, 16, 16), "embed_dim": 24, "depth": 10, "num_heads": 2}


def build(grad_checkpointing: bool = False, **options: Any) -> UniMedI:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"patch_size": 8, "patch_size_3d": (4, 8, 8), "embed_dim": 96, "depth": 4, "num_heads": 3}
    text = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 50, "num_attention_heads": 2}
    return UniMedI(
        UnifiedViT(64, (16, 64, 64), **sizes, grad_checkpointing=grad_checkpointing),
        ReportEncoder(config={**text, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
        ProjectionHead(96, 128, 32),
        ProjectionHead(64, 128, 32),
        DINOHead(96, 200, 128, 32, center_kinds=5),
        num_slices=2,
        **options,
    ).train()


def batch() -> dict[str, torch.Tensor]:
    return {
        "image2d": torch.randn(4, 1, 64, 64),
        "image3d": torch.randn(4, 1, 16, 64, 64),
        "input_ids": torch.randint(5, 50, (8, TOKENS)),
        "attention_mask": torch.ones(8, TOKENS, dtype=torch.long),
    }


def kept_bytes(network: UniMedI, amp: bool) -> int:
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=amp):
        loss = UniMediLoss(out_dim=200)(network(batch()))
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask_mode": "drop", "accumulation": 2},
        {"vl_on_full": True, "selector": "random"},
        {"vl_on_full": "image2d"},
        {"grad_checkpointing": True},
        {"self_distillation": False, "selector": "student"},
    ],
)
def test_flops_are_those_that_torch_counts(options: dict[str, Any]) -> None:
    network = build(**options)
    # the fused kernel of the CPU is not counted
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        UniMediLoss(out_dim=200)(network(batch())).backward()
    assert step_cost(network, 4, 4, TOKENS, amp=False).flops == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"mask_mode": "drop"}, {"vl_on_full": True}, {"vl_on_full": "image3d"}, {"self_distillation": False}],
)
def test_activations_are_those_that_autograd_keeps(options: dict[str, Any], amp: bool) -> None:
    network = build(**options)
    found = kept_bytes(network, amp)
    if amp:  # autocast's halved weights are among them, and counted with the weights
        found -= round(state_bytes(network, True) - state_bytes(network, False))
    assert step_cost(network, 4, 4, TOKENS, amp=amp).activations == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("muon_lr", [None, 1e-3])
def test_the_state_is_that_of_the_optimizer(muon_lr: float | None) -> None:
    network = build()
    optimizer = build_optimizer(network, 1e-3, 0.1, muon_lr=muon_lr)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for key, x in state.items() if key != "step"]
    held = [*network.parameters(), *(parameter.grad for parameter in trained), *moments]
    assert state_bytes(network, amp=False, muon=muon_lr is not None) == sum(x.nbytes for x in held)


@pytest.mark.parametrize("options", [{"grad_checkpointing": True}, {"accumulation": 4}])
def test_checkpointing_and_micro_batches_keep_less(options: dict[str, Any]) -> None:
    network = build(**options)
    cost = step_cost(network, 4, 4, TOKENS, amp=False)
    assert cost.activations == pytest.approx(kept_bytes(network, False), rel=0.15)
    whole = step_cost(build(), 4, 4, TOKENS, amp=False)
    assert cost.activations + cost.passing < 0.5 * (whole.activations + whole.passing)


def test_the_paper_on_eight_cards() -> None:
    config = check_config([CONFIGS / "train.json", CONFIGS / "mimic_cxr_bimcv.json"])
    network = network_of_config(config)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (network.encoder, network.teacher)]
    with torch.device("meta"):
        assert sizes == [sum(p.numel() for p in create_encoder(size="vit_b16").parameters())] * 2
    cost, fixed = step_cost(network, 12, 6, 112), state_bytes(network)
    text = describe(config, gpu="a100-40", gpus=8, share=0.5, xrays=96_000, cts=1000)
    with_muon = check_config([CONFIGS / "train.json", CONFIGS / "mimic_cxr_bimcv.json"], {"optimizer#muon_lr": 1e-4})
    saved = fixed - state_bytes(network, muon=True)
    assert f"{(fixed - saved) / GIB:.1f} of weights" in describe(with_muon, gpu="a100-40") and saved > 0.2 * GIB
    hours = 50 * 1000 * cost.flops / (0.5 * 312e12) / 3600
    assert f"hours          {hours:.1f}: 50000 steps, 50 epochs of 1000 (96000 images), at " in text
    assert "at 50% of 312 TFLOP/s in half precision (assumed)" in text
    assert f"{(fixed + cost.activations + cost.passing) / GIB:.1f} of 40 GiB (a100-40): " in text
    (found,) = re.findall(r"largest batch  (\d+) X-rays \+ (\d+) CTs a rank", text)
    two_d, three_d = map(int, found)
    assert two_d == 2 * three_d
    used = [step_cost(network, 2 * n, n, 112) for n in (three_d, three_d + 1)]
    within = [fixed + step.activations + step.passing <= 0.9 * 40 * GIB for step in used]
    assert within == [True, False]


TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "chest_ct_classification": ("fine_tune", {"vol_size": [8, 24, 24]}),
    "chest_xray_segmentation": ("", {"preprocessing#film#size": 64, "freeze_encoder": False}),
    "chest_xray_detection": ("", {"img_size": 64}),
    "abdomen_ct_segmentation": ("", {"vol_size": [16, 24, 24]}),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_tasks_step_is_what_torch_counts_on_real_tensors(name: str) -> None:
    overlay, changes = TASKS[name]
    folder = CONFIGS.parents[1] / name / "configs"
    files = [folder / f"{part}.json" for part in ("train", overlay) if part]
    step, real, images = TaskStep(check_config(files, changes)), TaskStep(check_config(files, changes)), 5
    real.network, real.fake = real._network(), contextlib.nullcontext()
    sizes = []
    for amp in (False, True):
        flops, convolved, kept, _ = real._counted(images, amp)
        cost = step.cost(images, amp)
        assert cost.float32 == pytest.approx(convolved if amp else 0.0, rel=0.01)
        sizes.append(cost.activations)
        halved = state_bytes(real.network, amp) - state_bytes(real.network, amp=False)
        assert cost.flops == pytest.approx(flops, rel=0.01) and cost.flops > 1e6
        assert cost.activations == pytest.approx(kept - halved, rel=0.03)
    # decoders keep float32 beside bfloat16, in their convolutions
    assert (cost.float32 > 0.01 * cost.flops) == (name != "chest_ct_classification")
    step.half = torch.float16
    half = step.cost(images)
    whole, bfloat16, float16 = *sizes, half.activations
    assert whole > bfloat16 and (bfloat16 > 1.05 * float16) == (name != "chest_ct_classification")
    assert half.float32 == 0.0


def test_hours_count_a_decoders_convolutions_at_the_rate_of_float32() -> None:
    """BCV at the paper's sizes, of which the config knows the data set and the steps."""
    folder = CONFIGS.parents[1] / "abdomen_ct_segmentation" / "configs"
    config = check_config([folder / "train.json", folder / "bcv.json"])
    step = TaskStep(config).cost(2)
    rest = step.flops - step.float32
    assert 0.4 * step.flops < step.float32 < step.flops
    for gpu, half, whole in (("a100-40", 312, 156), ("h100-80", 989, 494)):
        text = describe(config, gpu=gpu, gpus=1, share=0.5)
        hours = 25_000 * (rest / half + step.float32 / whole) / 0.5e12 / 3600
        assert (
            f"hours          {hours:.1f}: 25000 steps, as `iterations` says, at 50% of {half} TFLOP/s in half " in text
        )
        assert f"in half precision and {whole} in TF32 (assumed)" in text
    assert "data           21 volumes to train on, as bcv is published (another number: --cts)" in text
    assert f", {step.float32 / step.flops:.0%} of it convolutions in float32" in text
    # that card has no bfloat16, and float16 reaches the decoder
    assert "of 125 TFLOP/s in half precision (assumed)" in describe(config, gpu="v100-32", gpus=1)


@pytest.mark.parametrize(
    ("bundle", "files", "changes", "said"),
    [
        (
            "abdomen_ct_segmentation",
            ["train", "bcv"],
            {"data#datalist#split": "monai"},
            "24 volumes to train on, as bcv",
        ),
        (
            "abdomen_ct_segmentation",
            ["train"],
            {},
            "45 volumes to train on, the 45 phantoms of the config before their",
        ),
        (
            "chest_xray_classification",
            ["train", "rsna"],
            {"label_fraction": 0.1},
            "1868 X-rays to train on, as rsna is ",
        ),
        ("chest_xray_detection", ["train", "rsna"], {}, "16010 X-rays to train on, as rsna is published"),
        ("chest_ct_classification", ["train", "luna16"], {"cts": 7}, "7 volumes to train on, as given"),
        ("pretrain", ["train"], {"cts": 7}, "300000 X-rays and 7 CTs to train on, assumed: give --xrays"),
    ],
)
def test_the_number_of_images_says_what_it_is_taken_from(
    bundle: str, files: list[str], changes: dict[str, Any], said: str
) -> None:
    given = {name: changes[name] for name in changes if name == "cts"}
    small: dict[str, Any] = {} if len(files) == 1 else {"size": SMALL}
    small |= {name: value for name, value in changes.items() if name not in given}
    config = check_config([CONFIGS.parents[1] / bundle / "configs" / f"{name}.json" for name in files], small)
    assert f"\ndata           {said}" in describe(config, gpu="h100-80", **given)


def test_a_frozen_classifier_makes_features_once() -> None:
    folder = CONFIGS.parents[1] / "chest_xray_classification" / "configs"
    config = check_config([folder / "train.json"])
    encoder = create_encoder(size="tiny")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        encoder(torch.zeros(1, 1, 64, 64))
    needs = task_needs(config, 1, 7000, None)
    assert needs.once == pytest.approx(7000 * counter.get_total_flops(), rel=0.01)
    text = describe(config, gpu="v100-32", gpus=1, xrays=7000)
    # a frozen encoder keeps nothing that checkpointing could leave out
    assert "grad_checkpointing" not in text
    assert "48 X-rays on each of 1 ranks" in text and "50 epochs of 145" in text and "of 7000 X-rays" in text
    assert f"features are made once, {needs.once / 1e12:.1f} TFLOP" in text


def test_what_cannot_be_planned_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    train, inference = str(CONFIGS / "train.json"), str(CONFIGS / "inference.json")
    for words, message in (
        ([train, "--gpu", "v100"], "--gpu 'v100' is unknown; use one of v100-32, a100-40, a100-80, h100-80"),
        ([train, "--share", "2"], "--share must be in (0, 1], got 2"),
        ([train, "--gpus", "0"], "--gpus must be a whole number of at least 1, got 0"),
        ([inference], "plan reads the configs of pre-training and of the tasks' trainings: train.json, overlays"),
        (
            [f"{CT}/train.json", f"{CT}/luna16.json", "--size", "tiny"],
            "an image of 32x128x128 cannot be cut into patches",
        ),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["plan", *words])
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}") and error.count("\n") == 1
