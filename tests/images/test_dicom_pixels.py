# SPDX-License-Identifier: Apache-2.0
"""Headers and pixels of single DICOM files, against arrays that the files were written from."""

from __future__ import annotations

import contextlib
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from tests.images.single_files import GREY, H, W, compress, write
from unimedi_components.errors import DataError
from unimedi_components.images.dicom import modality_values, read_header, stored_values
from unimedi_components.images.find import sort_files
from unimedi_components.images.headers import is_dicom, starts_as_dicom
from unimedi_components.images.xray import read_xray
from unimedi_components.images.xray_checks import xray_fault


def stored(path: Path) -> np.ndarray:
    return stored_values(read_header(path))


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_plain_and_deflated_pixels(tmp_path: Path, syntax: str) -> None:
    path = write(tmp_path / "IM0001", GREY, syntax, BitsStored=12)
    header = read_header(path)
    assert (header.rows, header.columns, header.frames, header.transfer_syntax) == (H, W, 1, syntax)
    np.testing.assert_array_equal(stored(path), GREY[None])


@pytest.mark.parametrize(
    "kind", ["JPEG2000Lossless", "JPEGLSLossless", "RLELossless", "JPEGLosslessProcess14_1", "JPEGLosslessProcess14"]
)
@pytest.mark.parametrize("signed", [False, True])
def test_lossless_pixels(tmp_path: Path, kind: str, signed: bool) -> None:
    pixels = GREY.astype(np.int16) - 1900 if signed else GREY
    path = compress(write(tmp_path / "a.dcm", pixels, BitsStored=16), kind)
    np.testing.assert_array_equal(stored(path), pixels[None])


def test_jpeg_2000_of_another_sign_than_the_header_says(tmp_path: Path) -> None:
    values = GREY.astype(np.int16) - np.int16(2000)
    path = compress(write(tmp_path / "a.dcm", values), "JPEG2000Lossless")
    np.testing.assert_array_equal(stored_values(read_header(path))[0], values)
    file = pydicom.dcmread(path)
    file.PixelRepresentation = 0
    file.save_as(path)
    # the bits as the header calls them
    np.testing.assert_array_equal(stored_values(read_header(path))[0], values.view(np.uint16))


def test_lossy_pixels(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(H) * 2, np.arange(W)).astype(np.uint8)
    eight = write(tmp_path / "a.dcm", smooth)
    for kind in ("JPEGBaselineProcess1", "JPEGLSNearLossless"):
        assert np.abs(stored(compress(eight, kind))[0].astype(int) - smooth).max() <= 3
    # 12 bits, which only GDCM's own reader decodes
    twelve = write(tmp_path / "b.dcm", smooth.astype(np.uint16) * 16, BitsStored=12)
    found = stored(compress(twelve, "JPEGExtendedProcess2_4"))[0].astype(int)
    assert np.abs(found - smooth.astype(int) * 16).max() <= 48


def rle(path: Path, pixels: np.ndarray, frames: list[list[bytes]]) -> Path:
    """A file of these pixels, written as segments in RLE."""
    write(path, pixels, **({"NumberOfFrames": len(pixels)} if pixels.ndim == 3 else {}))
    file, coded = pydicom.dcmread(path), []
    for segments in frames:
        ends = np.cumsum([64, *map(len, segments)])
        starts = np.r_[len(segments), ends[:-1], np.zeros(16 - len(ends))].astype("<u4")
        coded.append(starts.tobytes() + b"".join(segments) + b"\0" * (int(ends[-1]) % 2))
    file.PixelData, file.file_meta.TransferSyntaxUID = encapsulate(coded), RLELossless
    file["PixelData"].is_undefined_length = True
    file.save_as(path)
    return path


def test_run_lengths(tmp_path: Path) -> None:
    # three sevens, 1 2 3, nothing, and nines from the second row into the third
    line = bytes([254, 7, 2, 1, 2, 3, 128, 248, 9])
    pixels = np.array([7, 7, 7, 1, 2, 3, *[9] * 9], np.uint8).reshape(3, 5)
    zeros, ones = bytes([242, 0]), bytes([242, 1])
    np.testing.assert_array_equal(stored(rle(tmp_path / "a.dcm", pixels, [[line]])), pixels[None])
    wide = np.stack([pixels.astype(np.uint32) + 2**24, pixels.astype(np.uint32) * 2**16])
    found = stored(rle(tmp_path / "b.dcm", wide, [[ones, zeros, zeros, line], [zeros, line, zeros, zeros]]))
    np.testing.assert_array_equal(found, wide)
    for planes, frames in ((pixels, [[line[:-2]]]), (np.stack([pixels] * 2), [[line]]), (pixels, [[line, line]])):
        path = rle(tmp_path / "c.dcm", planes, frames)
        with pytest.raises(DataError, match="the pixels cannot be decoded"):
            stored(path)


