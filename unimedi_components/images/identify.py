# SPDX-License-Identifier: Apache-2.0
"""What a file is by its first bytes; its name only has to agree."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from unimedi_components.images.headers import starts_as_dicom

__all__ = ["DICOM", "PICTURES", "VOLUMES", "content_fault", "family_of_name", "identify", "is_image"]

PICTURES = {"jpeg": ".jpg", "png": ".png", "bmp": ".bmp", "tiff": ".tif"}
VOLUMES = {"nifti": ".nii", "nifti.gz": ".nii.gz", "metaimage": ".mhd", "nrrd": ".nrrd"}
DICOM = "dicom"

_HEAD = 4096
_FAMILY = {
    "picture": (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"),
    "volume": (".nii", ".nii.gz", ".mhd", ".mha", ".nrrd"),
    "dicom": (".dcm", ".dicom", ".ima"),
}
_NAMED = {"picture": "a picture", "volume": "a volume", "dicom": "DICOM"}
_STARTS = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    # of more than 4 GB, or so written
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
    (b"NRRD000", "nrrd"),
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"GIF8", "gif"),
    (b"%PDF", "pdf"),
    (b"Rar!", "archive"),
    (b"7z\xbc\xaf\x27\x1c", "archive"),
    (b"BZh", "archive"),
    (b"\xfd7zXZ\0", "archive"),
)
_WORDS = {
    "jpeg": "a JPEG picture",
    "png": "a PNG picture",
    "bmp": "a BMP picture",
    "tiff": "a TIFF picture",
    "nrrd": "an NRRD volume",
    "nifti": "a NIfTI volume",
    "nifti.gz": "a NIfTI volume",
    "nifti pair": "one half of a NIfTI pair (.hdr and .img)",
    "metaimage": "a MetaImage header",
    "dicom": "DICOM",
    "zip": "a zip archive",
    "gif": "a GIF picture",
    "webp": "a WebP picture",
    "pdf": "a PDF document",
    "archive": "an archive that is not a zip",
    "gzip": "gzip data that is no NIfTI volume",
    "bad gzip": "damaged gzip data",
    "text": "text",
    "unknown": "data of an unknown format",
}


def identify(path: str | Path) -> str:
    """Say what a file holds: a key of `PICTURES` or `VOLUMES`, "dicom", "zip", "empty", or what else it is.

    DICOM is known by its mark behind 128 bytes, or, where these are missing, by elements in rising order.

    Raises:
        OSError: the file cannot be opened.
    """
    with open(path, "rb") as stream:
        head = stream.read(_HEAD)
    if not head:
        return "empty"
    if head[128:132] == b"DICM":
        return DICOM
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith(b"\x1f\x8b"):
        return _in_gzip(Path(path))
    if _nifti(head):
        return _nifti(head)
    for start, name in _STARTS:
        if head.startswith(start):
            return name
    if b"NDims" in head and (b"DimSize" in head or b"ElementDataFile" in head):
        return "metaimage"
    if starts_as_dicom(head):
        return DICOM
    return "text" if _is_text(head) else "unknown"


def _nifti(head: bytes) -> str:
    if head[344:347] == b"n+1" or head[4:7] == b"n+2":
        return "nifti"
    return "nifti pair" if head[344:347] == b"ni1" or head[4:7] == b"ni2" else ""


def _in_gzip(path: Path) -> str:
    try:
        with gzip.open(path) as stream:
            head = stream.read(_HEAD)
    except (OSError, EOFError, zlib.error):
        return "bad gzip"
    found = _nifti(head)
    return {"nifti": "nifti.gz", "nifti pair": "nifti pair"}.get(found, "gzip")


def _is_text(head: bytes) -> bool:
    try:
        text = head[: _HEAD - 4].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter.isspace() for letter in text)


def family_of_name(name: str) -> str:
    """What a file calls itself: "picture", "volume", "dicom", or "" where its ending says nothing."""
    lower = name.lower()
    return next((family for family, endings in _FAMILY.items() if lower.endswith(endings)), "")


def _family_of_content(content: str) -> str:
    if content in PICTURES:
        return "picture"
    return "volume" if content in VOLUMES else content if content == DICOM else ""


def is_image(name: str, content: str) -> bool:
    """Whether a file holds an image that is read here, or calls itself one."""
    return bool(_family_of_content(content) or family_of_name(name)) or content == "nifti pair"


def content_fault(name: str, content: str) -> str:
    """Say why a file is not read: its content is of another kind, or not what its name says; empty where it is fine."""
    named, held = family_of_name(name), _family_of_content(content)
    if content == "empty":
        return "the file is empty. Export or download it again"
    if content == "bad gzip" and named == "volume":
        return "the compressed data is damaged or cut off. Download or export it again"
    if held and (not named or named == held):
        return ""
    holds = _WORDS[content]
    if held:
        return f"is named as {_NAMED[named]} but holds {holds}. Give the file its right ending"
    if name.lower().endswith((".raw", ".zraw")):
        return "holds voxels without their header. Give the .mhd file together with it"
    if content == "nifti pair":
        return f"is {holds}. Convert the pair to one .nii.gz file"
    if content in ("zip", "archive"):
        return f"holds {holds}. Unpack it and give its files"
    if named:
        return f"is named as {_NAMED[named]} but holds {holds}. Export the image again from where it came"
    return f"holds {holds}, which is not read here"
