# SPDX-License-Identifier: Apache-2.0
"""Checks of CT volumes on hand-broken files, and of X-ray files."""

from __future__ import annotations

import struct

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from unimedi_components.errors import ConfigError, DataError
from unimedi_components.images.checks import CTLimits, check_ct, hounsfield_fault
from unimedi_components.images.volume import read_volume_header
from unimedi_components.images.xray_checks import xray_fault

SMALL = CTLimits(min_megabytes=0.0)


def body(shape=(24, 24, 22), axis=2):
    """An elliptic body of soft tissue with two lungs in air, in Hounsfield units."""
    i, j = np.meshgrid(np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), indexing="ij")
    plane = np.where(i**2 + j**2 < 0.8, 40, -1000)
    plane[(np.abs(np.abs(i) - 0.4) < 0.2) & (np.abs(j) < 0.4)] = -800
    return np.repeat(plane[..., None], shape[2], axis=2).astype(np.int16)


def save(path, volume, spacing=(1.0, 1.0, 2.0), affine=None):
    nib.save(nib.Nifti1Image(volume, np.diag([*spacing, 1.0]) if affine is None else affine), path)
    return path


def patch(path, changes):
    """Overwrite bytes of an uncompressed NIfTI-1 header: {offset: (struct format, values)}."""
    content = bytearray(path.read_bytes())
    for offset, (form, values) in changes.items():
        struct.pack_into("<" + form, content, offset, *values)
    path.write_bytes(content)
    return path


def reason(path, limits=SMALL):
    fault = check_ct(path, limits)
    if fault is not None:
        assert str(path) in fault.detail
    return fault and fault.reason


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_sound_volume(tmp_path, name):
    path = save(tmp_path / name, body())
    assert check_ct(path, SMALL) is None
    header = read_volume_header(path)
    assert (header.shape, header.spacing, header.voxel_bytes, header.num_slices) == ((24, 24, 22), (1, 1, 2), 2, 22)


def test_trailing_axis_and_slices_along_the_axial_axis(tmp_path):
    assert reason(save(tmp_path / "t.nii.gz", body()[..., None])) is None
    four = np.repeat(body()[..., None], 2, axis=3)
    assert reason(save(tmp_path / "four.nii.gz", four)) == "not a 3D volume"
    assert reason(save(tmp_path / "flat.nii.gz", body()[:, :, 0])) == "not a 3D volume"
    sagittal = np.array([[0, 0, 1.0, 0], [1, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 1]])
    path = save(tmp_path / "s.nii.gz", body((24, 30, 22)), affine=sagittal)
    assert read_volume_header(path).num_slices == 30


def test_affines(tmp_path):
    def fresh(name):
        return save(tmp_path / name, body())

    zero = (12 * "f", [0.0] * 12)
    assert reason(patch(fresh("zero.nii"), {280: zero})) == "zero affine"
    # no sform, no qform: nothing says where the voxels lie
    assert reason(patch(fresh("none.nii"), {252: ("hh", (0, 0)), 280: zero})) == "zero affine"
    assert reason(patch(fresh("nan.nii"), {280: ("f", (float("nan"),))})) == "affine not finite"
    flat = (12 * "f", [1, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0])
    assert reason(patch(fresh("flat.nii"), {280: flat})) == "singular affine"
    assert reason(patch(fresh("pix.nii"), {80: ("fff", (1, 1, 3))})) == "affine and spacing disagree"
    assert reason(patch(fresh("codes.nii"), {280: zero, 254: ("h", (0,)), 252: ("h", (1,))})) is None


def test_spacing_and_size_limits(tmp_path):
    assert reason(save(tmp_path / "fov.nii.gz", body(), (1, 1, 250.0))) == "spacing out of range"
    assert reason(save(tmp_path / "fine.nii.gz", body(), (0.1, 0.1, 1))) == "spacing out of range"
    assert reason(save(tmp_path / "edge.nii.gz", body(), (0.2, 0.2, 10))) is None
    few = save(tmp_path / "few.nii.gz", body((24, 24, 19)))
    assert reason(few) == "fewer than 20 slices"
    assert reason(few, CTLimits(min_slices=19, min_megabytes=0)) is None
    # 24 * 24 * 22 voxels of 2 bytes are 25,344 bytes
    sound = save(tmp_path / "a.nii.gz", body())
    assert reason(sound, CTLimits()) == "fewer than 1 MB of voxels"
    assert reason(sound, CTLimits(min_megabytes=0.025344)) is None
    assert reason(sound, CTLimits(min_megabytes=0.025345)) == "fewer than 0.025345 MB of voxels"