@pytest.mark.parametrize("drop", ["preamble", "preamble and meta", "meta"])
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_files_without_their_beginning(tmp_path: Path, drop: str, syntax: str) -> None:
    whole = write(tmp_path / "a.dcm", GREY, syntax, BitsStored=12).read_bytes()
    length = struct.unpack("<I", whole[140:144])[0]
    meta = whole[132 : 144 + length]
    body = whole[144 + length :]
    path = tmp_path / "film.dcm"
    path.write_bytes({"preamble": meta, "preamble and meta": b"", "meta": whole[:132]}[drop] + body)
    assert is_dicom(path)
    np.testing.assert_array_equal(stored(path), GREY[None])


def test_what_is_no_dicom(tmp_path: Path) -> None:
    for head in (
        b"",
        b"\x89PNG\r\n\x1a\n" + bytes(200),
        b"BM" + bytes(300),
        b"II*\0\x08\0\0\0",
        bytes(400),
        b"id,image\n",
    ):
        assert not starts_as_dicom(head)
    (tmp_path / "a.dcm").write_text("<html>please log in</html>" * 20)
    with pytest.raises(DataError, match=r"a\.dcm: is not a DICOM file"):
        read_header(tmp_path / "a.dcm")
    (tmp_path / "b.dcm").touch()
    with pytest.raises(DataError, match=r"b\.dcm: the file is empty"):
        read_header(tmp_path / "b.dcm")
    with pytest.raises(DataError, match=r"none\.dcm: no such file"):
        read_header(tmp_path / "none.dcm")


@pytest.mark.parametrize("cut", [30, 200])
def test_cut_off_files(tmp_path: Path, cut: int) -> None:
    noise = np.random.default_rng(0).integers(0, 4096, (H, W)).astype(np.uint16)
    plain = write(tmp_path / "a.dcm", noise, BitsStored=12)
    deflated = write(tmp_path / "b.dcm", noise, DeflatedExplicitVRLittleEndian, BitsStored=12)
    for path in (plain, deflated, compress(plain, "JPEG2000Lossless")):
        path.write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(DataError, match="cut off"):
            stored(path)


def test_damaged_codestream_is_one_error(tmp_path: Path) -> None:
    path = compress(write(tmp_path / "a.dcm", GREY, BitsStored=12), "JPEGLosslessProcess14_1")
    raw = bytearray(path.read_bytes())
    start = raw.find(b"\xff\xc3")
    raw[start : start + 20] = bytes(20)
    path.write_bytes(raw)
    with pytest.raises(DataError, match="the pixels cannot be decoded"):
        stored(path)


def test_what_would_end_the_process_is_one_error(tmp_path: Path) -> None:
    colours = np.stack([(GREY >> 4).astype(np.uint8)] * 3, -1)
    tags = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": "RGB", "BitsStored": 8}
    # a transform of colours that Adobe's segment cannot name, which GDCM takes for its own fault
    path = compress(write(tmp_path / "a.dcm", colours, **tags), "JPEGLosslessProcess14_1")
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"Adobe") + 11] = 0x5B
    path.write_bytes(raw)
    with pytest.raises(DataError, match="the codestream is damaged"):
        stored(path)
    # colours of which the header does not say what they are
    path = compress(write(tmp_path / "b.dcm", colours, **tags), "JPEG2000Lossless")
    file = pydicom.dcmread(path)
    del file.PhotometricInterpretation
    file.save_as(path)
    np.testing.assert_array_equal(stored(path)[0], colours)


def test_bits_in_use(tmp_path: Path) -> None:
    shifted = (GREY << 4) | 0xA  # left-justified, with rubbish below
    np.testing.assert_array_equal(stored(write(tmp_path / "a.dcm", shifted, BitsStored=12, HighBit=15)), GREY[None])
    overlaid = GREY | np.uint16(0x8000) * (np.arange(W) % 3 == 0).astype(np.uint16)
    path = write(tmp_path / "b.dcm", overlaid, BitsStored=12)
    np.testing.assert_array_equal(stored(path), GREY[None])
    np.testing.assert_array_equal(stored(compress(path, "RLELossless")), GREY[None])
    # 12 signed bits without their sign in the upper four
    signed = GREY.astype(np.int16) - 2000
    bare = (signed.view(np.uint16) & 0x0FFF).view(np.int16)
    np.testing.assert_array_equal(stored(write(tmp_path / "c.dcm", bare, BitsStored=12)), signed[None])


