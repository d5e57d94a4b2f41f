# SPDX-License-Identifier: Apache-2.0
"""What an uploaded DICOM file is by its header, and whether it holds all its pixels."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from unimedi_components.data.itk_loading import load_itk
from unimedi_components.serve.faults import unsupported, unusable
from unimedi_components.serve.uploads import Received

__all__ = ["XRAYS", "DicomFile", "check_image", "read_dicom"]

# PS3.3 C.7.3.1.1.1; secondary captures and files without a modality may be X-rays too
XRAYS = {"CR", "DX", "DR", "RG", "RF", "XA", "OT", "SC", ""}
_OTHERS = {
    **{"MR": "magnetic resonance", "PT": "positron emission", "NM": "nuclear medicine", "US": "ultrasound"},
    **{"MG": "mammography", "SR": "a structured report", "RTSTRUCT": "contours for radiotherapy"},
    **{"RTDOSE": "a radiotherapy dose", "RTPLAN": "a radiotherapy plan", "SEG": "a segmentation", "ECG": "an ECG"},
    **{"PR": "a presentation state", "KO": "a selection of key images", "DOC": "a document", "REG": "a registration"},
    **{
        "ES": "endoscopy",
        "XC": "a photograph",
        "SM": "microscopy",
        "OP": "ophthalmology",
        "PX": "dental",
        "IO": "dental",
    },
}
_TAGS = {
    *("0008|0008", "0008|0060", "0008|103e", "0018|0015", "0020|000e", "0020|0032", "0020|0037"),
    *("0028|0002", "0028|0100"),
}
_PIXELS = b"\xe0\x7f\x10\x00"
_TRANSFER_SYNTAX = re.compile(rb"\x02\0\x10\0UI..([0-9.]+)", re.DOTALL)
_MODALITY = re.compile(rb"\x08\0\x60\0(?:CS..|....)([A-Z]{2,16})", re.DOTALL)
# PS3.5 A.1, A.2 and A.3: one sample after the other, so that a header tells the file's size
_PLAIN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
_CHUNK = 2**20


@dataclass(frozen=True)
class DicomFile:
    """A file with the part of its header that decides what it is.

    Args:
        file: what was received.
        tags: values by "group|element", as ITK gives them; few where the file holds no image.
        is_image: whether there are pixels that can be read.
        shape: columns and rows.
        frames: number of planes.
    """

    file: Received
    tags: dict[str, str]
    is_image: bool = False
    shape: tuple[int, int] = (0, 0)
    frames: int = 1

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def modality(self) -> str:
        return self.tags.get("0008|0060", "").upper()

    @property
    def series(self) -> str:
        return self.tags.get("0020|000e", "") or self.name

    @property
    def description(self) -> str:
        return self.tags.get("0008|103e", "")[:60]

    @property
    def samples(self) -> int:
        """Values per pixel."""
        return self.number("0028|0002", 1)

    @property
    def is_localizer(self) -> bool:
        return "LOCALIZER" in self.tags.get("0008|0008", "").upper()

    @property
    def described(self) -> str:
        """Modality in words."""
        more = _OTHERS.get(self.modality, "")
        return f"{self.modality} ({more})" if more else self.modality or "not named"

    def number(self, tag: str, default: int) -> int:
        text = self.tags.get(tag, "").split("\\")[0].strip()
        return int(text) if text.isdigit() else default

    def numbers(self, tag: str) -> list[float]:
        return [float(part) for part in self.tags.get(tag, "").split("\\")]


def read_dicom(file: Received) -> DicomFile:
    """Read a file's header.

    Raises:
        UploadError: it holds pixels that cannot be read.
    """
    itk = load_itk()
    image_io = itk.GDCMImageIO.New()
    image_io.SetFileName(str(file.path))
    try:
        image_io.ReadImageInformation()
    except RuntimeError as error:
        with open(file.path, "rb") as stream:
            modality = _MODALITY.search(stream.read(_CHUNK))
        found = DicomFile(file, {"0008|0060": modality[1].decode() if modality else ""})
        if found.modality in XRAYS | {"CT"} and _holds_pixels(file):
            reason = str(error).strip().splitlines()[-1].rpartition("): ")[2].replace(str(file.path), file.name)[:160]
            raise unusable(
                f"{file.name}: the DICOM is cut off, damaged or of an unknown kind ({reason}). Export it again."
            ) from None
        return found
    tags = image_io.GetMetaDataDictionary()
    known = {str(name): str(tags[name]).strip().strip("\0").strip() for name in tags.GetKeys() if name in _TAGS}
    depth = int(image_io.GetDimensions(2)) if image_io.GetNumberOfDimensions() > 2 else 1
    shape = int(image_io.GetDimensions(0)), int(image_io.GetDimensions(1))
    # GDCM passes over pixels that are missing
    return DicomFile(file, known, _holds_pixels(file), shape, depth)


def _holds_pixels(file: Received) -> bool:
    last = b""
    with open(file.path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            if _PIXELS in last + chunk:
                return True
            last = chunk[-len(_PIXELS) + 1 :]
    return False


def check_image(found: DicomFile) -> None:
    """Check that a file holds grey pixels, all of them.

    Raises:
        UploadError: no pixels, a modality that is not read, or cut off.
    """
    if found.modality not in XRAYS | {"CT"}:
        raise unsupported(f"{found.name}: is DICOM of modality {found.described}. Give a chest X-ray (CR, DX) or a CT.")
    if not found.is_image:
        raise unusable(f"{found.name}: is DICOM without pixels (modality {found.described}). Export the image itself.")
    with open(found.file.path, "rb") as stream:
        syntax = _TRANSFER_SYNTAX.search(stream.read(4096))
    need = math.prod(found.shape) * found.frames * found.samples * found.number("0028|0100", 16) // 8
    size = found.file.path.stat().st_size
    if syntax is not None and syntax[1].decode() in _PLAIN and need > size:
        raise unusable(
            f"{found.name}: the DICOM is cut off: its header says {need:,} bytes of pixels, the file has {size:,}. "
            "Export it again."
        )
