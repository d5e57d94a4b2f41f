# SPDX-License-Identifier: Apache-2.0
"""The pixels of one DICOM file: as stored, and as modality values (PS3.3 C.7.6.3, C.11.1).

Compressed pixels are decoded behind pydicom, by GDCM, grey JPEG 2000 by Pillow; of grey pixels, plain ones are numbers
in the file, and Pillow knows the run lengths of RLE.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from unimedi_components.arrays import Array
from unimedi_components.errors import DataError
from unimedi_components.images.codestreams import form_fault
from unimedi_components.images.headers import (
    DEFLATED,
    DicomHeader,
    functional_group,
    is_dicom,
    load_pydicom,
    numbers_of,
    open_dicom,
    read_header,
    starts_as_dicom,
    values_of,
)

__all__ = [
    "DicomHeader",
    "DicomValues",
    "functional_group",
    "is_dicom",
    "lookup_table",
    "modality_values",
    "pixel_fault",
    "read_header",
    "starts_as_dicom",
    "stored_values",
    "transform_fault",
]


_TAIL = 4096
_LITTLE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")
_PLAIN = (*_LITTLE, "1.2.840.10008.1.2.2", DEFLATED)
_RLE, _JPEG_EXTENDED = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.51"
_JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
_NUMBERS = {8: "u1", 16: "<u2", 32: "<u4"}
_PALETTES = ("RedPaletteColorLookupTableDescriptor", "PaletteColorLookupTableUID")
# PS3.5 A.4: ends a sequence of fragments
_FRAMES_END = b"\xfe\xff\xdd\xe0"


@dataclass(frozen=True)
class DicomValues:
    """The pixels of a file after its modality transform.

    Args:
        values: float32 (frames, H, W), or (frames, H, W, 3) red, green and blue in 0 to 1.
        padding: bool (frames, H, W), true where PixelPaddingValue says that nothing was imaged; None without any.
        notes: what was done to the stored values, a line each.
    """

    values: Array
    padding: Array | None
    notes: tuple[str, ...]


def pixel_fault(header: DicomHeader) -> str:
    """Say why a file's pixels cannot be whole, from its header and its size; empty where nothing speaks against it."""
    if not header.pixels and header.rows:
        return "the DICOM is cut off before its pixels. Export it again"
    if not header.pixels:
        return f"is DICOM without pixels (modality {header.modality or 'not named'}). Export the image itself"
    if min(header.rows, header.columns) < 1:
        return "is DICOM with pixels of which the header gives no size. Export it again"
    if not _decodes(header.transfer_syntax):
        return f"is coded in transfer syntax {header.transfer_syntax}, which is not read here. Export it uncompressed"
    if header.bits_allocated not in (1, 8, 16, 32, 64) or header.samples not in (1, 3):
        return (
            f"has {header.samples} value(s) of {header.bits_allocated} bits a pixel, which are not read. Export again"
        )
    size, deflated = header.path.stat().st_size, header.transfer_syntax == DEFLATED
    if header.pixel_length is None:
        with open(header.path, "rb") as stream:
            stream.seek(max(header.pixel_offset, size - _TAIL))
            tail = stream.read()
        return "" if _FRAMES_END in tail else "the DICOM is cut off, the end of its frames is missing. Export it again"
    need = math.ceil(header.rows * header.columns * header.frames * header.samples * header.bits_allocated / 8)
    if header.photometric == "YBR_FULL_422":
        need = need * 2 // 3
    have = header.pixel_length if deflated else min(header.pixel_length, size - header.pixel_offset)
    if have < min(need, header.pixel_length) or (have < need and header.transfer_syntax in _PLAIN):
        return f"the DICOM is cut off: its header says {need:,} bytes of pixels, the file has {have:,}. Export it again"
    if header.transfer_syntax in _PLAIN and header.pixel_length >= 2 * need:
        return f"its header says {need:,} bytes of pixels, the file has {header.pixel_length:,}. Export it again"
    return ""


