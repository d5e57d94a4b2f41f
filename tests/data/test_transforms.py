# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import struct
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import CacheDataset, MetaTensor, PersistentDataset
from monai.transforms import Compose, RandFlipd, Resized, ScaleIntensityRanged
from PIL import Image

from unimedi_components.data.transforms import ByDimension, WindowAread, ct_transforms, xray_transforms
from unimedi_components.errors import DataError
from unimedi_components.images.xray import XrayReader

RNG = np.random.default_rng(3)


def write_dicom(path, pixels: np.ndarray, photometric: str, bits: int, rescale: tuple = ()) -> None:
    """A minimal explicit-VR little-endian computed radiograph, byte by byte."""

    def element(group: int, number: int, vr: str, value: bytes) -> bytes:
        value += (b"\0" if vr == "UI" else b" ") * (len(value) % 2)
        if vr in ("OW", "OB"):
            return struct.pack("<HH2sHI", group, number, vr.encode(), 0, len(value)) + value
        return struct.pack("<HH2sH", group, number, vr.encode(), len(value)) + value

    sop_class, us = b"1.2.840.10008.5.1.4.1.1.1", struct.Struct("<H").pack
    meta = element(2, 1, "OB", b"\0\1") + element(2, 2, "UI", sop_class) + element(2, 3, "UI", b"1.2.3")
    meta += element(2, 0x10, "UI", b"1.2.840.10008.1.2.1")
    meta = element(2, 0, "UL", struct.pack("<I", len(meta))) + meta
    samples = pixels.shape[2] if pixels.ndim == 3 else 1
    body = element(8, 0x16, "UI", sop_class) + element(8, 0x18, "UI", b"1.2.3") + element(8, 0x60, "CS", b"CR")
    body += element(0x28, 2, "US", us(samples)) + element(0x28, 4, "CS", photometric.encode())
    body += element(0x28, 6, "US", us(0)) if samples > 1 else b""
    allocated = pixels.dtype.itemsize * 8
    values = [
        (0x10, pixels.shape[0]),
        (0x11, pixels.shape[1]),
        (0x100, allocated),
        (0x101, bits),
        (0x102, bits - 1),
        (0x103, int(pixels.dtype.kind == "i")),
    ]
    body += b"".join(element(0x28, number, "US", us(value)) for number, value in values)
    for number, text in zip((0x1052, 0x1053)[: len(rescale)], rescale[::-1], strict=True):
        body += element(0x28, number, "DS", text.encode())
    body += element(0x7FE0, 0x10, "OW", pixels.tobytes())
    path.write_bytes(b"\0" * 128 + b"DICM" + meta + body)


def read(path) -> np.ndarray:
    return XrayReader().get_data(str(path))[0]


def xray(path, *args, **kwargs) -> torch.Tensor:
    return ByDimension(two_d=xray_transforms(*args, **kwargs))({"id": "a", "dim": 2, "image": str(path)})["image"]


def ct(path, *args, **kwargs) -> torch.Tensor:
    return ByDimension(three_d=ct_transforms(*args, **kwargs))({"id": "a", "dim": 3, "image": str(path)})["image"]


def root_cause(info) -> BaseException:
    error = info.value
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "CMYK", "I", "F"])
def test_every_pil_mode_is_the_same_upright_grey(tmp_path, mode):
    grey = np.zeros((6, 10), np.uint8)
    grey[1, 8], grey[4, 2] = 255, 100
    path = tmp_path / ("a.tif" if mode in ("CMYK", "I", "F") else "a.png")
    Image.fromarray(grey).convert(mode).save(path)
    array = read(path)
    assert array.shape == (6, 10) and array.dtype == np.float32
    assert array[1, 8] == 1 and array[4, 2] == np.float32(100 / 255) and (array > 0).sum() == 2


