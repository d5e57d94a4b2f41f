# SPDX-License-Identifier: Apache-2.0
"""3D volumes as ITK reads them: their geometry, a box of their voxels, and places in millimetres as voxel indices.

Places are written in ITK's world coordinates, LPS: mm to the patient's left, back and head. Affines are RAS, as in
nibabel and MONAI, so x and y change sign in between.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unimedi_components.errors import DataError
from unimedi_components.images.itk_loading import load_itk

__all__ = [
    "AIR_HU",
    "LPS_TO_RAS",
    "NOT_GREY",
    "VolumeGeometry",
    "cut_off",
    "header_gap",
    "header_warnings",
    "read_block",
    "read_geometry",
    "read_itk",
    "read_itk_geometry",
    "voxel_files",
    "voxel_to_world",
    "voxels_elsewhere",
    "world_to_voxel",
]

AIR_HU = -1000.0
_HEADER_BYTES = 2**16
# fields without which a header says nothing, as what they have to match
_NUMBERS = r"[\d.eE+-]+(\s+[\d.eE+-]+)*"
_WANTED = {
    False: {"DimSize": _NUMBERS, "ElementType": "MET_(U?(CHAR|SHORT|INT|LONG|LONG_LONG)|FLOAT|DOUBLE)"},
    True: {"sizes": _NUMBERS, "type": r"(?!block)\S.*"},
}
# the spaces whose axes are the patient's, and codings that ITK's reader has
_SPACES = "(ra|la|lp)st?|(right-anterior|left-anterior|left-posterior)-superior(-time)?"
_CODINGS = ("raw", "gzip", "gz", "ascii", "text", "txt", "hex")
#: What every reader says of voxels that are no single number.
NOT_GREY = "its voxels are colours or complex numbers. Convert them to grey values"
#: Turns homogeneous LPS coordinates into RAS ones, and back.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class VolumeGeometry:
    """Where a file's voxels are.

    Args:
        shape: voxels along the file's x, y and z axes.
        affine: (4, 4) voxel index to mm, RAS.
        voxel_bytes: bytes per stored voxel.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    voxel_bytes: int


def read_geometry(path: str | Path) -> VolumeGeometry:
    """Read size, offset, spacing and direction cosines of a 3D volume with ITK, without its voxels.

    Raises:
        DataError: see `read_itk_geometry`; it is not 3D, or the axes do not span space.
        RuntimeError: ITK cannot read the header.
    """
    shape, affine, voxel_bytes = read_itk_geometry(path)
    if len(shape) != 3:
        raise DataError(f"{path}: has {len(shape)} axes where a volume has 3")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-6:
        raise DataError(f"{path}: the direction cosines are singular or not finite; write the header again")
    return VolumeGeometry(shape, affine, voxel_bytes)


def read_itk_geometry(path: str | Path) -> tuple[tuple[int, ...], np.ndarray, int]:
    """Shape of any number of axes, affine (4, 4) to RAS mm of the first three, and bytes of a voxel.

    Raises:
        DataError: ITK does not know the format, a voxel holds several values, the header names voxels outside its
            folder or that are missing or too few, or leaves spacing or orientation open.
        RuntimeError: ITK cannot read the header.
    """
    if elsewhere := voxels_elsewhere(path):
        raise DataError(f"{path}: {elsewhere}")
    if gap := header_gap(path):
        raise DataError(f"{path}: {gap}")
    if header := _header(path):
        if missing := [name for name in _named_files(header) if not (Path(path).parent / name).is_file()]:
            raise DataError(f"{path}: its voxels {missing[0]} are missing. Unpack or download it again")
    itk = load_itk()
    image_io = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
    if image_io is None:
        raise DataError(f"{path}: no such file, or no reader knows the format")
    image_io.SetFileName(str(path))
    image_io.ReadImageInformation()
    n_axes = int(image_io.GetNumberOfDimensions())
    if int(image_io.GetNumberOfComponents()) > 1:
        raise DataError(f"{path}: {NOT_GREY}")
    affine = np.eye(4)
    for axis in range(min(3, n_axes)):
        direction = np.zeros(3)
        direction[: min(3, n_axes)] = np.asarray(list(image_io.GetDirection(axis)))[:3]
        affine[:3, axis] = direction * image_io.GetSpacing(axis)
        affine[axis, 3] = image_io.GetOrigin(axis)
    shape, voxel_bytes = tuple(int(image_io.GetDimensions(axis)) for axis in range(n_axes)), image_io.GetComponentSize()
    if header and (cut := _too_few_bytes(Path(path), header, math.prod(shape) * int(voxel_bytes))):
        raise DataError(f"{path}: {cut}")
    return shape, LPS_TO_RAS @ affine, int(voxel_bytes)


