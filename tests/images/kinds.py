# SPDX-License-Identifier: Apache-2.0
"""Files of every kind that hospitals hand over, each with what it is: an X-ray, a volume, or why it is neither."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate_extended, generate_frames
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from tests.images.conftest import SPACING, Writer, body, new_file, put_pixels
from tests.images.single_files import compress, write

__all__ = ["KINDS", "Kind", "Truth"]

#: 12 bits, dark above and bright below.
FILM = np.round(np.linspace(0, 4000, 90 * 70)).astype(np.uint16).reshape(90, 70)
GREYS = FILM / 4000
#: RAS, of `body`.
AFFINE = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])
AFFINE[:3, 3] = -10, 20, 100
#: of a gantry that was tilted by 1.2 mm a slice.
TILTED = AFFINE.copy()
TILTED[1, 2] = -1.2
Change = Callable[[int, FileDataset], None]


class Truth(NamedTuple):
    """Greys (H, W) of an X-ray within `near`, or Hounsfield units (x, y, z) and their affine to RAS mm."""

    values: np.ndarray
    affine: np.ndarray | None = None
    near: float = 0.0


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Args:
        make: writes its files below a writer's folder; returns the path that a user would name.
        is_a: "xray", "volume", or "" where it is refused.
        words: what the refusal says, or a warning.
        truth: where it is known.
        count: of images.
    """

    make: Callable[[Writer], Path]
    is_a: str
    words: str = ""
    truth: Truth | None = None
    count: int = 1


KINDS: dict[str, Kind] = {}


def kind(is_a: str, words: str = "", truth: Truth | None = None, count: int = 1) -> Any:
    def add(make: Callable[[Writer], Path]) -> Any:
        KINDS[make.__name__] = Kind(make, is_a, words, truth, count)
        return make

    return add


def film(writer: Writer, name: str = "film", pixels: np.ndarray = FILM, syntax: str = "", **tags: Any) -> Path:
    named = {"StudyInstanceUID": writer.root, "SeriesInstanceUID": f"{writer.root}.9", "PatientID": "7"}
    options = {"syntax": syntax} if syntax else {}
    return write(writer.folder / name, pixels, **options, **{"BitsStored": 12, **named, **tags})


def ct(writer: Writer, *changes: Change, **options: Any) -> Path:
    def change(number: int, file: FileDataset) -> None:
        for one in changes:
            one(number, file)

    writer.slices(change=change, **options)
    return writer.folder / options.get("folder", "ct")


def rewrite(folder: Path, change: Callable[[FileDataset], Any], **options: Any) -> Path:
    for path in sorted(folder.iterdir()) if folder.is_dir() else [folder]:
        file = pydicom.dcmread(path)
        change(file)
        file.save_as(path, **options)
    return folder