def test_luma_alpha_depth_and_exif(tmp_path):
    colour = np.zeros((4, 4, 4), np.uint8)
    colour[0, 0] = (255, 0, 0, 0)  # invisible red still counts
    colour[0, 1] = (255, 255, 255, 255)
    Image.fromarray(colour).save(tmp_path / "c.png")
    assert read(tmp_path / "c.png")[0, 0] == np.float32(76 / 255)  # 0.299 * 255 = 76.2

    deep = np.zeros((5, 7), np.uint16)
    deep[2, 3], deep[0, 0] = 4000, 1000  # 12 bits in a 16-bit file
    Image.fromarray(deep).save(tmp_path / "d.png")
    assert read(tmp_path / "d.png")[2, 3] == 1 and read(tmp_path / "d.png")[0, 0] == 0.25

    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated by 90 degrees to the left of upright
    stored = np.zeros((4, 8), np.uint8)
    stored[0, 0] = 255
    Image.fromarray(stored).save(tmp_path / "e.png", exif=exif)
    assert read(tmp_path / "e.png").shape == (8, 4) and read(tmp_path / "e.png")[0, 3] == 1


def test_dicom_photometric_interpretations(tmp_path):
    pixels = np.zeros((6, 4), np.uint16)
    pixels[0, 0], pixels[0, 3], pixels[5, 3] = 1000, 200, 4095
    write_dicom(tmp_path / "two.dcm", pixels, "MONOCHROME2", 12)
    write_dicom(tmp_path / "one", pixels, "MONOCHROME1", 12)  # no suffix: the content decides
    two, one = read(tmp_path / "two.dcm"), read(tmp_path / "one")
    np.testing.assert_allclose(two, pixels / 4095, atol=1e-7)
    np.testing.assert_allclose(one, 1 - pixels / 4095, atol=1e-7)
    # 16 bits, of which the image uses 10: as bright as its twin with the values the other way round
    write_dicom(tmp_path / "deep", np.minimum(pixels, 1000), "MONOCHROME1", 16)
    np.testing.assert_allclose(read(tmp_path / "deep"), 1 - np.minimum(pixels, 1000) / 1000, atol=1e-7)
    rgb = np.zeros((4, 4, 3), np.uint8)
    rgb[1, 2], rgb[3, 3] = (0, 255, 0), 255
    write_dicom(tmp_path / "rgb.dcm", rgb, "RGB", 8)
    assert read(tmp_path / "rgb.dcm")[1, 2] == np.float32(150 / 255) and read(tmp_path / "rgb.dcm")[3, 3] == 1


@pytest.mark.parametrize(
    ("pixels", "bits", "rescale", "dark"),
    [
        # rescaled -10, 1990, 3990, 7990: shifted to start at 0, then by the largest
        (np.array([[0, 1000], [2000, 4000]], np.uint16), 12, ("2", "-10"), [[0, 0.25], [0.5, 1]]),
        # rescaled 100, 600, 1100, 2100
        (np.array([[0, 1000], [2000, 4000]], np.uint16), 12, ("0.5", "100"), [[1 / 21, 2 / 7], [11 / 21, 1]]),
        (np.array([[0, 1000], [2000, 4000]], np.uint16), 16, ("1", "-1024"), [[0, 0.25], [0.5, 1]]),
        (np.array([[-100, 0], [100, 300]], np.int16), 16, (), [[0, 0.25], [0.5, 1]]),
        # rescaled -190, 10, 210, 610
        (np.array([[-100, 0], [100, 300]], np.int16), 16, ("2", "10"), [[0, 0.25], [0.5, 1]]),
    ],
    ids=["slope", "fraction", "intercept", "signed", "signed and rescaled"],
)
def test_rescaled_and_signed_films_invert_alike(tmp_path, pixels, bits, rescale, dark):
    write_dicom(tmp_path / "two.dcm", pixels, "MONOCHROME2", bits, rescale)
    write_dicom(tmp_path / "one.dcm", pixels, "MONOCHROME1", bits, rescale)
    np.testing.assert_allclose(read(tmp_path / "two.dcm"), dark, atol=1e-6)
    np.testing.assert_allclose(read(tmp_path / "one.dcm"), 1 - np.array(dark), atol=1e-6)


def test_not_an_xray(tmp_path):
    Image.fromarray(np.full((8, 8), 9, np.uint8)).save(tmp_path / "flat.png")
    with pytest.raises(DataError, match=r"flat\.png: all pixels have the value 9"):
        read(tmp_path / "flat.png")
    Image.fromarray(RNG.integers(0, 255, (200, 200), dtype=np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:9000])
    with pytest.raises(RuntimeError) as info:
        xray(tmp_path / "cut.jpg", 64)
    assert "truncated" in str(root_cause(info))
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(RuntimeError) as info:
        xray(tmp_path / "text.jpg", 64)
    assert "is named as a picture but holds text" in str(root_cause(info))


