# SPDX-License-Identifier: Apache-2.0
"""Boxes of a film in the world of 3D Slicer and MONAI Label: centre and size in millimetres, and back to pixels.

Slicer keeps a region of interest as centre and size along the axes of the patient, in the DICOM world (LPS: x to the
left, y to the back, z to the head), and MONAI Label hands both over as [x, y, z, width, height, depth]. A film is one
slice in that world: pixel (row, column) has its centre at origin + direction (column, row, 0) * spacing, as ITK and so
Slicer read it from the file. A PNG or JPG has spacing 1 and origin 0, so that there millimetres are pixels; a DICOM
film without a position has origin 0 and its pixel spacing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from unimedi_components.errors import DataError
from unimedi_components.images.headers import DicomHeader, is_dicom, read_header
from unimedi_components.images.itk_loading import load_itk

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Plane:
    """Where a film lies: index (column, row, slice) to LPS millimetres, and the thickness of the slice."""

    matrix: Array
    origin: Array
    thickness: float


def boxes_of_rois(path: str | Path, rois: Iterable[Sequence[float]]) -> list[list[float]]:
    """Bring regions of interest to pixels of the file.

    ``rois``: [x, y, z, width, height, depth] each: centre and size along the axes of the DICOM world (LPS), mm. Raises
    DataError: a region has not six finite numbers or no size, the film cannot be read, or its plane is upright in the
    world, so that regions have no place in it.

    Returns:
        [x0, y0, x1, y1] each, x along the columns, x1 and y1 just beyond the box; not clipped to the film. A region
        that the film's axes are turned to gives the box around it.
    """
    plane = _plane(Path(path))
    inverse = _inverse(plane, path)
    boxes = []
    for roi in rois:
        numbers = np.asarray(roi, dtype=np.float64).reshape(-1)
        if numbers.shape != (6,) or not np.isfinite(numbers).all() or (numbers[3:5] <= 0).any():
            raise DataError(
                f"{path}: the region of interest {list(roi)} is no box; it needs a centre and a size, "
                "[x, y, z, width, height, depth] in mm"
            )
        corners = [(numbers[0] + i * numbers[3] / 2, numbers[1] + j * numbers[4] / 2) for i in (-1, 1) for j in (-1, 1)]
        # the centre of the first pixel has index 0, its edge is box coordinate 0
        pixels = (np.asarray(corners) - plane.origin[:2]) @ inverse.T + 0.5
        boxes.append([float(v) for v in (*pixels.min(0), *pixels.max(0))])
    return boxes


def rois_of_boxes(path: str | Path, boxes: Iterable[Sequence[float]]) -> list[list[float]]:
    """Bring boxes [x0, y0, x1, y1] in pixels of the file to the world: what `boxes_of_rois` undoes, with its errors.

    Returns:
        [x, y, z, width, height, depth] each, LPS, mm; the depth is the slice's thickness, 1 where the file has none.
    """
    plane = _plane(Path(path))
    _inverse(plane, path)
    rois = []
    for x0, y0, x1, y1 in boxes:
        corners = np.asarray([(x, y) for x in (x0, x1) for y in (y0, y1)]) - 0.5
        world = corners @ plane.matrix[:, :2].T + plane.origin
        low, high = world.min(0), world.max(0)
        size = [*(high - low)[:2], plane.thickness]
        rois.append([float(v) for v in (*((low + high) / 2), *size)])
    return rois


def film_affine(path: str | Path) -> Array:
    """A film's (column, row, slice) to mm (4, 4), RAS as NIfTI has it. Raises DataError: the film cannot be read."""
    plane, affine = _plane(Path(path)), np.eye(4)
    affine[:3, :3], affine[:3, 3] = plane.matrix, plane.origin
    return np.diag([-1.0, -1, 1, 1]) @ affine


def _inverse(plane: _Plane, path: str | Path) -> Array:
    flat = plane.matrix[:2, :2]
    scale = float(np.abs(plane.matrix[:, :2]).max())
    if abs(np.linalg.det(flat)) < 1e-6 * scale**2:
        raise DataError(
            f"{path}: the film stands upright in its world (its rows or columns run from foot to head), where regions "
            "of interest have no place in its plane; remove its position and orientation, or draw on a PNG of it"
        )
    return np.asarray(np.linalg.inv(flat))


def _plane(path: Path) -> _Plane:
    if not path.is_file():
        raise DataError(f"{path}: no such file; correct the datalist")
    if is_dicom(path):
        return _dicom(read_header(path))
    itk = load_itk()
    reader = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
    if reader is None:
        return _picture(path)
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    dims = range(min(3, reader.GetNumberOfDimensions()))
    matrix, origin = np.eye(3), np.zeros(3)
    for axis in dims:
        direction = list(reader.GetDirection(axis))[:3]
        matrix[: len(direction), axis] = np.asarray(direction) * reader.GetSpacing(axis)
        origin[axis] = reader.GetOrigin(axis)
    thickness = float(reader.GetSpacing(2)) if len(dims) > 2 else 1.0
    return _Plane(matrix, origin, thickness)


def _dicom(header: DicomHeader) -> _Plane:
    """A film without a position lies at 0, without a direction along the axes, without a spacing in steps of 1 mm."""
    orientation = np.asarray(header.orientation or (1, 0, 0, 0, 1, 0), dtype=float)
    between_rows, between_columns = header.pixel_spacing or (1.0, 1.0)
    rows, columns = orientation[:3], orientation[3:]
    matrix = np.stack([rows * between_columns, columns * between_rows, np.cross(rows, columns)], axis=1)
    thickness = (header.numbers("SliceThickness") or (1.0,))[0] or 1.0
    return _Plane(matrix, np.asarray(header.position or (0, 0, 0), dtype=float), thickness)


def _picture(path: Path) -> _Plane:
    """A picture that ITK does not know: its pixels are millimetres, as of any picture."""
    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image)
    except OSError as error:
        raise DataError(f"{path}: cannot be read as a film ({error})") from error
    return _Plane(np.eye(3), np.zeros(3), 1.0)