@pytest.mark.parametrize("planar", [0, 1])
def test_colours(tmp_path: Path, planar: int) -> None:
    rgb = np.stack([GREY % 256, GREY % 200, GREY % 100], -1).astype(np.uint8)
    laid = rgb.transpose(2, 0, 1) if planar else rgb
    tags = {"SamplesPerPixel": 3, "PlanarConfiguration": planar, "Rows": H, "Columns": W}
    path = write(tmp_path / "a.dcm", laid, PhotometricInterpretation="RGB", **tags)
    np.testing.assert_array_equal(stored(path), rgb[None])
    np.testing.assert_array_equal(modality_values(read_header(path)).values, (rgb / np.float32(255))[None])


def test_palette(tmp_path: Path) -> None:
    indices = (GREY % 4).astype(np.uint8)
    entries = np.array([10, 80, 160, 250], np.uint16)
    tags: dict[str, Any] = {}
    for colour in ("Red", "Green", "Blue"):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [4, 0, 16]
        tags[f"{colour}PaletteColorLookupTableData"] = (entries << 8).astype("<u2").tobytes()
    path = write(tmp_path / "a.dcm", indices, PhotometricInterpretation="PALETTE COLOR", **tags)
    np.testing.assert_array_equal(
        modality_values(read_header(path)).values[0, ..., 1], entries[indices] / np.float32(255)
    )