def read_itk(path: str | Path) -> np.ndarray:
    """Read all voxels as float32, axes in the file's order.

    Raises:
        DataError: see `read_itk_geometry`.
        RuntimeError: ITK cannot read the file.
        zlib.error: its packed voxels are damaged.
    """
    shape, _, voxel_bytes = read_itk_geometry(path)
    if header := _header(path):
        _check_packed(Path(path), header, math.prod(shape) * voxel_bytes)
    itk = load_itk()
    array = np.asarray(itk.array_from_image(itk.imread(str(path))))
    return array.astype(np.float32, copy=False).transpose()


def world_to_voxel(world: Any, affine: Any) -> np.ndarray:
    """Continuous voxel indices (N, 3) of places (N, 3) in LPS mm, for an affine (4, 4) to RAS mm."""
    to_index = np.linalg.inv(np.asarray(affine, dtype=float)) @ LPS_TO_RAS
    return np.asarray(world, dtype=float).reshape(-1, 3) @ to_index[:3, :3].T + to_index[:3, 3]


def voxel_to_world(voxel: Any, affine: Any) -> np.ndarray:
    """Places (N, 3) in LPS mm of continuous voxel indices (N, 3), for an affine (4, 4) to RAS mm."""
    to_world = LPS_TO_RAS @ np.asarray(affine, dtype=float)
    return np.asarray(voxel, dtype=float).reshape(-1, 3) @ to_world[:3, :3].T + to_world[:3, 3]


def read_block(path: str | Path, start: Sequence[int], size: Sequence[int], fill: float = AIR_HU) -> np.ndarray:
    """Read a box of voxels; of an uncompressed file no other bytes are read.

    Args:
        path: any 3D volume that ITK reads.
        start: first index along the file's x, y and z axes; may lie outside.
        size: voxels along them.
        fill: value of the voxels outside the volume.

    Returns:
        float32 (x, y, z) of shape ``size``.

    Raises:
        RuntimeError: ITK cannot read the file.
    """
    itk = load_itk()
    reader = itk.ImageFileReader[itk.Image[itk.F, 3]].New(FileName=str(path))
    reader.UpdateOutputInformation()
    image = reader.GetOutput()
    shape = np.array(image.GetLargestPossibleRegion().GetSize())
    begin = np.asarray(start, dtype=int)
    low, high = np.clip(begin, 0, shape), np.clip(begin + np.asarray(size), 0, shape)
    block = np.full(tuple(size), fill, np.float32)
    if (high <= low).any():
        return block
    image.SetRequestedRegion(itk.ImageRegion[3](low.tolist(), (high - low).tolist()))
    reader.Update()
    # A compressed file comes whole.
    first = low - np.array(image.GetBufferedRegion().GetIndex())
    buffered = itk.array_view_from_image(image, update=False).transpose(2, 1, 0)
    inside = tuple(slice(a, b) for a, b in zip(low - begin, high - begin, strict=True))
    block[inside] = buffered[tuple(slice(a, a + n) for a, n in zip(first, high - low, strict=True))]
    return block


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


def _check_packed(path: Path, header: _Header, need: int) -> None:
    """Unpack voxels once, of which ITK makes anything where they are damaged; raises zlib.error where they are."""
    if _coding(header) not in ("gzip", "gz") or header.fields.keys() & {"line skip", "lineskip", "headersize"}:
        return
    files = [path.parent / name for name in _named_files(header)]
    for file in files or [path]:
        unpack, have = zlib.decompressobj(wbits=47), 0
        with open(file, "rb") as stream:
            stream.seek(0 if files else header.length)
            while not unpack.eof and (chunk := stream.read(_HEADER_BYTES)):
                have += len(unpack.decompress(chunk))
        if not unpack.eof or have < need / max(1, len(files)):
            raise zlib.error("too few bytes")


def _too_few_bytes(path: Path, header: _Header, need: int) -> str:
    fields, coding = header.fields, _coding(header)
    files = [path.parent / name for name in _named_files(header)]
    have = sum(file.stat().st_size for file in files) if files else path.stat().st_size - header.length
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