BODY = Truth(body(), AFFINE)
SAGITTAL = Truth(body().transpose(1, 2, 0), AFFINE[:, [1, 2, 0, 3]])
TURNED = Truth(body()[::-1], AFFINE @ np.array([[-1, 0, 0, 19], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
GREY = Truth(GREYS, near=1e-3)


# X-rays ---------------------------------------------------------------------------------------------------------------


@kind("xray", truth=GREY)
def jpeg_2000_of_no_ending(writer: Writer) -> Path:
    path = compress(film(writer), "JPEG2000Lossless")
    return path.rename(path.with_name("00000042"))


@kind("xray", truth=GREY)
def big_endian_without_preamble(writer: Writer) -> Path:
    path = film(writer, "IMG.7", syntax=ExplicitVRBigEndian)
    path.write_bytes(path.read_bytes()[132:])
    return path


@kind("xray", truth=GREY)
def implicit_without_meta(writer: Writer) -> Path:
    path = film(writer, "ü #1.dcm", syntax=ImplicitVRLittleEndian)
    whole = path.read_bytes()
    path.write_bytes(whole[132 + 12 + struct.unpack("<I", whole[140:144])[0] :])
    return path


@kind("xray", truth=GREY)
def mark_at_the_first_byte(writer: Writer) -> Path:
    path = film(writer, "cr.ima")
    path.write_bytes(path.read_bytes()[128:])
    return path


@kind("xray", truth=GREY)
def deflated(writer: Writer) -> Path:
    return film(writer, "deflated.dcm", syntax=DeflatedExplicitVRLittleEndian)


@kind("xray", truth=Truth(1 - GREYS, near=1e-3))
def monochrome1_with_a_second_window(writer: Writer) -> Path:
    window = {"WindowCenter": [60000, 2000.5], "WindowWidth": [1, 4001]}
    return film(writer, "dx.dcm", Modality="DX", PhotometricInterpretation="MONOCHROME1", **window)


@kind("xray", truth=Truth(1 - GREYS, near=1e-3))
def inverse_presentation(writer: Writer) -> Path:
    return film(writer, Modality="RG", PresentationLUTShape="INVERSE")


@kind("xray", truth=GREY)
def a_mark_at_the_top_of_16_bits(writer: Writer) -> Path:
    pixels = FILM.copy()
    pixels[:5, :6] = 65535
    return film(writer, pixels=pixels, BitsStored=16)


@kind("xray", truth=GREY)
def bits_at_the_top_and_an_overlay_below(writer: Writer) -> Path:
    overlay = np.zeros_like(FILM)
    overlay[3:9, 3:40] = 1
    return film(writer, pixels=(FILM << 4 | overlay).astype(np.uint16), HighBit=15)


@kind("xray", truth=GREY)
def modality_lut_and_an_empty_window(writer: Writer) -> Path:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4096, 0, 16])
    item.add_new("LUTData", "US", [max(4000 - n, 0) for n in range(4096)])
    item.ModalityLUTType = "US"
    return film(writer, pixels=(4000 - FILM).astype(np.uint16), ModalityLUTSequence=[item], WindowWidth="")


@kind("xray")
def padding_range(writer: Writer) -> Path:
    pixels = FILM.copy()
    pixels[:, :20] = np.arange(20) + 4000
    return film(writer, pixels=pixels, PixelPaddingValue=4019, PixelPaddingRangeLimit=4000)


@kind("xray", truth=Truth((FILM >> 4) / 255, near=1e-6))
def grey_as_ybr(writer: Writer) -> Path:
    grey = (FILM >> 4).astype(np.uint8)
    pixels = np.stack([grey, np.full_like(grey, 128), np.full_like(grey, 128)], -1)
    tags = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": "YBR_FULL", "BitsStored": 8}
    return film(writer, pixels=pixels, **tags)


@kind("xray", truth=GREY)
def text_of_other_alphabets(writer: Writer) -> Path:
    path = film(writer, BodyPartExamined="CHEST")
    file = pydicom.dcmread(path)
    for name, text in (("SeriesDescription", b"\xff\xfe\xd0"), ("PatientName", "王^小东".encode("gb18030") + b"\x81")):
        tag = pydicom.tag.Tag(name)
        file[tag] = pydicom.dataelem.RawDataElement(tag, "LO", len(text), text, 0, False, True)
    file.SpecificCharacterSet = ["", "ISO 2022 IR 58"]
    file.save_as(path)
    return path


@kind("xray", count=2)
def two_views_of_one_series(writer: Writer) -> Path:
    film(writer, "export/one", InstanceNumber=1, SOPInstanceUID="1.2.4")
    film(writer, "export/two", pixels=FILM[:50], InstanceNumber=1, SOPInstanceUID="1.2.5")
    return writer.folder / "export"


def picture(writer: Writer, name: str, pixels: np.ndarray, **options: Any) -> Path:
    path = writer.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


@kind("xray", truth=GREY)
def grey_12_bits_in_16(writer: Writer) -> Path:
    return picture(writer, "a.png", FILM)


@kind("xray", truth=Truth(1 - FILM * 16 / 65535, near=6e-3))
def tiff_whose_least_is_white(writer: Writer) -> Path:
    return picture(writer, "a.TIF", (FILM * 16).astype(np.uint16), tiffinfo={262: 0})


@kind("xray", truth=Truth(GREYS.T[:, ::-1], near=0.01))
def turned_jpeg(writer: Writer) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(writer, "IMG 0001.jpeg", np.round(GREYS * 255).astype(np.uint8), exif=exif, quality=100)


@kind("xray", truth=GREY)
def a_name_that_is_no_text(writer: Writer) -> Path:
    path = film(writer)
    return path.rename(os.fsdecode(os.fsencode(path.parent) + b"/M\xfcller 1.dcm")).parent


@kind("xray", truth=Truth(GREYS, near=0.01))
def much_behind_a_jpeg(writer: Writer) -> Path:
    path = picture(writer, "a.jpg", np.round(GREYS * 255).astype(np.uint8), quality=100)
    path.write_bytes(path.read_bytes() + bytes(9000))
    return path


@kind("xray", truth=Truth(GREYS, near=3e-3))
def a_tiff_called_jpg(writer: Writer) -> Path:
    path = picture(writer, "a.tif", np.round(GREYS * 255).astype(np.uint8))
    return path.rename(path.with_suffix(".jpg"))


@kind("xray", truth=Truth(GREYS, near=3e-3))
def grey_with_alpha(writer: Writer) -> Path:
    grey = np.round(GREYS * 255).astype(np.uint8)
    return picture(writer, "a.png", np.stack([grey, np.full_like(grey, 9)], -1))


@kind("xray", truth=Truth(GREYS.T[:, ::-1], near=1e-3))
def turned_tiff(writer: Writer) -> Path:
    return picture(writer, "a.tif", FILM, tiffinfo={0x0112: 6})


@kind("xray", truth=GREY)
def tiff_of_long_offsets(writer: Writer) -> Path:
    return picture(writer, "a.tif", FILM, big_tiff=True)


@kind("xray", "The film is FOR PROCESSING", GREY)
def raw_values_of_a_detector(writer: Writer) -> Path:
    return film(writer, PresentationIntentType="FOR PROCESSING")


@kind("xray", "The film's pixels are not square (0.4 high, 0.2 wide)", GREY)
def oblong_pixels(writer: Writer) -> Path:
    return film(writer, PixelSpacing=[0.4, 0.2])


@kind("xray", "The film's pixels are not square (2 high, 1 wide)", GREY)
def oblong_pixels_of_no_size(writer: Writer) -> Path:
    return film(writer, PixelAspectRatio=[2, 1])


@kind("xray", "The film has 15 x 16 pixels, too few to show a chest")
def a_films_thumbnail(writer: Writer) -> Path:
    return film(writer, pixels=FILM[:16, :15])


# volumes --------------------------------------------------------------------------------------------------------------


@kind("volume", truth=BODY)
def slices_without_endings(writer: Writer) -> Path:
    return ct(writer, lambda n, f: f.__delattr__("PatientID") if n % 5 == 0 else None, suffix="")


@kind("volume", truth=BODY)
def details_that_change(writer: Writer) -> Path:
    def change(number: int, file: FileDataset) -> None:
        file.SliceThickness, file.KVP, file.SeriesNumber = 3 + 1e-6 * number, 100 + number % 3, 2 + number // 12
        file.SeriesDescription, file.AcquisitionTime = f"{number}", f"1200{number:02d}"

    return ct(writer, change)


@kind("volume", truth=BODY)
def frame_of_reference_in_half(writer: Writer) -> Path:
    return ct(writer, lambda n, f: setattr(f, "FrameOfReferenceUID", "1.2" if n % 2 else ""))


@kind("volume", "scout view", BODY)
def scout_and_dose_report(writer: Writer) -> Path:
    ct(writer, lambda n, f: setattr(f, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]), start=300, places=[900])
    report = new_file(name="5000", root=writer.root)
    put_pixels(report, np.zeros((20, 18, 3), np.uint16))
    report.Rows, report.Columns, report.SamplesPerPixel, report.PlanarConfiguration = 20, 18, 3, 0
    report.PhotometricInterpretation, report.PixelData = "RGB", bytes(20 * 18 * 6)
    writer.save(report, "ct/zz.dcm")
    return ct(writer)