def test_modality_transform(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", GREY, RescaleSlope="0.5", RescaleIntercept="-1024")
    np.testing.assert_array_equal(
        modality_values(read_header(path)).values, (GREY * 0.5 - 1024).astype(np.float32)[None]
    )
    for bits, table in ((12, np.arange(4096)[::-1]), (16, np.arange(4096) * 15)):
        item = Dataset()
        item.add_new("LUTDescriptor", "US", [4096, 0, bits])
        item.ModalityLUTType = "US"
        item.add_new("LUTData", "OW", table.astype("<u2").tobytes())
        path = write(tmp_path / f"{bits}.dcm", GREY, BitsStored=12, ModalityLUTSequence=Sequence([item]))
        found = modality_values(read_header(path))
        np.testing.assert_array_equal(found.values[0], table[GREY])
        assert found.notes == ("Modality LUT",)
    short = Dataset()
    short.add_new("LUTDescriptor", "US", [4096, 0, 16])
    short.add_new("LUTData", "OW", b"\0" * 100)
    path = write(tmp_path / "c.dcm", GREY, ModalityLUTSequence=Sequence([short]))
    with pytest.raises(DataError, match=r"c\.dcm: its ModalityLUTSequence has"):
        modality_values(read_header(path))


def test_each_frame_has_its_own_rescale(tmp_path: Path) -> None:
    groups = []
    for slope, intercept in (("1", "-1024"), ("2", "0")):
        transform, group = Dataset(), Dataset()
        transform.RescaleSlope, transform.RescaleIntercept, transform.RescaleType = slope, intercept, "HU"
        group.PixelValueTransformationSequence = Sequence([transform])
        groups.append(group)
    frames = np.stack([GREY, GREY[::-1]])
    path = write(tmp_path / "a.dcm", frames, NumberOfFrames=2, PerFrameFunctionalGroupsSequence=Sequence(groups))
    found = modality_values(read_header(path)).values
    np.testing.assert_array_equal(found[0], GREY.astype(np.float32) - 1024)
    np.testing.assert_array_equal(found[1], GREY[::-1] * np.float32(2))


def test_padding(tmp_path: Path) -> None:
    pixels = GREY.copy()
    pixels[:5] = 63536
    path = write(tmp_path / "a.dcm", pixels, PixelPaddingValue=63536)
    padding = modality_values(read_header(path)).padding
    assert padding is not None and padding[0, :5].all() and not padding[0, 5:].any()
    # a signed tag of unsigned pixels: the same 16 bits
    file = pydicom.dcmread(path)
    file.add_new("PixelPaddingValue", "SS", -2000)
    file.save_as(path)
    padding = modality_values(read_header(path)).padding
    assert padding is not None and padding.sum() == 5 * W
    ranged = write(tmp_path / "b.dcm", pixels, PixelPaddingValue=65535, PixelPaddingRangeLimit=60000)
    padding = modality_values(read_header(ranged)).padding
    assert padding is not None and padding.sum() == 5 * W
    assert modality_values(read_header(write(tmp_path / "c.dcm", GREY, PixelPaddingValue=5000))).padding is None


def test_text_of_any_encoding(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", GREY, SeriesDescription="x" * 10, BodyPartExamined="TxTE")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"x" * 10, "Crâne à dr".encode("latin-1")).replace(b"TxTE", b"T\xcaTE"))
    header = read_header(path)
    assert header.text("SeriesDescription") == "Crâne à dr" and header.text("BodyPartExamined") == "TÊTE"
    named = write(tmp_path / "b.dcm", GREY, SpecificCharacterSet="ISO_IR 100", SeriesDescription="à")
    assert read_header(named).text("SeriesDescription") == "à"
    # code strings, which no set is meant for, in the file's own all the same; Latin-1 where they are not of it
    for charset, value, wanted in (
        ("ISO_IR 144", "ГРУДЬ".encode("iso8859_5"), "ГРУДЬ"),
        ("ISO_IR 192", "TÓRAX".encode(), "TÓRAX"),
        ("ISO_IR 192", b"T\xd3RAX\\A ", "TÓRAX\\A"),
        ("\\ISO 2022 IR 87", b"\x1b$B6;It\x1b(B", "胸部"),
    ):
        path = write(
            tmp_path / "d.dcm", GREY, SpecificCharacterSet=charset.split("\\"), BodyPartExamined="x" * len(value)
        )
        path.write_bytes(path.read_bytes().replace(b"x" * len(value), value))
        assert [read_header(path).text("BodyPartExamined") for _ in range(2)] == [wanted] * 2
    # said to be UTF-8, and is not; an unknown set; a control character
    for charset, value, wanted in (
        ("ISO_IR 192", b"T\xcaTE AB", "T\ufffdTE AB"),
        ("NO SUCH SET 1", b"ABCDEFGH", "ABCDEFGH"),
        ("ISO_IR 192", b"AB\x07DEFGH", "AB\ufffdDEFGH"),
    ):
        path = write(tmp_path / "c.dcm", GREY, SpecificCharacterSet="ISO_IR 192", SeriesDescription="x" * len(value))
        raw = path.read_bytes().replace(b"x" * len(value), value)
        path.write_bytes(raw.replace(b"\x0a\0ISO_IR 192", struct.pack("<H", len(charset) + len(charset) % 2)
                                     + charset.encode() + b" " * (len(charset) % 2)))  # fmt: skip
        assert read_header(path).text("SeriesDescription") == wanted


def test_values_that_are_not_to_the_letter(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.dcm", GREY, ImagePositionPatient=["1", "2", "3"], RescaleSlope="2.00", RescaleIntercept="0"
    )
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"1\\2\\3 ", b"1\\b\\3 "))
    assert read_header(path).position is None
    path.write_bytes(raw.replace(b"2.00", b"two."))
    with pytest.raises(DataError, match=r"a\.dcm: its RescaleSlope is no number"):
        modality_values(read_header(path))
    path.write_bytes(raw.replace(b"2.00", b"    "))
    np.testing.assert_array_equal(modality_values(read_header(path)).values[0], GREY)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"TransferSyntaxUID": "1.2.3.4"}, "is coded in transfer syntax 1.2.3.4, which is not read here"),
     ({"TransferSyntaxUID": "1.2.840.10008.1.2.4.201"}, "is coded in transfer syntax 1.2.840.10008.1.2.4.201"),
     ({"PhotometricInterpretation": None}, "its PhotometricInterpretation is missing, so what is black is unknown"),
     ({"PhotometricInterpretation": "GREY"}, "its PhotometricInterpretation is GREY, so what is black is unknown"),
     ({"PhotometricInterpretation": "PALETTE COLOR"}, "its palette is missing"),
     ({"BitsAllocated": 12}, "has 1 value(s) of 12 bits a pixel"),
     ({"SamplesPerPixel": 4}, "has 4 value(s) of 16 bits a pixel"),
     ({"RescaleSlope": b"abc"}, "its RescaleSlope is no number")],
)  # fmt: skip
def test_headers_that_cannot_be_read_have_one_verdict(tmp_path: Path, changes: Any, reason: str) -> None:
    path = write(tmp_path / "a.dcm", GREY, BitsStored=12)
    file = pydicom.dcmread(path)
    for name, value in changes.items():
        if name == "TransferSyntaxUID":
            file.file_meta.TransferSyntaxUID = value
            file.PixelData = pydicom.encaps.encapsulate([file.PixelData]) if "840" in value else file.PixelData
        elif value is None:
            delattr(file, name)
        elif isinstance(value, bytes):
            tag = pydicom.tag.Tag(name)
            file[tag] = pydicom.dataelem.RawDataElement(tag, "DS", len(value), value, 0, False, True)
        else:
            setattr(file, name, value)
    file.save_as(path, implicit_vr=False, little_endian=True)
    quick, full, found = xray_fault(path, "quick"), xray_fault(path, "full"), sort_files([path])[1]
    assert quick == full and quick is not None and quick[1].startswith(f"{path}: {reason}"), quick
    assert found[0].reason == quick[1].removeprefix(f"{path}: ")
    with pytest.raises(DataError, match=re.escape(quick[1])):
        read_xray(path)