def test_unreadable_files(tmp_path):
    good = save(tmp_path / "a.nii.gz", np.random.default_rng(0).integers(-1000, 200, (24, 24, 22)).astype(np.int16))
    (tmp_path / "cut.nii.gz").write_bytes(good.read_bytes()[:-3000])
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    (tmp_path / "text.nii.gz").write_text("not an image")
    (tmp_path / "series").mkdir()
    for name in ("cut.nii.gz", "empty.nii.gz", "text.nii.gz", "series"):
        assert reason(tmp_path / name) == "unreadable image"
    # the cut lies in the voxels, so the header alone is sound
    assert check_ct(tmp_path / "cut.nii.gz", SMALL, values=False) is None
    assert reason(tmp_path / "gone.nii.gz") == "missing image"
    with pytest.raises(DataError, match=r"cut\.nii\.gz: cannot be read"):
        check_ct(tmp_path / "cut.nii.gz", SMALL, strict=True)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda v: v + 1024, "as raw stored values do. Apply RescaleSlope/RescaleIntercept"),
        (lambda v: np.where(v == -1000, -2000, v + 1024), "as raw stored values do"),
        (lambda v: (v + 1000) / 1040, "as grey levels or rescaled intensities do"),
        (lambda v: (v + 1000) / 1040 * 255, "as grey levels or rescaled intensities do"),
        (lambda v: v - 1024, "the rescaling was applied twice"),
        (lambda v: v * 0, "as grey levels or rescaled intensities do"),
    ],
    ids=["stored", "stored-padded", "unit", "8-bit", "twice", "constant"],
)
def test_not_hounsfield(tmp_path, change, why):
    path = save(tmp_path / "a.nii.gz", change(body().astype(np.float32)).astype(np.float32))
    fault = check_ct(path, SMALL)
    assert fault is not None and fault.reason == "not Hounsfield units"
    assert why in fault.detail
    assert check_ct(path, CTLimits(min_megabytes=0, hounsfield=False)) is None


def test_stored_values_name_the_body_level(tmp_path):
    fault = check_ct(save(tmp_path / "a.nii.gz", (body() + 1024).astype(np.uint16)), SMALL)
    assert fault is not None and "values 24 to 1064" in fault.detail and "body lies near 1064" in fault.detail


def test_scaled_nifti_and_padding_are_hounsfield(tmp_path):
    image = nib.Nifti1Image((body() + 1024).astype(np.int16), np.diag([1, 1, 2, 1.0]))
    image.header.set_slope_inter(1, -1024)
    nib.save(image, tmp_path / "scaled.nii.gz")
    stored = nib.load(tmp_path / "scaled.nii.gz")
    if float(stored.dataobj.inter) == 0:  # nibabel chose its own scaling: write the fields themselves
        nib.save(nib.Nifti1Image((body() + 1024).astype(np.int16), np.diag([1, 1, 2, 1.0])), tmp_path / "scaled.nii")
        patch(tmp_path / "scaled.nii", {112: ("ff", (1.0, -1024.0))})
        assert reason(tmp_path / "scaled.nii") is None
    crop = np.random.default_rng(0).normal(45, 20, (20, 20, 20))
    assert reason(save(tmp_path / "crop.nii.gz", crop.astype(np.int16))) == "not Hounsfield units"
    # fat alone can be as dark
    crop[:4] -= 145
    assert reason(save(tmp_path / "crop.nii.gz", crop.astype(np.int16))) is None
    padded = body()
    padded[0] = -3024
    assert reason(save(tmp_path / "padded.nii.gz", padded)) is None
    assert hounsfield_fault(np.array([np.nan, -1000, 40])) == (
        "non-finite voxels",
        "some voxels are NaN or infinite. Convert it again from DICOM",
    )


