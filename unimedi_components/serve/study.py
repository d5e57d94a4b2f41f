# SPDX-License-Identifier: Apache-2.0
"""From the files of an upload to the one study that they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unimedi_components.serve.dicom import DicomFile, read_dicom
from unimedi_components.serve.dicom_series import check_series, check_xray, split_series
from unimedi_components.serve.faults import ACCEPTED, Limits, bad_request, too_large, unusable
from unimedi_components.serve.formats import DICOM, PICTURES, VOLUMES, family_of_name, identify, not_read
from unimedi_components.serve.pictures import check_picture
from unimedi_components.serve.uploads import Received, names_of, unpack
from unimedi_components.serve.volumes import metaimage_voxels, prepare_volume

__all__ = ["Study", "find_study"]


@dataclass(frozen=True)
class Study:
    """One X-ray or one volume, checked and ready to be read.

    Args:
        name: to show.
        dim: 2 for an X-ray, 3 for a volume.
        path: the file, or the folder of a DICOM series.
        facts: what to say about the file.
        warnings: what the user should know about it.
        slices: files that a DICOM series must give as slices; 0 where one file holds all.
    """

    name: str
    dim: int
    path: Path
    facts: dict[str, str]
    warnings: list[str] = field(default_factory=list)
    slices: int = 0


def find_study(files: Sequence[Received], folder: Path, limits: Limits) -> Study:
    """Find out what was uploaded.

    Args:
        files: what was received, in `folder`.
        folder: for what is unpacked, joined or written anew.
        limits: of the upload.

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


def _renamed_zip(file: Received) -> Exception:
    fault = not_read(file.name, "zip")
    assert fault is not None
    return fault


def _one_study(contents: dict[Received, str], archive: str, folder: Path, limits: Limits) -> Study:
    headers = [file for file, content in contents.items() if content == "metaimage"]
    voxels = {metaimage_voxels(file) for file in headers if not not_read(file.name, "metaimage")}
    others, left_out = {}, []
    for file, content in contents.items():
        if file.name in voxels:
            continue
        fault = not_read(file.name, content)
        if fault is None:
            others[file] = content
        elif len(contents) == 1 or family_of_name(file.name) or content == "nifti pair":
            raise fault
        else:
            left_out.append(file)
    if not others:
        fault = not_read(left_out[0].name, contents[left_out[0]])
        assert fault is not None
        raise fault
    notes = [f"Left out, no image: {names_of(left_out)}."] if left_out else []
    dicom = [file for file, content in others.items() if content == DICOM]
    if dicom and len(dicom) == len(others):
        return _dicom_study([read_dicom(file) for file in dicom], archive, notes, folder, limits)
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
    return Study(shown, 3, path, {"File": kinds.get(content, "NIfTI volume")}, notes)


def _dicom_study(found: list[DicomFile], archive: str, notes: list[str], folder: Path, limits: Limits) -> Study:
    images, left_out = split_series(found)
    first = images[0]
    if len(images) == 1 and first.modality != "CT":
        facts, warnings = check_xray(first, limits)
        path = first.file.path.rename(folder / "xray.dcm")
        return Study(first.name, 2, path, facts, [*notes, *left_out, *warnings])
    facts, warnings = check_series(images, limits)
    series = folder / "series"
    series.mkdir()
    for number, image in enumerate(images):
        image.file.path.rename(series / f"{number:05d}.dcm")
    shown = archive or (first.name if len(images) == 1 else f"{first.name} and {len(images) - 1} more")
    path = series / "00000.dcm" if len(images) == 1 else series
    return Study(shown, 3, path, facts, [*notes, *left_out, *warnings], len(images) if len(images) > 1 else 0)
