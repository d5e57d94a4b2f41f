# SPDX-License-Identifier: Apache-2.0
"""inference.json of the X-ray segmentation bundle: films of every kind to masks in their own pixels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.bundle
import numpy as np
import pandas as pd
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.data import load_net_with_metadata
from monai.transforms import Compose
from PIL import Image

from tests.common import run_bundle, write_radiograph
from unimedi_components.data import task_transforms, write_json
from unimedi_components.data.phantom import write_phantom
from unimedi_components.data.prepare import prepare
from unimedi_components.errors import CheckpointError
from unimedi_components.networks import SETRPUP, UnifiedViT, load_network, network_card
from unimedi_components.tasks.xray_masks import SaveMasks

pytestmark = pytest.mark.usefixtures("in_process")
SOURCE = Path(__file__).resolve().parents[2] / "bundles" / "chest_xray_segmentation"
SIDE = 80


class Bright(torch.nn.Module):
    """Finds what is brighter than the middle grey, so that the truth is known."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return 20 * image


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with random weights, alone in a folder."""
    folder = tmp_path_factory.mktemp("bundles") / SOURCE.name
    shutil.copytree(SOURCE / "configs", folder / "configs")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = UnifiedViT(64, (8, 32, 32), embed_dim=32, depth=2, num_heads=2)
        network = SETRPUP(encoder, widths=(8, 8, 4, 4))
        torch.nn.init.normal_(network.head.weight, std=2.0)
    (folder / "models").mkdir()
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    card = network_card(network, "segmentation", ["background", "pneumonia"], {"film": {"size": SIDE}})
    write_json(card, folder / "models" / "model.json")
    return folder


@pytest.fixture
def workflow(bundle: Path, tmp_path: Path) -> Callable[..., ConfigWorkflow]:
    def make(**overrides: Any) -> ConfigWorkflow:
        folders = {"bundle_root": str(bundle), "output_dir": str(tmp_path / "out"), "device": "cpu"}
        config = bundle / "configs" / "inference.json"
        return run_bundle(config, "inference", start=False, **{**folders, **overrides})

    return make


@pytest.fixture
def predict(workflow: Any, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run inference.json and read predictions.json."""

    def run(inputs: Any, figures: bool = False, **overrides: Any) -> dict[str, Any]:
        made = workflow(inputs=inputs, figures=figures, **overrides)
        made.run()
        made.finalize()
        return json.loads((tmp_path / "out" / "predictions.json").read_text())

    return run