@functools.cache
def _decodes(transfer_syntax: str) -> bool:
    load_pydicom()
    from pydicom.pixels import get_decoder

    try:
        return bool(get_decoder(transfer_syntax).is_available)
    except (NotImplementedError, ValueError):
        return False


def transform_fault(header: DicomHeader, frame: int = 0) -> str:
    """Say why a frame's stored values cannot become modality values or colours; empty where they can."""
    try:
        if header.photometric == "PALETTE COLOR":
            missing = not any(name in header.dataset for name in _PALETTES)
            return "its palette is missing. Export it again" if missing else ""
        if items := values_of(header.dataset, "ModalityLUTSequence"):
            lookup_table(header, items[0], "ModalityLUTSequence")
        else:
            _rescale(header, frame)
    except DataError as error:
        return str(error).removeprefix(f"{header.path}: ")
    return ""


def stored_values(header: DicomHeader) -> Array:
    """Decode a file's pixels.

    Only the bits in use count: values are shifted down from HighBit, overlays in the bits above are masked out, and
    the sign is taken from the highest bit in use. YBR becomes RGB; a palette's indices stay.

    Returns:
        whole numbers or floats (frames, H, W), or (frames, H, W, samples).

    Raises:
        DataError: there are no pixels, or they are cut off, damaged or coded in an unknown way.
    """
    return _in_use(header, _decoded(header))


def _decoded(header: DicomHeader) -> Array:
    """All allocated bits of the pixels, (frames, H, W[, samples])."""
    if fault := pixel_fault(header):
        raise DataError(f"{header.path}: {fault}")
    try:
        twelve_bits = header.transfer_syntax == _JPEG_EXTENDED and header.bits_stored > 8
        if (pixels := _as_written(header)) is None and (pixels := _run_lengths(header)) is None:
            pixels = _by_gdcm(header) if twelve_bits else _by_pydicom(header)
    except MemoryError:
        raise
    except Exception as error:  # pydicom and its decoders raise many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip().partition(" <")[0][:160]
        # what GDCM's binding and pydicom leave unsaid
        reason = "the codestream is damaged" if "NoneType" in reason else reason
        reason = "there are fewer frames than the header says" if isinstance(error, StopIteration) else reason
        raise DataError(f"{header.path}: the pixels cannot be decoded ({reason}). Export it uncompressed") from error
    plane = (header.rows, header.columns, *((header.samples,) if header.samples > 1 else ()))
    return pixels.reshape(-1, *plane)


def _as_written(header: DicomHeader) -> Array | None:
    """Grey pixels that are plain little-endian numbers in the file, without a second look at its header; else None."""
    kind = _NUMBERS.get(header.bits_allocated)
    count = header.rows * header.columns * header.frames
    if (
        kind is None
        or header.samples > 1
        or header.pixels != "PixelData"
        or header.transfer_syntax not in _LITTLE
        or (header.pixel_length or 0) < count * header.bits_allocated // 8
    ):
        return None
    kind = kind.replace("u", "i") if header.signed else kind
    return np.fromfile(header.path, kind, count, offset=header.pixel_offset)


def _run_lengths(header: DicomHeader) -> Array | None:
    """Grey pixels in RLE (PS3.5 G), which pydicom would decode in Python; None where they are anything else."""
    kind = _NUMBERS.get(header.bits_allocated)
    known = header.samples == 1 and header.pixels == "PixelData" and header.pixel_length is None
    if kind is None or not known or header.transfer_syntax != _RLE:
        return None
    from pydicom.encaps import generate_frames

    load_pydicom()
    count, size = header.rows * header.columns, header.bits_allocated // 8
    planes = []
    with open(header.path, "rb") as stream:
        stream.seek(header.pixel_offset)
        for frame in generate_frames(stream, number_of_frames=header.frames):
            segments, *starts = np.frombuffer(frame, "<u4", 16).tolist()
            if segments != size:
                raise ValueError(f"{segments} RLE segments for pixels of {size} bytes")
            # the highest byte comes first; one line, since some writers let a run go on in the next row
            parts = (frame[start:end] for start, end in pairwise((*starts[:size], len(frame))))
            lines = [np.asarray(Image.frombytes("L", (count, 1), part, "packbits", "L")) for part in parts]
            planes.append(np.stack([line.ravel() for line in lines[::-1]], axis=-1))
    if len(planes) < header.frames:
        raise ValueError(f"{len(planes)} of {header.frames} frames")
    return np.stack(planes[: header.frames]).view(kind.replace("u", "i") if header.signed else kind)


