# SPDX-License-Identifier: Apache-2.0
"""From the files of an upload to the one study that they are."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from unimedi_components.data.volume_loading import part_of
from unimedi_components.errors import DataError, reason_of
from unimedi_components.images.dicom_series import Sorted, sort_headers
from unimedi_components.images.headers import DicomHeader, read_header
from unimedi_components.images.identify import DICOM, PICTURES, VOLUMES, content_fault, family_of_name, identify
from unimedi_components.images.text_headers import voxel_files
from unimedi_components.images.volume import read_volume_header
from unimedi_components.images.xray import read_xray
from unimedi_components.images.xray_checks import PICTURE_FORMATS, dicom_warnings, modality_words
from unimedi_components.serve.faults import ACCEPTED, Limits, UploadError, bad_request, too_large, unsupported, unusable
from unimedi_components.serve.uploads import Received, names_of, unpack
from unimedi_components.serve.volumes import check_voxels, last_part, prepare_volume


@dataclass(frozen=True)
class Study:
    """One X-ray or one volume, checked and ready to be read.

    Args:
        dim: 2 for an X-ray, 3 for a volume.
        path: the file, or the folder of a DICOM series.
        warnings: what the user should know about it.
        part: of a volume, see `part_of`.
        names: what the files of a series are called, in the order of our own names.
    """

    name: str
    dim: int
    path: Path
    facts: dict[str, str]
    warnings: list[str] = field(default_factory=list)
    part: str = ""
    names: tuple[str, ...] = ()


def find_study(files: Sequence[Received], folder: Path, limits: Limits) -> Study:
    """Find out what was uploaded.

    Args:
        folder: for what is unpacked, joined or written anew.

    Raises:
        UploadError: anything but one X-ray or one volume that can be read.
    """
    if not files:
        raise bad_request(f"no file was uploaded. Give {ACCEPTED}.")
    name, contents = "", {file: identify(file.path) for file in files}
    zips = [file for file, content in contents.items() if content == "zip"]
    if zips:
        if len(files) > 1:
            raise unusable(f"{zips[0].name}: a zip among other files. Drop the zip alone.")
        if family_of_name(zips[0].name):
            raise _renamed_zip(zips[0])
        name = zips[0].name
        contents = {file: identify(file.path) for file in unpack(zips[0], folder, limits)}
    if len(contents) > limits.files:
        raise too_large(f"{len(contents)} files at once, more than {limits.files}. Drop one series.")
    if len(contents) > 1:
        contents = {file: content for file, content in contents.items() if not file.ignored} or contents
    return _one_study(contents, name, folder, limits)


def not_read(name: str, content: str) -> UploadError | None:
    """The fault of a file whose content is not read, or is another than its name says; None where both are fine."""
    fault = content_fault(name, content)
    if not fault:
        return None
    if content in ("empty", "bad gzip") or name.lower().endswith((".raw", ".zraw")):
        return unusable(f"{name}: {fault}.")
    more = f". Give {ACCEPTED}" if fault.endswith("not read here") else ""
    return unsupported(f"{name}: {fault}{more}.")


def _renamed_zip(file: Received) -> Exception:
    fault = not_read(file.name, "zip")
    assert fault is not None
    return fault


def _one_study(contents: dict[Received, str], archive: str, folder: Path, limits: Limits) -> Study:
    headers = [file for file, content in contents.items() if content in ("metaimage", "nrrd")]
    voxels = {last_part(name) for file in headers for name in voxel_files(file.path)}
    others: dict[Received, str] = {}
    left_out: list[Received] = []
    broken: dict[Received, UploadError] = {}
    for file, content in contents.items():
        # a header may name itself
        if file.name in voxels and file not in headers:
            continue
        fault = not_read(file.name, content)
        if fault is None:
            others[file] = content
        elif len(contents) == 1 or family_of_name(file.name) or content == "nifti pair":
            broken[file] = fault
        else:
            left_out.append(file)
    dicom = [file for file, content in others.items() if content == DICOM]
    # of a series some files may be damaged; of anything else that is another study
    if any(not dicom or family_of_name(file.name) != DICOM for file in broken):
        raise next(iter(broken.values()))
    if not others:
        fault = not_read(left_out[0].name, contents[left_out[0]])
        assert fault is not None
        raise fault
    notes = [f"Left out, no image: {names_of(left_out)}."] if left_out else []
    notes += [f"Left out: {fault}" for fault in broken.values()]
    if dicom and len(dicom) == len(others):
        return _dicom_study(dicom, archive, notes, folder, limits)
    if len(others) > 1:
        raise unusable(f"{names_of(others)}: {len(others)} studies at once. Drop one X-ray or one CT at a time.")
    ((file, content),) = others.items()
    shown = f"{file.name} in {archive}" if archive else file.name
    if content in PICTURES:
        facts = check_picture(file.path, file.name, limits)
        path = file.path.rename(folder / f"xray{PICTURES[content]}")
        return Study(shown, 2, path, facts, notes)
    companions = [other for other in contents if other is not file]
    path = prepare_volume(content, file, companions, folder, limits)
    kinds = {"metaimage": "MetaImage volume", "nrrd": "NRRD volume"}
    assert content in VOLUMES
    notes += read_volume_header(path).warnings
    return Study(
        shown, 3, path, {"File": kinds.get(content, "NIfTI volume")}, notes, part_of({"assume_hu": limits.assume_hu})
    )


def _dicom_study(files: Sequence[Received], archive: str, notes: Sequence[str], folder: Path, limits: Limits) -> Study:
    """The one X-ray or the one stack of CT slices among DICOM files, sorted as every command sorts them."""
    received = {file.path: file for file in files}
    headers: list[DicomHeader] = []
    damaged: list[UploadError] = []
    for upload in files:
        try:
            headers.append(read_header(upload.path))
        except DataError as error:
            damaged.append(unusable(f"{upload.name}: {reason_of(error, upload.path, upload.name)}."))
    if not headers:
        raise damaged[0]
    found = sort_headers(headers, limits.assume_hu)
    if not found.xrays and not found.stacks:
        path, reason, _ = found.left_out[0]
        refuse = unsupported if "modality" in reason and "pixels" not in reason else unusable
        raise refuse(f"{received[path].name}: {reason}.")
    if len(found.xrays) + len(found.stacks) > 1:
        raise _several(found, received)
    besides: dict[str, list[Received]] = {}
    for path, reason, _ in found.left_out:
        besides.setdefault(reason, []).append(received[path])
    left_out = [f"Left out: {names_of(members)}: {reason}." for reason, members in besides.items()]
    warnings = [*notes, *(f"Left out: {error}" for error in damaged), *left_out]
    first = received[Path((found.xrays or [found.stacks[0].header])[0].path)]
    if found.xrays:
        facts, more = check_xray(found.xrays[0], first.name, limits)
        path = first.path.rename(folder / "xray.dcm")
        return Study(first.name, 2, path, facts, [*warnings, *more])
    stack = found.stacks[0]
    check_voxels((stack.header.columns, stack.header.rows, len(stack.slices)), first.name, limits)
    several = len(stack.files) > 1
    frames = f"series of {len(stack.files)} files" if several else f"of {len(stack.slices)} frames"
    facts = {"File": f"DICOM CT {frames}"}
    if description := stack.header.text("SeriesDescription")[:60]:
        facts["Series"] = description
    series = folder / "series"
    series.mkdir()
    for number, file in enumerate(stack.files):
        file.rename(series / f"{number:05d}.dcm")
    first = min((received[file] for file in stack.files), key=lambda file: list(received).index(file.path))
    shown = archive or (f"{first.name} and {len(stack.files) - 1} more" if several else first.name)
    path = series if several else series / "00000.dcm"
    warnings += [*dicom_warnings(stack.header), *stack.warnings]
    names = tuple(received[file].name for file in stack.files) if several else ()
    return Study(shown, 3, path, facts, warnings, part_of({"assume_hu": limits.assume_hu}), names)


def _several(found: Sorted, received: Mapping[Path, Received]) -> UploadError:
    if not found.stacks:
        names = names_of(received[Path(header.path)] for header in found.xrays)
        return unusable(f"{names}: {len(found.xrays)} X-rays at once. Drop one at a time.")
    parts = []
    for stack in sorted(found.stacks, key=lambda stack: -len(stack.slices))[:4]:
        described = stack.header.text("SeriesDescription")[:60]
        label = f", {stack.label}" if stack.label else ""
        parts.append(f"{len(stack.slices)} × CT{f' {described!r}' if described else ''}{label}")
    parts += [f"{len(found.xrays)} X-rays"] if found.xrays else []
    name = received[found.stacks[0].files[0]].name
    count = len(found.stacks) + len(found.xrays)
    return unusable(f"{name}: the files are of {count} DICOM series ({', '.join(parts)}). Drop the files of one alone.")


def check_picture(path: Path, name: str, limits: Limits) -> dict[str, str]:
    """Decode a picture, and say what it is. Raises UploadError: too many pixels, damaged, or refused by `read_xray`."""
    # a picture of too many pixels is refused by its header, before anything is decoded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path, formats=PICTURE_FORMATS) as image:
                check_size(image.size, name, limits)
                facts = {"File": f"{image.format} picture, {image.width} × {image.height} pixels"}
            read_xray(path)
            return facts
        except UploadError:
            raise
        except Image.DecompressionBombError:
            raise too_large(f"{name}: has more than {limits.pixels:,} pixels. Scale the X-ray down.") from None
        except Exception as error:
            raise unusable(f"{name}: {reason_of(error, path, name)}.") from error


def check_size(size: tuple[int, int], name: str, limits: Limits) -> None:
    """Check an X-ray's width and height. Raises UploadError: too many pixels."""
    width, height = size
    if width * height > limits.pixels:
        raise too_large(
            f"{name}: has {width} × {height} pixels, more than {limits.pixels:,} in all. Scale the X-ray down."
        )


def check_xray(header: DicomHeader, name: str, limits: Limits) -> tuple[dict[str, str], list[str]]:
    """What to say and to warn of about a DICOM X-ray. Raises UploadError: a strange size, or refused by `read_xray`."""
    check_size((header.columns, header.rows), name, limits)
    try:
        read_xray(header.path)
    except DataError as error:
        raise unusable(f"{name}: {reason_of(error, header.path, name)}.") from error
    facts = {"File": f"DICOM, modality {modality_words(header.modality)}, {header.columns} × {header.rows} pixels"}
    return facts, list(dicom_warnings(header))
