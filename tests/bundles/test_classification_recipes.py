# SPDX-License-Identifier: Apache-2.0
"""The overlays of the paper's data sets, resolved without data or weights: the numbers of supplement 7.1.

What the paper leaves open is the MGCA repository's (X-rays) or UniMiSS's (volumes). Networks are built on the meta
device.
"""

from __future__ import annotations

import inspect
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import CenterSpatialCrop, RandFlipd, RandSpatialCrop

from unimedi_components.config_check import check_config
from unimedi_components.data import cc_ccii, chexpert, covidx, luna16, rsna
from unimedi_components.data.catalogue import find_dataset
from unimedi_components.data.phantom import write_phantom
from unimedi_components.data.transforms import ByDimension

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
XRAY, CT = "chest_xray_classification", "chest_ct_classification"
OVERLAYS = {"chexpert": XRAY, "rsna": XRAY, "covidx": XRAY, "cc_ccii": CT, "luna16": CT, "luna16_candidates": CT}
STEPS = 100
# learning rate, weight decay, batch size, epochs
PROBES = {
    "chexpert": (5e-4, 1e-6, 96, 50),
    "rsna": (5e-4, 1e-6, 48, 50),
    "covidx": (5e-3, 1e-6, 48, 50),
    "cc_ccii": (5e-4, 1e-6, 8, 50),
}
# no number of the paper but the epochs: UniMiSS' for volumes
FINE_TUNINGS = {
    "chexpert": (2e-5, 0.05, 96, 50),
    "rsna": (2e-5, 0.05, 48, 50),
    "covidx": (2e-5, 0.05, 48, 50),
    "cc_ccii": (1e-5, 5e-3, 8, 50),
    "luna16": (1e-5, 5e-3, 8, 100),
    "luna16_candidates": (1e-5, 5e-3, 8, 100),
}
each = pytest.mark.parametrize("name", list(OVERLAYS))


def recipe(name: str, *others: str, **changes: Any) -> ConfigParser:
    """The config with what needs data or weights replaced; nothing of the recipe's numbers."""
    files = [BUNDLES / OVERLAYS[name] / "configs" / f"{file}.json" for file in ("train", *others, name)]
    parser = ConfigParser(deepcopy(check_config(files)))
    parser["batch_size"] = parser["train#dataloader#batch_size"]
    parser.update({"encoder_weights": "none", "device": "meta", "train#dataloader": range(STEPS), **changes})
    return parser


def network_of(parser: ConfigParser) -> Any:
    with torch.device("meta"):
        return parser.get_parsed_content("network_def")