def _by_pydicom(header: DicomHeader) -> Array:
    pydicom = load_pydicom()
    from pydicom.pixels import pixel_array

    with open_dicom(header.path) as stream:
        dataset = pydicom.dcmread(stream, force=True)
    _complete(dataset, header)
    if header.pixels not in dataset:
        raise ValueError("the pixels end before the header says")
    if not getattr(dataset, "file_meta", None) or "TransferSyntaxUID" not in dataset.file_meta:
        dataset.ensure_file_meta()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(header.transfer_syntax)
    if header.pixels == "PixelData" and header.transfer_syntax in (*_PLAIN, _RLE):
        # all bits, since pydicom would take the lowest ones whatever HighBit says
        dataset.BitsStored, dataset.HighBit = header.bits_allocated, header.bits_allocated - 1
    pixels = None
    if header.pixel_length is None and header.transfer_syntax != _RLE:
        codes = _codestreams(header, dataset.PixelData)
        pixels = _by_pillow(dataset, header, codes) if header.transfer_syntax in _JPEG_2000 else None
    return np.asarray(pixel_array(dataset)) if pixels is None else pixels


def _codestreams(header: DicomHeader, fragments: Any) -> list[bytes]:
    """The codestreams of a file's frames; none where the offsets of several fragments lie elsewhere.

    Raises:
        ValueError: one holds other pixels than the header says.
    """
    from pydicom.encaps import generate_frames

    codes: list[bytes] = []
    with contextlib.suppress(Exception):
        codes = list(generate_frames(fragments, number_of_frames=header.frames))
    if fault := next((fault for code in codes if (fault := form_fault(code, header))), ""):
        raise ValueError(fault)
    return codes


def _by_pillow(dataset: Any, header: DicomHeader, codes: Sequence[bytes]) -> Array | None:
    """Grey JPEG 2000, of which Pillow makes the same as GDCM in less time; None where that is not sure."""
    from pydicom.pixels import pixel_array
    from pydicom.pixels.utils import get_j2k_parameters

    forms = [get_j2k_parameters(code) for code in codes]
    # a JP2 file may hold a palette
    if not forms or any(form.get("jp2", True) for form in forms):
        return None
    # signed values in a file that says unsigned come out of each as others
    if header.samples == 1 and (header.signed or not any(form["is_signed"] for form in forms)):
        # what Pillow cannot read, GDCM may
        with contextlib.suppress(Exception):
            return np.asarray(pixel_array(dataset, decoding_plugin="pillow"))
    return None


def _complete(dataset: Any, header: DicomHeader) -> None:
    """Give a data set what pydicom wants to be told, as the header was understood."""
    grey = header.samples == 1 and header.photometric != "PALETTE COLOR"
    wanted = {
        "PhotometricInterpretation": "RGB" if header.samples > 1 else "MONOCHROME2",
        "SamplesPerPixel": header.samples,
        "PixelRepresentation": int(header.signed),
        "PlanarConfiguration": 0,
        "BitsAllocated": header.bits_allocated,
        "BitsStored": header.bits_stored,
    }
    for name, value in wanted.items():
        if not values_of(dataset, name) or (grey and name == "PhotometricInterpretation"):
            setattr(dataset, name, value)
    if header.pixels == "PixelData" and not 1 <= int(dataset.BitsStored) <= header.bits_allocated:
        dataset.BitsStored = header.bits_allocated


