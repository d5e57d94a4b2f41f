# SPDX-License-Identifier: Apache-2.0
"""Whether a file is an X-ray that can be read: the same verdict in the same words for every command."""

from __future__ import annotations

import unicodedata
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin

from unimedi_components.errors import ConfigError, reason_of
from unimedi_components.images.dicom import DicomHeader, pixel_fault, read_header
from unimedi_components.images.identify import DICOM, content_fault, identify

__all__ = [
    "CT_CLASSES",
    "IMAGE_CHECKS",
    "PICTURE_FORMATS",
    "XRAYS",
    "Fault",
    "colour_fault",
    "dicom_warnings",
    "film_fault",
    "marks_fault",
    "modality_of",
    "modality_words",
    "pages_fault",
    "xray_fault",
]

IMAGE_CHECKS = ("quick", "full", "exists", "none")
#: Pillow's names of the pictures that are read.
PICTURE_FORMATS = ("JPEG", "PNG", "BMP", "TIFF")
# of 16 bits whose least is white, Pillow knows the other byte order alone
TiffImagePlugin.OPEN_INFO.setdefault((TiffImagePlugin.MM, 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))
#: PS3.3 C.7.3.1.1.1; secondary captures and files without a modality may be X-rays too.
XRAYS = frozenset({"CR", "DX", "DR", "RG", "RF", "XA", "OT", "SC", ""})
UNREADABLE, ONE_SLICE, NO_XRAY = "unreadable image", "one CT slice", "not an X-ray"

_HEAD, _TAIL = 8192, 4096
#: CT, enhanced CT and legacy converted enhanced CT image storage
_CLASSES = "1.2.840.10008.5.1.4.1.1."
CT_CLASSES = frozenset(f"{_CLASSES}{number}" for number in ("2", "2.1", "2.2"))
_OTHERS = {
    **{"MR": "magnetic resonance", "PT": "positron emission", "NM": "nuclear medicine", "US": "ultrasound"},
    **{"MG": "mammography", "SR": "a structured report", "RTSTRUCT": "contours for radiotherapy"},
    **{"RTDOSE": "a radiotherapy dose", "RTPLAN": "a radiotherapy plan", "SEG": "a segmentation", "ECG": "an ECG"},
    **{"PR": "a presentation state", "KO": "a selection of key images", "DOC": "a document", "REG": "a registration"},
    **{"ES": "endoscopy", "XC": "a photograph", "SM": "microscopy", "OP": "ophthalmology", "PX": "dental"},
    **{"IO": "dental"},
}
# modality by the end of a file's class, where the file does not name it
_BY_CLASS = {
    **{"1.2": "MG", "1.3": "IO", "13.1.3": "MG", "3": "US", "4": "MR", "6": "US", "11": "PR", "20": "NM"},
    **{"66": "SEG", "77": "XC", "88": "SR", "104": "DOC", "128": "PT", "130": "PT"},
}
_TRUNK = ("CHEST", "THORAX", "LUNG", "TORAX", "ABDOMEN", "TRUNK", "BODY", "RIBS", "HEART")
# A grey film that was saved as colour JPEG strays by a few levels; burnt-in coloured marks cover little of it.
_COLOURED, _COLOURED_SHARE, _FEW = 32, 0.05, 1024
# thumbnails of 28 pixels are trained on
_FEWEST = 16


class Fault(NamedTuple):
    """What is wrong with a file: a stable ``reason`` to count by, and a ``detail`` with the remedy."""

    reason: str
    detail: str


def xray_fault(path: str | Path, check: str = "quick", film: bool = True) -> tuple[str, str] | None:
    """Say what is wrong with a 2D image file.

    Args:
        path: DICOM (told by its content), JPEG, PNG, BMP or TIFF.
        check: ``"quick"`` reads the first and last bytes of JPEG and PNG files (start and end marks, so an empty or
            truncated file is found at the cost of one small read) and the headers of others, of DICOM also whether it
            is an X-ray; ``"full"`` reads the image as a network would see it; ``"exists"`` only asks whether the
            file is there; ``"none"`` does not look at all.
        film: whether the values must be a film's; False for slices of a CT as pictures, which are decoded alone.

    Returns:
        None when sound, otherwise ``(reason, detail)`` with the reason ``missing image``, ``unreadable image``,
        ``one CT slice`` or ``not an X-ray``.

    Raises:
        ConfigError: ``check`` is none of the four.
    """
    if check not in IMAGE_CHECKS:
        raise ConfigError(f"check_images={check!r} is unknown. Use one of {', '.join(IMAGE_CHECKS)}.")
    if check == "none":
        return None
    path = Path(path)
    if not path.is_file():
        return "missing image", f"{path}: no such file"
    if check == "exists":
        return None
    try:
        fault = _quick_fault(path)
        if fault is None and check == "full" and film:
            from unimedi_components.images.xray import read_xray

            read_xray(path)
        elif fault is None and check == "full":
            with Image.open(path) as image:
                image.load()
    except Exception as error:
        fault = Fault(UNREADABLE, reason_of(error, path))
    return None if fault is None else (fault.reason, f"{path}: {fault.detail}")


