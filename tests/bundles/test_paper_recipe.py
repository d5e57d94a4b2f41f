# SPDX-License-Identifier: Apache-2.0
"""mimic_cxr_bimcv.json resolved, without weights or a network: the paper's numbers (section 4.1) and those of its base.

Networks are built on the meta device. `BERT_CONFIG` is the architecture of emilyalsentzer/Bio_ClinicalBERT.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from torch import nn

from unimedi_components.config_check import check_config
from unimedi_components.engines.handlers import TeacherUpdate
from unimedi_components.loading import MixedBatchSampler

BERT_CONFIG = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "vocab_size": 28996,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
STEPS = 100
OVERLAYS = ("train.json", "mimic_cxr_bimcv.json", "multi_gpu_train.json")


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    """The merged config as it stands in the files."""
    folder = Path(__file__).resolve().parents[2] / "bundles" / "pretrain" / "configs"
    return check_config([folder / name for name in OVERLAYS])


@pytest.fixture(scope="module")
def recipe(written: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> ConfigParser:
    """The config with what needs data or a hub replaced; nothing of the recipe's numbers."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "config.json").write_text(json.dumps(BERT_CONFIG))
    parser = ConfigParser(deepcopy(written))
    parser["report_model"] = str(folder)
    parser["network_def#report_encoder#pretrained"] = False
    parser["encoder_weights"] = "none"
    parser["device"] = "meta"
    parser["network"] = "$@network_def.to(@device)"
    parser["lr_scheduler#steps_per_epoch"] = STEPS
    # the paper's 144 images, for which its learning rate is: a rule changes nothing
    parser["optimizer#sampler"] = MixedBatchSampler(
        [2] * 96 + [3] * 48, batch_2d=12, batch_3d=6, num_replicas=8, rank=0
    )
    parser["optimizer#lr_rule"] = "linear"
    with torch.device("meta"):
        parser.get_parsed_content("network_def")
    return parser


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_encoder_is_vit_b_16_with_two_tokenizers(recipe: ConfigParser) -> None:
    network = recipe.get_parsed_content("network_def")
    width, layers = 768, 12
    block = (
        2 * 2 * width
        + 3 * width * (width + 1)
        + width * (width + 1)
        + 4 * width * (width + 1)
        + width * (4 * width + 1)
    )
    xray_tokens, slabs = (224 // 16) ** 2, 32 // 4
    tokens = slabs * (128 // 16) ** 2
    expected = (
        layers * block
        + 2 * width  # the last norm
        + (16 * 16 + 1) * width  # T2D on one channel
        + (4 * 16 * 16 + 1) * width  # T3D
        + (1 + xray_tokens + tokens + 2 + slabs) * width  # positions, segments, depths
        + 2 * width  # CLS and mask token
    )
    assert (xray_tokens, tokens) == (196, 512)
    assert count(network.encoder) == expected == 86_594_304
    assert count(network.teacher) == expected
    assert {name: network.encoder.hparams[name] for name in ("patch_size", "patch_size_3d", "num_heads")} == {
        "patch_size": (16, 16),
        "patch_size_3d": (4, 16, 16),
        "num_heads": 12,
    }


def test_report_encoder_is_bio_clinical_bert(written: dict[str, Any], recipe: ConfigParser) -> None:
    assert written["report_model"] == "emilyalsentzer/Bio_ClinicalBERT"
    assert written["encoder_weights"] == "timm:deit_base_patch16_224.fb_in1k"
    assert written["network_def"]["report_encoder"]["name_or_path"] == "@report_model"
    assert written["tokenizer"] == "$unimedi_components.networks.load_tokenizer(@report_model)"
    encoder = recipe.get_parsed_content("network_def").report_encoder
    width = 768
    layer = 4 * width * (width + 1) + 4 * width * (width + 1) + width * (4 * width + 1) + 2 * 2 * width
    assert count(encoder) == (28996 + 512 + 2 + 2) * width + 12 * layer == 107_719_680
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert (encoder.model.config.hidden_dropout_prob, encoder.model.config.num_hidden_layers) == (0.1, 12)


def test_heads(recipe: ConfigParser) -> None:
    network = recipe.get_parsed_content("network_def")
    head = {"in_dim": 768, "hidden_dim": 2048, "out_dim": 128, "norm": "batch_per_modality"}
    assert network.image_projection.hparams == network.text_projection.hparams == head
    assert network.dino_head.prototypes.shape == (8192, 256)
    assert [layer.out_features for layer in network.dino_head.mlp if isinstance(layer, nn.Linear)] == [2048, 2048, 256]
    loss = recipe.get_parsed_content("loss_def")
    assert loss.center_cls.shape == (2, 8192)


def test_selection_masking_and_loss(written: dict[str, Any], recipe: ConfigParser) -> None:
    network = recipe.get_parsed_content("network_def")
    assert (network.num_slices, network.selector, network.expand, network.pseudo_pairs) == (
        4,
        "teacher",
        "centre",
        True,
    )
    assert (network.mask_ratio, network.mask_mode, network.patch_loss_on) == (0.5, "mask_token", "all")
    assert (network.self_distillation, network.vl_on_full, network.profile_power) == (True, False, 0.0)
    assert network.log_temperature.requires_grad
    assert written["network_def"]["init_temperature"] == 0.07
    loss = {name: written["loss_def"][name] for name in ("vl_weight", "icl_weight", "pcl_weight", "student_temp")}
    assert loss == {"vl_weight": 1.0, "icl_weight": 0.25, "pcl_weight": 0.25, "student_temp": 0.1}
    assert (written["loss_def"]["targets"], written["loss_def"]["within_modality"]) == ("sinkhorn", True)
    assert network.dino_head.center.num_modalities == 5
    temperatures = [written["loss_def"][f"teacher_temp{name}"] for name in ("", "_end", "_warmup_epochs")]
    assert temperatures == [0.04, 0.07, 30]
    assert written["loss_def"]["center_momentum"] == 0.9


def test_literal_is_the_paper_to_the_letter_over_every_other_overlay(configs: Path) -> None:
    for names in (("literal",), ("mimic_cxr_bimcv", "literal"), ("literal", "mimic_cxr_bimcv")):
        parser = ConfigParser()
        parser.read_config([str(configs / f"{name}.json") for name in ("train", *names)])
        loss, head = parser["loss_def"], parser["network_def"]["dino_head"]
        assert (loss["vl_weight"], loss["icl_weight"], loss["pcl_weight"]) == (1.0, 1.0, 1.0)
        assert (loss["targets"], loss["within_modality"], head["center_kinds"]) == ("center", False, 0)
        assert (parser["network_def"]["vl_on_full"], parser["network_def"]["profile_power"]) == (False, 0.0)


def test_learning_rate(recipe: ConfigParser) -> None:
    scheduler = recipe.get_parsed_content("lr_scheduler")
    assert recipe.get_parsed_content("train#trainer#max_epochs") == 50
    rates = {}
    for step in range(50 * STEPS + 1):
        rates[step / STEPS] = scheduler.get_last_lr()[0]
        scheduler.optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(1e-8, rel=1e-9)
    assert rates[10] == pytest.approx((1e-8 + 2e-5) / 2, rel=1e-9)
    assert rates[20] == pytest.approx(2e-5, rel=1e-9)
    assert rates[35] == pytest.approx(1e-5, rel=1e-9)  # half of the cosine from 20 to 50
    assert rates[50] == pytest.approx(1e-8, rel=1e-9)
    assert max(rates.values()) == rates[20]


def test_optimizer(recipe: ConfigParser, written: dict[str, Any]) -> None:
    optimizer = recipe.get_parsed_content("optimizer")
    assert type(optimizer) is torch.optim.AdamW
    decayed, rest = optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.05, 0.0)
    assert decayed["betas"] == rest["betas"] == (0.9, 0.999)
    assert optimizer.defaults["lr"] == 2e-5
    network = recipe.get_parsed_content("network_def")
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert len(decayed["params"]) + len(rest["params"]) == len(trainable)
    # Word embeddings, 12 + 12 layers and so on: nearly all weights are in the decayed group.
    assert sum(p.numel() for p in decayed["params"]) > 0.99 * sum(p.numel() for p in trainable)
    run = written["train"]["run"]
    values = {name: run[name] for name in ("max_grad_norm", "freeze_last_layer_epochs", "momentum_teacher")}
    assert values == {"max_grad_norm": 3.0, "freeze_last_layer_epochs": 1, "momentum_teacher": 0.996}
    assert inspect.signature(TeacherUpdate).parameters["momentum_end"].default == 1.0


def test_batch_of_144_over_8_gpus(written: dict[str, Any]) -> None:
    sampler = written["train"]["sampler"]
    dims = [2] * 960 + [3] * 240
    seen: Counter[int] = Counter()
    for rank in range(8):
        batches = MixedBatchSampler(
            dims, sampler["batch_2d"], sampler["batch_3d"], num_replicas=8, rank=rank, epoch_over=sampler["epoch_over"]
        )
        assert len(batches) == 10
        first = next(iter(batches))
        assert Counter(dims[index] for index in first) == {2: 12, 3: 6}
        seen.update(first)
    assert len(seen) == sum(seen.values()) == 144


def test_data_and_sizes(written: dict[str, Any]) -> None:
    preprocessing, datalist = written["preprocessing"], written["datalist"]
    assert (written["img_size"], written["vol_size"]) == (224, [32, 128, 128])
    assert (preprocessing["ct"]["window"], preprocessing["max_length"]) == ([-1000, 1000], 112)
    assert (datalist["phantoms"], datalist["keep_punct"], written["dataset_dir"]) == (None, False, "@data_dir")
    assert written["train"]["run"]["whiten_tokenizers"] is False