def _by_gdcm(header: DicomHeader) -> Array:
    """GDCM's own reader, for codestreams that pydicom does not hand to it (12-bit JPEG)."""
    import gdcm

    with open(header.path, "rb") as stream:
        stream.seek(header.pixel_offset)
        _codestreams(header, stream)
    reader = gdcm.ImageReader()
    reader.SetFileName(str(header.path))
    if header.pixels != "PixelData" or not reader.Read():
        raise ValueError("GDCM cannot read the file")
    image = reader.GetImage()
    kind = _NUMBERS[image.GetPixelFormat().GetBitsAllocated()]
    # the binding gives bytes as text
    pixels = np.frombuffer(image.GetBuffer().encode("utf-8", "surrogateescape"), kind)
    return pixels.view(kind.replace("u", "i")) if header.signed else pixels


def _in_use(header: DicomHeader, pixels: Array) -> Array:
    if pixels.dtype.kind == "f" or header.bits_allocated == 1:
        return pixels
    size = pixels.dtype.itemsize * 8
    stored, shift = header.bits_stored, header.high_bit + 1 - header.bits_stored
    if not 0 < stored <= size or not 0 <= shift <= size - stored:
        # such a header says nothing about the bits
        stored, shift = size, 0
    if stored == size:
        return pixels
    bits = pixels.astype(pixels.dtype.newbyteorder("="), copy=False).view(f"u{size // 8}")
    if shift and header.transfer_syntax not in (*_PLAIN, _RLE) and int(bits.max()) < 2**stored:
        # the codestream has the values' own precision
        shift = 0
    # up to the highest bit and down again, which leaves the sign in all bits above
    up = size - stored - shift
    left = bits << bits.dtype.type(up)
    whole = left.view(f"i{size // 8}") if header.signed else left
    return np.asarray(whole >> whole.dtype.type(size - stored))


def modality_values(header: DicomHeader) -> DicomValues:
    """Decode a file's pixels and bring them to what the modality measured: Hounsfield units of a CT.

    A Modality LUT is applied where there is one, otherwise RescaleSlope and RescaleIntercept, of each frame where they
    differ. Colours become red, green and blue between 0 and 1, also those of a palette.

    Raises:
        DataError: see `stored_values`, or the transform is not one.
    """
    raw = _decoded(header)
    stored = _in_use(header, raw)
    if header.photometric == "PALETTE COLOR":
        return DicomValues(_palette_colours(header, stored), None, ("palette colours",))
    if header.samples > 1:
        top = 1 if stored.dtype.kind == "f" else 2 ** min(header.bits_stored, stored.dtype.itemsize * 8) - 1
        return DicomValues(np.divide(stored[..., :3], top, dtype=np.float32), None, ())
    padding = _padding(header, raw)
    if (items := values_of(header.dataset, "ModalityLUTSequence")) and stored.dtype.kind != "f":
        first, table, _ = lookup_table(header, items[0], "ModalityLUTSequence")
        return DicomValues(_look_up(table, first, stored), padding, ("Modality LUT",))
    values = np.empty(stored.shape, np.float32)
    scales = set()
    for frame, plane in enumerate(stored):
        slope, intercept = _rescale(header, frame)
        scales.add((slope, intercept))
        if slope == 1 and float(intercept).is_integer() and stored.dtype.itemsize <= 2:
            np.add(plane, np.float32(intercept), out=values[frame], dtype=np.float32)
        else:
            # in double precision, so that whole Hounsfield units stay whole
            values[frame] = plane * float(slope) + float(intercept)
    scales -= {(1.0, 0.0)}
    notes = (f"rescaled by {_by_values(scales)}",) if scales else ()
    return DicomValues(values, padding, notes)


def _by_values(scales: Iterable[tuple[float, float]]) -> str:
    pairs = sorted(scales)
    return "each frame's own" if len(pairs) > 1 else f"slope {pairs[0][0]:g}, intercept {pairs[0][1]:g}"


