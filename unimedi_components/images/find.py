# SPDX-License-Identifier: Apache-2.0
"""From files, folders, patterns and DICOMDIRs to X-rays and volumes, and to what is left out and why."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from unimedi_components.errors import DataError, reason_of
from unimedi_components.images.checks import CTLimits, header_fault
from unimedi_components.images.dicom_series import sort_headers
from unimedi_components.images.dicom_stacks import Stack
from unimedi_components.images.headers import DicomHeader, read_header, values_of
from unimedi_components.images.identify import DICOM, PICTURES, content_fault, identify, is_image
from unimedi_components.images.text_headers import voxel_files
from unimedi_components.images.volume import read_volume_header, stack_header
from unimedi_components.images.xray_checks import dicom_warnings

__all__ = [
    "VOLUME_ENDINGS",
    "Image",
    "ImageList",
    "LeftOut",
    "expand",
    "find_images",
    "image_at",
    "image_items",
    "sort_files",
]

logger = logging.getLogger(__name__)

VOLUME_ENDINGS = (".nii", ".nii.gz", ".mhd", ".mha", ".nrrd", ".nhdr")
_GEOMETRY = CTLimits(min_slices=2, min_megabytes=0.0)


class LeftOut(NamedTuple):
    """A file that is no image of its own: why, and whether that is a fault (what is no image is none)."""

    file: str
    reason: str
    fault: bool


@dataclass(frozen=True)
class Image:
    """An X-ray or a volume, before its pixels are read.

    Args:
        path: the file, or the folder that holds a DICOM stack.
        dim: 2 for an X-ray, 3 for a volume.
        files: exactly the files that it is read from.
        content: what `identify` says.
        warnings: what the reader has to mend.
        header: of a DICOM X-ray.
        stack: of a DICOM volume.
        stem: name without ending.
    """

    path: Path
    dim: int
    files: tuple[Path, ...]
    content: str
    warnings: tuple[str, ...] = ()
    header: DicomHeader | None = field(default=None, repr=False)
    stack: Stack | None = field(default=None, repr=False)

    @property
    def is_folder(self) -> bool:
        """Whether a stack of files stands for the image rather than one file."""
        return len(self.files) > 1


class ImageList(list[dict[str, Any]]):
    """Items, and under `left_out` the files that are none."""

    def __init__(self, items: Iterable[dict[str, Any]] = (), left_out: Iterable[LeftOut] = ()) -> None:
        super().__init__(items)
        self.left_out = list(left_out)

    @property
    def not_read(self) -> list[LeftOut]:
        """Images that are none of the items, the files of one series together; what is no image does not count."""
        groups: dict[tuple[str, str, bool], list[LeftOut]] = {}
        for one in self.left_out:
            if one.fault or _is_image(one):
                groups.setdefault((os.path.dirname(one.file), one.reason, one.fault), []).append(one)
        return [
            members[0] if len(members) == 1 else LeftOut(folder, f"{reason} ({len(members)} files)", fault)
            for (folder, reason, fault), members in groups.items()
        ]


def find_images(
    inputs: str | Sequence[str] | None = None, root: str | Path = ".", assume_hu: bool = False
) -> ImageList:
    """Items for each X-ray and CT volume that the inputs name.

    Content decides what a file is: pictures and DICOM films are X-rays, NIfTI, MetaImage and NRRD files, DICOM files of
    many frames and DICOM slices of one geometric stack are volumes. What is left out is logged, by file and reason.

    Args:
        inputs: a file, folder, DICOMDIR or pattern such as `scans/**/*.nii.gz`, or several; relative ones are looked
            for in `root`, then in the current folder. None takes all below `root`.
        root: folder of relative inputs.
        assume_hu: take CT values for Hounsfield units that do not say how they are rescaled.

    Returns:
        {"id", "image" and "source": absolute path, "dim": 2 or 3, "report": ""} each, of a DICOM stack "files" too, of
        a volume "check_hu" (its values are checked when it is read) or "assume_hu"; ids are unique and can be file
        names.

    Raises:
        DataError: an input names nothing, or nothing was found.
    """
    base = Path(root).expanduser().absolute()
    named = [str(inputs)] if isinstance(inputs, (str, Path)) else [str(name) for name in (inputs or ["."])]
    images, left_out = sort_files(expand(named, base), assume_hu)
    _log(images, left_out)
    if not images:
        first = next((one for one in left_out if one.fault), left_out[0] if left_out else None)
        why = f" ({first.file}: {first.reason})" if first else ""
        raise DataError(f"{', '.join(named)}: no image in it; name X-ray or CT files, or folders that hold them{why}")
    return ImageList(image_items(images, base, assume_hu), left_out)


def _log(images: Sequence[Image], left_out: Sequence[LeftOut]) -> None:
    for line in summarised(left_out):
        logger.warning("left out %s", line)
    for image in images:
        for warning in image.warnings:
            logger.warning("%s: %s", image.path, warning)


def expand(names: Sequence[str], base: Path) -> list[Path]:
    """All files that files, folders, patterns and DICOMDIRs name, each once; hidden ones of folders are passed over.

    Raises:
        DataError: a name stands for nothing.
    """
    files: dict[Path, None] = {}
    for name in names:
        for folder in (base, Path.cwd()):
            pattern = os.path.normpath(os.path.join(folder, os.path.expanduser(name)))
            matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
            if matches:
                break
        else:
            # a command line may have read such a name as a number, as 2024_01
            hint = f"; a name of digits alone is written ./{name}" if name.replace(".", "").isdigit() else ""
            raise DataError(f"{name}: no such file, folder or pattern, neither in {base} nor in {Path.cwd()}{hint}")
        for match in map(Path, matches):
            if match.is_dir():
                files |= dict.fromkeys(sorted(_below(match)))
            elif match.name.upper() == "DICOMDIR":
                files |= dict.fromkeys([match, *_listed_files(match)])
            else:
                files[match] = None
    return list(files)


def _below(folder: Path) -> Iterator[Path]:
    """Files below a folder and the folders that it links to, each folder once; also links to files that are missing."""
    seen = set()

    def closed(error: OSError) -> None:
        logger.warning("left out %s: cannot be opened (%s)", error.filename, error.strerror)

    for here, folders, names in os.walk(folder, onerror=closed, followlinks=True):
        if (place := os.path.realpath(here)) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = (Path(here, name) for name in names if not name.startswith("."))
        yield from (file for file in files if file.is_file() or file.is_symlink())


def _listed_files(directory: Path) -> list[Path]:
    """The files that a DICOMDIR refers to; those that are missing are named when they are read."""
    try:
        records = values_of(read_header(directory).dataset, "DirectoryRecordSequence")
    except DataError:
        return []
    files = []
    for record in records:
        parts = [str(part) for part in values_of(record, "ReferencedFileID")]
        if not parts or ".." in parts:
            continue
        # a copy of a CD may have small letters
        places = (Path(directory.parent, *case) for case in (parts, [part.lower() for part in parts]))
        files.append(next((place for place in places if place.is_file()), Path(directory.parent, *parts)))
    return sorted(files)


def sort_files(files: Iterable[Path], assume_hu: bool = False) -> tuple[list[Image], list[LeftOut]]:
    """Files as X-rays and volumes, in the order of their paths, and those that are neither.

    Args:
        files: each once.
        assume_hu: see `find_images`.
    """
    images: list[Image] = []
    left_out: list[LeftOut] = []
    headers: list[DicomHeader] = []
    contents: dict[Path, str] = {}
    for file in files:
        try:
            contents[file] = identify(file)
        except OSError as error:
            lost = file.is_symlink() and not file.exists()
            why = f"cannot be opened ({error.strerror or error})"
            why = "is a link to a file that is missing. Fetch it" if lost else why
            left_out.append(LeftOut(str(file), why, True))
    voxels = {
        Path(os.path.normpath(file.parent / name))
        for file, content in contents.items()
        if content in ("metaimage", "nrrd")
        for name in voxel_files(file)
    }
    for file, content in contents.items():
        if file in voxels and not is_image("", content):
            continue
        fault = content_fault(file.name, content)
        try:
            if fault:
                left_out.append(LeftOut(str(file), fault, is_image(file.name, content)))
            elif content == DICOM:
                headers.append(read_header(file))
            elif content in PICTURES:
                images.append(Image(file, 2, (file,), content))
            else:
                images.append(Image(file, 3, (file,), content, _checked_geometry(file)))
        except DataError as error:
            left_out.append(LeftOut(str(file), str(error).removeprefix(f"{file}: "), True))
    series = sort_headers(headers, assume_hu)
    for header in series.xrays:
        path = Path(header.path)
        images.append(Image(path, 2, (path,), DICOM, dicom_warnings(header), header))
    for stack in series.stacks:
        if (unsound := header_fault(stack_header(stack), _GEOMETRY)) is not None:
            left_out += [LeftOut(str(file), unsound[1], True) for file in stack.files]
        else:
            images.append(_volume(stack))
    left_out += [LeftOut(str(file), reason, fault) for file, reason, fault in series.left_out]
    images.sort(key=lambda image: (image.path, image.dim, image.files[0]))
    return images, sorted(left_out)


def _checked_geometry(file: Path) -> tuple[str, ...]:
    """Warnings of a volume's header.

    Raises:
        DataError: it is not one sound volume.
    """
    try:
        header = read_volume_header(file)
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(reason_of(error, file)) from error
    if (fault := header_fault(header, _GEOMETRY)) is not None:
        raise DataError(fault[1])
    return header.warnings


def _volume(stack: Stack) -> Image:
    files = tuple(stack.files)
    path = files[0] if len(files) == 1 else Path(os.path.commonpath([file.parent for file in files]))
    return Image(path, 3, files, DICOM, (*stack.warnings, *dicom_warnings(stack.header)), stack=stack)


def image_items(images: Sequence[Image], base: Path, assume_hu: bool = False) -> list[dict[str, Any]]:
    """Datalist items of images, as of `find_images`."""
    return [
        {
            **{"id": name, "image": str(image.path), "source": str(image.path), "dim": image.dim, "report": ""},
            **({"files": [str(file) for file in image.files]} if image.is_folder else {}),
            **({} if image.dim == 2 else {"assume_hu": True} if assume_hu else {"check_hu": True}),
        }
        for name, image in zip(_unique_names(images, base), images, strict=True)
    ]


def image_at(path: Path, assume_hu: bool = False) -> Image:
    """The one image that a file or folder is.

    Raises:
        DataError: it is none, or several.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file. Correct the path or fetch the file")
    images, left_out = sort_files(expand([str(path)], path.parent), assume_hu)
    if len(images) == 1:
        _log(images, left_out)
        return images[0]
    if len(images) > 1:
        found = "; ".join(image.stack.described if image.stack else image.path.name for image in images[:4])
        raise DataError(f"{path}: holds {len(images)} images and not one ({found}). Give the files of one alone")
    first = next((one for one in left_out if one.fault), left_out[0] if left_out else None)
    if first is None:
        raise DataError(f"{path}: the folder holds no image. Correct the path")
    raise DataError(f"{first.file if len(left_out) == 1 else path}: {first.reason}")


