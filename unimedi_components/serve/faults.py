# SPDX-License-Identifier: Apache-2.0
"""What an upload can be refused for, and the limits that it is held to."""

from dataclasses import dataclass
from functools import partial

from unimedi_components.errors import DataError

ACCEPTED = (
    "an X-ray (JPG, PNG, TIFF, BMP or DICOM) or a CT (NIfTI, MetaImage, NRRD, or a DICOM series as files or as a zip)"
)


class UploadError(DataError):
    """An upload that is refused, with the HTTP status that says so.

    Args:
        status: 400 the request, 413 too large, 415 not a format that is read, 422 read but not usable.
        message: one sentence: the file, the fault and the remedy.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


# the request itself is wrong
bad_request = partial(UploadError, 400)
# more bytes, files, pixels or voxels than allowed
too_large = partial(UploadError, 413)
# not a format that is read here
unsupported = partial(UploadError, 415)
# a known format, but damaged or not an image that the network can read
unusable = partial(UploadError, 422)


@dataclass(frozen=True)
class Limits:
    """Limits of one upload.

    Args:
        upload_bytes: of the request's body, all files together.
        files: in one upload, and in one zip.
        pixels: of an X-ray; the largest detectors have about 20 million.
        voxels: of a volume; 512 x 512 x 1024 by default, which takes some gigabytes while it is prepared.
        unpack: a zip or gz may grow to this many times `upload_bytes`.
        assume_hu: no limit to the values of a CT: they are taken for Hounsfield units.
    """

    upload_bytes: int = 512 * 2**20
    files: int = 4000
    pixels: int = 100_000_000
    voxels: int = 2**28
    unpack: int = 4
    assume_hu: bool = False

    @property
    def unpacked_bytes(self) -> int:
        """Most bytes that may come out of a zip."""
        return self.unpack * self.upload_bytes


def megabytes(size: int) -> str:
    """Bytes as text, in units of 2**20."""
    return f"{size / 2**20:.3g} MB" if size < 2**30 else f"{size / 2**30:.3g} GB"
