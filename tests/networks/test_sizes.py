# SPDX-License-Identifier: Apache-2.0
"""Named sizes of the encoder, and what is said where weights are of another one."""

from __future__ import annotations

import ast
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from torch import Tensor

from unimedi_components.config_check import check_config
from unimedi_components.errors import CheckpointError, ConfigError
from unimedi_components.networks import SIZES, UnifiedViT, create_encoder, encoder_sizes, task_encoder
from unimedi_components.networks.sizes import size_name, sizes_of_state

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
TASKS = sorted(path.parent.parent.name for path in BUNDLES.glob("*/configs/train.json"))


def vit_state(width: int, depth: int, side: int = 14) -> dict[str, Tensor]:
    """Weights of an RGB ViT with patches of 16, as timm names them."""
    kept = UnifiedViT(16 * side, (4, 16, 16), in_chans=3, embed_dim=width, depth=depth, num_heads=1).state_dict()
    ours = ("mask_token", "segment_embed", "depth_embed", "pos_embed_3d", "patch_embed_3d")
    return {name: value for name, value in kept.items() if not name.startswith(ours)}


def save_run(folder: Path, **sizes: Any) -> Path:
    """What a pre-training run leaves."""
    encoder = UnifiedViT(**sizes)
    torch.save(encoder.state_dict(), folder / "model.pt")
    (folder / "model.json").write_text(json.dumps({"format": 1, "encoder": encoder.hparams}))
    return folder / "model.pt"


@pytest.mark.parametrize(("name", "tensors", "parameters"), [("tiny", 72, 1_118_464), ("vit_s16", 156, 22_063_488)])
def test_named_sizes(name: str, tensors: int, parameters: int) -> None:
    encoder = create_encoder(size=name)
    assert size_name(encoder.hparams) == name
    state = encoder.state_dict()
    assert (len(state), sum(value.numel() for value in state.values())) == (tensors, parameters)


def test_the_paper_and_the_default() -> None:
    assert encoder_sizes("vit_b16") == {
        **{"img_size": 224, "vol_size": (32, 128, 128), "patch_size": 16, "patch_size_3d": (4, 16, 16)},
        **{"embed_dim": 768, "depth": 12, "num_heads": 12},
    }
    assert encoder_sizes("tiny", depth=8) == {**SIZES["tiny"], "depth": 8}
    assert encoder_sizes({"embed_dim": 24}, num_heads=2) == {"embed_dim": 24, "num_heads": 2}
    with pytest.raises(ConfigError, match=r"--size 'vit_b_16' is unknown. did you mean 'vit_b16'"):
        encoder_sizes("vit_b_16")
    with pytest.raises(ConfigError, match=r"--size 16 is no size. Sizes: tiny, vit_s16, vit_b16, or a dict"):
        encoder_sizes(16)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"the encoder has no argument 'dept'. did you mean 'depth'"):
        encoder_sizes("tiny", dept=3)


def test_weights_of_another_size_are_refused_with_both_names(tmp_path: Path) -> None:
    path = save_run(tmp_path, **SIZES["tiny"])
    assert task_encoder(path, "tiny").hparams == UnifiedViT(**SIZES["tiny"]).hparams
    for make in (task_encoder, create_encoder):
        with pytest.raises(CheckpointError) as info:
            make(path, "vit_b16")
        assert str(info.value) == (
            f"{path}: its encoder is of size tiny (patch_size_3d [4, 12, 12], embed_dim 128, depth 5, num_heads 4), "
            "the config asks for size vit_b16 (patch_size_3d [4, 16, 16], embed_dim 768, depth 12, num_heads 12). Give "
            "--size tiny, or weights of the config's size with --encoder_weights"
        )
        with pytest.raises(CheckpointError) as info:
            make(path, "tiny", depth=8)
        assert "size tiny (depth 5), the config asks for a size of its own (depth 8). Give --size tiny and no" in str(
            info.value
        )
    own = save_run(tmp_path, img_size=32, vol_size=(8, 24, 24), patch_size_3d=(4, 12, 12), embed_dim=24, num_heads=2)
    with pytest.raises(CheckpointError) as info:
        task_encoder(own, "tiny")
    size = re.search(r'Give --size "(.*?)"', str(info.value))
    assert size is not None and task_encoder(own, ast.literal_eval(size[1])).hparams["num_heads"] == 2


