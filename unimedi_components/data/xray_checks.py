# SPDX-License-Identifier: Apache-2.0
"""Checks of a 2D image file before it enters a datalist."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from unimedi_components.data.itk_loading import load_itk
from unimedi_components.data.sources import progress_map
from unimedi_components.errors import ConfigError

__all__ = ["IMAGE_CHECKS", "xray_fault", "xray_faults"]

IMAGE_CHECKS = ("quick", "full", "exists", "none")
_HEAD, _TAIL = 8192, 4096
_DICOM_PIXELS = b"\xe0\x7f\x10\x00"
_DICOM_END_OF_FRAMES = b"\xfe\xff\xdd\xe0"


def xray_fault(path: str | Path, check: str = "quick") -> tuple[str, str] | None:
    """Say what is wrong with a 2D image file.

    Args:
        path: JPEG, PNG, DICOM or any other file that pillow opens.
        check: ``"quick"`` reads only the first and last bytes of JPEG, PNG and DICOM files (start and end marks,
            so an empty or truncated file is found at the cost of one small read) and the header of others;
            ``"full"`` decodes the image; ``"exists"`` only asks whether the file is there; ``"none"`` does not
            look at all.

    Returns:
        None when sound, otherwise ``(reason, detail)`` with the reason ``missing image`` or ``unreadable
        image``.

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
        fault = _marks_fault(path) if check == "quick" else _decode_fault(path)
    except Exception as error:  # pillow and ITK raise many kinds for broken files
        fault = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return ("unreadable image", f"{path}: {fault}. Download or export it again") if fault else None


def xray_faults(
    root: str | Path,
    images: Sequence[str],
    check: str = "quick",
    num_workers: int = 8,
    progress: bool = True,
    desc: str = "images",
) -> list[tuple[str, str] | None]:
    """Return :func:`xray_fault` of every image, in order, under a progress bar.

    Args:
        root: folder that the images are relative to.
        images: paths relative to it.
        check: see :func:`xray_fault`.
        num_workers: threads that read files.
        progress: show the bar.
        desc: text of the bar.
    """
    base = str(root)
    return progress_map(lambda image: xray_fault(os.path.join(base, image), check), images, desc, num_workers, progress)


def _marks_fault(path: Path) -> str:
    size = path.stat().st_size
    if size == 0:
        return "the file is empty"
    with open(path, "rb") as stream:
        head = stream.read(_HEAD)
        stream.seek(max(0, size - _TAIL))
        tail = stream.read()
    if head.startswith(b"\xff\xd8\xff"):
        # Coded data never holds ff d9 (0xff is followed by 00 or a restart mark), so only a whole file does.
        return "" if b"\xff\xd9" in tail else "truncated JPEG, the end-of-image mark is missing"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "" if b"IEND" in tail else "truncated PNG, the end chunk is missing"
    if head[128:132] == b"DICM":
        return _dicom_fault(head, tail, size)
    if path.suffix.lower() in {".jpg", ".jpeg", ".png"}:
        return f"the content is not {path.suffix[1:].upper()}"
    return _decode_fault(path, header_only=True)


def _dicom_fault(head: bytes, tail: bytes, size: int) -> str:
    """Compare the length of the pixel data (7FE0,0010) with the file's, where the header is short enough."""
    start = head.find(_DICOM_PIXELS)
    if start < 0 or start + 12 > len(head):
        return ""
    explicit = head[start + 4 : start + 6] in (b"OW", b"OB")
    place = start + (8 if explicit else 4)
    length = int.from_bytes(head[place : place + 4], "little")
    if length == 0xFFFFFFFF:
        return "" if _DICOM_END_OF_FRAMES in tail else "truncated DICOM, the end of the frames is missing"
    return "truncated DICOM, pixels are missing" if place + 4 + length > size else ""


def _decode_fault(path: Path, header_only: bool = False) -> str:
    if path.suffix.lower() in {".dcm", ".dicom"}:
        itk = load_itk()

        if header_only:
            image_io = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
            if image_io is None:
                return "not a DICOM file"
            image_io.SetFileName(str(path))
            image_io.ReadImageInformation()
            return ""
        itk.imread(str(path))
        return ""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            if not header_only:
                image.load()
    return ""
