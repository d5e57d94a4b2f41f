# SPDX-License-Identifier: Apache-2.0
"""What a JPEG, JPEG-LS or JPEG 2000 codestream says of its own pixels: decoders believe the DICOM header instead.

GDCM ends the whole process where a codestream has fewer values than the header says, or segments that are damaged.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from unimedi_components.images.headers import DicomHeader

__all__ = ["Form", "form_fault", "form_of"]

_J2K, _JPEG = b"\xff\x4f\xff\x51", b"\xff\xd8"
# ITU T.81 B.1.1.3 and T.87 C.1.1: starts of a frame, which are neither tables nor arithmetic conditions
_STARTS = (*(number for number in range(0xC0, 0xD0) if number not in (0xC4, 0xC8, 0xCC)), 0xF7)
_APP14, _SCAN, _FILL = 0xEE, 0xDA, 0xFF
# ITU T.872 6.5.3: none, YCbCr, YCCK
_TRANSFORMS = 2


class Form(NamedTuple):
    """Pixels along a row and along a column, values of a pixel, and bits of a value."""

    columns: int
    rows: int
    samples: int
    bits: int


def form_of(code: bytes) -> Form | None:
    """The form of a codestream's pixels; None where it is of another kind, or damaged before its pixels."""
    try:
        if code.startswith(_J2K) or code[4:8] == b"jP  ":
            # ITU T.800 A.5.1, in a JP2 file behind its boxes
            size = code[code.index(_J2K) :]
            right, bottom, left, top = struct.unpack(">4I", size[8:24])
            return Form(right - left, bottom - top, int.from_bytes(size[40:42], "big"), (size[42] & 0x7F) + 1)
        place, form = 2, None
        while code.startswith(_JPEG) and code[place] == _FILL and (marker := code[place + 1]) != _SCAN:
            # the mark, the length that counts itself, and what it holds
            segment = code[place + 4 : place + 2 + int.from_bytes(code[place + 2 : place + 4], "big")]
            if marker in _STARTS:
                bits, rows, columns, samples = struct.unpack(">BHHB", segment[:6])
                form = Form(columns, rows, samples, bits)
            # shorter ones are no Adobe's
            if marker == _APP14 and segment.startswith(b"Adobe") and len(segment) > 11 and segment[11] > _TRANSFORMS:
                return None
            place += 1 if marker == _FILL else 4 + len(segment)
        return form if code[place] == _FILL else None
    except (IndexError, ValueError, struct.error):
        return None


def form_fault(code: bytes, header: DicomHeader) -> str:
    """Say that a codestream holds other pixels than the header says, or is damaged before them; else empty."""
    if (form := form_of(code)) is None:
        return "the codestream is damaged" if code.startswith(_JPEG) else ""
    if (form.columns, form.rows) != (header.columns, header.rows):
        said = f"{header.columns} x {header.rows}"
        return f"the codestream has {form.columns} x {form.rows} pixels, the header says {said}"
    if form.samples != header.samples or form.bits > header.bits_allocated:
        said = f"{header.samples} of {header.bits_allocated}"
        return f"the codestream has {form.samples} value(s) of {form.bits} bits a pixel, the header says {said}"
    return ""
