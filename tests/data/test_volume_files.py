# SPDX-License-Identifier: Apache-2.0
"""Volume files that are squeezed, or refused by every reader in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from unimedi_components.data import ByDimension, ct_transforms, find_images
from unimedi_components.data.segmentation import segmentation_transforms
from unimedi_components.errors import DataError
from unimedi_components.images.checks import CTLimits, check_ct, check_metaimage
from unimedi_components.images.itk_volumes import read_geometry
from unimedi_components.images.text_headers import voxels_elsewhere
from unimedi_components.images.volume import read_volume_header
from unimedi_components.loading import ImageDataset
from unimedi_components.retrieval.inference import attention_in_file_geometry

AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])
LIMITS = CTLimits(min_slices=2, min_megabytes=0.0)
NOT_GREY = "its voxels are colours or complex numbers. Convert them to grey values"
OUTSIDE = "its header names voxels outside its folder ({}). Put them beside it and name them there"


def body() -> np.ndarray:
    """Air with a body in it, (12, 10, 8) in Hounsfield units."""
    volume = np.full((12, 10, 8), -1000, np.int16)
    volume[3:9, 2:8] = np.arange(8) * 10
    return volume


def save(path: Path, volume: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(volume, AFFINE), path)
    return path


def save_metaimage(path: Path, voxels: str, volume: np.ndarray | None = None) -> Path:
    """A header, and the voxels beside it under the last part of their name."""
    values = body() if volume is None else volume
    sizes = " ".join(map(str, values.shape))
    path.write_text(
        f"ObjectType = Image\nNDims = {values.ndim}\nDimSize = {sizes}\nElementType = MET_SHORT\n"
        f"ElementSpacing = {' '.join(['2', '2', '3', '1', '1'][: values.ndim])}\nElementDataFile = {voxels}\n"
    )
    return path


def save_nrrd(path: Path, voxels: str) -> Path:
    path.write_text(
        "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 12 10 8\n"
        "space directions: (2,0,0) (0,2,0) (0,0,3)\nspace origin: (0,0,0)\nendian: little\nencoding: raw\n"
        f"data file: {voxels}\n"
    )
    return path


def refusal(path: Path, tmp_path: Path) -> str:
    """What training, prediction and embedding say of a file; all the same."""
    said = set()
    for chain in (ct_transforms((4, 8, 8)), segmentation_transforms(label_map=False)):
        item = [{"id": "a", "image": str(path), "dim": 3, "report": "x"}]
        dataset = ImageDataset(item, chain, tmp_path, dim=3).without_stand_ins()
        assert dataset.__getitems__([0])[0] == dataset.skipped[0]
        said.add(dataset.skipped[0].reason.removeprefix("DataError: "))
    assert len(said) == 1, said
    return said.pop()


@pytest.mark.parametrize("axes", [(1,), (1, 1), (1, 1, 1)])
def test_trailing_axes_are_dropped_by_every_reader(tmp_path: Path, axes: tuple[int, ...]) -> None:
    plain = save(tmp_path / "plain.nii.gz", body())
    path = save(tmp_path / "more.nii.gz", body().reshape(*body().shape, *axes))
    assert nib.load(path).shape == (12, 10, 8, *axes)
    assert check_ct(path, LIMITS) is None and read_volume_header(path).shape == (12, 10, 8)
    for chain in (ct_transforms((8, 10, 12)), segmentation_transforms(label_map=False)):
        transform = ByDimension((), chain)
        first, second = (transform({"id": "a", "dim": 3, "image": str(file)})["image"] for file in (plain, path))
        assert torch.equal(torch.as_tensor(first), torch.as_tensor(second))
    values, affine = attention_in_file_geometry({"image": str(path)}, torch.ones(2, 2, 2) / 8)
    assert values.shape == (12, 10, 8)
    np.testing.assert_allclose(affine, AFFINE)


def test_label_maps_drop_them_too(tmp_path: Path) -> None:
    image = save(tmp_path / "image.nii.gz", body()[..., None, None])
    mask = save(tmp_path / "mask.nii.gz", (body() > 0).astype(np.uint8)[..., None, None])
    done = ByDimension((), segmentation_transforms(num_classes=2))(
        {"id": "a", "dim": 3, "image": str(image), "mask": str(mask)}
    )
    assert done["mask"].shape == (1, 8, 10, 12) and int(done["mask"].sum()) == int((body() > 0).sum())


@pytest.mark.parametrize(
    ("volume", "words"),
    [
        (body().astype(np.complex64), NOT_GREY),
        (np.zeros((12, 10, 8), [("R", "u1"), ("G", "u1"), ("B", "u1")]), NOT_GREY),
        (body()[:, :, :1], "has shape 12 × 10 × 1, which is not a 3D volume. Give all slices in one file"),
        (body()[:, :, 0], "has shape 12 × 10, which is not a 3D volume. Give all slices in one file"),
        (
            np.repeat(body()[..., None, None], 2, axis=3),
            "is 4D (12 × 10 × 8 × 2): several time points or channels. Extract one 3D volume",
        ),
    ],
    ids=["complex", "colour", "one slice", "flat", "two time points"],
)
def test_one_refusal_of_what_is_no_volume(tmp_path: Path, volume: np.ndarray, words: str) -> None:
    path = save(tmp_path / "bad.nii.gz", volume)
    fault = check_ct(path, LIMITS)
    assert fault is not None and fault.detail == f"{path}: {words}"
    assert refusal(path, tmp_path) == words
    with pytest.raises(Exception) as info:
        attention_in_file_geometry({"image": str(path)}, torch.ones(2, 2, 2))
    assert str(info.value) == f"{path}: {words}"


@pytest.mark.parametrize("kind", ["mhd", "mha", "nhdr", "nrrd"])
@pytest.mark.parametrize("where", ["absolute", "parent", "inner parent", "link", "windows"])
def test_voxels_outside_the_folder_are_refused(tmp_path: Path, kind: str, where: str) -> None:
    secret, folder = tmp_path / "secret.raw", tmp_path / "scans"
    (folder / "inner").mkdir(parents=True)
    secret.write_bytes(body().tobytes(order="F"))
    (folder / "link.raw").symlink_to(secret)
    names = {
        "absolute": str(secret),
        "parent": "../secret.raw",
        "inner parent": "inner/../../secret.raw",
        "link": "link.raw",
        "windows": "C:\\secret.raw",
    }
    save_header = save_metaimage if kind in ("mhd", "mha") else save_nrrd
    path = save_header(folder / f"scan.{kind}", names[where])
    words = OUTSIDE.format(names[where][:80])
    assert voxels_elsewhere(path) == words
    fault = check_ct(path, LIMITS)
    assert fault is not None and (fault.reason, fault.detail) == ("voxels outside the folder", f"{path}: {words}")
    assert refusal(path, tmp_path) == words
    with pytest.raises(DataError) as info:
        read_geometry(path)
    assert str(info.value) == f"{path}: {words}"
    if kind == "mhd":
        assert check_metaimage(path)[0] == fault


def test_lists_and_patterns_of_slices_are_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    listed = save_metaimage(folder / "list.mhd", "LIST\n0.raw\n../1.raw")
    assert voxels_elsewhere(listed) == OUTSIDE.format("../1.raw")
    pattern = save_metaimage(folder / "pattern.mhd", "../s%03d.raw 1 8 1")
    assert voxels_elsewhere(pattern) == OUTSIDE.format("../s001.raw")
    assert not voxels_elsewhere(save_metaimage(folder / "sound.mhd", "s%03d.raw 1 8 1"))
    assert not voxels_elsewhere(save_metaimage(folder / "local.mha", "LOCAL"))
    padded = save_metaimage(folder / "padded.mhd", "/etc/hostname")
    padded.write_text(padded.read_text().replace("ElementType", "Comment = " + "x" * 70_000 + "\nElementType"))
    assert voxels_elsewhere(padded) == OUTSIDE.format("/etc/hostname")


@pytest.mark.parametrize("kind", ["mhd", "nhdr"])
@pytest.mark.parametrize("name", ["scan.raw", "inner/scan.raw"])
def test_voxels_beside_or_below_are_read(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / name).write_bytes(body().tobytes(order="F"))
    path = (save_metaimage if kind == "mhd" else save_nrrd)(tmp_path / f"scan.{kind}", name)
    assert check_ct(path, LIMITS) is None
    assert [item["dim"] for item in find_images(str(path))] == [3]
    volume: Any = ByDimension((), ct_transforms((8, 10, 12)))({"id": "a", "dim": 3, "image": str(path)})["image"]
    # the file's axes run to the left, back and head: to Superior, Posterior, Left without a turn
    np.testing.assert_allclose(volume[0].numpy(), body().transpose(2, 1, 0) / 1000, atol=1e-6)


def test_one_volume_with_a_fourth_axis_through_itk(tmp_path: Path) -> None:
    (tmp_path / "scan.raw").write_bytes(body().tobytes(order="F"))
    path = save_metaimage(tmp_path / "scan.mhd", "scan.raw", body()[..., None])
    assert read_volume_header(path).shape == (12, 10, 8)
    assert check_ct(path, LIMITS) is None
    volume: Any = ByDimension((), ct_transforms((8, 10, 12)))({"id": "a", "dim": 3, "image": str(path)})["image"]
    np.testing.assert_allclose(volume[0].numpy(), body().transpose(2, 1, 0) / 1000, atol=1e-6)