@kind("volume", "is a scout view by its geometry (it lies across 24 slices of its study)", BODY)
def scouts_that_nothing_names(writer: Writer) -> Path:
    # from the front in the series itself, from the side in one of its own
    for number, rows in enumerate(([1, 0, 0], [0, 1, 0])):
        change = {"ImageOrientationPatient": [*rows, 0, 0, -1], "SeriesInstanceUID": f"{writer.root}.{number + 1}"}
        ct(writer, lambda n, f, change=change: f.update(change), start=300 + number, places=[40])
    return ct(writer)


@kind("volume", "repeats one place of the scan, as bolus tracking does", BODY)
def bolus_tracking_in_the_series(writer: Writer) -> Path:
    for number in range(8):
        place = {"places": [30.0], "volume": body()[:, :, 10:11] + np.int16(number)}
        ct(writer, lambda n, f: setattr(f, "AcquisitionNumber", 2), start=100 + number, **place)
    return ct(writer, lambda n, f: setattr(f, "AcquisitionNumber", 3))


@kind("volume", truth=BODY)
def a_capture_of_the_series_own_size(writer: Writer) -> Path:
    capture = new_file(name="999", root=writer.root, sop_class="1.2.840.10008.5.1.4.1.1.7")
    put_pixels(capture, np.arange(18 * 20, dtype=np.uint16).reshape(18, 20))
    writer.save(capture, "ct/capture")
    return ct(writer)


@kind("volume", truth=BODY)
def a_hidden_folder_beside(writer: Writer) -> Path:
    film(writer, "ct/.Trashes/a.dcm")
    return ct(writer)


@kind("volume", "the same slice as another", BODY)
def a_slice_exported_twice(writer: Writer) -> Path:
    ct(writer)
    path = writer.folder / "ct" / "0890.dcm"
    double = pydicom.dcmread(path)
    double.SOPInstanceUID = double.file_meta.MediaStorageSOPInstanceUID = f"{writer.root}.1.999"
    double.save_as(path.with_name("again.dcm"))
    return path.parent


@kind("volume", "2 gap(s) of up to 9 mm where 3 mm is usual")
def slices_that_are_missing(writer: Writer) -> Path:
    kept = [z for z in range(24) if z not in (5, 6, 15)]
    return ct(writer, places=[3.0 * z for z in kept], volume=body()[:, :, kept])


@kind("volume", "uneven steps of 1.5 to 3 mm")
def two_thicknesses(writer: Writer) -> Path:
    return ct(writer, places=[*np.arange(0, 36, 3.0), *np.arange(36, 54, 1.5)])


@kind("volume", "The gantry was tilted by 21.8 degrees", Truth(body(), TILTED))
def tilted_reversed_and_big_endian(writer: Writer) -> Path:
    folder = ct(writer, lambda n, f: setattr(f, "InstanceNumber", 24 - n), shift=lambda place: (0.0, 0.4 * place))
    for path in folder.iterdir():
        file = pydicom.dcmread(path)
        file.PixelData = np.frombuffer(file.PixelData, "<u2").astype(">u2").tobytes()
        file.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        pydicom.dcmwrite(path, file, implicit_vr=False, little_endian=False, force_encoding=True)
    return folder


@kind("volume", "The gantry was tilted by 18.4 degrees")
def tilted_backwards(writer: Writer) -> Path:
    return ct(writer, shift=lambda place: (0.0, -place / 3))


@kind("volume", "The series holds 2 stacks", count=2)
def reconstructions_between_each_other(writer: Writer) -> Path:
    ct(writer, lambda n, f: setattr(f, "ConvolutionKernel", "STANDARD"))
    places = [3.0 * z + 1.5 for z in range(24)]
    return ct(writer, lambda n, f: setattr(f, "ConvolutionKernel", "LUNG"), start=100, places=places)


@kind("volume", "The series holds 2 stacks", count=2)
def two_phases(writer: Writer) -> Path:
    ct(writer, lambda n, f: setattr(f, "ContrastBolusAgent", "none"))
    change: Change = lambda n, f: setattr(f, "ContrastBolusAgent", "350")  # noqa: E731
    return ct(writer, change, start=100, volume=(body() + 5).astype(np.int16))


@kind("volume", "The series holds 2 stacks", count=2)
def phases_by_their_exposure(writer: Writer) -> Path:
    ct(writer, lambda n, f: setattr(f, "IrradiationEventUID", "1.2.1"))
    change: Change = lambda n, f: setattr(f, "IrradiationEventUID", "1.2.2")  # noqa: E731
    return ct(writer, change, start=100, volume=(body() + 5).astype(np.int16))


@kind("volume", truth=SAGITTAL)
def sagittal_slices(writer: Writer) -> Path:
    values = body()
    paths = writer.slices(volume=values.transpose(1, 2, 0), places=[0.0] * 20)
    for x, path in enumerate(paths):
        file = pydicom.dcmread(path)
        file.ImageOrientationPatient, file.PixelSpacing = [0, 1, 0, 0, 0, 1], [3.0, 2.5]
        file.ImagePositionPatient = [10 + 2.0 * x, -20, 100]
        file.save_as(path)
    return writer.folder / "ct"


@kind("volume", truth=BODY)
def signed_with_padding_and_intercepts(writer: Writer) -> Path:
    def change(number: int, file: FileDataset) -> None:
        stored = body()[:, :, number].T.astype(int) - number
        # outside the body is the padding of a round field of view
        stored[stored < -900] = -2000
        file.PixelRepresentation, file.PixelPaddingValue, file.RescaleIntercept = 1, -2000, number
        file.PixelData = stored.astype("<i2").tobytes()

    return ct(writer, change)


@kind("volume", truth=BODY)
def run_lengths(writer: Writer) -> Path:
    return rewrite(ct(writer), lambda file: file.compress(pydicom.uid.RLELossless))


