# SPDX-License-Identifier: Apache-2.0
"""What a DICOM file says of itself before its pixels, as pydicom reads it; also without preamble or file meta."""

from __future__ import annotations

import functools
import io
import logging
import math
import threading
import warnings
from collections.abc import Callable, MutableSequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimedi_components.errors import DataError

__all__ = [
    "DEFLATED",
    "DicomHeader",
    "functional_group",
    "is_dicom",
    "load_pydicom",
    "numbers_of",
    "open_dicom",
    "read_header",
    "starts_as_dicom",
    "values_of",
]

DEFLATED = "1.2.840.10008.1.2.1.99"

_HEAD, _DEFER, _PREAMBLE = 4096, 2**16, 128
_PIXEL_TAGS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", 0x7FE00010: "PixelData"}
_UNDEFINED = 0xFFFFFFFF
_VRS = frozenset(
    b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV".split()
)
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_NUMBERS: dict[str, Callable[[bytes], float]] = {"DS": float, "IS": int}
_PLAIN_TEXT = frozenset({"CS", "UI", "DA", "TM", "DT", "LO", "SH", *_NUMBERS})
_lock = threading.Lock()


@functools.cache
def load_pydicom() -> Any:
    """The module pydicom, silent about values that are not to the letter: what matters is checked here."""
    with _lock:
        import pydicom

        pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
        logging.getLogger("pydicom").setLevel(logging.ERROR)
        # once and for all, since warnings.catch_warnings is not safe in threads
        warnings.filterwarnings("ignore", module="pydicom")
    return pydicom


@dataclass(frozen=True)
class DicomHeader:
    """One file's header.

    Args:
        path: the file.
        dataset: all elements before the pixels, as pydicom reads them.
        modality: as "CT"; empty where not named.
        study: StudyInstanceUID.
        series: SeriesInstanceUID.
        sop_class: SOPClassUID.
        image_type: values of ImageType in capitals.
        rows: pixels along a column; 0 where there is no image.
        columns: pixels along a row.
        frames: planes of the file, at least 1.
        samples: values per pixel.
        position: ImagePositionPatient, mm, LPS; None where it is missing or has not three finite numbers.
        orientation: ImageOrientationPatient, cosines along a row and along a column, likewise.
        pixel_spacing: PixelSpacing (ImagerPixelSpacing of a film without one): mm between rows and between columns.
        photometric: as "MONOCHROME2".
        bits_allocated: of a stored value.
        bits_stored: of them in use.
        high_bit: the highest in use.
        signed: whether stored values are two's complement.
        transfer_syntax: its UID; of a file that does not say, the one that its elements are written in.
        pixels: keyword of the element that holds the pixels; empty where there are none.
        pixel_offset: first byte of the pixels in the file; 0 in a deflated file.
        pixel_length: bytes of the pixels by the header; None where they are fragments of undefined length.
    """

    path: Path
    dataset: Any = field(repr=False, compare=False)
    modality: str
    study: str
    series: str
    sop_class: str
    image_type: tuple[str, ...]
    rows: int
    columns: int
    frames: int
    samples: int
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    pixel_spacing: tuple[float, ...] | None
    photometric: str
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    transfer_syntax: str
    pixels: str
    pixel_offset: int
    pixel_length: int | None

    def text(self, keyword: str) -> str:
        """An element as one line of printable text, several values joined by a backslash; empty where missing."""
        return _text(self.dataset, keyword)

    def numbers(self, keyword: str) -> tuple[float, ...] | None:
        """An element's values; None where it is missing or one of them is no finite number."""
        return numbers_of(self.dataset, keyword)


def starts_as_dicom(head: bytes) -> bool:
    """Whether a file that begins with these bytes (a few hundred) is DICOM, also without preamble or file meta.

    A file without "DICM" counts where its first elements follow each other as PS3.5 section 7 writes them, in group 2
    or 8, explicit or implicit, little or big endian.
    """
    if head[128:132] == b"DICM" or head[:4] == b"DICM":
        return True
    return any(_elements(head, order) for order in ("little", "big"))


def _elements(head: bytes, order: Any) -> bool:
    place, last, seen = 0, 0, 0
    while seen < 3:
        if place + 8 > len(head):
            # a long element may leave the bytes that were read
            return seen >= 2 and place > len(head)
        group, element = (int.from_bytes(head[at : at + 2], order) for at in (place, place + 2))
        tag = group << 16 | element
        if tag <= last or (seen == 0 and group not in (2, 8)) or group > 0x7FE0:
            return False
        vr = head[place + 4 : place + 6]
        if vr in _LONG_VRS:
            length, start = int.from_bytes(head[place + 8 : place + 12], order), 12
        elif vr in _VRS:
            length, start = int.from_bytes(head[place + 6 : place + 8], order), 8
        else:
            length, start = int.from_bytes(head[place + 4 : place + 8], order), 8
            if order == "big":
                return False
        if length == _UNDEFINED:
            return seen >= 1
        if length % 2 or length > 2**16:
            return False
        place, last, seen = place + start + length, tag, seen + 1
    return True


