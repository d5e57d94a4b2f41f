# SPDX-License-Identifier: Apache-2.0
"""What the text headers of MetaImage and NRRD files say and leave open, where ITK believes or guesses."""

from __future__ import annotations

import os
import re
import zlib
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "check_packed",
    "cut_off",
    "header_gap",
    "header_warnings",
    "missing_voxels",
    "too_few_bytes",
    "voxel_files",
    "voxels_elsewhere",
]

_HEADER_BYTES = 2**16
# fields without which a header says nothing, as what they have to match
_NUMBERS = r"[\d.eE+-]+(\s+[\d.eE+-]+)*"
_WANTED = {
    False: {
        "DimSize": _NUMBERS,
        "ElementType": "MET_(U?(CHAR|SHORT|INT|LONG|LONG_LONG)|FLOAT|DOUBLE)",
        "ElementDataFile": r"\S.*",
    },
    True: {"sizes": _NUMBERS, "type": r"(?!block)\S.*"},
}
# the spaces whose axes are the patient's, and codings that ITK's reader has
_SPACES = "(ra|la|lp)st?|(right-anterior|left-anterior|left-posterior)-superior(-time)?"
_CODINGS = ("raw", "gzip", "gz", "ascii", "text", "txt", "hex")


def voxels_elsewhere(path: str | Path) -> str:
    """Say that a MetaImage or NRRD header names voxels outside its folder; empty when it does not.

    A header is text from a stranger: followed, it would read any file of this machine as an image.

    Args:
        path: any file; its content decides, not its name.
    """
    path = Path(path)
    home = path.parent.resolve()
    for name in voxel_files(path):
        parts = re.split(r"[/\\]", name)
        absolute = os.path.isabs(name) or re.match(r"[A-Za-z]:|\\", name)
        if absolute or ".." in parts or not (home / name).resolve().is_relative_to(home):
            return f"its header names voxels outside its folder ({name[:80]}). Put them beside it and name them there"
    return ""


class _Header(NamedTuple):
    """The text of an NRRD or MetaImage header: its lines, its fields by their names in small letters, its bytes."""

    nrrd: bool
    lines: list[str]
    fields: dict[str, str]
    length: int


def _header(path: str | Path) -> _Header | None:
    """The header of an NRRD or MetaImage file; None of any other file."""
    if not Path(path).is_file():
        return None
    with open(path, "rb") as stream:
        head = stream.read(_HEADER_BYTES)
        nrrd = head.startswith(b"NRRD0")
        if nrrd or b"NDims" in head:
            head += stream.read(64 * _HEADER_BYTES)
    if not nrrd and b"ElementDataFile" not in head:
        return None
    # an attached NRRD's header ends with an empty line, a MetaImage's with the line ElementDataFile
    end = re.search(rb"\r?\n\r?\n" if nrrd else rb"(?m)^ElementDataFile[^\n]*\n?", head)
    length = end.end() if end else len(head)
    # bytes of names as they are in the file system, whatever they are
    text = (head[:length] if nrrd else head).decode("utf-8", "surrogateescape")
    own = (line for line in head[:length].decode("utf-8", "surrogateescape").splitlines() if ":=" not in line)
    pairs = (line.partition(":" if nrrd else "=") for line in own)
    fields = {name.strip().lower(): value.strip() for name, _, value in pairs}
    return _Header(nrrd, text.splitlines(), fields, length)


def voxel_files(path: str | Path) -> list[str]:
    """Files of voxels that a MetaImage or NRRD header names, patterns and lists included; none of any other file."""
    header = _header(path)
    return _named_files(header) if header else []


def missing_voxels(path: str | Path) -> str:
    """Say which of a header's files of voxels is not there; empty where all are."""
    missing = [name for name in voxel_files(path) if not (Path(path).parent / name).is_file()]
    return f"its voxels {missing[0]} are missing. Unpack or download it again" if missing else ""


def _named_files(header: _Header) -> list[str]:
    field = re.compile(r"data ?file:\s*(.*)" if header.nrrd else r"ElementDataFile\s*=\s*(.*)", re.IGNORECASE)
    for number, line in enumerate(header.lines):
        match = field.match(line.strip())
        if match is None:
            continue
        value = match[1].strip()
        if value.split()[:1] == ["LIST"]:
            # a list of nothing is a file that is missing
            return [name.strip() for name in header.lines[number + 1 :] if name.strip()] or [value]
        return [] if value.upper() == "LOCAL" else _numbered_files(value)
    return []


