# SPDX-License-Identifier: Apache-2.0
"""inference.json and metadata of the abdomen bundle: label maps in each file's own geometry, and MONAI's own checks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import itk
import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, load_net_with_metadata
from monai.transforms import Compose

from tests.common import run_bundle, write_ct_slice
from unimedi_components.bundle import user_fault
from unimedi_components.data import Restored, segmentation_transforms, task_transforms, write_json
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.networks import UnifiedViT, load_network, network_card
from unimedi_components.networks.unetr import UnifiedUNETR
from unimedi_components.tasks.organs import OrganInferer

REPOSITORY = Path(__file__).resolve().parents[2]
NAME = "abdomen_ct_segmentation"
SOURCE = REPOSITORY / "bundles" / NAME
SIZE = (32, 48, 48)

pytestmark = pytest.mark.usefixtures("in_process")


def make_bundle(folder: Path, seed: int = 0) -> Path:
    """The bundle with random weights of a small network."""
    bundle = folder / NAME
    shutil.copytree(SOURCE / "configs", bundle / "configs")
    train = json.loads((SOURCE / "configs" / "train.json").read_text())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = UnifiedViT(64, SIZE, patch_size_3d=(4, 12, 12), embed_dim=32, depth=2, num_heads=2)
        network = UnifiedUNETR(encoder, 14, hidden_states=(0, 1), feature_size=4)
        torch.nn.init.normal_(network.out.conv.conv.weight, std=1.0)
    (bundle / "models").mkdir()
    torch.save(network.state_dict(), bundle / "models" / "model.pt")
    organs = {"spatial_size": SIZE, "spacing": None, "window": (-175, 250), "num_classes": 14}
    write_json(
        network_card(network, "segmentation", train["label_names"], {"organs": organs}),
        bundle / "models" / "model.json",
    )
    return bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def predict(bundle: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run inference.json and read predictions.json."""

    def run(inputs: Any, **overrides: Any) -> dict[str, Any]:
        folders = {"bundle_root": str(bundle), "output_dir": str(tmp_path / "out"), "device": "cpu", "figures": False}
        changes = {**folders, "inputs": inputs, **overrides}
        made = run_bundle(bundle / "configs" / "inference.json", "inference", **changes)
        assert made.check_properties() == []
        return json.loads((tmp_path / "out" / "predictions.json").read_text())

    return run


def oblique(spacing: tuple[float, ...], degrees: float) -> np.ndarray:
    """An affine with flipped and turned axes."""
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(spacing) @ np.diag([-1, 1, 1])
    affine[:3, 3] = (50, -80, 30)
    return affine