def test_random_weights_have_the_overridden_depth() -> None:
    assert len(task_encoder("none", "tiny", depth=2).blocks) == 2


@pytest.mark.parametrize(("width", "depth", "heads"), [(768, 12, 12), (384, 12, 6), (192, 12, 3)])
def test_sizes_come_from_the_file_where_it_tells(
    width: int, depth: int, heads: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = vit_state(width, depth, side=4)
    torch.save(state, tmp_path / "vit.pth")
    with caplog.at_level(logging.WARNING):
        encoder = task_encoder(tmp_path / "vit.pth", "tiny")
    assert (encoder.embed_dim, len(encoder.blocks), encoder.num_heads, encoder.img_size) == (
        width,
        depth,
        heads,
        (64, 64),
    )
    assert torch.equal(encoder.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])
    assert f"{width} wide, 12 blocks; the encoder gets its size" in caplog.text
    with pytest.raises(
        CheckpointError, match=rf"\(embed_dim {width}\), the config asks for a size of its own \(embed_dim 24\)"
    ):
        task_encoder(tmp_path / "vit.pth", {"embed_dim": 24, "depth": 12, "num_heads": 2})


def test_where_it_does_not_tell_the_error_names_the_option(tmp_path: Path) -> None:
    torch.save(vit_state(96, 3, side=2), tmp_path / "vit.pth")
    assert sizes_of_state(vit_state(96, 3, side=2)) is None
    with pytest.raises(CheckpointError, match=r"tokens are 96 wide, .* is 128; give the weights' size with --size \"{"):
        task_encoder(tmp_path / "vit.pth", "tiny")
    sizes = {"img_size": 32, "vol_size": (4, 32, 32), "embed_dim": 96, "depth": 3, "num_heads": 3}
    assert task_encoder(tmp_path / "vit.pth", sizes).num_heads == 3


@pytest.mark.parametrize("bundle", TASKS)
def test_every_train_config_names_its_size(bundle: str) -> None:
    configs = BUNDLES / bundle / "configs"
    assert check_config([configs / "train.json"])["size"] == "tiny"
    for overlay in configs.glob("*.json"):
        content = json.loads(overlay.read_text())
        assert not [key for key in content if key.startswith("network_def#encoder#")]
        if content.get("size") == "vit_b16":
            assert check_config([configs / "train.json", overlay])["size"] == "vit_b16"


@pytest.mark.parametrize("bundle", TASKS)
def test_every_default_takes_a_vit_of_another_project(bundle: str, tmp_path: Path) -> None:
    torch.save(vit_state(192, 12, side=4), tmp_path / "vit.pth")
    parser = ConfigParser(json.loads((BUNDLES / bundle / "configs" / "train.json").read_text()))
    parser.update({"encoder_weights": str(tmp_path / "vit.pth"), "bundle_root": str(tmp_path), "device": "cpu"})
    if bundle == "pretrain":
        parser["network_def#report_encoder#config#vocab_size"] = 100
    network: Any = parser.get_parsed_content("network_def")
    encoder = network.encoder
    assert (encoder.embed_dim, len(encoder.blocks), encoder.num_heads) == (192, 12, 3)
    assert (encoder.img_size, encoder.vol_size, encoder.patch_depth) == ((64, 64), (32, 48, 48), 4)
    if bundle != "pretrain":
        metadata = json.loads((BUNDLES / bundle / "configs" / "metadata.json").read_text())
        sides = metadata["network_data_format"]["inputs"]["image"]["spatial_shape"]
        with torch.no_grad():
            assert len(network.eval()(torch.zeros(1, 1, *sides))) == 1