def test_xray_resize_pad_crop_positions(tmp_path):
    pixels = RNG.integers(0, 256, (512, 384), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    half = pixels.reshape(256, 2, 192, 2).mean((1, 3))
    square = np.full((256, 256), -1.0)
    square[:, 32:224] = half / 255 * 2 - 1
    full = xray(tmp_path / "a.png", 256)  # long side 293
    assert full.shape == (1, 256, 256)
    image = xray(tmp_path / "a.png")
    assert type(image) is torch.Tensor and image.dtype == torch.float32 and image.shape == (1, 224, 224)
    np.testing.assert_allclose(image[0].numpy(), square[16:240, 16:240], atol=1e-6)
    assert (image[0, :, :16] == -1).all() and (image[0, :, 16:208] > -1).float().mean() > 0.99

    transform = ByDimension(two_d=xray_transforms(random_crop=True))
    corners = set()
    for seed in range(8):
        transform.seed_random(2, seed)
        image = transform({"id": "a", "dim": 2, "image": str(tmp_path / "a.png")})["image"]
        assert type(image) is torch.Tensor and image.shape == (1, 224, 224)
        found = [
            (top, left)
            for top in range(33)
            for left in range(33)
            if np.allclose(image[0, :4].numpy(), square[top : top + 4, left : left + 224], atol=1e-6)
        ]
        top, left = found[0]
        np.testing.assert_allclose(image[0].numpy(), square[top : top + 224, left : left + 224], atol=1e-6)
        corners.add((top, left))
    assert len(corners) >= 7


def test_xray_sizes(tmp_path):
    Image.fromarray(RNG.integers(0, 256, (90, 146), dtype=np.uint8)).save(tmp_path / "a.png")
    chain = ByDimension(two_d=xray_transforms(64, random_crop=True))
    assert chain.cached({"dim": 2, "image": str(tmp_path / "a.png")})["image"].shape == (1, 73, 73)
    assert xray(tmp_path / "a.png", 64, long_side=64).shape == (1, 64, 64)
    with pytest.raises(DataError, match="size 64 is larger than long_side 60"):
        xray_transforms(64, long_side=60)


def test_draft_decoding_changes_little(tmp_path):
    row, column = np.mgrid[0:1024, 0:800]
    smooth = 127 + 60 * np.sin(row / 40) * np.cos(column / 30) + RNG.normal(0, 20, (1024, 800))
    Image.fromarray(smooth.clip(0, 255).astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    reader = XrayReader(draft_size=256)
    assert reader.get_data(str(tmp_path / "a.jpg"))[0].shape == (512, 400)
    pixels = np.asarray(Image.open(tmp_path / "a.jpg"), np.float32)[:, :] / 255
    blocks = pixels.reshape(128, 8, 100, 8).mean((1, 3))
    drafted = xray(tmp_path / "a.jpg", 128, long_side=128)[0, :, 14:114].numpy() / 2 + 0.5
    assert np.abs(drafted - blocks).max() < 0.02


def save_nifti(path, volume_ras: np.ndarray, axcodes: str, spacing=(1.0, 1.0, 1.0)) -> None:
    """Store an array that is indexed (right, anterior, superior) with its axes in another order."""
    affine = np.diag([*spacing, 1.0])
    target = nib.orientations.axcodes2ornt(tuple(axcodes))
    nib.Nifti1Image(volume_ras.astype(np.int16), affine).as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt(("R", "A", "S")), target)
    ).to_filename(path)
    assert nib.aff2axcodes(nib.load(path).affine) == tuple(axcodes)


