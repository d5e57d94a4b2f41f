# SPDX-License-Identifier: Apache-2.0
"""Series as hospitals export them: what makes one volume, with which voxels, and what is left out by which reason."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from unimedi_components.errors import DataError
from unimedi_components.images.find import Image, LeftOut, expand, find_images, image_at, sort_files
from unimedi_components.images.volume import Volume, read_volume, read_volume_header


def listed(folder: Path, **options: Any) -> tuple[list[Image], list[LeftOut]]:
    return sort_files(expand([str(folder)], folder), **options)


def only_volume(folder: Path) -> Volume:
    """The one volume of a folder, read from the files that the listing names."""
    images, _ = listed(folder)
    (image,) = (image for image in images if image.dim == 3)
    return read_volume(image.path, image.files if image.is_folder else ())


def is_body(volume: Volume, truth: Any) -> bool:
    values, affine = truth
    return np.array_equal(volume.values, values) and np.allclose(volume.affine, affine, atol=1e-6)


def reasons(left_out: list[LeftOut]) -> set[str]:
    return {one.reason for one in left_out}


def test_a_plain_series_without_endings(dicom: Any, truth: Any) -> None:
    paths = dicom.slices(suffix="")
    images, left_out = listed(dicom.folder)
    assert not left_out and images[0].files == tuple(paths) and images[0].warnings == ()
    assert is_body(only_volume(dicom.folder), truth)
    assert is_body(read_volume(dicom.folder / "ct"), truth)
    header = read_volume_header(dicom.folder / "ct")
    assert (header.shape, header.spacing, header.num_slices) == ((20, 18, 24), (2.0, 2.5, 3.0), 24)


@pytest.mark.parametrize("sizes", [((60, 50), (60, 50)), ((60, 50), (40, 70))])
def test_two_films_of_one_series_are_two_xrays(dicom: Any, sizes: Any) -> None:
    paths = [dicom.film(name, "5", size=size) for name, size in zip(("a.dcm", "b.dcm"), sizes, strict=True)]
    images, left_out = listed(dicom.folder)
    assert [(image.path, image.dim) for image in images] == [(path, 2) for path in paths] and not left_out


def test_a_scout_of_the_series_is_left_out(dicom: Any, truth: Any) -> None:
    dicom.slices()

    def scout(number: int, file: Any) -> None:
        file.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    path = dicom.slices(places=[500], start=100, change=scout)[0]
    assert is_body(only_volume(dicom.folder), truth)
    _, left_out = listed(dicom.folder)
    assert left_out == [LeftOut(str(path), "is a scout view (LOCALIZER), no slice of the series", False)]


@pytest.mark.parametrize(
    ("name", "values"),
    [("SliceThickness", (3.0, 2.999998)), ("SliceThickness", (3.0, 5.0)), ("SeriesNumber", (2, 3)),
     ("AcquisitionNumber", (1, 2)), ("KVP", (100, 120)), ("ImageComments", ("a", "b"))],
)  # fmt: skip
def test_details_that_change_do_not_split(dicom: Any, truth: Any, name: str, values: Any) -> None:
    for change in (lambda n, f: setattr(f, name, values[n % 2]), lambda n, f: setattr(f, name, values[n // 12])):
        dicom.slices(change=change)
        assert is_body(only_volume(dicom.folder), truth)


def test_doubles_are_dropped_and_counted(dicom: Any, truth: Any) -> None:
    for path in dicom.slices()[7:9]:
        shutil.copy(path, path.with_name(f"copy of {path.name}"))
    images, left_out = listed(dicom.folder)
    assert images[0].warnings == ("2 slice(s) are the same as another and were dropped.",)
    assert len(images[0].files) == 24 and len(left_out) == 2
    assert reasons(left_out) == {"is the same slice as another file (position and pixels)"}
    assert is_body(only_volume(dicom.folder), truth)


@pytest.mark.parametrize(
    ("name", "values"),
    [("AcquisitionNumber", (1, 2)), ("TemporalPositionIdentifier", (1, 2)), ("TriggerTime", (0, 400)),
     ("ContentTime", ("101500", "101530")), ("ConvolutionKernel", ("B30f", "B70f"))],
)  # fmt: skip
def test_phases_are_told_apart_by_their_tags(dicom: Any, truth: Any, name: str, values: Any) -> None:
    other = (truth[0] + 7).astype(np.int16)
    dicom.slices(change=lambda n, f: setattr(f, name, values[0]))
    dicom.slices(start=100, volume=other, change=lambda n, f: setattr(f, name, values[1]))
    images, left_out = listed(dicom.folder)
    assert len(images) == 2 and not left_out
    found = [read_volume(image.path, image.files) for image in images]
    assert sorted(int(volume.values.min()) for volume in found) == [-1000, -993]
    for volume in found:
        assert np.array_equal(volume.values, truth[0] if volume.values.min() == -1000 else other)
        assert np.allclose(volume.affine, truth[1])
    ids = [item["id"] for item in find_images(str(dicom.folder / "ct"), dicom.folder)]
    assert ids == ["ct", "ct-2"]
    with pytest.raises(DataError, match="holds 2 volumes"):
        read_volume(dicom.folder / "ct")


def test_phases_by_the_time_of_each_slice(dicom: Any, truth: Any) -> None:
    other = (truth[0] + 7).astype(np.int16)
    dicom.slices(change=lambda n, f: setattr(f, "AcquisitionTime", f"1015{n:02d}.5"))
    dicom.slices(start=100, volume=other, change=lambda n, f: setattr(f, "AcquisitionTime", f"1016{n:02d}.5"))
    images, _ = listed(dicom.folder)
    assert [image.stack.label for image in images] == [f"AcquisitionTime, phase {n} of 2" for n in (2, 1)]
    assert all(len(np.unique(read_volume(i.path, i.files).values[0, 0])) == 1 for i in images)


def test_phases_that_nothing_tells_apart_are_refused(dicom: Any, truth: Any) -> None:
    dicom.slices()
    dicom.slices(start=100, volume=(truth[0] + 7).astype(np.int16))
    images, left_out = listed(dicom.folder)
    assert not images and len(left_out) == 48
    (reason,) = reasons(left_out)
    assert reason.startswith("the series holds several stacks: 24 places with 2 slices at each")
    with pytest.raises(DataError, match="holds several stacks"):
        read_volume(dicom.folder / "ct")


def test_missing_slices_are_named_and_filled(dicom: Any, truth: Any) -> None:
    values, affine = truth
    places = [3.0 * z for z in range(24) if z not in (10, 11, 12)]
    dicom.slices(places=places, volume=np.delete(values, (10, 11, 12), axis=2))
    volume = only_volume(dicom.folder)
    assert volume.warnings == (
        "Slices seem to be missing: 1 gap(s) of up to 12 mm where 3 mm is usual; resampled to 24 slices in even steps "
        "of 3 mm.",
    )
    assert volume.values.shape == values.shape and np.allclose(volume.affine, affine)
    kept = [z for z in range(24) if z not in (10, 11, 12)]
    assert np.array_equal(volume.values[..., kept], values[..., kept])
    between = values[..., 9] + (values[..., 13].astype(float) - values[..., 9]) / 2
    assert np.allclose(volume.values[..., 11], between, atol=1e-3)


def test_a_missing_block_is_refused(dicom: Any) -> None:
    dicom.slices(places=[3.0 * z + (60 if z > 11 else 0) for z in range(24)])
    images, left_out = listed(dicom.folder)
    assert not images and len(left_out) == 24
    assert next(iter(reasons(left_out))).startswith(
        "slices are missing: a block of 63 mm where steps of 3 mm are usual"
    )


def test_uneven_steps_are_resampled(dicom: Any, truth: Any) -> None:
    # a ramp along z, which linear interpolation gives back exactly
    places = [3.0 * z for z in range(12)] + [33.0 + z for z in range(1, 13)]
    ramp = np.broadcast_to(np.asarray(places) * 10 - 500, (20, 18, 24)).astype(np.int16)
    dicom.slices(places=places, volume=ramp)
    volume = only_volume(dicom.folder)
    assert volume.warnings == (
        "Slices lie in uneven steps of 1 to 3 mm; resampled to 46 slices in even steps of 1 mm.",
    )
    assert np.allclose(volume.values[4, 4], np.arange(46) * 10 - 500, atol=1e-3)
    assert np.allclose(np.diag(volume.affine), (-2, -2.5, 1, 1))


def test_positions_rounded_to_a_tenth_are_even(dicom: Any) -> None:
    dicom.slices(places=[round(0.625 * z, 1) for z in range(24)])
    volume = only_volume(dicom.folder)
    assert volume.warnings == () and volume.values.shape[2] == 24
    assert volume.affine[2, 2] == pytest.approx(14.4 / 23)


def test_a_tilted_gantry_gives_a_sheared_affine(dicom: Any, truth: Any) -> None:
    values, affine = truth
    step = np.tan(np.deg2rad(18))
    dicom.slices(shift=lambda place: (0.0, step * place))
    volume = only_volume(dicom.folder)
    assert np.array_equal(volume.values, values)
    expected = affine.copy()
    expected[1, 2] = -3 * step
    assert np.allclose(volume.affine, expected, atol=1e-6)
    assert volume.warnings == ("The gantry was tilted by 18 degrees; the network sees the volume upright.",)


def test_no_position_no_orientation_no_volume(dicom: Any) -> None:
    def remove(number: int, file: Any) -> None:
        del file.ImagePositionPatient, file.ImageOrientationPatient

    dicom.slices(change=remove)
    images, left_out = listed(dicom.folder)
    assert not images and len(left_out) == 24
    assert next(iter(reasons(left_out))).startswith("lacks ImagePositionPatient")


@pytest.mark.parametrize("which", [range(24), range(5, 6)])
def test_missing_rescale_is_refused_unless_told(dicom: Any, truth: Any, which: Any) -> None:
    def remove(number: int, file: Any) -> None:
        if number in which:
            del file.RescaleSlope, file.RescaleIntercept

    dicom.slices(change=remove)
    images, left_out = listed(dicom.folder)
    assert not images and len(left_out) == 24
    (reason,) = reasons(left_out)
    assert "stored values, not Hounsfield units" in reason and f"in {len(which)} of its 24 files" in reason
    assert "--assume_hu" in reason
    with pytest.raises(DataError, match="stored values, not Hounsfield units"):
        read_volume(dicom.folder / "ct")
    (item,) = find_images(str(dicom.folder), assume_hu=True)
    assert item["assume_hu"] is True
    values = read_volume(item["image"], item["files"], assume_hu=True).values
    assert np.array_equal(values[..., 5], truth[0][..., 5] + 1024)


def test_each_slice_has_its_own_rescale(dicom: Any, truth: Any) -> None:
    def change(number: int, file: Any) -> None:
        file.RescaleIntercept = -1024 - number
        file.PixelData = (np.frombuffer(file.PixelData, "<u2") + number).astype("<u2").tobytes()

    dicom.slices(change=change)
    assert is_body(only_volume(dicom.folder), truth)


def test_padding_becomes_air(dicom: Any, truth: Any) -> None:
    def pad(number: int, file: Any) -> None:
        pixels = np.frombuffer(file.PixelData, "<u2").reshape(18, 20).copy()
        pixels[:3], pixels[-3:] = 63536, 63536
        file.PixelPaddingValue, file.PixelData = 63536, pixels.tobytes()

    dicom.slices(change=pad)
    assert is_body(only_volume(dicom.folder), truth)


@pytest.mark.parametrize("order", [range(24), range(23, -1, -1), np.random.default_rng(1).permutation(24)])
def test_enhanced_frames_are_sorted_by_position(dicom: Any, truth: Any, order: Any) -> None:
    path = dicom.enhanced("enhanced.dcm", [int(number) for number in order])
    images, left_out = listed(dicom.folder)
    assert [(image.path, image.dim) for image in images] == [(path, 3)] and not left_out
    assert is_body(read_volume(path), truth)


def test_one_slice_is_said_to_be_one(dicom: Any) -> None:
    path = dicom.slices(places=[0])[0]
    _, left_out = listed(dicom.folder)
    assert left_out[0].reason == "is one CT slice. Give all files of its series, or its folder"
    with pytest.raises(DataError, match=f"{path.name}: is one CT slice"):
        image_at(path)


def test_a_dicomdir_export(dicom: Any, truth: Any) -> None:
    slices = dicom.slices(folder="PAT0/ST0/SE0", suffix="")
    film = dicom.film("PAT0/ST0/SE1/IM0", "8")
    records = []
    for path in [*slices, film]:
        record = Dataset()
        record.DirectoryRecordType = "IMAGE"
        record.ReferencedFileID = list(path.relative_to(dicom.folder).parts)
        records.append(record)
    outside = Dataset()
    outside.ReferencedFileID = ["..", "secret"]
    directory = dicom.new_file(sop_class="1.2.840.10008.1.3.10")
    directory.DirectoryRecordSequence = [*records, outside]
    place = dicom.save(directory, "DICOMDIR")
    for start in (dicom.folder, place):
        images, left_out = listed(start)
        assert [image.dim for image in images] == [3, 2] and images[1].path == film
        assert [Path(one.file).name for one in left_out] == ["DICOMDIR"] and not left_out[0].fault
    assert is_body(only_volume(place), truth)


def test_other_objects_are_named(dicom: Any) -> None:
    dicom.slices()
    mr, loop = dicom.film("mr.dcm", modality="MR"), dicom.film("loop.dcm", size=(30, 40))
    film = pydicom.dcmread(loop)
    film.NumberOfFrames, film.PixelData = 2, film.PixelData * 2
    film.save_as(loop)
    images, left_out = listed(dicom.folder)
    found = {Path(one.file).name: one for one in left_out}
    assert len(images) == 1 and set(found) == {"mr.dcm", "loop.dcm"} and mr.exists()
    assert found["mr.dcm"].reason.startswith("is DICOM of modality MR (magnetic resonance)")
    assert found["loop.dcm"].reason.startswith("holds 2 frames, a film or loop")


def test_two_patients_with_one_uid_are_two_volumes(dicom: Any, truth: Any) -> None:
    dicom.slices(folder="a")
    dicom.slices(folder="b", change=lambda n, f: setattr(f, "PatientID", "other"))
    images, left_out = listed(dicom.folder)
    assert [image.path.name for image in images] == ["a", "b"] and not left_out
    assert all(is_body(read_volume(image.path, image.files), truth) for image in images)


def test_copies_of_one_export_stay_apart_and_halves_come_together(dicom: Any, truth: Any) -> None:
    dicom.slices(folder="a")
    dicom.slices(folder="b")
    dicom.enhanced("c/one.dcm", range(24))
    dicom.enhanced("c/two.dcm", range(23, -1, -1))
    dicom.slices(folder="d", change=lambda n, f: f.__delattr__("RescaleSlope"))
    for number, path in enumerate(dicom.slices(folder="e", series="2")):
        half = path.parent / str(number // 12) / path.name
        half.parent.mkdir(exist_ok=True)
        path.rename(half)
    images, left_out = listed(dicom.folder)
    assert [str(image.path.relative_to(dicom.folder)) for image in images] == ["a", "b", "c/one.dcm", "c/two.dcm", "e"]
    assert {Path(one.file).parent.name for one in left_out} == {"d"}
    assert all(is_body(read_volume(image.path, image.files), truth) for image in images)


def test_a_slice_and_its_copy_are_one_slice(dicom: Any) -> None:
    path = dicom.slices(places=[0])[0]
    shutil.copy(path, path.with_name("copy.dcm"))
    images, left_out = listed(dicom.folder)
    assert not images and len(left_out) == 2
    assert reasons(left_out) == {"is one CT slice. Give all files of its series, or its folder"}


def test_a_double_of_another_rescale_is_one(dicom: Any, truth: Any) -> None:
    path = dicom.slices()[5]
    double = pydicom.dcmread(path)
    double.RescaleIntercept, stored = -1000, double.pixel_array.astype(np.int16) - 24
    double.PixelRepresentation, double.PixelData = 1, stored.astype("<i2").tobytes()
    double.save_as(path.with_name("double.dcm"))
    images, left_out = listed(dicom.folder)
    assert images[0].warnings == ("1 slice(s) are the same as another and were dropped.",) and len(left_out) == 1
    assert is_body(only_volume(dicom.folder), truth)


def test_scouts_that_only_their_description_names(dicom: Any, truth: Any) -> None:
    dicom.slices()

    def scout(number: int, file: Any) -> None:
        file.ImageOrientationPatient, file.SeriesDescription = [1, 0, 0, 0, 0, -1], "Topogram 0.6"
        file.ImagePositionPatient = [0, 10 * number, 0]

    dicom.slices(places=[0, 1], start=100, change=scout)
    assert is_body(only_volume(dicom.folder), truth)
    _, left_out = listed(dicom.folder)
    assert [(one.reason, one.fault) for one in left_out] == [("is a scout view (TOPOGRAM)", False)] * 2


def test_frames_of_one_file_that_come_twice(dicom: Any, truth: Any) -> None:
    path = dicom.enhanced("double.dcm", [0, 1, 2, 3, 3, *range(4, 24)])
    images, left_out = listed(dicom.folder)
    assert images[0].warnings == ("1 slice(s) are the same as another and were dropped.",) and not left_out
    assert is_body(read_volume(path), truth)


def test_phases_in_one_file_are_refused_by_all(dicom: Any) -> None:
    path = dicom.enhanced("phases.dcm", [*range(24), *range(24)])
    file = pydicom.dcmread(path)
    stored = file.pixel_array.copy()
    stored[24:] += 7
    file.PixelData = stored.tobytes()
    for number, group in enumerate(file.PerFrameFunctionalGroupsSequence):
        content = Dataset()
        content.TemporalPositionIndex = 1 + number // 24
        group.FrameContentSequence = [content]
    file.save_as(path)
    images, left_out = listed(dicom.folder)
    assert not images and left_out[0].reason.startswith("holds 2 volumes in one file (24 slices of 20 x 18 (Temporal")
    with pytest.raises(DataError, match="holds 2 volumes in one file"):
        read_volume(path)


def test_labels_hold_no_free_text(dicom: Any, truth: Any) -> None:
    dicom.slices(change=lambda n, f: setattr(f, "SeriesDescription", "Doe^Jane arterial"))
    other = (truth[0] + 7).astype(np.int16)
    dicom.slices(start=100, volume=other, change=lambda n, f: setattr(f, "SeriesDescription", "Doe^Jane venous"))
    images, _ = listed(dicom.folder)
    assert [image.stack.label for image in images] == [f"SeriesDescription, phase {n} of 2" for n in (2, 1)]


@pytest.mark.parametrize("folders", [2, 23])
def test_a_gap_does_not_tear_folders_apart(dicom: Any, truth: Any, folders: int) -> None:
    kept = [z for z in range(24) if z != 7]
    paths = dicom.slices(places=[3.0 * z for z in kept], volume=truth[0][:, :, kept])
    for number, path in enumerate(paths):
        place = path.parent / str(number % folders) / path.name
        place.parent.mkdir(exist_ok=True)
        path.rename(place)
    images, left_out = listed(dicom.folder)
    assert len(images) == 1 and len(images[0].files) == 23 and not left_out
    assert images[0].warnings[0].startswith("Slices seem to be missing: 1 gap(s) of up to 6 mm where 3 mm is usual")
    volume = only_volume(dicom.folder)
    assert np.array_equal(volume.values[:, :, kept], truth[0][:, :, kept]) and np.allclose(volume.affine, truth[1])


def half_a_step(dicom: Any, values: np.ndarray, first: Any = None, second: Any = None) -> None:
    """Two acquisitions in one series, the second half a step above the first and 7 HU denser."""
    nothing = lambda number, file: None  # noqa: E731
    dicom.slices(change=first or nothing)
    places = [3.0 * z + 1.5 for z in range(24)]
    dicom.slices(start=100, places=places, volume=(values + 7).astype(np.int16), change=second or nothing)


@pytest.mark.parametrize(
    ("name", "values"),
    [("AcquisitionNumber", (1, 2)), ("ConvolutionKernel", ("B30f", "B70f")), ("ReconstructionDiameter", (350, 400)),
     ("KVP", (80, 140)), ("AcquisitionTime", ("1015", "1016"))],
)  # fmt: skip
def test_acquisitions_half_a_step_apart_are_two(dicom: Any, truth: Any, name: str, values: Any) -> None:
    changes = [lambda n, f, value=value: setattr(f, name, value) for value in values]
    if name == "AcquisitionTime":
        changes = [lambda n, f, value=value: setattr(f, name, f"{value}{n:02d}.5") for value in values]
    half_a_step(dicom, truth[0], *changes)
    images, left_out = listed(dicom.folder)
    assert len(images) == 2 and not left_out
    for image, more, z in zip(images, (7, 0), (101.5, 100), strict=True):
        volume = read_volume(image.path, image.files)
        assert np.array_equal(volume.values, truth[0] + more)
        assert np.allclose(volume.affine[:3, 3], [-10, 20, z]) and volume.affine[2, 2] == 3
        other = next(one for one in images if one is not image)
        assert image.warnings == (f"The series holds 2 stacks; besides this one: {other.stack.described}.",)


def test_acquisitions_that_only_the_thickness_tells_from_one_stack(dicom: Any, truth: Any) -> None:
    def change(acquisition: int) -> Any:
        def set_numbers(number: int, file: Any) -> None:
            file.AcquisitionNumber, file.InstanceNumber = acquisition, 2 * number + acquisition

        return set_numbers

    half_a_step(dicom, truth[0], change(1), change(2))
    assert [image.stack.label for image in listed(dicom.folder)[0]] == ["AcquisitionNumber 2", "AcquisitionNumber 1"]


def test_acquisitions_that_nothing_tells_apart_are_refused(dicom: Any, truth: Any) -> None:
    half_a_step(dicom, truth[0])
    images, left_out = listed(dicom.folder)
    (reason,) = reasons(left_out)
    assert not images and len(left_out) == 48
    assert reason.startswith("the series holds several stacks: 24 and 24 slices that lie between each other's")
    assert reason.endswith("Export each as a series of its own, or give the files of one alone")


def test_directions_that_stray_are_one_stack(dicom: Any, truth: Any) -> None:
    def turn(step: float) -> Any:
        def set_direction(number: int, file: Any) -> None:
            along, across = np.cos(step * number), np.sin(step * number)
            file.ImageOrientationPatient = [along, across, 0, -across, along, 0]

        return set_direction

    dicom.slices(change=lambda n, f: turn(0.004)(n % 2, f))
    volume = only_volume(dicom.folder)
    assert np.array_equal(volume.values, truth[0])
    assert volume.warnings == ("The directions of slices differ by up to 0.23 degrees; their mean is taken.",)
    mean = np.array([np.cos(0.002), np.sin(0.002), 0])
    assert np.allclose(volume.affine[:3, 0], 2.0 * mean * [-1, -1, 1], atol=1e-4)
    assert np.allclose(np.linalg.norm(volume.affine[:3, :3], axis=0), [2, 2.5, 3], atol=1e-6)
    dicom.slices(folder="fan", series="2", change=turn(0.005))
    _, left_out = listed(dicom.folder)
    assert reasons(left_out) == {
        "the slices lie in directions up to 6.6 degrees apart and are no one stack. Export each stack as a series of "
        "its own"
    }


@pytest.mark.parametrize("name", ["PatientID", "StudyInstanceUID", "SeriesInstanceUID"])
def test_names_that_some_slices_lack_do_not_split(dicom: Any, truth: Any, name: str) -> None:
    dicom.slices(change=lambda n, f: f.__delattr__(name) if n % 3 == 0 else None)
    assert is_body(only_volume(dicom.folder), truth)
    # another stack at the same places is not taken for the missing slices
    dicom.slices(folder="ct", start=100, change=lambda n, f: f.__delattr__("SeriesInstanceUID"), series="2")
    assert len(listed(dicom.folder)[0]) == 2


def test_stacks_of_one_series_name_each_other(dicom: Any) -> None:
    dicom.slices(change=lambda n, f: setattr(f, "PixelSpacing", [2.5, 2.0] if n < 10 else [2.6, 2.0]))
    images, left_out = listed(dicom.folder)
    assert sorted(len(image.files) for image in images) == [10, 14] and not left_out
    assert {image.warnings for image in images} == {
        (f"The series holds 2 stacks; besides this one: {count} slices of 20 x 18.",) for count in (10, 14)
    }