def is_dicom(path: str | Path) -> bool:
    """Whether a file's content is DICOM, whatever its name; False where it cannot be opened."""
    try:
        with open(path, "rb") as stream:
            return starts_as_dicom(stream.read(_HEAD))
    except OSError:
        return False


def open_dicom(path: str | Path) -> Any:
    """A DICOM file as a stream for pydicom, which wants 128 bytes before "DICM" where a file has none."""
    stream = open(path, "rb")  # noqa: SIM115
    start = stream.read(4)
    stream.seek(0)
    if start != b"DICM":
        return stream
    with stream:
        return io.BytesIO(bytes(_PREAMBLE) + stream.read())


def read_header(path: str | Path) -> DicomHeader:
    """Read a file's header, and nothing of its pixels.

    Raises:
        DataError: no such file, not DICOM, or a header that is cut off or damaged.
    """
    path = Path(path)
    try:
        with open_dicom(path) as stream:
            head = stream.read(_HEAD)
            if not head:
                raise DataError(f"{path}: the file is empty. Export or download it again")
            if not starts_as_dicom(head):
                raise DataError(f"{path}: is not a DICOM file. Give the DICOM file itself")
            return _parse(path, stream)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror or error})") from None
    except Exception as error:  # pydicom and zlib raise many kinds for damaged headers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].replace(str(path), path.name)[:160]
        raise DataError(f"{path}: the DICOM is cut off or damaged ({reason}). Export it again") from error


def _parse(path: Path, stream: Any) -> DicomHeader:
    met: dict[str, Any] = {}

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        if int(tag) not in _PIXEL_TAGS:
            return False
        # the first look at a data set asks before anything is read
        met.update(name=_PIXEL_TAGS[int(tag)], offset=stream.tell(), length=length)
        return True

    from pydicom.filereader import read_partial

    load_pydicom()
    stream.seek(0)
    # a deferred value is looked for in the file of the stream's name
    in_memory = isinstance(stream, io.BytesIO)
    dataset = read_partial(stream, at_pixels, defer_size=None if in_memory else _DEFER, force=True)
    if in_memory and met:
        met["offset"] -= _PREAMBLE
    syntax = str(getattr(dataset, "file_meta", {}).get("TransferSyntaxUID", "") or "")
    if syntax == DEFLATED:
        # a deferred value would be looked for in the deflated bytes
        stream.seek(0)
        dataset = read_partial(stream, at_pixels, force=True)
        met["offset"] = 0
    return _header(path, dataset, syntax, met)


def _header(path: Path, dataset: Any, syntax: str, met: dict[str, Any]) -> DicomHeader:
    if not syntax:
        implicit, little = dataset.original_encoding
        syntax = "1.2.840.10008.1.2" if implicit else f"1.2.840.10008.1.2.{1 if little else 2}"
    numbers = functools.partial(numbers_of, dataset)
    bits = _whole(dataset, "BitsAllocated", 16)
    stored = _whole(dataset, "BitsStored", bits)
    spacing = numbers("PixelSpacing") or numbers("ImagerPixelSpacing") or numbers("NominalScannedPixelSpacing")
    position, orientation = numbers("ImagePositionPatient"), numbers("ImageOrientationPatient")
    length = met.get("length")
    return DicomHeader(
        path=path,
        dataset=dataset,
        modality=_text(dataset, "Modality").upper(),
        study=_text(dataset, "StudyInstanceUID"),
        series=_text(dataset, "SeriesInstanceUID"),
        sop_class=_text(dataset, "SOPClassUID"),
        image_type=tuple(part.strip() for part in _text(dataset, "ImageType").upper().split("\\") if part.strip()),
        rows=_whole(dataset, "Rows", 0),
        columns=_whole(dataset, "Columns", 0),
        frames=max(1, _whole(dataset, "NumberOfFrames", 1)),
        samples=max(1, _whole(dataset, "SamplesPerPixel", 1)),
        position=position if position is not None and len(position) == 3 else None,
        orientation=orientation if orientation is not None and len(orientation) == 6 else None,
        pixel_spacing=spacing if spacing is not None and len(spacing) == 2 and min(spacing) > 0 else None,
        photometric=_text(dataset, "PhotometricInterpretation").upper(),
        bits_allocated=bits,
        bits_stored=stored,
        high_bit=_whole(dataset, "HighBit", stored - 1),
        signed=_whole(dataset, "PixelRepresentation", 0) == 1,
        transfer_syntax=syntax,
        pixels=met.get("name", ""),
        pixel_offset=met.get("offset", 0),
        pixel_length=None if length == _UNDEFINED else length,
    )