def spl(volume_ras: np.ndarray) -> np.ndarray:
    """The definition: index d goes up, h goes to the back, w goes to the patient's left."""
    x, y, z = volume_ras.shape
    out = np.empty((z, y, x))
    for d in range(z):
        for h in range(y):
            for w in range(x):
                out[d, h, w] = volume_ras[x - 1 - w, y - 1 - h, d]
    return out


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "LAS", "PIR", "SAL"])
def test_ct_axes_from_any_stored_order(tmp_path, axcodes):
    volume = RNG.integers(-900, 900, (5, 6, 4))
    volume[0, 0, 0], volume[-1, -1, -1] = -3000, 3000  # left posterior lowest; right anterior highest
    save_nifti(tmp_path / "a.nii.gz", volume, axcodes)
    image = ct(tmp_path / "a.nii.gz", (4, 6, 5))
    assert type(image) is torch.Tensor and image.dtype == torch.float32 and image.shape == (1, 4, 6, 5)
    np.testing.assert_allclose(image[0].numpy(), spl(volume).clip(-1000, 1000) / 1000, atol=1e-6)
    assert image[0, 0, -1, -1] == -1 and image[0, -1, 0, 0] == 1


def test_ct_through_itk_agrees(tmp_path):
    import itk

    volume = RNG.integers(-900, 900, (5, 6, 4)).astype(np.int16)
    lps_first = volume[::-1, ::-1]  # ITK's world is LPS: an identity direction runs left, posterior, superior
    itk.imwrite(itk.image_from_array(np.ascontiguousarray(lps_first.transpose(2, 1, 0))), str(tmp_path / "a.mha"))
    image = ct(tmp_path / "a.mha", (4, 6, 5))
    np.testing.assert_allclose(image[0].numpy(), spl(volume) / 1000, atol=1e-6)


def test_ct_window_and_area(tmp_path):
    volume = RNG.integers(-2000, 2000, (8, 8, 12))
    volume[0, 0, :5] = (-1024, -1000, 0, 500, 1000)
    save_nifti(tmp_path / "a.nii.gz", volume, "RAS")
    values = ct(tmp_path / "a.nii.gz", (12, 8, 8))[0, :5, -1, -1]
    assert values.tolist() == [-1, -1, 0, 0.5, 1]
    image = ct(tmp_path / "a.nii.gz", (6, 4, 2), window=(-500, 1500))[0].numpy()
    clipped = (spl(volume).clip(-500, 1500) - 500) / 1000
    np.testing.assert_allclose(image, clipped.reshape(6, 2, 4, 2, 2, 4).mean((1, 3, 5)), atol=1e-5)


def test_ct_spacing(tmp_path):
    ramp = np.broadcast_to(np.arange(9) * 100 - 400, (4, 4, 9))
    save_nifti(tmp_path / "a.nii.gz", ramp, "RAS", spacing=(1.0, 1.0, 2.0))
    image = ct(tmp_path / "a.nii.gz", (5, 4, 4), spacing=(4.0, 1.0, 1.0))
    np.testing.assert_allclose(image[0, :, 2, 2].numpy(), [-0.4, -0.2, 0, 0.2, 0.4], atol=1e-5)


def test_ct_shapes_and_broken_headers(tmp_path):
    volume = RNG.integers(-900, 900, (5, 6, 4, 1)).astype(np.int16)
    nib.Nifti1Image(volume, np.eye(4)).to_filename(tmp_path / "single.nii.gz")
    np.testing.assert_allclose(
        ct(tmp_path / "single.nii.gz", (4, 6, 5))[0].numpy(), spl(volume[..., 0]) / 1000, atol=1e-6
    )
    nib.Nifti1Image(np.repeat(volume, 3, -1), np.eye(4)).to_filename(tmp_path / "time.nii.gz")
    with pytest.raises(RuntimeError) as info:
        ct(tmp_path / "time.nii.gz", (4, 6, 5))
    assert isinstance(root_cause(info), DataError) and "is 4D (5 × 6 × 4 × 3)" in str(root_cause(info))

    image = nib.Nifti1Image(volume[..., 0], np.eye(4))
    image.to_filename(tmp_path / "zero.nii")
    raw = bytearray((tmp_path / "zero.nii").read_bytes())
    raw[252:256] = struct.pack("<hh", 0, 1)  # qform off, sform on
    raw[280:328] = bytes(48)  # srow_x, srow_y, srow_z
    (tmp_path / "zero.nii").write_bytes(raw)
    with pytest.raises(RuntimeError) as info:
        ct(tmp_path / "zero.nii", (4, 6, 5))
    assert isinstance(root_cause(info), DataError) and "zero.nii: the affine is zero" in str(root_cause(info))


