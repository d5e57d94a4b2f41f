# SPDX-License-Identifier: Apache-2.0
"""Uploaded NIfTI, MetaImage and NRRD files as plain files that no header can lead astray.

A header is text or numbers from a stranger: it may promise more voxels than memory holds, or name another file of this
machine as its voxels. So sizes are checked before anything is allocated, gz is unpacked under a limit, and text
headers are written anew from the fields that are known.
"""

import gzip
import math
import os
import re
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib

from unimedi_components.errors import reason_of
from unimedi_components.images.checks import CTLimits, check_ct
from unimedi_components.images.text_headers import header_gap, voxel_files, voxels_elsewhere
from unimedi_components.images.volume import read_volume_header
from unimedi_components.serve.faults import Limits, UploadError, too_large, unusable
from unimedi_components.serve.uploads import Received

_CHUNK = 2**20
_HEADER_BYTES = 2**16
_GEOMETRY = CTLimits(min_slices=2, min_megabytes=0.0)
_META_FIELDS = (
    *("ObjectType", "NDims", "DimSize", "ElementSpacing", "ElementSize", "ElementType", "ElementNumberOfChannels"),
    *("Offset", "Origin", "Position", "TransformMatrix", "Rotation", "Orientation", "CenterOfRotation"),
    *("AnatomicalOrientation", "BinaryData", "BinaryDataByteOrderMSB", "ElementByteOrderMSB", "CompressedData"),
    *("CompressedDataSize", "DistanceUnits"),
)
_NRRD_SKIPS = ("line skip", "lineskip", "byte skip", "byteskip")
_NRRD_FIELDS = (
    *("type", "dimension", "sizes", "encoding", "endian", "space", "space dimension", "space directions"),
    *("space origin", "space units", "spacings", "kinds", "centers", "centerings", *_NRRD_SKIPS),
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
    if gap := voxels_elsewhere(file.path) or header_gap(file.path):
        raise unusable(f"{file.name}: {gap}.")
    try:
        if content.startswith("nifti"):
            path = _nifti(file, folder, limits)
        elif content == "metaimage":
            path = _metaimage(file, companions, folder, limits)
        else:
            path = _nrrd(file, companions, folder, limits)
    except UploadError:
        raise
    except Exception as error:
        raise unusable(f"{file.name}: {reason_of(error, file.path, file.name)}.") from error
    fault = check_ct(path, _GEOMETRY, values=False)
    if fault is not None:
        raise unusable(f"{file.name}: {fault.detail.removeprefix(f'{path}: ')}.")
    return path


def check_voxels(shape: Sequence[int], name: str, limits: Limits) -> None:
    """Check a volume's size by its header. Raises UploadError: it is too large."""
    if math.prod(shape) > limits.voxels:
        text = " × ".join(map(str, shape))
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
    check_voxels(shape, file.name, limits)
    # what every command says of it
    whole = read_volume_header(file.path)
    if packed:
        _gunzip(file, path, int(header["vox_offset"]) + math.prod(shape) * whole.voxel_bytes)
    else:
        file.path.rename(path)
    return path


def _gunzip(file: Received, path: Path, need: int) -> None:
    # more can follow only where the header does not tell the truth
    left = need + _CHUNK
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


def _voxel_paths(file: Received, companions: Sequence[Received], whole: bool) -> list[Path]:
    """The uploaded files that a header says its voxels are in, in its order; `whole`: they cannot be joined."""
    names = [os.path.basename(name) for name in voxel_files(file.path)]
    if len(names) > 1 and (whole or len(set(names)) < len(names)):
        raise unusable(f"{file.name}: its slices lie in packed files or in several folders. Convert it to one file.")
    received = {other.name: other.path for other in companions}
    if missing := [name for name in names if name not in received]:
        raise unusable(f"{file.name}: its voxels {missing[0]} are missing. Drop {file.name} and {missing[0]} together.")
    return [received[name] for name in names]


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
    check_voxels((*shape, int(fields.get("ElementNumberOfChannels", "1") or 1)), file.name, limits)
    voxels, name = folder / "voxels.raw", last_part(fields["ElementDataFile"])
    packed = fields.get("CompressedData", "").lower() == "true"
    voxels = voxels.with_suffix(".zraw") if packed else voxels
    if name == "LOCAL":
        _copy_from(file.path, length, voxels)
    else:
        for part in _voxel_paths(file, companions, packed):
            _copy_from(part, 0, voxels)
    of_file = () if name == "LOCAL" else ("HeaderSize",)
    known = [f"{field} = {fields[field]}" for field in (*_META_FIELDS, *of_file) if field in fields]
    path = folder / "volume.mhd"
    path.write_text("\n".join([*known, f"ElementDataFile = {voxels.name}", ""]), encoding="latin-1")
    return path


def _nrrd(file: Received, companions: Sequence[Received], folder: Path, limits: Limits) -> Path:
    with open(file.path, "rb") as stream:
        head = stream.read(_HEADER_BYTES)
    end = re.search(rb"\r?\n\r?\n", head)
    lines = head[: None if end is None else end.start()].decode("latin-1").splitlines()
    pairs = (line.partition(": ") for line in lines[1:] if not line.startswith("#") and ":=" not in line)
    fields = {name.strip().lower(): value.strip() for name, _, value in pairs}
    voxels = fields.get("data file", fields.get("datafile", ""))
    if not (voxels or end):
        raise unusable(f"{file.name}: the NRRD header is cut off. Save it again.")
    sources, start = [file.path], 0 if end is None else end.end()
    if voxels:
        whole = fields.get("encoding", "") != "raw" or bool(fields.keys() & set(_NRRD_SKIPS))
        sources, start = _voxel_paths(file, companions, whole), 0
    check_voxels(tuple(int(size) for size in fields.get("sizes", "").split()), file.name, limits)
    path = folder / "volume.nrrd"
    known = [lines[0][:8], *(f"{name}: {fields[name]}" for name in _NRRD_FIELDS if name in fields)]
    path.write_bytes(("\n".join(known) + "\n\n").encode("latin-1"))
    for source in sources:
        _copy_from(source, start, path)
    return path


def _copy_from(source: Path, start: int, target: Path) -> None:
    with open(source, "rb") as stream, open(target, "ab") as out:
        stream.seek(start)
        shutil.copyfileobj(stream, out, _CHUNK)
