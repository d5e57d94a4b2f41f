# SPDX-License-Identifier: Apache-2.0
"""Checks of a 2D image file before it enters a datalist."""

from __future__ import annotations

import warnings
from pathlib import Path

from unimedi_components.errors import ConfigError

__all__ = ["IMAGE_CHECKS", "xray_fault"]

IMAGE_CHECKS = ("quick", "full", "none")
_TAIL = 4096


def xray_fault(path: str | Path, check: str = "quick") -> tuple[str, str] | None:
    """Say what is wrong with a 2D image file.

    Args:
        path: JPEG, PNG, DICOM or any other file that pillow opens.
        check: ``"quick"`` reads only the first and last bytes of JPEG and PNG files (start and end-of-image
            marks, so an empty or truncated file is found at the cost of one small read) and the header of
            others; ``"full"`` decodes the image; ``"none"`` only asks whether the file exists.

    Returns:
        None when sound, otherwise ``(reason, detail)`` with the reason ``missing image`` or ``unreadable
        image``.

    Raises:
        ConfigError: ``check`` is none of the three.
    """
    if check not in IMAGE_CHECKS:
        raise ConfigError(f"check_images={check!r} is unknown. Use one of {', '.join(IMAGE_CHECKS)}.")
    path = Path(path)
    if not path.is_file():
        return "missing image", f"{path}: no such file"
    if check == "none":
        return None
    try:
        fault = _marks_fault(path) if check == "quick" else _decode_fault(path)
    except Exception as error:  # pillow and ITK raise many kinds for broken files
        fault = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return ("unreadable image", f"{path}: {fault}. Download or export it again") if fault else None


def _marks_fault(path: Path) -> str:
    size = path.stat().st_size
    if size == 0:
        return "the file is empty"
    with open(path, "rb") as stream:
        head = stream.read(16)
        stream.seek(max(0, size - _TAIL))
        tail = stream.read()
    if head.startswith(b"\xff\xd8\xff"):
        # Coded data never holds ff d9 (0xff is followed by 00 or a restart mark), so only a whole file does.
        return "" if b"\xff\xd9" in tail else "truncated JPEG, the end-of-image mark is missing"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "" if b"IEND" in tail else "truncated PNG, the end chunk is missing"
    if path.suffix.lower() in {".jpg", ".jpeg", ".png"}:
        return f"the content is not {path.suffix[1:].upper()}"
    return _decode_fault(path, header_only=True)


def _decode_fault(path: Path, header_only: bool = False) -> str:
    if path.suffix.lower() in {".dcm", ".dicom"}:
        import itk

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