def test_metaimage(tmp_path):
    itk = pytest.importorskip("itk")
    image = itk.image_from_array(np.ascontiguousarray(body().transpose(2, 1, 0)))
    image.SetSpacing([1.0, 1.0, 2.0])
    path = tmp_path / "a.mhd"
    itk.imwrite(image, str(path))
    header = read_volume_header(path)
    assert (header.shape, header.spacing, header.num_slices) == ((24, 24, 22), (1.0, 1.0, 2.0), 22)
    assert reason(path) is None
    (tmp_path / "a.raw").unlink()
    assert reason(path) == "unreadable image"


def test_xray_files(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 64), dtype=np.uint8))
    for name in ("a.jpg", "a.png"):
        picture.save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        assert xray_fault(tmp_path / name) is None
        assert xray_fault(tmp_path / name, "full") is None
        cut = tmp_path / f"cut-{name}"
        cut.write_bytes(whole[: len(whole) * 2 // 3])
        for check in ("quick", "full"):
            assert (xray_fault(cut, check) or ("",))[0] == "unreadable image"
        assert xray_fault(cut, "exists") is None
        padded = tmp_path / f"padded-{name}"
        padded.write_bytes(whole + bytes(100))
        assert xray_fault(padded) is None
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert xray_fault(tmp_path / "empty.jpg") == (
        "unreadable image",
        f"{tmp_path / 'empty.jpg'}: the file is empty. Export or download it again",
    )
    (tmp_path / "page.jpg").write_text("<html>please log in</html>")
    assert "is named as a picture but holds text" in (xray_fault(tmp_path / "page.jpg") or ("", ""))[1]
    assert (xray_fault(tmp_path / "none.jpg", "exists") or ("",))[0] == "missing image"
    assert xray_fault(tmp_path / "none.jpg", "none") is None
    with pytest.raises(ConfigError, match="check_images='fast'"):
        xray_fault(tmp_path / "a.jpg", "fast")


@pytest.mark.parametrize("vr", [b"OW\0\0", b""])
def test_truncated_dicom(tmp_path, vr):
    """Native pixels of a known length, with an explicit and an implicit value representation."""
    pixels = bytes(range(200))
    start = b"\0" * 128 + b"DICM"
    for group, number, kind, value in (
        *((2, 16, b"UI", b"1.2.840.10008.1.2\0" if not vr else b"1.2.840.10008.1.2.1\0"),),
        *((0x28, 2, b"US", b"\1\0"), (0x28, 4, b"CS", b"MONOCHROME2 "), (0x28, 0x10, b"US", b"\x14\0")),
        *((0x28, 0x11, b"US", b"\x0a\0"), (0x28, 0x100, b"US", b"\x08\0"), (0x28, 0x101, b"US", b"\x08\0")),
    ):
        size = kind + len(value).to_bytes(2, "little") if vr or group == 2 else len(value).to_bytes(4, "little")
        start += group.to_bytes(2, "little") + number.to_bytes(2, "little") + size + value
    head = start + b"\xe0\x7f\x10\x00" + vr + len(pixels).to_bytes(4, "little")
    (tmp_path / "whole.dcm").write_bytes(head + pixels)
    (tmp_path / "cut.dcm").write_bytes(head + pixels[:-1])
    assert xray_fault(tmp_path / "whole.dcm") is None
    assert "its header says 200 bytes of pixels, the file has 199" in (xray_fault(tmp_path / "cut.dcm") or ("", ""))[1]
    # frames of no fixed length (JPEG) end with a sequence delimiter
    frames = head[:-4] + b"\xff" * 4 + pixels
    (tmp_path / "frames.dcm").write_bytes(frames + b"\xfe\xff\xdd\xe0\0\0\0\0")
    (tmp_path / "short.dcm").write_bytes(frames)
    assert xray_fault(tmp_path / "frames.dcm") is None
    assert "the end of its frames is missing" in (xray_fault(tmp_path / "short.dcm") or ("", ""))[1]
