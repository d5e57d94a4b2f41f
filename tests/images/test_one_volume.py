# SPDX-License-Identifier: Apache-2.0
"""One CT in every format: equal network input, and predictions on the voxels of each file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose

from unimedi_components.data.segmentation import segmentation_transforms
from unimedi_components.data.transforms import ct_transforms
from unimedi_components.errors import DataError
from unimedi_components.images import volume as volume_module
from unimedi_components.images.checks import check_ct
from unimedi_components.images.find import expand, find_images, sort_files
from unimedi_components.images.itk_loading import load_imaged
from unimedi_components.images.volume import read_volume


def nifti(path: Path, values: np.ndarray, affine: np.ndarray, axes: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image: Any = nib.Nifti1Image(values, affine)
    if axes:
        target = nib.orientations.axcodes2ornt(tuple(axes))
        image = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), target))
    nib.save(image, path)
    return path


def metaimage(path: Path, values: np.ndarray, affine: np.ndarray, name: str = "LOCAL") -> Path:
    """Axes of the array run along the file's x, y and z."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    matrix = " ".join(f"{number:g}" for number in (lps[:3, :3] / spacing).T.ravel())
    header = (
        f"ObjectType = Image\nNDims = 3\nDimSize = {' '.join(map(str, values.shape))}\nElementType = MET_SHORT\n"
        f"ElementSpacing = {' '.join(map(str, spacing))}\nOffset = {' '.join(map(str, lps[:3, 3]))}\n"
        f"TransformMatrix = {matrix}\nElementByteOrderMSB = False\nElementDataFile = {name}\n"
    )
    voxels = values.astype("<i2").tobytes(order="F")
    if name == "LOCAL":
        path.write_bytes(header.encode() + voxels)
    else:
        path.write_bytes(header.encode())
        target = path.parent / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(voxels)
    return path