def summarised(left_out: Sequence[LeftOut]) -> list[str]:
    """A line for each reason in each folder: the file, or how many there are; what is no image at all is counted."""
    lines: list[str] = []
    groups: dict[tuple[str, str], list[LeftOut]] = {}
    for one in left_out:
        key = (os.path.dirname(one.file), one.reason) if one.fault or _is_image(one) else ("", "")
        groups.setdefault(key, []).append(one)
    for (folder, reason), members in groups.items():
        if not reason:
            lines.append(f"{len(members)} files that are no images, such as {members[0].file}")
        elif len(members) == 1:
            lines.append(f"{members[0].file}: {reason}")
        else:
            lines.append(f"{folder}: {len(members)} files, such as {os.path.basename(members[0].file)}: {reason}")
    return lines


def _is_image(one: LeftOut) -> bool:
    # what content that is not read is said to do
    return not one.reason.startswith("holds")


def _unique_names(images: Sequence[Image], base: Path) -> list[str]:
    """File names without endings; the folders below `base` are part of them."""
    names: list[str] = []
    used: set[str] = set()
    numbers: dict[str, int] = {}
    for image in images:
        path = image.path
        relative = path.relative_to(base) if path.is_relative_to(base) and path != base else Path(path.name)
        # no letters that a file system forbids, nor bytes that are none
        stem = re.sub(r"[\\/:\x00-\x1f\x7f\ud800-\udfff]", "_", "_".join(relative.parts))
        if not image.is_folder:
            ending = next((end for end in (*VOLUME_ENDINGS[::-1], path.suffix) if path.name.lower().endswith(end)), "")
            ending = ending if image.content != DICOM or not ending[1:].isdigit() else ""
            stem = stem[: len(stem) - len(ending)] or stem
        number, name = numbers.get(stem, 1), stem
        while name in used:
            number += 1
            name = f"{stem}-{number}"
        numbers[stem] = number
        used.add(name)
        names.append(name)
    return names
