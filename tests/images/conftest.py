# SPDX-License-Identifier: Apache-2.0
"""DICOM files written by hand with pydicom: a body whose every voxel is known, and any fault that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset

CT, ENHANCED, CR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.1"
ROOT = "1.2.826.0.1.3680043.2.1125.7"
SHAPE, SPACING = (20, 18, 24), (2.0, 2.5, 3.0)


def body() -> np.ndarray:
    """int16 Hounsfield units (x, y, z), x to the left, y to the back, z to the head; no two slices are equal."""
    volume = np.full(SHAPE, -1000, np.int16)
    volume[3:17, 3:15, 1:] = 40
    volume[5:9, 5:12, 2:18] = -820
    volume[12, 13, :] = np.arange(SHAPE[2]) * 10
    return volume


def new_file(
    modality: str = "CT", sop_class: str = CT, series: str = "1", name: str = "0", root: str = ROOT
) -> FileDataset:
    """A header without image."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, f"{root}.{series}.{name}"
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    file.Modality, file.StudyInstanceUID, file.SeriesInstanceUID = modality, root, f"{root}.{series}"
    file.PatientName, file.PatientID, file.StudyDate = "Doe^Jane", "MRN-4711", "20240229"
    file.SeriesNumber = series
    return file


def put_pixels(file: Dataset, planes: np.ndarray) -> None:
    """uint16 (H, W) or (frames, H, W)."""
    file.Rows, file.Columns = planes.shape[-2:]
    file.BitsAllocated = file.BitsStored = 16
    file.HighBit, file.PixelRepresentation, file.SamplesPerPixel = 15, 0, 1
    file.PhotometricInterpretation = "MONOCHROME2"
    file.PixelData = np.ascontiguousarray(planes, "<u2").tobytes()


class Writer:
    """Writes files below a folder."""

    new_file = staticmethod(new_file)

    def __init__(self, folder: Path, root: str = ROOT) -> None:
        self.folder, self.root = folder, root

    def save(self, file: FileDataset, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        file.save_as(path, enforce_file_format=True)
        return path

    def slices(
        self,
        folder: str = "ct",
        series: str = "1",
        places: Sequence[float] | None = None,
        volume: np.ndarray | None = None,
        shift: Callable[[float], Sequence[float]] = lambda place: (0.0, 0.0),
        change: Callable[[int, FileDataset], None] = lambda number, file: None,
        start: int = 0,
        suffix: str = ".dcm",
    ) -> list[Path]:
        """A series, one file a slice, file names against the order of the slices.

        Args:
            folder: below the writer's own.
            series: end of the UID.
            places: z in mm of each slice; by default even ones.
            volume: Hounsfield units (x, y, z).
            shift: (x, y) in mm by which a slice at z is moved.
            change: called with the number and the file of each slice before it is written.
            start: first number in the file names.
            suffix: of the file names.
        """
        volume = body() if volume is None else volume
        places = [SPACING[2] * z for z in range(volume.shape[2])] if places is None else list(places)
        paths = []
        for number, place in enumerate(places):
            file = new_file(series=series, name=str(start + number), root=self.root)
            x, y = shift(place)
            file.ImagePositionPatient = [10 + x, -20 + y, 100 + place]
            file.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
            file.PixelSpacing, file.SliceThickness = [SPACING[1], SPACING[0]], 3.0
            file.RescaleSlope, file.RescaleIntercept = 1, -1024
            file.InstanceNumber = start + number + 1
            put_pixels(file, (volume[:, :, number].T + 1024).astype(np.uint16))
            change(number, file)
            paths.append(self.save(file, f"{folder}/{900 - start - number:04d}{suffix}"))
        return paths

    def film(self, name: str, series: str = "9", modality: str = "CR", size: tuple[int, int] = (60, 50)) -> Path:
        file = new_file(modality, CR, series, str(sum(name.encode())), self.root)
        rng = np.random.default_rng(sum(name.encode()))
        put_pixels(file, rng.integers(0, 4096, size).astype(np.uint16))
        return self.save(file, name)

    def enhanced(self, name: str, order: Sequence[int], volume: np.ndarray | None = None) -> Path:
        """A multi-frame CT whose frames are the slices `order`."""
        volume = body() if volume is None else volume
        file = new_file(sop_class=ENHANCED, name="77", root=self.root)
        file.NumberOfFrames = len(order)
        measures, rescale, orientation, shared = Dataset(), Dataset(), Dataset(), Dataset()
        measures.PixelSpacing, measures.SliceThickness = [SPACING[1], SPACING[0]], 3.0
        rescale.RescaleSlope, rescale.RescaleIntercept = 1, -1024
        orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        shared.PixelMeasuresSequence, shared.PixelValueTransformationSequence = [measures], [rescale]
        shared.PlaneOrientationSequence = [orientation]
        file.SharedFunctionalGroupsSequence = [shared]
        groups = []
        for number in order:
            plane, group = Dataset(), Dataset()
            plane.ImagePositionPatient = [10, -20, 100 + SPACING[2] * number]
            group.PlanePositionSequence = [plane]
            groups.append(group)
        file.PerFrameFunctionalGroupsSequence = groups
        put_pixels(file, (volume[:, :, list(order)].transpose(2, 1, 0) + 1024).astype(np.uint16))
        return self.save(file, name)


@pytest.fixture
def dicom(tmp_path: Path) -> Writer:
    return Writer(tmp_path / "in")


@pytest.fixture
def truth() -> Any:
    """The body as (values, affine in RAS) of files that the writer makes."""
    affine = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])
    affine[:3, 3] = -10, 20, 100
    return body(), affine