def nrrd(path: Path, values: np.ndarray, affine: np.ndarray, voxels: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = " ".join("(" + ",".join(f"{number:g}" for number in affine[:3, axis]) + ")" for axis in range(3))
    origin = ",".join(f"{number:g}" for number in affine[:3, 3])
    header = (
        f"NRRD0004\ntype: short\ndimension: 3\nspace: right-anterior-superior\nsizes: "
        f"{' '.join(map(str, values.shape))}\nspace directions: {columns}\nkinds: domain domain domain\n"
        f"endian: little\nencoding: raw\nspace origin: ({origin})\n"
    )
    data = values.astype("<i2").tobytes(order="F")
    if voxels:
        path.write_text(f"{header}data file: {voxels}\n\n")
        (path.parent / voxels).parent.mkdir(parents=True, exist_ok=True)
        (path.parent / voxels).write_bytes(data)
    else:
        path.write_bytes(f"{header}\n".encode() + data)
    return path


FORMATS: dict[str, Callable[[Any, Path, np.ndarray, np.ndarray], object]] = {
    "series": lambda d, p, v, a: d.slices(),
    "frames": lambda d, p, v, a: d.enhanced("in/e.dcm", list(range(24))),
    "frames in reverse": lambda d, p, v, a: d.enhanced("in/e.dcm", list(range(23, -1, -1))),
    "NIfTI RAS": lambda d, p, v, a: nifti(p / "a.nii.gz", v, a, "RAS"),
    "NIfTI LPS": lambda d, p, v, a: nifti(p / "a.nii", v, a),
    "NIfTI 5D": lambda d, p, v, a: nifti(p / "a.nii.gz", v[..., None, None], a),
    "slices in reverse": lambda d, p, v, a: nifti(p / "a.nii.gz", v, a, "LPI"),
    "MetaImage": lambda d, p, v, a: metaimage(p / "a.mha", v, a),
    "MetaImage in two files": lambda d, p, v, a: metaimage(p / "a.mhd", v, a, "a.raw"),
    "NRRD": lambda d, p, v, a: nrrd(p / "a.nrrd", v, a),
    "NRRD in two files": lambda d, p, v, a: nrrd(p / "a.nhdr", v, a, "a.raw"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_one_network_input_and_its_own_geometry(
    name: str, dicom: Any, truth: Any, tmp_path: Path
) -> None:
    values, affine = truth
    dicom.folder = tmp_path if name.startswith("frames") else dicom.folder
    FORMATS[name](dicom, tmp_path / "in", values, affine)
    (item,) = find_images(str(tmp_path / "in"), tmp_path)
    reference = nifti(tmp_path / "reference.nii.gz", values, affine)
    chain = Compose(ct_transforms((8, 24, 24)))
    expected, got = (chain({"dim": 3, **one})["image"] for one in ({"image": str(reference)}, item))
    assert torch.allclose(got, expected, atol=1e-6)
    # where a label map on the network's grid lands in the file
    read = read_volume(item["image"], item.get("files", ()))
    steps = Compose(segmentation_transforms(window=(-1000.0, 1000.0), label_map=False))
    prepared = steps(dict(item))
    back = steps.inverse({"image": prepared["image"]})["image"]
    assert back.shape[1:] == read.values.shape and np.allclose(back.affine, read.affine)
    assert np.allclose(back[0].numpy() * 1000, read.values, atol=0.1)
    world = np.c_[np.argwhere(read.values == 130), 1] @ read.affine.T
    truth_world = np.c_[np.argwhere(values == 130), 1] @ affine.T
    assert len(world) == 1 and np.allclose(world, truth_world, atol=0.01)


@pytest.mark.parametrize("kind", ["tilted slices", "shifted slices"])
def test_a_tilted_series_is_seen_upright_and_written_sheared(kind: str, dicom: Any, truth: Any, tmp_path: Path) -> None:
    """A block that stands straight in the patient, scanned by a gantry that is tilted by 20 degrees."""
    angle = np.deg2rad(20)
    z, y = np.meshgrid(3.0 * np.arange(24), 2.5 * np.arange(18), indexing="ij")
    if kind == "tilted slices":
        y, z = y * np.cos(angle), z + y * np.sin(angle)

        def turn(number: int, file: Any) -> None:
            file.ImageOrientationPatient = [1, 0, 0, 0, float(np.cos(angle)), float(np.sin(angle))]

        options: dict[str, Any] = {"change": turn}
    else:
        y = y + np.tan(angle) * (z - 36)
        options = {"shift": lambda place: (0.0, np.tan(angle) * (place - 36))}
    inside = (np.abs(y - 21) < 9) & (np.abs(z - 40) < 20)
    volume = np.broadcast_to(np.where(inside, 40, -1000).T, (20, 18, 24)).astype(np.int16)
    dicom.slices(volume=volume, **options)
    (item,) = find_images(str(dicom.folder), tmp_path)
    steps = Compose(segmentation_transforms(window=(-1000.0, 1000.0), label_map=False))
    image = steps(dict(item))["image"]
    matrix = np.asarray(image.affine)[:3, :3]
    assert np.allclose(matrix.T @ matrix, np.diag(np.diag(matrix.T @ matrix)), atol=1e-4)
    # the block's front and back lie at one y on every slice that it is on
    rows = (image[0, :, :, 10] > -0.5).numpy()
    edges = {(int(row.argmax()), int(len(row) - row[::-1].argmax())) for row in rows if row.sum() > 3}
    starts, ends = zip(*edges, strict=True)
    assert max(starts) - min(starts) <= 2 and max(ends) - min(ends) <= 2
    # air around the field of view, and the file's own sheared grid on the way back
    assert float(image.min()) == pytest.approx(-1.0, abs=1e-6)
    read = read_volume(item["image"], item["files"])
    back = steps.inverse({"image": image})["image"]
    assert back.shape[1:] == read.values.shape and np.allclose(back.affine, read.affine)
    assert np.mean((back[0].numpy() > -0.5) == (read.values > -500)) > 0.97


@pytest.mark.parametrize("name", ["../secret.raw", "/etc/hostname", "sub/../../secret.raw", "..\\secret.raw"])
def test_headers_that_lead_out_of_their_folder_are_refused(name: str, truth: Any, tmp_path: Path) -> None:
    values, affine = truth
    (tmp_path / "secret.raw").write_bytes(values.astype("<i2").tobytes())
    folder = tmp_path / "in"
    path = metaimage(folder / "a.mhd", values, affine, "a.raw")
    path.write_text(path.read_text().replace("a.raw", name))
    other = nrrd(folder / "b.nhdr", values, affine, "b.raw")
    other.write_text(other.read_text().replace("data file: b.raw", f"data file: {name}"))
    images, left_out = sort_files(expand(["a.mhd", "b.nhdr"], folder))
    assert not images and len(left_out) == 2
    assert all(f"names voxels outside its folder ({name})" in one.reason for one in left_out)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda v: v.astype(np.complex64), "its voxels are colours or complex numbers"),
        (lambda v: v[:, :, :1], "has shape 20 × 18 × 1,"),
        (lambda v: np.repeat(v[..., None], 2, 3), "several time points or channels. Extract one 3D volume"),
    ],
)
def test_what_is_no_volume_is_refused_in_the_same_words(make: Any, reason: str, truth: Any, tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii.gz", make(truth[0]), truth[1])
    with pytest.raises(DataError, match=reason):
        find_images(str(path))
    fault = check_ct(path)
    assert fault is not None and reason in fault.detail
    with pytest.raises(RuntimeError) as caught:
        Compose(ct_transforms((8, 16, 16)))({"image": str(path)})
    assert reason in str(caught.value.__cause__)


def test_gzip_is_read_alike_with_and_without_isal(tmp_path, monkeypatch):
    pytest.importorskip("isal")
    values = np.random.default_rng(0).integers(-1000, 1000, (9, 8, 7)).astype(np.int16)
    image = nib.Nifti1Image(values, np.eye(4))
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / "a.nii.gz")
    whole = (tmp_path / "a.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    found = []
    for library in (volume_module.igzip, None):
        monkeypatch.setattr(volume_module, "igzip", library)
        found.append(volume_module.read_volume(tmp_path / "a.nii.gz").values)
        with pytest.raises(DataError, match=r"cut\.nii\.gz: cannot be read .*Download or export it again"):
            volume_module.read_volume(tmp_path / "cut.nii.gz")
    assert np.array_equal(found[0], found[1]) and found[0].std() > 100


@pytest.mark.filterwarnings("error")
def test_a_decoder_that_nothing_uses_is_not_missed(caplog: pytest.LogCaptureFixture) -> None:
    load_imaged("image")
    assert caplog.text == ""