def header_gap(path: str | Path) -> str:
    """Say what a MetaImage or NRRD header leaves open where ITK guesses, or says that it cannot read; else empty."""
    if (header := _header(path)) is None:
        return ""
    nrrd, fields = header.nrrd, header.fields
    for name, fits in _WANTED[nrrd].items():
        if not re.fullmatch(fits, value := fields.get(name.lower(), ""), re.IGNORECASE):
            said = f"says {name} {value[:40]}, which is not read here" if value else f"gives no {name}"
            return f"its header {said}. Export it again"
    if not fields.keys() & ({"space directions", "spacings"} if nrrd else {"elementspacing", "elementsize"}):
        return "its header gives no spacing, so the size of its voxels is unknown. Export it again"
    axes, sizes = fields.get("dimension" if nrrd else "ndims", ""), fields["sizes" if nrrd else "dimsize"].split()
    if axes != str(len(sizes)):
        return f"its header says {axes or 'no'} axes and {len(sizes)} sizes. Export it again"
    if not nrrd and re.search(r"(^|\s)-", fields.get("elementspacing", "")):
        return "its header gives a spacing below 0, so its orientation is unknown. Export it again"
    if nrrd and "space" not in fields:
        return "its header names no space, so its orientation is unknown. Export it again"
    if nrrd and not re.fullmatch(_SPACES, fields["space"], re.IGNORECASE):
        return f"its header names the space {fields['space'][:40]}, which says nothing of the patient. Export it again"
    coding = _coding(header)
    if nrrd and coding not in _CODINGS:
        return f"its voxels are coded as {coding[:40]}, which is not read here. Save it with the encoding gzip"
    if not nrrd and coding == "text":
        return "its voxels are written as text, which is not read here. Save it with BinaryData = True"
    if not nrrd and coding == "gzip" and not _named_files(header) and "compresseddatasize" not in fields:
        return "its header gives no CompressedDataSize. Export it again"
    # which ITK passes over
    units = re.findall(r"[A-Za-z]+", fields.get("space units" if nrrd else "distanceunits", ""))
    if others := set(units) - {"mm", "millimeter", "millimeters"}:
        return f"its header gives places in {', '.join(sorted(others))}, not in mm. Export it again"
    return ""


def header_warnings(path: str | Path) -> tuple[str, ...]:
    """What a MetaImage header leaves open and its format has a default for."""
    header = _header(path)
    if header is None or header.nrrd or header.fields.keys() & {"transformmatrix", "rotation", "orientation"}:
        return ()
    return ("The header gives no orientation (TransformMatrix): axes are taken to run to the left, back and head.",)


def cut_off(need: int, have: int, packed: bool = False) -> str:
    """Say that there are fewer bytes of voxels than a header says; empty where there may be enough."""
    # deflate reaches about 1030:1
    if have * 1100 + 2**21 >= need if packed else have >= need:
        return ""
    return f"is cut off: its header says {need:,} bytes of voxels, there are {have:,}. Download or export it again"


def _coding(header: _Header) -> str:
    fields = header.fields
    if header.nrrd:
        return fields.get("encoding", "raw").lower()
    coding = "gzip" if fields.get("compresseddata", "").lower() == "true" else "raw"
    return "text" if fields.get("binarydata", "").lower() == "false" else coding


def check_packed(path: str | Path, need: int) -> None:
    """Unpack voxels once, of which ITK makes anything where they are damaged.

    Args:
        path: any file; other formats and codings pass.
        need: bytes of voxels.

    Raises:
        zlib.error: they are damaged or too few.
    """
    header = _header(path)
    if (
        header is None
        or _coding(header) not in ("gzip", "gz")
        or header.fields.keys() & {"line skip", "lineskip", "headersize"}
    ):
        return
    files = [Path(path).parent / name for name in _named_files(header)]
    for file in files or [Path(path)]:
        unpack, have = zlib.decompressobj(wbits=47), 0
        with open(file, "rb") as stream:
            stream.seek(0 if files else header.length)
            while not unpack.eof and (chunk := stream.read(_HEADER_BYTES)):
                have += len(unpack.decompress(chunk))
        if not unpack.eof or have < need / max(1, len(files)):
            raise zlib.error("too few bytes")


def too_few_bytes(path: str | Path, need: int) -> str:
    """`cut_off` of a MetaImage's or NRRD's files, or of the bytes behind its header; empty of any other file."""
    if (header := _header(path)) is None:
        return ""
    fields, coding = header.fields, _coding(header)
    files = [Path(path).parent / name for name in _named_files(header)]
    have = sum(file.stat().st_size for file in files) if files else Path(path).stat().st_size - header.length
    if coding == "gzip" and fields.get("compresseddatasize", "").isdigit():
        return cut_off(int(fields["compresseddatasize"]), have)
    return cut_off(need, have, coding != "raw") if coding in ("raw", "gzip", "gz") else ""


def _numbered_files(value: str) -> list[str]:
    """The files of a pattern such as "slice%03d.raw 1 24 1"; any other text is a name."""
    pattern = re.fullmatch(r"(.*)%(0?\d?)d(\S*)\s+(\d{1,5})\s+(\d{1,5})(?:\s+(\d{1,5}))?(?:\s+\d)?", value)
    if pattern is None:
        return [value]
    before, width, after = pattern[1], pattern[2], pattern[3]
    numbers = range(int(pattern[4]), int(pattern[5]) + 1, max(1, int(pattern[6] or 1)))
    return [f"{before}{number:{width}d}{after}" for number in numbers]