def _quick_fault(path: Path) -> Fault | None:
    content = identify(path)
    if fault := content_fault(path.name, content):
        return Fault(UNREADABLE, fault)
    if content == DICOM:
        return film_fault(read_header(path))
    if (text := marks_fault(path)) is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=PICTURE_FORMATS) as image:
                text = pages_fault(image)
    return Fault(UNREADABLE, text) if text else None


def marks_fault(path: Path) -> str | None:
    """What the first and last bytes of a picture say; None where only opening the file can tell."""
    with open(path, "rb") as stream:
        head = stream.read(_HEAD)
        stream.seek(max(0, path.stat().st_size - _TAIL))
        tail = stream.read()
    if head.startswith(b"\xff\xd8\xff"):
        # coded data never holds ff d9 (0xff is followed by 00 or a restart mark), but much may follow it
        whole = b"\xff\xd9" in tail or b"\xff\xd9" in path.read_bytes().rpartition(b"\xff\xda")[2]
        return "" if whole else "truncated JPEG, the end-of-image mark is missing. Download or export it again"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        # an animated picture says so before its pixels
        if b"acTL" in head:
            return None
        whole = b"IEND" in tail or b"IEND" in path.read_bytes()
        return "" if whole else "truncated PNG, the end chunk is missing. Download or export it again"
    return None


def pages_fault(image: Image.Image) -> str:
    """Say that a picture holds several; empty where it is one, or a JPEG with its previews behind it."""
    pages = getattr(image, "n_frames", 1)
    return f"holds {pages} pages or frames. Give one X-ray per file" if pages > 1 and image.format != "MPO" else ""


def film_fault(header: DicomHeader) -> Fault | None:
    """Say why a DICOM file is no X-ray that can be read; None where its header speaks for one."""
    # which needs the modalities of this module itself
    from unimedi_components.images.dicom_series import sort_headers

    found = sort_headers([header], assume_hu=True)
    if found.xrays:
        return None
    if found.stacks:
        return Fault(NO_XRAY, f"is a CT of {header.frames} frames, not an X-ray. Give it as a volume")
    detail = found.left_out[0][1]
    if "one CT slice" in detail:
        return Fault(ONE_SLICE, detail)
    return Fault(UNREADABLE if pixel_fault(header) else NO_XRAY, detail)


def dicom_warnings(header: DicomHeader) -> tuple[str, ...]:
    """Warnings where the header names another part of the body than the trunk, raw values, oblong or few pixels."""
    part, intent = header.text("BodyPartExamined"), header.text("PresentationIntentType").upper()
    # as TÓRAX
    plain = unicodedata.normalize("NFKD", part).encode("ascii", "ignore").decode().upper()
    found = []
    if part and not any(word in plain for word in _TRUNK):
        found.append(f"The DICOM header names the body part {part[:40]}; the network knows chests.")
    if intent == "FOR PROCESSING":
        found.append("The film is FOR PROCESSING, a detector's raw values. Give the one FOR PRESENTATION.")
    sides = header.pixel_spacing or header.numbers("PixelAspectRatio") or (1.0, 1.0)
    film = header.sop_class not in CT_CLASSES and header.modality != "CT"
    if film and max(sides) > 1.01 * min(sides):
        found.append(f"The film's pixels are not square ({sides[0]:g} high, {sides[1]:g} wide), but are read as such.")
    if film and min(header.rows, header.columns) < _FEWEST:
        found.append(f"The film has {header.columns} x {header.rows} pixels, too few to show a chest.")
    return tuple(found)


def modality_of(header: DicomHeader) -> str:
    """The modality that a file names, or where it names none or no kind of image (OT, SC), that of its class."""
    kinds = _BY_CLASS.items() if header.modality in ("", "OT", "SC") else ()
    starts = ((f"{_CLASSES}{number}.", named) for number, named in kinds)
    return next((named for start, named in starts if f"{header.sop_class}.".startswith(start)), header.modality)


def modality_words(modality: str) -> str:
    """A modality and what it stands for."""
    more = _OTHERS.get(modality, "")
    return f"{modality} ({more})" if more else modality or "not named"


def colour_fault(rgb: Any) -> str:
    """Say that a picture is too colourful for a radiograph; empty where it is not.

    It is where in more than 5% of the pixels the largest and the smallest of red, green and blue differ by more than
    32 of 255. Grey films stored as RGB pass, with coloured arrows and letters on them; photographs and films that are
    tinted all over do not.

    Args:
        rgb: (H, W, 3) in 0 to 255; fewer than 1,024 pixels are too few to judge.
    """
    if np.asarray(rgb)[..., 0].size < _FEW:
        return ""
    share = float((np.ptp(np.asarray(rgb, dtype=np.float32), axis=-1) > _COLOURED).mean())
    if share <= _COLOURED_SHARE:
        return ""
    return (
        f"is a colour picture, not a radiograph ({share:.0%} of its pixels are coloured). "
        "If it is a tinted X-ray, convert it to greyscale"
    )