@kind("volume", truth=BODY)
def enhanced_jpeg_2000_with_offsets(writer: Writer) -> Path:
    def change(file: FileDataset) -> None:
        frames = list(generate_frames(file.PixelData, number_of_frames=24))
        coded = encapsulate_extended(frames)
        file.PixelData, file.ExtendedOffsetTable, file.ExtendedOffsetTableLengths = coded
        file["PixelData"].VR = "OB"

    return rewrite(compress(writer.enhanced("multi.dcm", range(24)), "JPEG2000Lossless"), change)


@kind("volume", truth=BODY)
def enhanced_out_of_order(writer: Writer) -> Path:
    return writer.enhanced("multi.dcm", np.random.default_rng(2).permutation(24).tolist())


@kind("volume", truth=BODY)
def enhanced_with_rescale_of_each_frame(writer: Writer) -> Path:
    def change(file: FileDataset) -> None:
        del file.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
        stored = file.pixel_array.astype(int)
        for number, group in enumerate(file.PerFrameFunctionalGroupsSequence):
            item = Dataset()
            item.RescaleSlope, item.RescaleIntercept = 1, -1024 - number
            group.PixelValueTransformationSequence = [item]
            stored[number] += number
        file.PixelData = stored.astype("<u2").tobytes()

    return rewrite(writer.enhanced("IM0", range(23, -1, -1)), change)


@kind("volume", truth=BODY)
def enhanced_in_two_files(writer: Writer) -> Path:
    for number in range(2):
        path = writer.enhanced(f"parts/{number}", range(12 * number, 12 * number + 12))
        rewrite(path, lambda file, n=number: setattr(file, "SOPInstanceUID", f"{writer.root}.1.{n}"))
    return writer.folder / "parts"


def nifti(writer: Writer, name: str, values: np.ndarray, affine: Any = AFFINE, slope: float | None = None) -> Path:
    path = writer.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(values, affine)
    if slope:
        image.header.set_slope_inter(slope, 0)
    nib.save(image, path)
    return path


def nifti_saying(writer: Writer, place: int, value: bytes) -> Path:
    path = nifti(writer, "a.nii", body())
    data = bytearray(path.read_bytes())
    data[place : place + len(value)] = value
    path.write_bytes(data)
    return path


@kind("volume", truth=BODY)
def nifti_with_five_axes(writer: Writer) -> Path:
    return nifti(writer, "five.nii.gz", body()[..., None, None])