@pytest.mark.parametrize("name", ["PhotometricInterpretation", "PixelRepresentation", "BitsStored", "SamplesPerPixel"])
def test_slices_of_incomplete_headers_are_read(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.dcm", GREY, Modality="CT")
    file = pydicom.dcmread(path)
    delattr(file, name)
    file.save_as(path)
    assert np.array_equal(stored_values(read_header(path))[0], GREY)


def test_a_mark_without_its_preamble(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", GREY, BitsStored=12)
    whole = path.read_bytes()
    path.write_bytes(whole[128:])
    header = read_header(path)
    assert header.pixel_offset == whole[128:].index(GREY.astype("<u2").tobytes())
    assert np.array_equal(stored_values(header)[0], GREY) and xray_fault(path) is None
    path.write_bytes(whole[128:-200])
    assert "cut off" in xray_fault(path)[1]


# keyword, VR, bytes as stored, text and numbers
ELEMENTS: list[tuple[str, str, bytes, str, tuple[float, ...] | None]] = [
    ("SliceThickness", "DS", b" 1.50 ", "1.50", (1.5,)),
    ("SliceThickness", "DS", b"-1.5E-3\0", "-1.5E-3", (-0.0015,)),
    ("SliceThickness", "DS", b"1,5 ", "1,5", None),
    ("SliceThickness", "DS", b"", "", None),
    ("SliceThickness", "DS", b"inf ", "inf", None),
    ("SliceThickness", "LO", b"2.5 ", "2.5", (2.5,)),
    ("PixelSpacing", "DS", b"0.70\\ .7 ", "0.70\\.7", (0.7, 0.7)),
    ("InstanceNumber", "IS", b"012 ", "012", (12.0,)),
    ("InstanceNumber", "IS", b"3.0 ", "3.0", (3.0,)),
    ("InstanceNumber", "IS", b"1\\2 ", "1\\2", (1.0, 2.0)),
    ("Rows", "US", b"\x00\x02", "512", (512.0,)),
    ("Rows", "US", b"\x00\x02\x01\x00", "512\\1", (512.0, 1.0)),
    ("Rows", "SS", b"\xff\xff", "-1", (-1.0,)),
    ("TriggerTime", "FD", struct.pack("<d", 0.25), "0.25", (0.25,)),
    ("ImageType", "CS", b"ORIGINAL\\PRIMARY ", "ORIGINAL\\PRIMARY", None),
    ("ImageType", "CS", b"A \\B ", "A \\B", None),
    ("StudyInstanceUID", "UI", b"1.2.3\0", "1.2.3", None),
    ("ContentTime", "TM", b"120001.50 ", "120001.50", (120001.5,)),
    ("SeriesDescription", "LO", b"  Thorax 5 ", "Thorax 5", None),
    ("SeriesDescription", "LO", "Größe".encode("latin-1"), "Größe", None),
    ("SeriesDescription", "LO", b"a\x1b\x01b", "a\ufffd\ufffdb", None),
]


@pytest.mark.parametrize(("keyword", "vr", "value", "text", "numbers"), ELEMENTS)
@pytest.mark.parametrize("converted", [False, True])
def test_elements_as_they_are_stored(
    tmp_path: Path, keyword: str, vr: str, value: bytes, text: str, numbers: tuple[float, ...] | None, converted: bool
) -> None:
    dataset = pydicom.dcmread(write(tmp_path / "a.dcm", GREY))
    dataset.SpecificCharacterSet = "ISO_IR 100"
    tag = pydicom.tag.Tag(keyword)
    dataset[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)
    dataset.save_as(tmp_path / "b.dcm")
    header = read_header(tmp_path / "b.dcm")
    if converted:
        with contextlib.suppress(ValueError):
            header.dataset[tag]
    assert (header.text(keyword), header.numbers(keyword)) == (text, numbers)