def film(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright rectangle off the centre, with edges that are blurred by no more than a pixel, and its mask."""
    mask = np.zeros((rows, columns), bool)
    mask[round(0.2 * rows) : round(0.5 * rows), round(0.55 * columns) : round(0.9 * columns)] = True
    return np.where(mask, 230, 20).astype(np.uint8), mask


def write(kind: str, folder: Path) -> tuple[Path, np.ndarray]:
    """A film of a kind and its true mask, upright."""
    folder.mkdir(exist_ok=True)
    path = folder / kind
    sizes = {"odd.png": (317, 211), "big.png": (2000, 1500), "long.png": (90, 1200), "tall.png": (900, 64)}
    pixels, mask = film(*sizes.get(kind, (133, 91)))
    if kind == "exif.jpg":
        image = Image.fromarray(pixels)
        exif = image.getexif()
        # 6: the camera was turned, rows of the file are columns of the picture
        exif[0x0112] = 6
        image.rotate(90, expand=True).save(path, exif=exif, quality=95)
    elif kind == "rgb.jpg":
        Image.fromarray(np.stack([pixels] * 3, -1)).save(path, quality=95)
    elif kind == "sixteen.png":
        Image.fromarray(pixels.astype(np.uint16) * 200).save(path)
    elif kind == "mono1.dcm":
        write_radiograph(path, 4000 - 15 * pixels.astype(np.int32), b"MONOCHROME1")
    else:
        Image.fromarray(pixels).save(path)
    return path, mask


KINDS = ("odd.png", "big.png", "long.png", "tall.png", "exif.jpg", "rgb.jpg", "sixteen.png", "mono1.dcm")


def test_masks_come_back_in_their_files_pixels(predict: Any, tmp_path: Path) -> None:
    truths = {kind.partition(".")[0]: write(kind, tmp_path / "films")[1] for kind in KINDS}
    (tmp_path / "films" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    found = predict(str(tmp_path / "films"), **{"network": Bright()})
    assert [Path(entry["file"]).name for entry in found["skipped"]] == ["broken.png"]
    assert [entry["id"] for entry in found["predictions"]] == sorted(truths)
    for entry in found["predictions"]:
        truth = truths[entry["id"]]
        mask = np.asarray(Image.open(entry["mask"]))
        assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255}
        assert mask.shape == truth.shape == (entry["height"], entry["width"])
        assert entry["area"] == int((mask > 0).sum())
        assert entry["share"] == pytest.approx((mask > 0).mean(), abs=1e-6)
        assert entry["probability"] > 0.99
        both = ((mask > 0) & truth).sum()
        # the edges lie within a pixel of the network's input of where they are; a slim film has few of those
        dice = 2 * both / ((mask > 0).sum() + truth.sum())
        assert dice > (0.8 if entry["id"] in ("long", "tall") else 0.95), (entry["id"], dice)
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        pixel = max(truth.shape) / SIDE + 1
        assert abs(rows[0] - round(0.2 * truth.shape[0])) <= pixel
        assert abs(columns[-1] + 1 - round(0.9 * truth.shape[1])) <= pixel


def test_probabilities_are_those_of_the_network_interpolated(predict: Any, bundle: Path, tmp_path: Path) -> None:
    path, _ = write("odd.png", tmp_path / "films")
    network = load_network(bundle / "models" / "model.pt")
    image = Compose(task_transforms(network.card["preprocessing"]))({"image": str(path)})["image"]
    with torch.no_grad():
        small = network(image[None]).sigmoid()
    # 317 x 211 was made 80 x 53 and padded by 13 and 14 columns
    inner = torch.nn.functional.interpolate(small[..., 13:66], (317, 211), mode="bilinear", align_corners=False)[0, 0]
    threshold = float(inner.median())
    found = predict(str(path), threshold=threshold)
    mask = torch.from_numpy(np.asarray(Image.open(found["predictions"][0]["mask"])) > 0)
    certain = (inner - threshold).abs() > 1e-5
    assert (mask == (inner >= threshold))[certain].all()
    assert certain.float().mean() > 0.9 and 0.3 < mask.float().mean() < 0.7
    assert found["threshold"] == threshold
    assert found["predictions"][0]["probability"] == pytest.approx(float(inner.max()), abs=1e-5)


def test_files_of_a_run(predict: Any, tmp_path: Path) -> None:
    for kind in ("odd.png", "mono1.dcm"):
        write(kind, tmp_path / "films")
    found = predict(str(tmp_path / "films"), figures=True)
    out = tmp_path / "out"
    names = {"predictions.json", "predictions.csv", "masks", "odd.png", "mono1.png"}
    assert {path.name for path in out.iterdir()} == names
    assert {path.name for path in (out / "masks").iterdir()} == {"odd.png", "mono1.png"}
    table = pd.read_csv(out / "predictions.csv")
    assert table.to_dict("records") == [{key: entry[key] for key in table.columns} for entry in found["predictions"]]
    assert found["label_names"] == ["pneumonia"]
    assert Path(found["predictions"][1]["source"]) == tmp_path / "films" / "odd.png"


def test_a_network_that_diverged(bundle: Path, tmp_path: Path) -> None:
    writer = SaveMasks(tmp_path, load_network(bundle / "models" / "model.pt"), figures=False)
    with pytest.raises(CheckpointError, match="a: probabilities that are not finite"):
        writer({"id": "a", "pred": torch.full((1, 2, 2), torch.nan)})
    request = {"pred": torch.zeros(1, 2, 2)}
    assert writer(request) is request
    with pytest.raises(ValueError, match=r"threshold must be a probability from 0 to 1, not 2"):
        SaveMasks(tmp_path, writer, threshold=2)


def test_the_test_split_is_the_default(predict: Any, bundle: Path, tmp_path: Path) -> None:
    write_phantom("rsna", tmp_path / "rsna", 12, workers=0, progress=False)
    prepare("rsna", tmp_path / "rsna", tmp_path / "rsna.json", task="segmentation")
    found = predict(None, dataset_dir=str(tmp_path / "rsna"), datalist_file=str(tmp_path / "rsna.json"))
    wanted = [item["id"] for item in json.loads((tmp_path / "rsna.json").read_text())["test"]]
    assert [entry["id"] for entry in found["predictions"]] == wanted
    assert {(entry["width"], entry["height"]) for entry in found["predictions"]} == {(256, 256)}


def test_network_takes_and_gives_what_metadata_says(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle)
    files = {"meta_file": "configs/metadata.json", "config_file": "configs/inference.json"}
    monai.bundle.verify_net_in_out("network_def", **files, device="cpu", bundle_root=str(bundle))


def test_export_with_its_default_options(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle)
    monai.bundle.ckpt_export(config_file="configs/inference.json", filepath="exported.ts")
    network, metadata, _ = load_net_with_metadata("exported.ts", more_extra_files=("inference.json",))
    eager = load_network(bundle / "models" / "model.pt")
    for count in (1, 2, 5):
        image = torch.rand(count, 1, SIDE, SIDE) * 2 - 1
        with torch.no_grad():
            assert torch.allclose(network(image), eager(image), atol=1e-5)
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"]["1"] == "pneumonia"
