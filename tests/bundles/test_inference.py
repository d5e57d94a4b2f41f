# SPDX-License-Identifier: Apache-2.0
"""inference.json: files to embeddings, attention and selected slices, each against the network itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tests.common import run_bundle
from unimedi_components.data import ByDimension, ct_transforms, xray_transforms
from unimedi_components.errors import DataError
from unimedi_components.networks import load_pretrained
from unimedi_components.retrieval.inference import attention_in_file_geometry

pytestmark = pytest.mark.usefixtures("in_process")
Embed = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def embed(configs: Path, trained: Any, tmp_path: Path) -> Embed:
    """Run inference.json and read what it wrote, by id."""

    def run(**overrides: Any) -> dict[str, dict[str, Any]]:
        fixed = {"ckpt_dir": str(trained.models), "output_dir": str(tmp_path / "out"), "device": "cpu"}
        config = configs / "inference.json"
        run_bundle(config, "infer", **fixed, **overrides)
        return {path.stem: dict(np.load(path)) for path in (tmp_path / "out").glob("*.npz")}

    return run


def test_the_test_split_of_the_training_run(embed: Embed, trained: Any, tmp_path: Path) -> None:
    found = embed(dataset_dir=str(trained.data / "phantom"), batch_2d=1)
    items = json.loads((trained.data / "phantom" / "pretrain.json").read_text())["test"]
    assert found.keys() == {item["id"] for item in items}
    pretrained = load_pretrained(trained.models / "model.pt")
    prepare = ByDimension(
        xray_transforms(**pretrained.card["preprocessing"]["xray"]),
        ct_transforms(**pretrained.card["preprocessing"]["ct"]),
    )
    for item in items:
        values, source = found[item["id"]], trained.data / "phantom" / item["image"]
        image = prepare({**item, "image": str(source)})["image"][None]
        expected = pretrained.network.encode_image(image)
        assert np.allclose(values["embed"], F.normalize(expected.embed, dim=-1)[0].detach(), atol=1e-5)
        assert np.allclose(values["cls"], expected.cls[0].detach(), atol=1e-5)
        assert np.allclose(values["attention"].ravel(), expected.attention[0].detach(), atol=1e-6)
        assert values["attention"].shape == ((2, 2) if item["dim"] == 2 else (4, 2, 2))
        assert values["attention"].sum() == pytest.approx(1.0, abs=1e-5)
        assert (values["dim"], str(values["source"])) == (item["dim"], str(source))
        with Image.open(tmp_path / "out" / f"{item['id']}.png") as figure:
            assert figure.width == 1200
        if item["dim"] == 3:
            assert values["selected"].tolist() == expected.selected[0].tolist()
            # slabs are ranked by the scores of Eq. 2 over the root of their usual profile
            usual = pretrained.network.slab_profile.sqrt().numpy()
            assert np.allclose(values["scores"] * usual, values["attention"].mean((1, 2)))
            assert values["selected_position"].tolist() == [(s + 0.5) / 16 for s in values["selected"]]
            file, drawn = nib.load(source), nib.load(tmp_path / "out" / f"{item['id']}_attention.nii.gz")
            assert drawn.shape == file.shape
            assert np.array_equal(drawn.affine, file.affine)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [entry["id"] for entry in summary["written"]] == [item["id"] for item in items]
    assert summary["skipped"] == []


def test_own_files_with_an_unreadable_one(embed: Embed, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 50), dtype=np.uint8)).save(own / "a.png")
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(0, 300, (20, 22, 24)), np.eye(4)), own / "v.nii.gz")
    (own / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    found = embed(dataset_dir=str(own), figures=False, attention_volumes=False)
    assert found.keys() == {"a", "v"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.npz", "v.npz", "summary.json"}
    (skipped,) = json.loads((tmp_path / "out" / "summary.json").read_text())["skipped"]
    assert (skipped["id"], skipped["file"]) == ("cut", str(own / "cut.jpg"))


def test_nothing_readable_is_an_error(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(RuntimeError) as info:
        embed(inputs=str(tmp_path / "cut.jpg"))
    cause: BaseException = info.value
    while cause.__cause__ is not None:
        cause = cause.__cause__
    assert isinstance(cause, DataError)
    assert str(cause).startswith(f"none of 1 inputs could be read, first {tmp_path / 'cut.jpg'}")


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, -1), (-1, -1, 1)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_attention_returns_to_the_files_axes(tmp_path: Path, flips: tuple[int, ...], order: tuple[int, ...]) -> None:
    """Attention at the foot, front and right of the patient lies there in the file, however its axes run."""
    affine = np.zeros((4, 4))
    for axis, world in enumerate(order):
        affine[world, axis] = flips[world] * (1.5, 2.0, 3.0)[world]
    affine[:, 3] = (10, -20, 30, 1)
    shape = tuple((16, 20, 24)[world] for world in order)
    nib.save(nib.Nifti1Image(np.zeros(shape, np.int16), affine), tmp_path / "v.nii.gz")
    attention = torch.full((4, 2, 2), 0.5 / 15)
    attention[0, 0, 0] = 0.5
    drawn, got = attention_in_file_geometry({"image": str(tmp_path / "v.nii.gz")}, attention)
    assert drawn.shape == shape
    assert np.allclose(got, affine)
    assert drawn.max() == pytest.approx(8.0)
    world = nib.affines.apply_affine(affine, np.argwhere(drawn > 7.99))
    corners = nib.affines.apply_affine(affine, np.argwhere(np.ones(shape)))
    # RAS+: right is large x, front is large y, the foot is small z.
    assert world[:, 0].max() == corners[:, 0].max() and world[:, 0].min() > corners[:, 0].mean()
    assert world[:, 1].max() == corners[:, 1].max() and world[:, 1].min() > corners[:, 1].mean()
    assert world[:, 2].min() == corners[:, 2].min() and world[:, 2].max() < corners[:, 2].mean()