def write_nifti(path: Path, shape: tuple[int, ...], affine: np.ndarray, seed: int = 0) -> Path:
    values = np.random.default_rng(seed).normal(20, 200, shape).astype(np.int16)
    # a body in air, so that the prediction is no constant
    values[: shape[0] // 4] = -1000
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


GEOMETRIES = {
    "17_slices": ((40, 36, 17), np.diag([2.0, 2.0, 6.0, 1])),
    "thin_and_oblique": ((70, 64, 90), oblique((0.7, 0.7, 0.7), 20)),
    "thick_and_oblique": ((50, 44, 21), oblique((0.9, 0.8, 3.0), -35)),
    "smaller_than_a_patch": ((9, 7, 3), np.diag([8.0, 8.0, 10.0, 1])),
    "sagittal_storage": ((20, 40, 44), np.array([[0, 0, 3.0, 1], [2.0, 0, 0, 2], [0, -2.5, 0, 3], [0, 0, 0, 1]])),
}


@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_a_label_map_has_its_files_geometry(name: str, predict: Any, tmp_path: Path) -> None:
    shape, affine = GEOMETRIES[name]
    file = write_nifti(tmp_path / f"{name}.nii.gz", shape, affine)
    content = predict(str(file), figures=name == "17_slices")
    (row,) = content["predictions"]
    written = nib.load(tmp_path / "out" / row["labels"])
    assert written.shape == shape
    assert np.allclose(written.affine, affine, atol=1e-4)
    assert written.get_data_dtype() == np.uint8
    labels = np.asarray(written.dataobj)
    assert labels.max() <= 13
    millilitre = abs(np.linalg.det(affine[:3, :3])) / 1000
    for index, organ in enumerate(content["label_names"][1:], start=1):
        assert row["volume_ml"][organ] == pytest.approx((labels == index).sum() * millilitre, rel=1e-3, abs=2e-3)
    assert (tmp_path / "out" / f"{name}.png").is_file() == (name == "17_slices")


class Marks(torch.nn.Module):
    """Scores of three classes that depend on the grey level alone."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(image) + 0.3, image, -image], 1)


def test_labels_come_back_to_the_voxels_they_were_seen_at(tmp_path: Path) -> None:
    """Boxes of a resampled, turned and flipped volume, to within the border voxels."""
    affine, shape = oblique((1.2, 1.0, 2.5), 90), (48, 60, 20)
    truth = np.zeros(shape, np.uint8)
    truth[8:24, 10:40, 3:11], truth[30:44, 30:54, 8:18] = 1, 2
    values = np.select([truth == 1, truth == 2], [600, -600], 0).astype(np.int16)
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "a.nii.gz")
    for options in ({"spatial_size": (16, 40, 40)}, {"spacing": (3.0, 1.5, 1.4)}, {}):
        chain = Compose(segmentation_transforms(window=(-1000, 1000), label_map=False, **options))
        image = chain({"image": str(tmp_path / "a.nii.gz")})["image"]
        scores = OrganInferer((16, 24, 24))(image[None], Marks())[0]
        found = Restored(chain, labels=True)({"image": image, "pred": scores})["pred"]
        assert isinstance(found, MetaTensor)
        assert np.allclose(found.affine, affine, atol=1e-5)
        labels = found[0].numpy()
        assert labels.shape == shape
        for organ in (1, 2):
            both = ((labels == organ) & (truth == organ)).sum()
            assert 2 * both / ((labels == organ).sum() + (truth == organ).sum()) > (0.85 if options else 0.999)


def test_mirrored_copies_are_averaged() -> None:
    weight = torch.randn(3, 1, 3, 3, 3, generator=torch.Generator().manual_seed(0))

    def network(image: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv3d(image, weight, padding=1)

    image = torch.randn(1, 1, 8, 10, 12, generator=torch.Generator().manual_seed(1))
    found = OrganInferer((8, 10, 12), mirror_axes=[0, 2])(image, network)
    views = [[], [2], [4], [2, 4]]
    wanted = sum(network(image.flip(dims)).flip(dims) for dims in views) / 4
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(OrganInferer((8, 10, 12))(image, network), network(image), atol=1e-5)
    with pytest.raises(ConfigError, match="mirror_axes"):
        OrganInferer((8, 10, 12), mirror_axes=[3])


def test_a_volume_that_forgot_its_preparation() -> None:
    with pytest.raises(DataError, match="does not say how it was prepared"):
        Restored([], labels=True)({"image": torch.zeros(1, 4, 4, 4), "pred": torch.zeros(2, 4, 4, 4), "id": "x"})


def dicom_series(folder: Path, count: int) -> np.ndarray:
    """Slices of a tilted stack; the affine in RAS."""
    folder.mkdir()
    angle = np.deg2rad(15)
    direction = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    origin, spacing = np.array([-30.0, -40.0, 100.0]), (1.4, 1.1, 3.0)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(-1000, 400, (1, 28, 34)).astype(np.int16)
        image = itk.image_from_array(pixels)
        image.SetSpacing(spacing)
        image.SetDirection(itk.matrix_from_array(direction))
        place = origin + direction @ np.array([0, 0, spacing[2] * index])
        image.SetOrigin(place.tolist())
        write_ct_slice(folder / f"{index:03d}.dcm", image, index + 1)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = direction @ np.diag(spacing), origin
    return np.diag([-1, -1, 1, 1]) @ affine


def test_a_dicom_series(predict: Any, tmp_path: Path) -> None:
    affine = dicom_series(tmp_path / "series", 12)
    (row,) = predict(str(tmp_path / "series"))["predictions"]
    written = nib.load(tmp_path / "out" / row["labels"])
    assert written.shape == (34, 28, 12)
    assert np.allclose(written.affine, affine, atol=1e-3)


def test_one_slice_of_a_dicom_series(predict: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dicom_series(tmp_path / "series", 1)
    with pytest.raises(Exception) as info:
        predict(str(tmp_path / "series"))
    message = user_fault(info.value)
    assert message is not None and "no image in it; name X-ray or CT files" in message
    assert "is one CT slice. Give all files of its series, or its folder" in caplog.text


def test_what_cannot_be_read_is_listed(predict: Any, tmp_path: Path) -> None:
    good = write_nifti(tmp_path / "good.nii.gz", (30, 30, 12), np.diag([2.0, 2.0, 4.0, 1]))
    nib.save(nib.Nifti1Image(np.zeros((12, 12, 6, 3), np.int16), np.eye(4)), tmp_path / "four.nii.gz")
    (tmp_path / "torn.nii.gz").write_bytes(good.read_bytes()[:200])
    content = predict([str(good), str(tmp_path / "four.nii.gz"), str(tmp_path / "torn.nii.gz")])
    assert [row["id"] for row in content["predictions"]] == ["good"]
    reasons = {Path(row["file"]).name: row["reason"] for row in content["skipped"]}
    assert set(reasons) == {"four.nii.gz", "torn.nii.gz"}
    assert "is 4D (12 × 12 × 6 × 3): several time points" in reasons["four.nii.gz"]
    with pytest.raises(Exception) as info:
        predict(str(tmp_path / "four.nii.gz"))
    message = user_fault(info.value)
    assert message is not None and "no image in it" in message and "four.nii.gz: is 4D" in message


def test_monais_checks_and_export(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundles" / NAME)
    monkeypatch.chdir(tmp_path / "bundles" / NAME)
    schema = Path(__file__).with_name("meta_schema_20240725.json")
    monai.bundle.verify_metadata(meta_file="configs/metadata.json", filepath=str(schema))
    files = {"meta_file": "configs/metadata.json", "config_file": "configs/inference.json"}
    monai.bundle.verify_net_in_out("network_def", **files, device="cpu")
    monai.bundle.ckpt_export(config_file="configs/inference.json")
    network, _, _ = load_net_with_metadata("models/model.ts")
    eager = load_network("models/model.pt")
    image = torch.rand(1, 1, *SIZE) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(network(image), eager(image), atol=1e-4)
    monkeypatch.chdir(tmp_path)
    loaded = monai.bundle.load(NAME, bundle_dir="bundles", workflow_type="inference", device="cpu")
    assert all(torch.equal(value, eager.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert task_transforms(eager.card["preprocessing"], label_map=False)