def check_optimisation(parser: ConfigParser, numbers: tuple[float, float, int, int], power: float) -> None:
    lr, weight_decay, batch_size, epochs = numbers
    network_of(parser)
    optimizer = parser.get_parsed_content("optimizer")
    assert type(optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [weight_decay, 0.0]
    assert parser.get_parsed_content("batch_size") == batch_size
    assert parser["validate#dataloader#batch_size"] == "@train::dataloader::batch_size"
    assert parser.get_parsed_content("train#trainer#max_epochs") == epochs
    assert parser["train#run#patience"] == 10
    scheduler = parser.get_parsed_content("lr_scheduler")
    for step in range(3):
        assert scheduler.get_last_lr() == pytest.approx([lr * (1 - step / (epochs * STEPS)) ** power] * 2)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", list(PROBES))
def test_probes(name: str) -> None:
    parser = recipe(name)
    check_optimisation(parser, PROBES[name], power=0)
    network = network_of(parser)
    assert network.hparams["freeze_encoder"]
    assert (network.hparams["feature_norm"], network.hparams["dropout"]) == (False, 0.0)
    learning = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert learning == ["head.weight", "head.bias"]


@pytest.mark.parametrize("name", list(FINE_TUNINGS))
def test_fine_tuning(name: str) -> None:
    parser = recipe(name, "fine_tune")
    check_optimisation(parser, FINE_TUNINGS[name], power=0.9)
    assert not network_of(parser).hparams["freeze_encoder"]


@pytest.mark.parametrize("name", ["luna16", "luna16_candidates"])
def test_luna16_trains_the_whole_network_without_being_told(name: str) -> None:
    check_optimisation(recipe(name), FINE_TUNINGS[name], power=0.9)


@pytest.mark.parametrize(("fraction", "batch_size"), [(0.01, 48), (0.1, 48), (1.0, 96), (1, 96)])
def test_batch_of_chexpert_by_fraction(fraction: float, batch_size: int) -> None:
    assert recipe("chexpert", label_fraction=fraction).get_parsed_content("batch_size") == batch_size


@each
def test_the_encoder_is_vit_b_16(name: str) -> None:
    network = network_of(recipe(name))
    assert {
        key: network.encoder.hparams[key]
        for key in ("img_size", "vol_size", "patch_size", "patch_size_3d", "embed_dim", "depth", "num_heads")
    } == {
        "img_size": (224, 224),
        "vol_size": (32, 128, 128),
        "patch_size": (16, 16),
        "patch_size_3d": (4, 16, 16),
        "embed_dim": 768,
        "depth": 12,
        "num_heads": 12,
    }


def chain(parser: ConfigParser, stage: str) -> list[Any]:
    return list(parser.get_parsed_content(f"{stage}#preprocessing"))


@pytest.mark.parametrize("name", [name for name, bundle in OVERLAYS.items() if bundle == XRAY])
def test_xrays_are_padded_to_256_and_cropped_to_224(name: str) -> None:
    parser = recipe(name)
    for stage, kind in (("train", RandSpatialCrop), ("validate", CenterSpatialCrop)):
        steps = {type(step).__name__: step for step in chain(parser, stage)}
        assert steps["Resized"].resizer.spatial_size == 256
        assert steps["Resized"].resizer.size_mode == "longest"
        assert steps["SpatialPadd"].padder.spatial_size == (256, 256)
        (crop,) = [step.cropper for name, step in steps.items() if "Crop" in name]
        assert isinstance(crop, kind)
        assert tuple(crop.roi_size) == (224, 224)
    assert len(ByDimension(chain(parser, "train"), ()).random.branches[2].transforms) == 2


SIZES = {"cc_ccii": (32, 128, 128), "luna16": (32, 128, 128), "luna16_candidates": (32, 64, 64)}


@pytest.mark.parametrize("name", list(SIZES))
def test_volumes_are_resized_and_flipped_in_plane(name: str) -> None:
    parser = recipe(name)
    flips = [step for step in chain(parser, "train") if isinstance(step, RandFlipd)]
    assert [(flip.flipper.spatial_axis, flip.prob) for flip in flips] == [(1, 0.5), (2, 0.5)]
    assert chain(parser, "train")[-2:] == flips
    assert not any(isinstance(step, RandFlipd) for step in chain(parser, "validate"))
    kinds = {"cc_ccii": {"slices", "ct"}, "luna16": {"ct"}, "luna16_candidates": {"cube"}}
    preprocessing = parser.get_parsed_content("preprocessing")
    assert preprocessing.keys() == kinds[name]
    for arguments in preprocessing.values():
        size = arguments.get("spatial_size", arguments.get("size"))
        assert tuple(size) == SIZES[name]
        assert arguments["window"] == [-1000, 1000]
    if name == "cc_ccii":
        assert preprocessing["slices"]["grey_window"] is None


LABELS = {
    "chexpert": ("multilabel", chexpert.COMPETITION),
    "rsna": ("binary", ("no pneumonia", "pneumonia")),
    "covidx": ("multiclass", covidx.CLASSES["three"]),
    "cc_ccii": ("multiclass", cc_ccii.CLASSES),
    "luna16": ("binary", luna16.LABEL_NAMES["volume"]),
    "luna16_candidates": ("binary", luna16.LABEL_NAMES["candidates"]),
}


@each
def test_labels_are_those_of_the_converter(name: str) -> None:
    parser = recipe(name)
    task, names = LABELS[name]
    assert (parser["task"], parser["label_names"]) == (task, list(names))
    assert network_of(parser).head.out_features == (1 if task == "binary" else len(names))
    assert parser.get_parsed_content("loss").task == task
    options = inspect.signature(find_dataset(parser["data#datalist#dataset"]).collect).parameters
    given = {key: value.default for key, value in options.items()}
    fixed = ("_target_", "dataset", "dataset_dir", "out", "phantoms", "phantom_seed")
    given |= {key: value for key, value in parser["data#datalist"].items() if key not in fixed}
    assert given.keys() == options.keys()
    assert given.get("findings", "competition") == "competition"
    assert given.get("uncertain", "paper") == "paper"
    assert given.get("mode", "volume") == ("candidates" if name == "luna16_candidates" else "volume")
    assert parser["data#datalist#phantoms"] is None
    places = [parser.get_parsed_content(key) for key in ("data_dir", "dataset_dir", "datalist_file")]
    found = [str(Path(place).relative_to(places[0])) for place in places[1:]]
    assert found == [parser["data#datalist#dataset"], f"{name}.json"]


def test_rsna_converter_says_the_names(tmp_path: Path) -> None:
    write_phantom("rsna", tmp_path / "rsna", 12, 5, workers=0, progress=False)
    builder = rsna.collect(tmp_path / "rsna", progress=False)
    assert (builder.meta["task"], tuple(builder.meta["label_names"])) == LABELS["rsna"]


def test_the_defaults_are_those_of_the_phantom_sets() -> None:
    for bundle, name in ((XRAY, "chexpert"), (CT, "cc_ccii")):
        default = check_config([BUNDLES / bundle / "configs" / "train.json"])
        assert default["data"]["datalist"]["dataset"] == name
        assert (default["task"], tuple(default["label_names"])) == (LABELS[name][0], tuple(LABELS[name][1]))
