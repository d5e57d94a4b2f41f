# SPDX-License-Identifier: Apache-2.0
"""Write one grey image as a DICOM file whose bytes depend on nothing but its content.

ITK's writer adds the date and time of writing, so the few lines that the format needs are here: explicit
VR, little endian, uncompressed (PS3.5, sections 7.1 and 8; PS3.10, section 7.1).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

__all__ = ["Tag", "write_dicom"]

Tag = tuple[int, int]

_EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
_WRITER = "2.25.305411318937826216457281059428163205714"
_SOP_CLASS, _SOP_INSTANCE = (0x0008, 0x0016), (0x0008, 0x0018)


def write_dicom(path: Path, pixels: np.ndarray, photometric: str, tags: Mapping[Tag, tuple[str, str]]) -> None:
    """Write a DICOM file.

    Args:
        pixels: (H, W) uint8 or uint16, stored as they are.
        photometric: ``MONOCHROME2`` (0 is black) or ``MONOCHROME1`` (0 is white).
        tags: (group, element) -> (value representation, text), SOP class and instance among them; sizes,
            bits and pixels are added.
    """
    bits = 8 * pixels.dtype.itemsize
    numbers = {0x0002: 1, 0x0010: pixels.shape[0], 0x0011: pixels.shape[1]}
    numbers |= {0x0100: bits, 0x0101: bits, 0x0102: bits - 1, 0x0103: 0}
    elements = {tag: _element(tag, vr, text.encode("ascii")) for tag, (vr, text) in tags.items()}
    elements |= {(0x0028, number): _us((0x0028, number), value) for number, value in numbers.items()}
    elements[0x0028, 0x0004] = _element((0x0028, 0x0004), "CS", photometric.encode("ascii"))
    little = pixels.astype(pixels.dtype.newbyteorder("<"))
    elements[0x7FE0, 0x0010] = _element((0x7FE0, 0x0010), "OB" if bits == 8 else "OW", little.tobytes())
    meta = b"".join(
        (
            _element((0x0002, 0x0001), "OB", b"\0\1"),
            _element((0x0002, 0x0002), "UI", tags[_SOP_CLASS][1].encode("ascii")),
            _element((0x0002, 0x0003), "UI", tags[_SOP_INSTANCE][1].encode("ascii")),
            _element((0x0002, 0x0010), "UI", _EXPLICIT_LITTLE_ENDIAN.encode("ascii")),
            _element((0x0002, 0x0012), "UI", _WRITER.encode("ascii")),
        )
    )
    length = _element((0x0002, 0x0000), "UL", struct.pack("<I", len(meta)))
    body = b"".join(elements[tag] for tag in sorted(elements))
    path.write_bytes(b"\0" * 128 + b"DICM" + length + meta + body)


def _us(tag: Tag, value: int) -> bytes:
    return _element(tag, "US", struct.pack("<H", value))


def _element(tag: Tag, vr: str, value: bytes) -> bytes:
    """One data element; values are padded to an even length."""
    value += (b"\0" if vr in ("UI", "OB") else b" ") * (len(value) % 2)
    size = struct.pack("<HI", 0, len(value)) if vr in ("OB", "OW") else struct.pack("<H", len(value))
    return struct.pack("<HH", *tag) + vr.encode("ascii") + size + value
