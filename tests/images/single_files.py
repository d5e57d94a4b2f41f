# SPDX-License-Identifier: Apache-2.0
"""Single DICOM files whose every pixel is known, plain and in each transfer syntax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

H, W = 48, 40
#: 12 bits, no two pixels alike.
GREY = (np.arange(H * W, dtype=np.uint16).reshape(H, W) * 2 + 17).astype(np.uint16)


def write(path: Path, pixels: np.ndarray, syntax: str = ExplicitVRLittleEndian, **tags: Any) -> Path:
    """A computed radiograph of these pixels, (H, W), (frames, H, W) or, with SamplesPerPixel, (H, W, 3)."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    meta.TransferSyntaxUID = syntax
    implicit, little = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
    file = FileDataset("", {}, b"\0" * 128, meta, implicit, little)
    file.SOPClassUID, file.SOPInstanceUID, file.Modality = meta.MediaStorageSOPClassUID, "1.2.3", "CR"
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    samples = tags.get("SamplesPerPixel", 1)
    file.Rows, file.Columns = pixels.shape[-3:-1] if samples > 1 else pixels.shape[-2:]
    file.BitsAllocated = file.BitsStored = pixels.dtype.itemsize * 8
    file.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in tags.items():
        setattr(file, name, value)
    file.HighBit = tags.get("HighBit", file.BitsStored - 1)
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    file.PixelData = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder(order)).tobytes()
    file["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)
    return path


def compress(path: Path, kind: str) -> Path:
    """The same file in another transfer syntax, by GDCM."""
    import gdcm

    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, kind)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer, out = gdcm.ImageWriter(), path.with_name(f"{kind}.dcm")
    writer.SetFileName(str(out))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return out
