# SPDX-License-Identifier: Apache-2.0
"""Write one grey image as a DICOM file whose bytes depend on nothing but its content: no date, no version."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

Tag = tuple[int, int]

_WRITER = "2.25.305411318937826216457281059428163205714"


def write_dicom(path: Path, pixels: np.ndarray, photometric: str, tags: Mapping[Tag, tuple[str, str]]) -> None:
    """Write a DICOM file, explicit little-endian.

    Args:
        pixels: (H, W) uint8 or uint16, stored as they are.
        photometric: ``MONOCHROME2`` (0 is black) or ``MONOCHROME1`` (0 is white).
        tags: (group, element) -> (value representation, text), SOP class and instance among them; sizes,
            bits and pixels are added.
    """
    from pydicom import Dataset, dcmwrite
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian

    file, bits = Dataset(), 8 * pixels.dtype.itemsize
    # what real files hold against the standard, such as an age without its unit, is written too
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tag, (representation, text) in tags.items():
            file.add_new(tag, representation, text)
        file.SamplesPerPixel, file.PhotometricInterpretation = 1, photometric
        file.Rows, file.Columns = pixels.shape
        file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = bits, bits, bits - 1, 0
        little = pixels.astype(pixels.dtype.newbyteorder("<"))
        file.add_new((0x7FE0, 0x0010), "OB" if bits == 8 else "OW", little.tobytes())
        file.file_meta, file.preamble = FileMetaDataset(), b"\0" * 128
        file.file_meta.FileMetaInformationGroupLength, file.file_meta.FileMetaInformationVersion = 0, b"\0\1"
        file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID
        file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID
        file.file_meta.TransferSyntaxUID, file.file_meta.ImplementationClassUID = ExplicitVRLittleEndian, UID(_WRITER)
        dcmwrite(path, file)