@kind("volume", truth=TURNED)
def nifti_turned_and_scaled(writer: Writer) -> Path:
    return nifti(writer, "SCAN.NII", (TURNED.values // 10).astype(np.int16), TURNED.affine, slope=10)


@kind("volume", "The header places the volume twice, up to 114 mm apart (sform and qform)", BODY)
def nifti_of_two_places(writer: Writer) -> Path:
    path = writer.folder / "two.nii.gz"
    path.parent.mkdir(parents=True)
    image = nib.Nifti1Image(body(), AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE @ np.diag([-1, -1, 1, 1]), 1)
    nib.save(image, path)
    return path


@kind("volume", truth=BODY)
def packed_nifti_without_its_ending(writer: Writer) -> Path:
    path = nifti(writer, "scan.nii.gz", body())
    return path.rename(path.with_name("scan"))


@kind("volume", truth=BODY)
def nifti_that_is_not_packed_as_it_says(writer: Writer) -> Path:
    path = nifti(writer, "scan.nii", body())
    return path.rename(path.with_name("scan.nii.gz"))


@kind("volume", truth=BODY)
def metaimage_beside_its_voxels(writer: Writer) -> Path:
    folder = writer.folder / "meta"
    folder.mkdir(parents=True)
    (folder / "scan.raw").write_bytes(body().astype("<i2").tobytes(order="F"))
    (folder / "scan.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 20 18 24\nElementSpacing = 2 2.5 3\nOffset = 10 -20 100\n"
        "TransformMatrix = 1 0 0 0 1 0 0 0 1\nElementType = MET_SHORT\nElementDataFile = scan.raw\n"
    )
    return folder / "scan.mhd"


@kind("volume", truth=BODY)
def nrrd(writer: Writer) -> Path:
    path = writer.folder / "scan.nrrd"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = (
        "NRRD0005\ntype: short\ndimension: 3\nsizes: 20 18 24\nspace: right-anterior-superior\nencoding: raw\n"
        "endian: little\nspace directions: (-2,0,0) (0,-2.5,0) (0,0,3)\nspace origin: (-10,20,100)\n\n"
    )
    path.write_bytes(head.encode() + body().astype("<i2").tobytes(order="F"))
    return path


@kind("volume", truth=BODY)
def nrrd_beside_its_voxels(writer: Writer) -> Path:
    head, _, voxels = nrrd(writer).read_bytes().partition(b"\n\n")
    (writer.folder / "scan.nrrd").unlink()
    (writer.folder / "scan.raw").write_bytes(voxels)
    (writer.folder / "scan.nhdr").write_bytes(head + b"\ndata file: ./scan.raw\n")
    return writer.folder / "scan.nhdr"


@kind("volume", truth=BODY)
def nrrd_behind_other_bytes(writer: Writer) -> Path:
    path = nrrd(writer)
    head, _, voxels = path.read_bytes().partition(b"\n\n")
    path.write_bytes(head + b"\nbyte skip: -1\n\nanything" + voxels)
    return path


def headed(writer: Writer, *changes: tuple[str, str]) -> Path:
    path = metaimage_beside_its_voxels(writer)
    text = path.read_text()
    for old, new in changes:
        text = text.replace(old, new)
    path.write_text(text)
    return path


@kind("volume", truth=BODY)
def metaimage_with_four_axes(writer: Writer) -> Path:
    four = ("2 2.5 3", "2 2.5 3 1"), ("20 18 24", "20 18 24 1"), ("10 -20 100", "10 -20 100 0")
    matrix = ("1 0 0 0 1 0 0 0 1", "1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1")
    return headed(writer, ("NDims = 3", "NDims = 4"), *four, matrix)


@kind("volume", "The header gives no orientation (TransformMatrix): axes are taken to run to the left", truth=BODY)
def metaimage_of_no_orientation(writer: Writer) -> Path:
    return headed(writer, ("TransformMatrix = 1 0 0 0 1 0 0 0 1\n", ""))


def slices_beside(header: Path, files: str) -> Path:
    """A header whose voxels lie in a file for each slice instead of scan.raw."""
    names = [f"s{z:02d}.raw" for z in range(24)]
    for z, name in enumerate(names):
        (header.parent / name).write_bytes(body()[:, :, z].astype("<i2").tobytes(order="F"))
    (header.parent / "scan.raw").unlink()
    header.write_text(header.read_text().replace("./", "").replace("scan.raw", files.format("\n".join(names))))
    return header


@kind("volume", truth=BODY)
def metaimage_of_other_letters(writer: Writer) -> Path:
    path = headed(writer, ("scan.raw", "Müller #1.raw"))
    path.with_name("scan.raw").rename(path.with_name("Müller #1.raw"))
    return path


@kind("volume", truth=BODY)
def metaimage_that_lists_its_slices(writer: Writer) -> Path:
    return slices_beside(metaimage_beside_its_voxels(writer), "LIST\n{}\n")


@kind("volume", truth=BODY)
def metaimage_that_numbers_its_slices(writer: Writer) -> Path:
    return slices_beside(metaimage_beside_its_voxels(writer), "s%02d.raw 0 23 1")


@kind("volume", truth=BODY)
def nrrd_that_lists_its_slices(writer: Writer) -> Path:
    return slices_beside(nrrd_beside_its_voxels(writer), "LIST 2\n{}")


@kind("volume", truth=BODY)
def nrrd_that_numbers_its_slices(writer: Writer) -> Path:
    return slices_beside(nrrd_beside_its_voxels(writer), "s%02d.raw 0 23 1 2")


@kind("volume", truth=BODY)
def metaimage_behind_a_foreign_header(writer: Writer) -> Path:
    path = metaimage_beside_its_voxels(writer)
    raw = path.with_suffix(".raw")
    raw.write_bytes(b"head" * 25 + raw.read_bytes())
    path.write_text(path.read_text().replace("ElementDataFile", "HeaderSize = 100\nElementDataFile"))
    return path


@kind("volume", "Slices seem to be missing: 2 gap(s) of up to 6 mm")
def a_series_with_damaged_files(writer: Writer) -> Path:
    folder = ct(writer)
    (folder / "0890.dcm").write_bytes(b"")
    whole = (folder / "0885.dcm").read_bytes()
    (folder / "0885.dcm").write_bytes(whole[:-300])
    return folder


@kind("volume", truth=BODY)
def legacy_converted_with_stacks_of_frames(writer: Writer) -> Path:
    def change(file: FileDataset) -> None:
        file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.2"
        orientation = file.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
        del file.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
        for number, group in enumerate(file.PerFrameFunctionalGroupsSequence):
            group.PlaneOrientationSequence = orientation
            group.FrameContentSequence = [Dataset()]
            group.FrameContentSequence[0].StackID, group.FrameContentSequence[0].InStackPositionNumber = "1", number + 1

    return rewrite(writer.enhanced("legacy", [*range(12, 24), *range(12)]), change)


@kind("volume", truth=BODY)
def frames_in_even_steps(writer: Writer) -> Path:
    file = new_file(root=writer.root)
    file.NumberOfFrames, file.PixelSpacing, file.RescaleSlope, file.RescaleIntercept = 24, [2.5, 2], 1, -1024
    file.ImagePositionPatient, file.ImageOrientationPatient = [10, -20, 100], [1, 0, 0, 0, 1, 0]
    file.SpacingBetweenSlices = 3
    put_pixels(file, (body().transpose(2, 1, 0) + 1024).astype(np.uint16))
    return writer.save(file, "frames.dcm")


@kind("volume", truth=BODY)
def slices_of_two_folders(writer: Writer) -> Path:
    folder = ct(writer)
    for number, path in enumerate(sorted(folder.iterdir())):
        part = folder / f"DIR{number % 2}"
        part.mkdir(exist_ok=True)
        path.rename(part / path.stem)
    return folder


@kind("volume", truth=BODY)
def a_dicomdir_export(writer: Writer) -> Path:
    from pydicom.fileset import FileSet

    files = FileSet()
    for path in sorted(ct(writer, lambda n, f: f.update({"StudyTime": "1200", "StudyID": "1"})).iterdir()):
        files.add(path)
    files.write(writer.folder / "CD")
    return writer.folder / "CD" / "DICOMDIR"


@kind("volume", count=2)
def folders_whose_series_have_no_name(writer: Writer) -> Path:
    for folder in ("a", "b"):
        ct(writer, lambda n, f: setattr(f, "SeriesInstanceUID", ""), folder=f"CD/{folder}")
    return writer.folder / "CD"


@kind("volume", "directions of slices differ by up to 0.17 degrees")
def directions_of_few_digits(writer: Writer) -> Path:
    return ct(writer, lambda n, f: setattr(f, "ImageOrientationPatient", [1, 0.003 * (n % 2), 0, 0, 1, 0]))


# refused --------------------------------------------------------------------------------------------------------------


@kind("", "is one CT slice")
def one_slice_of_many(writer: Writer) -> Path:
    return ct(writer, places=[3.0]) / "0900.dcm"


@kind("", "is one CT slice")
def enhanced_of_one_frame(writer: Writer) -> Path:
    return writer.enhanced("one.dcm", [7])


@kind("", "all 24 slices lie at one place")
def one_position_for_all(writer: Writer) -> Path:
    return ct(writer, places=[0.0] * 24)


@kind("", "lacks ImagePositionPatient")
def no_position(writer: Writer) -> Path:
    return ct(writer, lambda n, f: f.__delattr__("ImagePositionPatient"))


@kind("", "5 of the 24 files of its series lack ImagePositionPatient")
def no_position_in_some(writer: Writer) -> Path:
    return ct(writer, lambda n, f: f.__delattr__("ImagePositionPatient") if n % 5 == 0 else None)


@kind("", "lacks ImageOrientationPatient")
def no_orientation(writer: Writer) -> Path:
    return ct(writer, lambda n, f: setattr(f, "ImageOrientationPatient", None))


@kind("", "RescaleSlope and RescaleIntercept are missing in 5 of its 24 files")
def no_rescale_in_some(writer: Writer) -> Path:
    return ct(writer, lambda n, f: setattr(f, "RescaleSlope", "") if n % 5 == 0 else None)


@kind("", "slices are missing: a block of 46 mm where steps of 3 mm are usual")
def a_block_that_is_missing(writer: Writer) -> Path:
    return ct(writer, places=[3.0 * z if z < 14 else 3.0 * z + 43 for z in range(24)])


@kind("", "24 places with 2 slices at each")
def phases_by_number_alone(writer: Writer) -> Path:
    ct(writer)
    return ct(writer, start=100, volume=(body() + 5).astype(np.int16))


@kind("", "slices that lie between each other's")
def acquisitions_by_number_alone(writer: Writer) -> Path:
    ct(writer)
    return ct(writer, start=100, places=[3.0 * z + 1.5 for z in range(24)])


@kind("", "spacing 2x2.5x12 mm is outside 0.2 to 10 mm")
def slices_too_far_apart(writer: Writer) -> Path:
    return ct(writer, places=[12.0 * z for z in range(24)])


@kind("", "frames without positions")
def frames_without_positions(writer: Writer) -> Path:
    file = new_file(root=writer.root)
    file.NumberOfFrames, file.PixelSpacing, file.RescaleSlope, file.RescaleIntercept = 24, [2.5, 2], 1, -1024
    file.ImagePositionPatient, file.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    put_pixels(file, (body().transpose(2, 1, 0) + 1024).astype(np.uint16))
    return writer.save(file, "frames.dcm")


@kind("", "several time points or channels")
def nifti_of_two_times(writer: Writer) -> Path:
    return nifti(writer, "two.nii.gz", np.stack([body(), body()], -1))


@kind("", "its voxels are colours or complex numbers")
def complex_nifti(writer: Writer) -> Path:
    return nifti(writer, "complex.nii", body().astype(np.complex64))


@kind("", "has shape 20 × 18 × 24 × 0, which holds no voxel")
def nifti_of_no_time(writer: Writer) -> Path:
    return nifti_saying(writer, 40, struct.pack("<8h", 4, 20, 18, 24, 0, 1, 1, 1))


@kind("", "data code 77 not recognized")
def nifti_of_unknown_voxels(writer: Writer) -> Path:
    return nifti_saying(writer, 70, struct.pack("<2h", 77, 16))


@kind("", "which is not a 3D volume")
def nifti_of_one_slice(writer: Writer) -> Path:
    return nifti(writer, "slice.nii.gz", body()[:, :, 9:10])


@kind("", "the affine is zero")
def nifti_of_no_place(writer: Writer) -> Path:
    return nifti_saying(writer, 252, bytes(4))


@kind("", "its header gives places in um, not in mm")
def nifti_in_micrometres(writer: Writer) -> Path:
    return nifti_saying(writer, 123, b"\3")


@kind("", "its header places the voxels inside the header itself")
def nifti_whose_voxels_begin_at_zero(writer: Writer) -> Path:
    return nifti_saying(writer, 108, struct.pack("<f", 0))


@kind("", "raw stored values")
def stored_values_in_nifti(writer: Writer) -> Path:
    return nifti(writer, "stored.nii.gz", (body() + 1024).astype(np.uint16))


@kind(
    "", "as grey levels or rescaled intensities do. Convert it again from DICOM without rescaling the intensities, or"
)
def grey_levels_in_nifti(writer: Writer) -> Path:
    return nifti(writer, "grey.nii.gz", np.clip((body() + 1000) / 6, 0, 255).astype(np.uint8))


@kind("", "values 0 to 0 are not Hounsfield units")
def a_series_of_zeros(writer: Writer) -> Path:
    return ct(writer, volume=np.zeros_like(body()))


@kind("", "some voxels are NaN or infinite")
def an_infinite_voxel(writer: Writer) -> Path:
    values = body().astype(np.float32)
    values[1, 1, 1] = np.inf
    return nifti(writer, "inf.nii.gz", values)


@kind("", "its header names voxels outside its folder")
def a_header_that_leads_elsewhere(writer: Writer) -> Path:
    path = metaimage_beside_its_voxels(writer)
    path.write_text(path.read_text().replace("scan.raw", "../../secret.raw"))
    return path


@kind("", "its voxels s05.raw are missing")
def a_listed_slice_that_is_missing(writer: Writer) -> Path:
    path = metaimage_that_lists_its_slices(writer)
    path.with_name("s05.raw").unlink()
    return path


@kind("", "its header gives no spacing, so the size of its voxels is unknown")
def metaimage_of_no_spacing(writer: Writer) -> Path:
    path = metaimage_beside_its_voxels(writer)
    path.write_text(path.read_text().replace("ElementSpacing = 2 2.5 3\n", ""))
    return path


@kind("", "its header names no space, so its orientation is unknown")
def nrrd_of_no_space(writer: Writer) -> Path:
    path = nrrd(writer)
    head, _, voxels = path.read_bytes().partition(b"\n\n")
    kept = [line for line in head.splitlines() if not line.startswith(b"space")]
    path.write_bytes(b"\n".join([*kept, b"spacings: 2 2.5 3", b"", voxels]))
    return path


@kind("", "its header names the space scanner-xyz, which says nothing of the patient")
def nrrd_in_the_scanners_space(writer: Writer) -> Path:
    path = nrrd(writer)
    path.write_bytes(path.read_bytes().replace(b"right-anterior-superior", b"scanner-xyz"))
    return path


@kind("", "its voxels are coded as bzip2, which is not read here. Save it with the encoding gzip")
def nrrd_in_another_coding(writer: Writer) -> Path:
    path = nrrd(writer)
    path.write_bytes(path.read_bytes().replace(b"encoding: raw", b"encoding: bzip2"))
    return path


def packed(writer: Writer, data: bytes, *fields: str) -> Path:
    """A MetaImage of these packed voxels behind its own header."""
    path = headed(writer, ("ElementDataFile = scan.raw\n", "\n".join(["CompressedData = True", *fields, ""])))
    path.write_bytes(path.read_bytes() + b"ElementDataFile = LOCAL\n" + data)
    return path.rename(path.with_suffix(".mha"))


VOXELS = body().astype("<i2").tobytes(order="F")


@kind("volume", truth=BODY)
def packed_metaimage(writer: Writer) -> Path:
    data = zlib.compress(VOXELS)
    return packed(writer, data, f"CompressedDataSize = {len(data)}")


@kind("", "the compressed data is damaged or cut off")
def damaged_metaimage(writer: Writer) -> Path:
    data = bytearray(zlib.compress(VOXELS))
    data[len(data) // 2] ^= 0xFF
    return packed(writer, bytes(data), f"CompressedDataSize = {len(data)}")


@kind("", "the compressed data is damaged or cut off")
def packed_metaimage_of_fewer_voxels(writer: Writer) -> Path:
    data = zlib.compress(VOXELS[:-4000])
    return packed(writer, data, f"CompressedDataSize = {len(data)}")


@kind("", "the compressed data is damaged or cut off")
def damaged_nrrd(writer: Writer) -> Path:
    path = nrrd(writer)
    head, _, voxels = path.read_bytes().partition(b"\n\n")
    data = bytearray(gzip.compress(voxels))
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(head.replace(b"raw", b"gzip") + b"\n\n" + data)
    return path


@kind("", "its header gives no CompressedDataSize")
def packed_metaimage_of_no_size(writer: Writer) -> Path:
    return packed(writer, zlib.compress(VOXELS))


@kind("", "its header says ElementType MET_COFFEE, which is not read here")
def metaimage_of_unknown_voxels(writer: Writer) -> Path:
    return headed(writer, ("MET_SHORT", "MET_COFFEE"))


@kind("", "its voxels are written as text, which is not read here. Save it with BinaryData = True")
def metaimage_as_text(writer: Writer) -> Path:
    return headed(writer, ("ElementType", "BinaryData = False\nElementType"))


@kind("", "its header gives a spacing below 0, so its orientation is unknown")
def metaimage_of_negative_spacing(writer: Writer) -> Path:
    return headed(writer, ("2 2.5 3", "2 2.5 -3"))


@kind("", "its header gives places in cm, not in mm")
def metaimage_in_centimetres(writer: Writer) -> Path:
    return headed(writer, ("ElementType", "DistanceUnits = cm\nElementType"))


@kind("", "its voxels are colours or complex numbers")
def metaimage_of_colours(writer: Writer) -> Path:
    return headed(writer, ("20 18 24", "20 18 8"), ("ElementType", "ElementNumberOfChannels = 3\nElementType"))


def cut(path: Path, count: int = 500) -> Path:
    path.write_bytes(path.read_bytes()[:-count])
    return path


@kind("", "is cut off: its header says 17,280 bytes of voxels, there are 16,780. Download or export it again")
def nifti_cut_off(writer: Writer) -> Path:
    return cut(nifti(writer, "a.nii", body()))


@kind("", "is cut off: its header says 240,000,000 bytes of voxels")
def a_nifti_of_fewer_voxels(writer: Writer) -> Path:
    path = nifti(writer, "a.nii.gz", body())
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole[:42] + struct.pack("<3h", 2000, 2000, 30) + whole[48:]))
    return path


@kind("", "the compressed data is damaged or cut off")
def packed_nifti_cut_off(writer: Writer) -> Path:
    return cut(nifti(writer, "a.nii.gz", body()), 100)


@kind("", "is cut off: its header says 17,280 bytes of voxels, there are 16,780. Download or export it again")
def metaimage_cut_off(writer: Writer) -> Path:
    path = metaimage_beside_its_voxels(writer)
    cut(path.with_suffix(".raw"))
    return path


@kind("", "is cut off: its header says 17,280 bytes of voxels, there are 16,780. Download or export it again")
def nrrd_cut_off(writer: Writer) -> Path:
    return cut(nrrd(writer))


@kind("", "truncated PNG, the end chunk is missing. Download or export it again")
def a_png_without_its_end(writer: Writer) -> Path:
    return cut(picture(writer, "a.png", FILM), 12)


@kind("", "cannot be read (image file is truncated")
def a_tiff_cut_off(writer: Writer) -> Path:
    return cut(picture(writer, "a.tif", FILM), 5000)


@kind("", "is DICOM of modality MR (magnetic resonance)")
def mr_that_names_no_modality(writer: Writer) -> Path:
    return film(writer, Modality="", SOPClassUID="1.2.840.10008.5.1.4.1.1.4")


@kind("", "holds 3 frames, a film or loop")
def a_loop(writer: Writer) -> Path:
    return film(writer, pixels=np.stack([FILM] * 3), Modality="XA", NumberOfFrames=3)


@kind("", "is DICOM of modality MR (magnetic resonance)")
def another_modality(writer: Writer) -> Path:
    return film(writer, Modality="MR")


@kind("", "the pixels cannot be decoded (the codestream has 70 x 90 pixels, the header says 90 x 70)")
def a_codestream_of_another_shape(writer: Writer) -> Path:
    path = compress(film(writer), "JPEG2000Lossless")
    return rewrite(path, lambda file: file.update({"Rows": 70, "Columns": 90}))


@kind("", "its header says 12,600 bytes of pixels, the file has 25,200")
def more_frames_than_the_header_says(writer: Writer) -> Path:
    return film(writer, pixels=np.stack([FILM] * 2))


@kind("", "the codestream is damaged")
def jpeg_of_damaged_segments(writer: Writer) -> Path:
    path = compress(film(writer), "JPEGLosslessProcess14_1")
    whole = bytearray(path.read_bytes())
    # the mark of the segment behind the one that gives the size, of which GDCM ends the process
    whole[whole.index(b"\xff\xc3") + 13] = 0xD7
    path.write_bytes(whole)
    return path


def coded_otherwise(writer: Writer, coding: str, pixels: np.ndarray = FILM, **tags: Any) -> Path:
    bits = {"BitsStored": 8} if pixels.dtype == np.uint8 else {}
    return rewrite(compress(film(writer, pixels=pixels, **bits), coding), lambda file: file.update(tags))


@kind("", "the codestream has 70 x 90 pixels, the header says 90 x 70")
def jpeg_ls_of_another_shape(writer: Writer) -> Path:
    return coded_otherwise(writer, "JPEGLSLossless", Rows=70, Columns=90)


@kind("", "the codestream has 70 x 90 pixels, the header says 90 x 70")
def jpeg_of_12_bits_and_another_shape(writer: Writer) -> Path:
    return coded_otherwise(writer, "JPEGExtendedProcess2_4", Rows=70, Columns=90)


@kind("", "the codestream has 70 x 90 pixels, the header says 70 x 100")
def jpeg_ls_of_more_rows(writer: Writer) -> Path:
    return coded_otherwise(writer, "JPEGLSLossless", Rows=100)


@kind("", "the codestream has 1 value(s) of 16 bits a pixel, the header says 1 of 8")
def lossless_jpeg_of_fewer_bits(writer: Writer) -> Path:
    return coded_otherwise(writer, "JPEGLosslessProcess14_1", BitsAllocated=8, BitsStored=8, HighBit=7)


@kind("", "the codestream has 1 value(s) of 8 bits a pixel, the header says 3 of 8")
def jpeg_2000_of_colours_that_are_none(writer: Writer) -> Path:
    colours = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    return coded_otherwise(writer, "JPEG2000Lossless", (FILM >> 4).astype(np.uint8), **colours)


@kind("", "0900.dcm: the pixels cannot be decoded (the codestream has 20 x 18 pixels, the header says 20 x 17)")
def slices_of_another_shape(writer: Writer) -> Path:
    folder = ct(writer)
    for path in sorted(folder.iterdir()):
        compress(path, "JPEGLSLossless").replace(path)
    return rewrite(folder, lambda file: setattr(file, "Rows", 17))


@kind("", "in 1 of the 24 files of its series, its RescaleSlope is 0, which makes all values one")
def a_slope_of_zero(writer: Writer) -> Path:
    return ct(writer, lambda n, f: setattr(f, "RescaleSlope", 0) if n == 5 else None)


@kind("", "its RescaleSlope is 0, which makes all values one")
def a_films_slope_of_zero(writer: Writer) -> Path:
    return film(writer, RescaleSlope=0, RescaleIntercept=0)


@kind("", "has ImagePositionPatient that is not 3 numbers, so the place and size of its slices are unknown")
def a_place_of_four_values(writer: Writer) -> Path:
    return ct(writer, lambda n, f: setattr(f, "ImagePositionPatient", [10, -20, 100 + 3 * n, ""]))


@kind("", "its header is damaged, or its pixels are of a kind that is not read. Save it as 8- or 16-bit grey")
def a_tiff_of_64_bits(writer: Writer) -> Path:
    path = picture(writer, "a.tif", FILM.astype(np.float32))
    data = path.read_bytes()
    tag = struct.pack("<HHI", 258, 3, 1)
    path.write_bytes(data.replace(tag + struct.pack("<H", 32), tag + struct.pack("<H", 64)))
    return path


@kind("", "the DICOM is cut off")
def a_film_cut_off(writer: Writer) -> Path:
    path = film(writer)
    path.write_bytes(path.read_bytes()[:-500])
    return path


@kind("", "is coded in transfer syntax 1.2.840.113619.5.2")
def coded_in_a_makers_own_way(writer: Writer) -> Path:
    def change(file: FileDataset) -> None:
        file.file_meta.TransferSyntaxUID = "1.2.840.113619.5.2"

    return rewrite(film(writer), change, implicit_vr=False, little_endian=True)


@kind("", "its PhotometricInterpretation is missing")
def polarity_unknown(writer: Writer) -> Path:
    return rewrite(film(writer), lambda file: file.__delattr__("PhotometricInterpretation"))


@kind("", "holds 2 pages or frames")
def pages(writer: Writer) -> Path:
    more = [Image.fromarray((FILM >> 4).astype(np.uint8))]
    return picture(writer, "a.tif", (FILM >> 4).astype(np.uint8), save_all=True, append_images=more)


@kind("", "is a colour picture, not a radiograph")
def a_photograph(writer: Writer) -> Path:
    colours = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return picture(writer, "a.png", colours)


@kind("", "all pixels have the value 7")
def nothing_on_it(writer: Writer) -> Path:
    return picture(writer, "a.png", np.full((64, 64), 7, np.uint8))


@kind("", "is named as a picture but holds a WebP picture")
def another_picture(writer: Writer) -> Path:
    path = picture(writer, "a.webp", (FILM >> 4).astype(np.uint8))
    return path.rename(path.with_name("a.jpg"))


@kind("", "the file is empty")
def nothing_in_it(writer: Writer) -> Path:
    path = writer.folder / "a.dcm"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def make_all(folder: Path, names: Sequence[str] = ()) -> dict[str, Path]:
    """Write files of each kind to a folder of its own; the path to name, by kind."""
    paths = {}
    for number, name in enumerate(names or KINDS, start=1):
        paths[name] = KINDS[name].make(Writer(folder / f"{number:03d}_{name}", root=f"1.2.826.0.1.9.{number}"))
    return paths