@functools.cache
def _tag(keyword: str) -> tuple[Any, str]:
    """An element's tag and its usual VR: pydicom looks tags up several times as fast as keywords."""
    from pydicom.datadict import dictionary_VR, tag_for_keyword
    from pydicom.tag import Tag

    tag = Tag(tag_for_keyword(keyword) or 0)
    return tag, dictionary_VR(tag) if tag else ""


def _unread(dataset: Any, keyword: str) -> tuple[str, bytes, bool]:
    """VR, bytes and byte order of an element that pydicom has not converted yet, which takes it long; else no VR."""
    tag, vr = _tag(keyword)
    raw = dataset.get_item(tag, keep_deferred=True)
    if raw is None or not raw.is_raw or not isinstance(raw.value, bytes):
        return "", b"", True
    return raw.VR or vr, raw.value, raw.is_little_endian


def values_of(dataset: Any, keyword: str) -> list[Any]:
    """An element's values; none where it is missing, empty, or cannot be read as what it is said to be."""
    tag, _ = _tag(keyword)
    if tag not in dataset:
        return []
    try:
        value = dataset[tag].value
    except Exception:  # pydicom raises many kinds for values that are not to the letter
        return []
    if isinstance(value, (MutableSequence, tuple)):
        return list(value)
    return [] if value is None or value == "" else [value]


def numbers_of(dataset: Any, keyword: str) -> tuple[float, ...] | None:
    """An element's values; None where it is missing or one of them is no finite number."""
    vr, value, little = _unread(dataset, keyword)
    try:
        numbers = _plain_numbers(vr, value, little) or tuple(float(part) for part in values_of(dataset, keyword))
    except (TypeError, ValueError):
        return None
    return numbers if numbers and all(map(math.isfinite, numbers)) else None


def _plain_numbers(vr: str, value: bytes, little: bool) -> tuple[float, ...]:
    """Numbers as they are commonly written; none where pydicom has to judge them."""
    if vr == "US" and len(value) == 2:
        return (float(int.from_bytes(value, "little" if little else "big")),)
    if vr not in _NUMBERS:
        return ()
    try:
        return tuple(float(_NUMBERS[vr](part)) for part in value.rstrip(b" \0").split(b"\\"))
    except ValueError:
        return ()


def _text(dataset: Any, keyword: str) -> str:
    vr, value, little = _unread(dataset, keyword)
    plain = value.rstrip(b" \0")
    if (
        vr in _PLAIN_TEXT
        # which reads the same in every character set
        and plain.isascii()
        and not (b" " in plain and b"\\" in plain)
        and (text := plain.decode("ascii")).isprintable()
        and (vr not in _NUMBERS or not text or _plain_numbers(vr, value, little))
    ):
        return text.strip()
    parts = [_code_string(dataset, plain)] if vr == "CS" else values_of(dataset, keyword)
    text = "\\".join(str(part) for part in parts).strip().strip("\0").strip()
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _code_string(dataset: Any, value: bytes) -> str:
    """Text of VR CS, where makers write their language, in the file's character set: pydicom takes it for Latin-1."""
    from pydicom.charset import convert_encodings, decode_bytes

    text = decode_bytes(value, convert_encodings(values_of(dataset, "SpecificCharacterSet")), set())
    return value.decode("latin-1") if "\ufffd" in text else text


def _whole(dataset: Any, keyword: str, default: int) -> int:
    numbers = numbers_of(dataset, keyword)
    return int(numbers[0]) if numbers else default


def functional_group(header: DicomHeader, keyword: str, frame: int = 0) -> Any:
    """The functional group of a frame in an enhanced object (PS3.3 C.7.6.16), or what all frames share.

    Args:
        header: of the file.
        keyword: of the group, as "PlanePositionSequence".
        frame: which, from 0.

    Returns:
        its one item, a pydicom data set, or None where the file has none.
    """
    each = values_of(header.dataset, "PerFrameFunctionalGroupsSequence")
    shared = values_of(header.dataset, "SharedFunctionalGroupsSequence")
    for groups in (each[frame : frame + 1], shared[:1]):
        for group in groups:
            if items := values_of(group, keyword):
                return items[0]
    return None