def test_by_dimension_dispatches_and_splits(tmp_path):
    Image.fromarray(RNG.integers(0, 256, (40, 40), dtype=np.uint8)).save(tmp_path / "a.png")
    save_nifti(tmp_path / "a.nii.gz", RNG.integers(-900, 900, (5, 6, 4)), "RAS")
    items = [
        {"id": "x", "dim": 2, "image": str(tmp_path / "a.png")},
        {"id": "c", "dim": 3, "image": str(tmp_path / "a.nii.gz")},
    ]
    flip = RandFlipd("image", prob=0.5, spatial_axis=2)
    transform = ByDimension(xray_transforms(16, random_crop=True), [*ct_transforms((4, 6, 5)), flip])
    assert [type(t).__name__ for t in transform.cached_transforms(2)][-1] == "ScaleIntensityRanged"
    assert [type(t).__name__ for t in transform.cached_transforms(3)][-1] == "EnsureTyped"
    assert transform.get_index_of_first(lambda t: t is transform.random) == 1

    for make in (
        lambda: PersistentDataset(items, transform, cache_dir=tmp_path / "cache"),
        lambda: CacheDataset(items, transform, progress=False),
    ):
        dataset = make()
        drawn = []
        for _ in range(2):
            transform.set_random_state(seed=11)
            drawn.append([dataset[i]["image"] for i in (0, 1)])
        assert drawn[0][0].shape == (1, 16, 16) and drawn[0][1].shape == (1, 4, 6, 5)
        assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
        assert len({tuple(dataset[0]["image"].flatten().tolist()) for _ in range(6)}) > 1
    cached = [torch.load(p, weights_only=True)["image"] for p in (tmp_path / "cache").iterdir()]
    assert sorted(tuple(image.shape) for image in cached) == [(1, 4, 6, 5), (1, 18, 18)]
    assert not any(isinstance(image, MetaTensor) for image in cached)

    with pytest.raises(RuntimeError) as info:
        ByDimension(xray_transforms(16))(items[1])
    assert '"dim" is 3, must be one of [2]' in str(root_cause(info))


def test_ct_rotation_turns_every_slice_alike_and_never_flips() -> None:
    chain = ct_transforms((4, 32, 32), rotate=10.0)
    turn = Compose(chain[-2:])
    ramp = torch.arange(32.0).expand(32, 32) / 32
    volume = ramp.expand(1, 4, 32, 32) + torch.arange(4.0).view(1, 4, 1, 1)
    angles = []
    for seed in range(6):
        turn.set_random_state(seed)
        found = turn({"image": volume})["image"]
        assert type(found) is torch.Tensor and found.shape == volume.shape
        depths = found[0] - found[0, :1]
        assert torch.allclose(depths, torch.arange(4.0).view(4, 1, 1).expand(4, 32, 32), atol=1e-4)
        inner = found[0, 0, 8:24, 8:24]
        down, across = inner.diff(dim=0).mean(), inner.diff(dim=1).mean()
        angles.append(math.degrees(math.atan2(float(down), float(across))))
    assert max(map(abs, angles)) <= 10.01 and min(angles) < -1 and max(angles) > 1


@pytest.mark.parametrize(
    ("shape", "size"), [((50, 40, 36), (32, 24, 24)), ((9, 20, 22), (16, 24, 24)), ((8, 9, 7),) * 2]
)
@pytest.mark.parametrize("kind", [torch.int16, torch.float32])
def test_slices_at_a_time_equal_the_whole_volume(shape: Any, size: Any, kind: torch.dtype) -> None:
    values = (torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)) * 4000 - 2000).to(kind)
    volume = MetaTensor(values, affine=torch.diag(torch.tensor([3.0, 2, 1, 1])))
    whole = Compose(
        [
            ScaleIntensityRanged("image", a_min=-1000, a_max=400, b_min=-1, b_max=1, clip=True),
            Resized("image", spatial_size=size, mode="area"),
        ]
    )({"image": volume})["image"]
    found = WindowAread("image", (-1000, 400), size)({"image": volume})["image"]
    assert found.dtype == torch.float32 and torch.equal(found.as_tensor(), whole.as_tensor())
    assert torch.allclose(found.affine, whole.affine)
    assert torch.equal(volume.affine, torch.diag(torch.tensor([3.0, 2, 1, 1], dtype=torch.float64)))
