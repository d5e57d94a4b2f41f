# SPDX-License-Identifier: Apache-2.0
"""Uploaded NIfTI, MetaImage and NRRD files as plain files that no header can lead astray.

A header is text or numbers from a stranger: it may promise more voxels than memory holds, or name another file of this
machine as its voxels. So sizes are checked before anything is allocated, gz is unpacked under a limit, and text
headers are written anew from the fields that are known.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib

from unimedi_components.images.checks import CTLimits, check_ct, check_metaimage
from unimedi_components.images.itk_volumes import NOT_GREY, voxels_elsewhere
from unimedi_components.images.volume import shape_problem
from unimedi_components.serve.faults import Limits, UploadError, too_large, unusable
from unimedi_components.serve.uploads import Received

_CHUNK = 2**20
_HEADER_BYTES = 2**16
_GEOMETRY = CTLimits(min_slices=2, min_megabytes=0.0)
_META_FIELDS = (
    *("ObjectType", "NDims", "DimSize", "ElementSpacing", "ElementSize", "ElementType", "ElementNumberOfChannels"),
    *("Offset", "Origin", "Position", "TransformMatrix", "Rotation", "Orientation", "CenterOfRotation"),
    *("AnatomicalOrientation", "BinaryData", "BinaryDataByteOrderMSB", "ElementByteOrderMSB", "CompressedData"),
    *("CompressedDataSize",),
)
_NRRD_FIELDS = (
    *("type", "dimension", "sizes", "encoding", "endian", "space", "space dimension", "space directions"),
    *("space origin", "space units", "spacings", "kinds", "centers", "centerings"),
)


def prepare_volume(content: str, file: Received, companions: Sequence[Received], folder: Path, limits: Limits) -> Path:
    """Check a volume's header and write it as a file that can be read safely.

    Args:
        content: "nifti", "nifti.gz", "metaimage" or "nrrd".
        companions: files that may hold a header's voxels.

    Returns:
        path of the volume, with sound geometry.

    Raises:
        UploadError: too large, damaged, 4D, or without usable geometry.
    """
    if elsewhere := voxels_elsewhere(file.path):
        raise unusable(f"{file.name}: {elsewhere}.")
    try:
        if content.startswith("nifti"):
            path = _nifti(file, folder, limits)
        elif content == "metaimage":
            path = _metaimage(file, companions, folder, limits)
        else:
            path = _nrrd(file, companions, folder, limits)
    except UploadError:
        raise
    except Exception as error:  # nibabel, zlib and ITK raise many kinds for broken files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        reason = reason.replace(str(file.path), file.name)[:160]
        raise unusable(f"{file.name}: cannot be read as a volume ({reason}). Export or convert it again.") from error
    fault = check_ct(path, _GEOMETRY, values=False)
    if fault is not None:
        raise unusable(f"{file.name}: {fault.detail.removeprefix(f'{path}: ')}.")
    return path


def check_voxels(shape: Sequence[int], name: str, limits: Limits) -> None:
    """Check a volume's size by its header.

    Raises:
        UploadError: it is not 3D, or too large.
    """
    # one slice is said by the checks of the file or of the series
    if (problem := shape_problem(shape)) and (len(shape) != 3 or min(shape) < 1):
        raise unusable(f"{name}: {problem}.")
    text = " × ".join(map(str, shape))
    if math.prod(shape) > limits.voxels:
        raise too_large(
            f"{name}: its header says {text} voxels, more than {limits.voxels:,} in all. Crop or resample the volume."
        )


def _nifti(file: Received, folder: Path, limits: Limits) -> Path:
    with open(file.path, "rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    path = folder / "volume.nii"
    with gzip.open(file.path) if packed else open(file.path, "rb") as stream:
        block = stream.read(540)
    two = block[4:7] == b"n+2"
    header: Any = (nib.Nifti2Header if two else nib.Nifti1Header)(block if two else block[:348], check=False)
    shape = tuple(int(size) for size in header["dim"][1 : 1 + max(0, min(int(header["dim"][0]), 7))])
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    check_voxels(shape, file.name, limits)
    kind = header.get_data_dtype()
    if kind.names or kind.kind not in "iuf":
        raise unusable(f"{file.name}: {NOT_GREY}.")
    need = int(header["vox_offset"]) + math.prod(shape) * kind.itemsize
    if packed:
        _gunzip(file, path, need)
    else:
        file.path.rename(path)
    if (size := path.stat().st_size) < need:
        raise unusable(f"{file.name}: is cut off: {size:,} bytes where {need:,} are needed. Download it again.")
    return path


def _gunzip(file: Received, path: Path, need: int) -> None:
    left = need + _CHUNK
    # more can follow only where the header does not tell the truth
    if left > 1100 * file.path.stat().st_size + 2 * _CHUNK:
        raise unusable(f"{file.name}: is cut off: its header says {need:,} bytes of voxels. Download it again.")
    try:
        with gzip.open(file.path) as stream, open(path, "wb") as out:
            while left > 0 and (chunk := stream.read(min(_CHUNK, left))):
                out.write(chunk)
                left -= len(chunk)
    except (OSError, EOFError, zlib.error):
        fault = "the compressed data is damaged or cut off"
        raise unusable(f"{file.name}: {fault}. Download or export it again.") from None


def last_part(name: str) -> str:
    """What an upload is called of a path in a header."""
    return re.split(r"[/\\]", name)[-1]


def _companion(name: str, file: Received, companions: Sequence[Received]) -> Received:
    """The uploaded file that a header says its voxels are in."""
    if name.split()[:1] == ["LIST"] or "%" in name:
        raise unusable(f"{file.name}: its slices lie in files of their own. Convert it to one .mha or .nii.gz file.")
    found = next((other for other in companions if other.name == name), None)
    if found is None:
        raise unusable(f"{file.name}: its voxels {name} are missing. Drop {file.name} and {name} together.")
    return found


def _meta_fields(file: Received) -> tuple[dict[str, str], int]:
    """Fields up to ElementDataFile, which ends a header, and the number of bytes that they take."""
    with open(file.path, "rb") as stream:
        head = stream.read(_HEADER_BYTES)
    fields, done = {}, 0
    for line in head.splitlines(keepends=True):
        done += len(line)
        name, _, value = line.decode("latin-1").partition("=")
        fields[name.strip()] = value.strip()
        if name.strip() == "ElementDataFile":
            return fields, done
    raise unusable(f"{file.name}: the MetaImage header lacks ElementDataFile. Export the volume again.")


def _metaimage(file: Received, companions: Sequence[Received], folder: Path, limits: Limits) -> Path:
    fields, length = _meta_fields(file)
    shape = tuple(int(size) for size in fields.get("DimSize", "").split())
    channels = int(fields.get("ElementNumberOfChannels", "1") or 1)
    check_voxels(shape if channels == 1 else (*shape, channels), file.name, limits)
    voxels, name = folder / "voxels.raw", last_part(fields["ElementDataFile"])
    packed = fields.get("CompressedData", "").lower() == "true"
    voxels = voxels.with_suffix(".zraw") if packed else voxels
    if name == "LOCAL":
        _copy_from(file.path, length, voxels)
    else:
        _companion(name, file, companions).path.rename(voxels)
    known = [f"{field} = {fields[field]}" for field in _META_FIELDS if field in fields]
    path = folder / "volume.mhd"
    path.write_text("\n".join([*known, f"ElementDataFile = {voxels.name}", ""]), encoding="latin-1")
    fault, _ = check_metaimage(path, "quick")
    if fault is not None:
        detail = fault.detail.removeprefix(f"{path}: ").replace(voxels.name, "its file of voxels")
        raise unusable(f"{file.name}: {detail}.")
    return path


def _nrrd(file: Received, companions: Sequence[Received], folder: Path, limits: Limits) -> Path:
    with open(file.path, "rb") as stream:
        head = stream.read(_HEADER_BYTES)
    end = re.search(rb"\r?\n\r?\n", head)
    lines = head[: None if end is None else end.start()].decode("latin-1").splitlines()
    pairs = (line.partition(": ") for line in lines[1:] if not line.startswith("#") and ":=" not in line)
    fields = {name.strip().lower(): value.strip() for name, _, value in pairs}
    voxels = fields.get("data file", fields.get("datafile", ""))
    if fields.keys() & {"line skip", "lineskip", "byte skip", "byteskip"} or not (voxels or end):
        raise unusable(f"{file.name}: the NRRD header skips bytes or is cut off. Save it as one .nrrd file.")
    source, start = file.path, 0 if end is None else end.end()
    if voxels:
        source, start = _companion(last_part(voxels), file, companions).path, 0
    check_voxels(tuple(int(size) for size in fields.get("sizes", "").split()), file.name, limits)
    path = folder / "volume.nrrd"
    known = [lines[0][:8], *(f"{name}: {fields[name]}" for name in _NRRD_FIELDS if name in fields)]
    path.write_bytes(("\n".join(known) + "\n\n").encode("latin-1"))
    _copy_from(source, start, path)
    size, need = path.stat().st_size, math.prod(int(size) for size in fields["sizes"].split())
    if fields.get("encoding", "") == "raw" and size < need:
        raise unusable(f"{file.name}: is cut off: {size:,} bytes for {need:,} voxels. Download it again.")
    return path


def _copy_from(source: Path, start: int, target: Path) -> None:
    with open(source, "rb") as stream, open(target, "ab") as out:
        stream.seek(start)
        while chunk := stream.read(_CHUNK):
            out.write(chunk)