def _rescale(header: DicomHeader, frame: int) -> tuple[float, float]:
    group = functional_group(header, "PixelValueTransformationSequence", frame)
    dataset, scale = header.dataset if group is None else group, [1.0, 0.0]
    for place, keyword in enumerate(("RescaleSlope", "RescaleIntercept")):
        if (numbers := numbers_of(dataset, keyword)) is not None:
            scale[place] = numbers[0]
        elif keyword in dataset and str(dataset.get_item(keyword).value or "").strip("b' "):
            raise DataError(f"{header.path}: its {keyword} is no number. Export it again")
    if scale[0] == 0:
        raise DataError(f"{header.path}: its RescaleSlope is 0, which makes all values one. Export it again")
    return scale[0], scale[1]


def _padding(header: DicomHeader, raw: Array) -> Array | None:
    """Where the pixels have PixelPaddingValue, or lie between it and PixelPaddingRangeLimit (PS3.3 C.7.5.1.1.2)."""
    value = numbers_of(header.dataset, "PixelPaddingValue")
    if value is None or raw.dtype.kind == "f":
        return None
    limit = numbers_of(header.dataset, "PixelPaddingRangeLimit") or value
    low, high = sorted((_as_stored(header, value[0], raw), _as_stored(header, limit[0], raw)))
    mask = (raw >= low) & (raw <= high)
    if not mask.any():
        # the padding may be written in the bits in use alone
        stored = _in_use(header, raw)
        mask = (stored >= low) & (stored <= high)
    return mask if mask.any() else None


def _as_stored(header: DicomHeader, value: float, raw: Array) -> int:
    """A padding value as the pixels' own numbers: its tag may be unsigned where they are signed, and the reverse."""
    size = raw.dtype.itemsize * 8
    bits = int(value) & (2**size - 1)
    return bits - 2**size if raw.dtype.kind == "i" and bits >= 2 ** (size - 1) else bits


def lookup_table(header: DicomHeader, item: Any, name: str) -> tuple[int, Array, int]:
    """A Modality or VOI LUT (PS3.3 C.11.1.1 and C.11.2.1.1).

    Returns:
        the first input that is mapped, float32 entries, and their bits.

    Raises:
        DataError: the table is not complete.
    """
    try:
        count, first, bits = (int(number) for number in item["LUTDescriptor"].value)
        count = (count & 0xFFFF) or 2**16
        data = item["LUTData"].value
        if isinstance(data, bytes):
            order = "<" if header.dataset.original_encoding[1] in (None, True) else ">"
            narrow = len(data) < 2 * count
            table = np.frombuffer(data[: len(data) // 2 * 2] if not narrow else data, "u1" if narrow else f"{order}u2")
        else:
            table = np.asarray(data, np.int64).reshape(-1) & 0xFFFF
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{header.path}: its {name} cannot be read. Export it again") from error
    if len(table) < count or not 1 <= bits <= 16:
        raise DataError(
            f"{header.path}: its {name} has {len(table)} of {count} entries of {bits} bits. Export it again"
        )
    first = first - 2**16 if header.signed and first >= 2**15 else first
    return (first if header.signed else first & 0xFFFF), table[:count].astype(np.float32), bits


def _look_up(table: Array, first: int, values: Array) -> Array:
    return np.asarray(table[np.clip(values.astype(np.int64) - first, 0, len(table) - 1)])


def _palette_colours(header: DicomHeader, indices: Array) -> Array:
    from pydicom.pixels import apply_color_lut

    try:
        colours = np.asarray(apply_color_lut(indices, header.dataset))[..., :3]
    except Exception as error:  # pydicom raises many kinds for incomplete palettes
        raise DataError(f"{header.path}: its palette cannot be read ({error}). Export it again") from error
    if colours.dtype == np.uint16 and not (colours & 255).any():
        # 8 bits in the upper half of each entry
        colours = (colours >> 8).astype(np.uint8)
    return np.divide(colours, np.iinfo(colours.dtype).max, dtype=np.float32)
