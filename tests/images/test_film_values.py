# SPDX-License-Identifier: Apache-2.0
"""What films become: greys in [0, 1] against the arrays that the files were written from."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from tests.images.single_files import write
from unimedi_components.data.xray_loading import LoadXrayd
from unimedi_components.errors import DataError
from unimedi_components.images.xray import read_xray
from unimedi_components.images.xray_checks import xray_fault

H, W = 72, 64


def film(top: float = 3890.0, bottom: float = 205.0) -> np.ndarray:
    """uint16 (72, 64): a smooth film between two values."""
    rows, columns = np.mgrid[:H, :W]
    smooth = 0.5 + 0.5 * np.sin(rows / 9.0) * np.cos(columns / 7.0)
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    return np.round(bottom + (top - bottom) * smooth).astype(np.uint16)


def greys(path: Path) -> np.ndarray:
    values, notes = read_xray(path)
    assert values.dtype == np.float32 and notes and values.min() >= 0 and values.max() <= 1
    return values


def test_window_functions(tmp_path: Path) -> None:
    values = film().astype(np.float64)
    centre, width = 2000.0, 3000.0
    wanted = {
        "LINEAR": np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1),
        "LINEAR_EXACT": np.clip((values - centre) / width + 0.5, 0, 1),
        "SIGMOID": 1 / (1 + np.exp(-4 * (values - centre) / width)),
    }
    for name, right in wanted.items():
        tags = {"WindowCenter": ["2000", "900"], "WindowWidth": ["3000", "40"], "VOILUTFunction": name}
        path = write(tmp_path / f"{name}.dcm", film(), BitsStored=12, **tags)
        np.testing.assert_allclose(greys(path), right, atol=1e-6)
        assert read_xray(path)[1] == [f"window 2000 / 3000 ({name})"]
    # of rescaled values
    tags = {"WindowCenter": "0", "WindowWidth": "2000", "RescaleSlope": "0.5", "RescaleIntercept": "-1000"}
    path = write(tmp_path / "b.dcm", film(), BitsStored=12, **tags)
    np.testing.assert_allclose(greys(path), np.clip((values / 2 - 1000 + 0.5) / 1999 + 0.5, 0, 1), atol=1e-6)


@pytest.mark.parametrize(("centre", "width"), [("50000", "10"), ("2000", "0"), ("2000", "-5"), ("", "")])
def test_windows_that_do_not_fit_are_not_used(tmp_path: Path, centre: str, width: str) -> None:
    path = write(tmp_path / "a.dcm", film(), BitsStored=12, WindowCenter=centre, WindowWidth=width)
    np.testing.assert_allclose(greys(path), film() / 3890, atol=1e-6)


def test_voi_lut_comes_before_a_window(tmp_path: Path) -> None:
    table = (1023 * np.sqrt(np.arange(4096) / 4095)).astype(np.uint16)
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4096, 0, 10])
    item.add_new("LUTData", "OW", table.astype("<u2").tobytes())
    tags = {"VOILUTSequence": Sequence([item]), "WindowCenter": "1", "WindowWidth": "2"}
    path = write(tmp_path / "a.dcm", film(), BitsStored=12, **tags)
    np.testing.assert_allclose(greys(path), table[film()] / 1023, atol=1e-6)
    assert read_xray(path)[1] == ["VOI LUT"]


@pytest.mark.parametrize("window", [{}, {"WindowCenter": "2048", "WindowWidth": "4096"}])
def test_a_mark_does_not_set_white(tmp_path: Path, window: dict[str, Any]) -> None:
    plain = greys(write(tmp_path / "a.dcm", film(), **window))
    marked = film()
    marked[4:8, 4:10] = 65535
    found = greys(write(tmp_path / "b.dcm", marked, **window))
    assert (found[4:8, 4:10] == 1).all()
    outside = marked != 65535
    np.testing.assert_allclose(found[outside], plain[outside], atol=1e-6)


@pytest.mark.parametrize("bits", [12, 16])
def test_a_border_does_not_set_white(tmp_path: Path, bits: int) -> None:
    plain = greys(write(tmp_path / "a.dcm", film(3000), BitsStored=bits))
    bordered = film(3000)
    border = np.ones((H, W), bool)
    border[6:-6, 6:-6] = False
    bordered[border] = 2**bits - 1
    found = greys(write(tmp_path / "b.dcm", bordered, BitsStored=bits))
    np.testing.assert_allclose(found[~border], plain[~border], atol=0.01)
    # of a film whose least value is white
    dark = film(3000, 900)
    plain = greys(write(tmp_path / "c.dcm", dark, BitsStored=bits, PhotometricInterpretation="MONOCHROME1"))
    dark[border] = 0
    found = greys(write(tmp_path / "d.dcm", dark, BitsStored=bits, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_allclose(found[~border], plain[~border], atol=0.01)


def test_padding_is_black_and_does_not_count(tmp_path: Path) -> None:
    padded = film()
    padded[:, :20] = 63536
    for photometric in ("MONOCHROME2", "MONOCHROME1"):
        tags = {"PixelPaddingValue": 63536, "PhotometricInterpretation": photometric}
        found = greys(write(tmp_path / "a.dcm", padded, **tags))
        right = film()[:, 20:] / film()[:, 20:].max()
        assert (found[:, :20] == 0).all()
        np.testing.assert_allclose(found[:, 20:], right if photometric[-1] == "2" else 1 - right, atol=1e-6)


def test_values_far_from_zero_use_the_whole_range(tmp_path: Path) -> None:
    found = greys(write(tmp_path / "a.dcm", film(3000, 1000)))
    np.testing.assert_allclose(found, (film(3000, 1000) - 1000.0) / 2000, atol=1e-6)
    signed = film(3000, 1000).astype(np.int16) - 2000
    np.testing.assert_allclose(greys(write(tmp_path / "b.dcm", signed)), found, atol=1e-6)


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted"),
    [
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", "IDENTITY", True),
        ("MONOCHROME1", "INVERSE", True),
    ],
)
def test_inversion_is_done_once(tmp_path: Path, photometric: str, shape: str, inverted: bool) -> None:
    tags = {"PhotometricInterpretation": photometric, "PresentationLUTShape": shape}
    found = greys(write(tmp_path / "a.dcm", film(), BitsStored=12, WindowCenter="2048", WindowWidth="4096", **tags))
    np.testing.assert_allclose(found, 1 - film() / 4095 if inverted else film() / 4095, atol=1e-6)


def test_eight_bits_are_shares_of_255(tmp_path: Path) -> None:
    eight = (film() // 16).astype(np.uint8)
    for name, tags in (("a", {}), ("b", {"PhotometricInterpretation": "MONOCHROME1"})):
        found = greys(write(tmp_path / f"{name}.dcm", eight, **tags))
        np.testing.assert_allclose(found, 1 - eight / 255 if tags else eight / 255, atol=1e-7)
    # eight bits in sixteen, likewise
    np.testing.assert_allclose(greys(write(tmp_path / "c.dcm", eight.astype(np.uint16), BitsStored=8)), eight / 255)
    Image.fromarray(eight).save(tmp_path / "d.png")
    np.testing.assert_array_equal(greys(tmp_path / "d.png"), eight.astype(np.float32) / 255)


def png16(path: Path, channels: list[np.ndarray]) -> Path:
    """A 16-bit PNG of grey with alpha, RGB or RGBA; Pillow writes none of them."""
    kind = {2: 4, 3: 2, 4: 6}[len(channels)]
    height, width = channels[0].shape
    rows = np.stack(channels, -1).astype(">u2").reshape(height, -1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


def tiff(
    path: Path, channels: list[np.ndarray], photometric: int, orientation: int = 1, planar: int = 1, order: str = "<"
) -> Path:
    """A TIFF of one strip, 16 bits a sample."""
    height, width = channels[0].shape
    data = np.stack(channels, -1 if planar == 1 else 0).astype(f"{order}u2").tobytes()
    count = len(channels)
    bits = (258, 3, count, 16 if count == 1 else 200)
    tags = [(256, 3, 1, width), (257, 3, 1, height), bits, (259, 3, 1, 1), (262, 3, 1, photometric), (273, 4, 1, 256)]
    tags += [(274, 3, 1, orientation), (277, 3, 1, count), (278, 3, 1, height), (279, 4, 1, len(data))]
    tags += [(284, 3, 1, planar)]
    head = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags))
    for number, kind, many, value in tags:
        form = "HH" if kind == 3 and many == 1 else "I"
        head += struct.pack(f"{order}HHI{form}", number, kind, many, *((value, 0) if form == "HH" else (value,)))
    path.write_bytes(head.ljust(200, b"\0") + struct.pack(f"{order}4H", 16, 16, 16, 16) + bytes(48) + data)
    return path


def test_sixteen_bit_pictures(tmp_path: Path) -> None:
    twelve, deep = film(), (film() * 16.0).astype(np.uint16)
    opaque, right = np.full((H, W), 65535, np.uint16), film() / 3890
    Image.fromarray(twelve).save(tmp_path / "grey.png")
    np.testing.assert_allclose(greys(tmp_path / "grey.png"), right, atol=1e-6)
    files = (
        png16(tmp_path / "la.png", [twelve, opaque]),
        png16(tmp_path / "rgb.png", [twelve] * 3),
        png16(tmp_path / "rgba.png", [*[twelve] * 3, opaque]),
        tiff(tmp_path / "rgb.tif", [twelve] * 3, 2),
        tiff(tmp_path / "grey.tif", [twelve], 1),
    )
    for path in files:
        np.testing.assert_allclose(greys(path), right, atol=1e-6, err_msg=path.name)
    # all 16 bits in use
    for path in (png16(tmp_path / "a.png", [deep] * 3), tiff(tmp_path / "a.tif", [deep] * 3, 2)):
        np.testing.assert_allclose(greys(path), deep / 65535, atol=1e-6)
    marked = twelve.copy()
    marked[4:8, 4:10] = 65535
    for path in (png16(tmp_path / "b.png", [marked] * 3), tiff(tmp_path / "b.tif", [marked], 1)):
        np.testing.assert_allclose(greys(path)[marked < 65535], right[marked < 65535], atol=1e-6)


def test_tiff_whose_least_value_is_white(tmp_path: Path) -> None:
    deep = (film() * 16.0).astype(np.uint16)
    path = tiff(tmp_path / "a.tif", [65535 - deep], 0)
    np.testing.assert_allclose(greys(path), deep / deep.max(), atol=1e-6)
    np.testing.assert_array_equal(greys(tiff(tmp_path / "be.tif", [65535 - deep], 0, order=">")), greys(path))
    assert read_xray(path)[1][0] == "inverted (MinIsWhite)"
    # 12 of the 16 bits
    path = tiff(tmp_path / "b.tif", [65535 - film()], 0)
    np.testing.assert_allclose(greys(path), film() / 3890, atol=1e-6)


def test_deep_colours_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
    path = png16(tmp_path / "a.png", [film()] * 3)
    raw = path.read_bytes()
    path.write_bytes(raw[:33] + chunk + raw[33:])
    np.testing.assert_allclose(greys(path), np.rot90(film(), -1) / 3890, atol=1e-6)
    with pytest.raises(DataError, match="16-bit colours that are to be turned"):
        read_xray(tiff(tmp_path / "a.tif", [film()] * 3, 2, orientation=6))
    with pytest.raises(DataError, match="16-bit colours in planes of their own"):
        read_xray(tiff(tmp_path / "b.tif", [film()] * 3, 2, planar=2))


def test_one_verdict_for_what_is_no_film(tmp_path: Path) -> None:
    tinted = np.stack([film() // 16, film() // 40, film() // 90], -1).astype(np.uint8)
    Image.fromarray(tinted).save(tmp_path / "tinted.png")
    Image.fromarray(tinted).save(tmp_path / "tinted.jpg")
    pages = [Image.fromarray(film()) for _ in range(3)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    Image.fromarray(np.full((H, W), 7, np.uint8)).save(tmp_path / "flat.png")
    Image.fromarray(tinted[..., 0]).save(tmp_path / "film.gif")
    ct = {"Modality": "CT", "RescaleSlope": "1", "RescaleIntercept": "-1024"}
    place = {"ImagePositionPatient": [0, 0, 0], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [1, 1]}
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    write(tmp_path / "slice.dcm", film(), **ct, **place)
    write(tmp_path / "scout.dcm", film(), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], **ct)
    write(tmp_path / "loop.dcm", np.stack([film()] * 3), NumberOfFrames=3)
    write(tmp_path / "mr.dcm", film(), Modality="MR")
    write(tmp_path / "tinted.dcm", tinted, **colour)
    write(tmp_path / "flat.dcm", np.full((H, W), 900, np.uint16))
    faults = {
        "tinted.png": "is a colour picture, not a radiograph",
        "tinted.jpg": "is a colour picture, not a radiograph",
        "pages.tif": "holds 3 pages or frames",
        "flat.png": "all pixels have the value 7",
        "film.gif": "holds a GIF picture, which is not read here",
        "slice.dcm": "is one CT slice",
        "scout.dcm": "is a scout view",
        "loop.dcm": "holds 3 frames",
        "mr.dcm": "is DICOM of modality MR (magnetic resonance)",
        "tinted.dcm": "is a colour picture, not a radiograph",
        "flat.dcm": "all pixels have the value 900",
    }
    for name, text in faults.items():
        reason, detail = xray_fault(tmp_path / name, "full") or ("", "")
        assert text in detail and detail.startswith(str(tmp_path / name)), (name, detail)
        assert reason == ("one CT slice" if name == "slice.dcm" else reason)
        with pytest.raises(DataError) as info:
            read_xray(tmp_path / name)
        assert text in str(info.value)
    # told by the header alone
    for name in ("slice.dcm", "scout.dcm", "loop.dcm", "mr.dcm", "pages.tif", "film.gif"):
        assert xray_fault(tmp_path / name) is not None
    for name in ("flat.png", "tinted.png"):
        assert xray_fault(tmp_path / name) is None


def test_items_carry_what_was_done(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", film(), BitsStored=12, WindowCenter="2048", WindowWidth="4096")
    item = LoadXrayd("image")({"image": str(path), "id": "a"})
    assert item["image"].shape == (1, H, W) and item["id"] == "a"
    assert item["film_values"] == item["image"].meta["film_values"] == "window 2048 / 4096 (LINEAR)"
    assert item["image"].meta["filename_or_obj"] == str(path)
    with pytest.raises(DataError, match="must name one file, got 2"):
        LoadXrayd("image")({"image": [str(path), str(path)]})


#: 12 bits.
FILM = film()


@pytest.mark.parametrize(
    ("centre", "width"),
    [("50000\\2000", "10\\3000"), ("\\2000", "10\\3000"), ("abc\\2000", "10\\3000"), ("2000\\2000", "0\\3000"),
     ("9\\9\\2000", "-1\\x\\3000")],
)  # fmt: skip
def test_a_later_window_stands_for_one_that_cannot_be_used(tmp_path: Path, centre: str, width: str) -> None:
    path = write(tmp_path / "a.dcm", FILM, BitsStored=12)
    file = pydicom.dcmread(path)
    for name, text in (("WindowCenter", centre), ("WindowWidth", width)):
        tag = pydicom.tag.Tag(name)
        file[tag] = pydicom.dataelem.RawDataElement(tag, "DS", len(text), text.encode(), 0, False, True)
    file.save_as(path)
    greys, notes = read_xray(path)
    expected = (FILM.astype(float) - 1999.5) / 2999 + 0.5
    assert np.allclose(greys, expected.clip(0, 1), atol=1e-6)
    assert notes[-1] == "window 2000 / 3000 (LINEAR)" and all(note.endswith("not used") for note in notes[:-1])


@pytest.mark.parametrize("second", [True, False])
def test_a_damaged_voi_lut_is_passed_over(tmp_path: Path, second: bool) -> None:
    def table(count: int, entries: int, bits: int = 12) -> Dataset:
        item = Dataset()
        item.add_new("LUTDescriptor", "US", [count, 0, bits])
        item.add_new("LUTData", "US", list(range(entries)))
        return item

    items = [table(4096, 100), table(4096, 4096, 0), *([table(4096, 4096)] if second else [])]
    path = write(tmp_path / "a.dcm", FILM, BitsStored=12, VOILUTSequence=items)
    greys, notes = read_xray(path)
    plain = read_xray(write(tmp_path / "b.dcm", FILM, BitsStored=12))[0]
    assert np.allclose(greys, FILM / 4095 if second else plain, atol=1e-6)
    assert notes[:2] == ["the file's VOI LUT cannot be read, not used"] * 2
    assert notes[2] == "VOI LUT" if second else "robust ends" in notes[2]
    assert xray_fault(path, "quick") is None and xray_fault(path, "full") is None
