# SPDX-License-Identifier: Apache-2.0
"""One CT volume of any format: its geometry alone, or its voxels in Hounsfield units."""

from __future__ import annotations

import contextlib
import gzip
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy

from unimedi_components.errors import DataError, reason_of
from unimedi_components.images.dicom import modality_values
from unimedi_components.images.dicom_series import sort_headers
from unimedi_components.images.dicom_stacks import DicomSlice, Stack
from unimedi_components.images.headers import DicomHeader, is_dicom, read_header
from unimedi_components.images.identify import identify
from unimedi_components.images.itk_volumes import AIR_HU, NOT_GREY, read_itk, read_itk_geometry
from unimedi_components.images.text_headers import cut_off, header_warnings

try:
    # decodes faster than zlib
    from isal import igzip
except ImportError:
    igzip = None  # type: ignore[assignment]

__all__ = [
    "NIFTI_ENDINGS",
    "SAMPLED_SLICES",
    "Volume",
    "VolumeHeader",
    "find_stack",
    "read_volume",
    "read_volume_header",
    "sample_volume",
    "shape_problem",
    "stack_header",
]

NIFTI_ENDINGS = (".nii", ".nii.gz")
SAMPLED_SLICES = 9
# beyond these Hounsfield units a padding value cannot be tissue, so that no corner has to show it
_TISSUE = (-950.0, 4000.0)

# NIfTI's codes of units, of which nibabel takes no notice
_OTHER_UNITS = {1: "m", 3: "um"}

# nibabel logs its own repairs of a header, which would repeat what the checks report.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class VolumeHeader:
    """Geometry of a volume: shape in voxels, affine (4, 4) to mm, spacing in mm, bytes per voxel, warnings."""

    shape: tuple[int, ...]
    affine: np.ndarray
    spacing: tuple[float, ...]
    voxel_bytes: int
    warnings: tuple[str, ...] = ()

    @property
    def num_slices(self) -> int:
        """Number of slices along the axis nearest to inferior-superior."""
        return self.shape[self._axial]

    @property
    def slice_spacing(self) -> float:
        """Distance of neighbouring slices along that axis in mm."""
        return self.spacing[self._axial]

    @property
    def _axial(self) -> int:
        return int(
            np.argmax(np.abs(self.affine[2, :3]) / np.maximum(np.linalg.norm(self.affine[:3, :3], axis=0), 1e-12))
        )


@dataclass(frozen=True)
class Volume:
    """A volume that was read.

    Args:
        values: (X, Y, Z) in the file's own axes, Hounsfield units where the file says how to get them; int16 where all
            are whole numbers that it holds, which is half the memory, else float32.
        affine: (4, 4) voxel to mm, RAS; sheared where a gantry was tilted.
        warnings: what the reader had to mend, a sentence each.
    """

    values: np.ndarray
    affine: np.ndarray
    warnings: tuple[str, ...] = ()


def read_volume_header(path: str | Path, files: Sequence[str | Path] = (), assume_hu: bool = False) -> VolumeHeader:
    """Read the geometry of a volume without its voxels.

    Trailing axes of length 1 are dropped. A NIfTI with neither sform nor qform has a zero affine here: where its
    voxels lie is not stored.

    Args:
        path: a file, or the folder of one DICOM stack.
        files: exactly the DICOM files that make the volume; by default all of the folder that do.
        assume_hu: take DICOM slices without RescaleSlope and RescaleIntercept for Hounsfield units.

    Raises:
        DataError: it is no volume.
        Exception: whatever nibabel raises for a broken file.
    """
    path = Path(path)
    if (stack := find_stack(path, files, assume_hu)) is not None:
        return stack_header(stack)
    warnings: tuple[str, ...] = ()
    if _is_nifti(path):
        image = _load_nifti(path)
        raw = _raw_nifti_header(path)
        affine = np.asarray(image.affine, dtype=float)
        if raw is not None and int(raw["sform_code"]) <= 0 and int(raw["qform_code"]) <= 0:
            affine = np.zeros((4, 4))
        else:
            warnings = _two_places(image.header, image.shape)
        kind = image.header.get_data_dtype()
        if kind.names or kind.kind not in "iufb":
            raise DataError(f"{path}: {NOT_GREY}")
        if unit := _OTHER_UNITS.get(int(image.header["xyzt_units"]) & 7):
            raise DataError(f"{path}: its header gives places in {unit}, not in mm. Export it again")
        if image.dataobj.offset < int(image.header["sizeof_hdr"]):
            raise DataError(
                f"{path}: its header places the voxels inside the header itself. Convert it again from DICOM"
            )
        shape, spacing = tuple(image.shape), tuple(float(zoom) for zoom in image.header.get_zooms()[:3])
        voxel_bytes = int(kind.itemsize)
        packed = _is_packed(path)
        have = path.stat().st_size - (0 if packed else image.dataobj.offset)
        if cut := cut_off(math.prod(shape) * voxel_bytes, have, packed):
            raise DataError(f"{path}: {cut}")
    else:
        shape, affine, voxel_bytes = read_itk_geometry(path)
        warnings = header_warnings(path)
        spacing = tuple(float(step) for step in np.linalg.norm(affine[:3, :3], axis=0))
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return VolumeHeader(shape, affine, spacing, voxel_bytes, warnings)


def read_volume(path: str | Path, files: Sequence[str | Path] = (), assume_hu: bool = False) -> Volume:
    """Read a volume.

    A DICOM stack is rescaled slice by slice, its padding becomes air, and slices in uneven steps are brought to even
    ones (linear between neighbours), which its warnings say.

    Args:
        path: a file, or the folder of one DICOM stack.
        files: exactly the DICOM files that make the volume; by default all of the folder that do.
        assume_hu: take DICOM slices without RescaleSlope and RescaleIntercept for Hounsfield units.

    Raises:
        DataError: it is no volume, or cannot be read.
    """
    path = Path(path)
    if (stack := find_stack(path, files, assume_hu)) is not None:
        return Volume(_stack_values(stack), stack.affine, stack.warnings)
    try:
        header = read_volume_header(path)
        values = _nifti_values(path) if _is_nifti(path) else read_itk(path)
    except (DataError, MemoryError):
        raise
    except Exception as error:
        if not path.exists():
            raise DataError(f"{path}: no such file. Correct the path or fetch the file") from None
        raise DataError(f"{path}: {reason_of(error, path)}") from error
    return Volume(values.reshape(header.shape), header.affine, header.warnings)


def stack_header(stack: Stack) -> VolumeHeader:
    """The geometry of a DICOM stack, in even steps."""
    spacing = tuple(float(step) for step in np.linalg.norm(stack.affine[:3, :3], axis=0))
    return VolumeHeader(stack.shape, stack.affine, spacing, stack.header.bits_allocated // 8, stack.warnings)


def sample_volume(path: str | Path, header: VolumeHeader, stack: Stack | None = None) -> np.ndarray:
    """Some slices along the last axis, the last one included so that a truncated file shows, float32 (X, Y, N).

    One NaN stands for a NIfTI file that holds any value that is not finite.
    Of NIfTI files and DICOM stacks no other slices are decoded; other formats are read whole.

    Raises:
        Exception: whatever the reader raises for a broken file.
    """
    path = Path(path)
    if stack is not None:
        chosen = {_place(len(stack.slices), share) for share in np.linspace(0, 1, SAMPLED_SLICES)}
        sample = _slice_values([stack.slices[number] for number in sorted(chosen)])
        return sample.transpose(2, 1, 0).astype(np.float32)
    index = sorted({_place(header.shape[2], share) for share in np.linspace(0, 1, SAMPLED_SLICES)})
    if not _is_nifti(path):
        return read_volume(path).values[:, :, index]
    with _nifti_voxels(path) as proxy:
        # Unscaled: a memory map for .nii, and one pass without a float copy for .nii.gz.
        whole, scale = proxy.get_unscaled(), (float(proxy.slope), float(proxy.inter))
    if whole.dtype.kind == "f" and not np.isfinite(whole).all():
        return np.full((1, 1, 1), np.nan, np.float32)
    stored = whole.reshape(header.shape)[:, :, index]
    return np.asarray(stored, dtype=np.float32) * scale[0] + scale[1]


def _place(count: int, share: float) -> int:
    return round(share * (count - 1))


def find_stack(path: Path, files: Sequence[str | Path] = (), assume_hu: bool = False) -> Stack | None:
    """The DICOM stack that files, a folder or a file of many frames hold; None for other formats.

    Raises:
        DataError: there is none, there are several, or one of `files` is not of it.
    """
    if not files and not path.is_dir():
        if not path.is_file() or not is_dicom(path):
            return None
        files = [path]
    given = [Path(file) for file in files]
    members = given or sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    headers = [read_header(file) for file in members if given or is_dicom(file)]
    result = sort_headers(headers, assume_hu)
    if len(result.stacks) == 1 and not (given and len(result.stacks[0].files) < len(given)):
        return result.stacks[0]
    if len(result.stacks) > 1:
        found = "; ".join(
            f"{stack.header.text('SeriesDescription')} {stack.described}".strip() for stack in result.stacks
        )
        raise DataError(f"{path}: holds {len(result.stacks)} volumes ({found}). Give the files of one alone")
    if result.left_out:
        file, reason, _ = max(result.left_out, key=lambda one: one[2])
        raise DataError(f"{file if len(result.left_out) == 1 else path}: {reason}")
    if result.xrays:
        raise DataError(f"{path}: holds {len(result.xrays)} X-ray(s) and no CT volume. Give the X-ray's file as such")
    raise DataError(f"{path}: the folder holds no DICOM series. Correct the path")


def _stack_values(stack: Stack) -> np.ndarray:
    """(columns, rows, slices) in even steps, int16 or float32."""
    values = _slice_values(stack.slices)
    if not stack.is_even:
        values = _evenly(values.astype(np.float32), stack.places, stack.even_places)
    return values.transpose(2, 1, 0)


def _slice_values(slices: Sequence[DicomSlice]) -> np.ndarray:
    """(slices, rows, columns), int16 or float32; each file is decoded once."""
    first = slices[0].header
    values: np.ndarray = np.empty((len(slices), first.rows, first.columns), np.int16)
    places: dict[Path, list[int]] = {}
    for number, one in enumerate(slices):
        places.setdefault(one.header.path, []).append(number)
    for numbers in places.values():
        planes = _hounsfield(slices[numbers[0]].header)
        if values.dtype == np.int16:
            with np.errstate(invalid="ignore"):
                whole = planes.astype(np.int16)
            # a value that int16 cannot hold comes back as another
            if np.array_equal(whole, planes):
                planes = whole
            else:
                values = values.astype(np.float32)
        for number in numbers:
            values[number] = planes[slices[number].frame]
    return values


def _hounsfield(header: DicomHeader) -> np.ndarray:
    """float32 (frames, rows, columns) of a file, padding as air."""
    pixels = modality_values(header)
    values = pixels.values
    if pixels.padding is None:
        return values
    for plane, padding in zip(values, pixels.padding, strict=True):
        if not padding.any():
            continue
        level = float(plane[padding][0])
        # some scanners name a value that tissue has too: real padding lies around the field of view
        if not _TISSUE[0] < level < _TISSUE[1] or padding[[0, 0, -1, -1], [0, -1, 0, -1]].any():
            plane[padding] = AIR_HU
    return values


def _evenly(values: np.ndarray, places: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Slices (N, H, W) at `places` mm as slices at `wanted` mm, linear between neighbours."""
    even = np.empty((len(wanted), *values.shape[1:]), np.float32)
    for number, place in enumerate(wanted):
        after = int(np.clip(np.searchsorted(places, place), 1, len(places) - 1))
        share = np.clip((place - places[after - 1]) / (places[after] - places[after - 1]), 0, 1)
        # places that agree to a thousandth of a millimetre are one slice
        share = round(float(share)) if min(share, 1 - share) * (places[after] - places[after - 1]) < 1e-3 else share
        even[number] = values[after - 1] + (values[after] - values[after - 1]) * np.float32(share)
    return even


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(NIFTI_ENDINGS) or (path.is_file() and identify(path) in ("nifti", "nifti.gz"))


def _is_packed(path: Path) -> bool:
    with open(path, "rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _load_nifti(path: Path) -> Any:
    """A NIfTI image by its content: the name may lack the ending, or say gz of a file that is not packed."""
    packed = _is_packed(path)
    if path.name.lower().endswith(".nii.gz" if packed else ".nii"):
        return nib.load(path)  # type: ignore[attr-defined]
    # nibabel takes a name's word for what is in the file, but not a stream's
    stream: Any = gzip.open(path) if packed else open(path, "rb")  # noqa: SIM115
    two = stream.read(8)[4:7] == b"n+2"
    stream.seek(0)
    kind = nib.Nifti2Image if two else nib.Nifti1Image
    return kind.from_file_map({"image": nib.FileHolder(fileobj=stream)})


@contextlib.contextmanager
def _nifti_voxels(path: Path) -> Iterator[Any]:
    """The voxels of a NIfTI file, not read yet; packed ones by the faster library where it is installed."""
    proxy: Any = _load_nifti(path).dataobj
    with contextlib.ExitStack() as stack:
        if igzip is not None and _is_packed(path):
            spec = (proxy.shape, proxy.dtype, proxy.offset, proxy.slope, proxy.inter)
            proxy = ArrayProxy(stack.enter_context(igzip.open(path)), spec, mmap=False)
        yield proxy


def _nifti_values(path: Path) -> np.ndarray:
    with _nifti_voxels(path) as proxy:
        stored: np.ndarray = np.asanyarray(proxy)
    kind = np.int16 if stored.dtype in (np.int8, np.uint8, np.int16) else np.float32
    return stored.astype(kind, order="C", copy=False)


def _two_places(header: Any, shape: Sequence[int]) -> tuple[str, ...]:
    """A warning where sform and qform place a corner of the volume more than a voxel apart."""
    if min(int(header["sform_code"]), int(header["qform_code"])) < 1:
        return ()
    try:
        apart = header.get_sform() - header.get_qform()
    except nib.spatialimages.HeaderDataError:
        return ()
    corners = np.asarray(list(np.ndindex(2, 2, 2))) * (np.asarray((*shape, 1, 1))[:3] - 1)
    most = float(np.linalg.norm(nib.affines.apply_affine(apart, corners), axis=1).max())
    if not math.isfinite(most) or most <= max(header.get_zooms()[:3]):
        return ()
    return (f"The header places the volume twice, up to {most:.4g} mm apart (sform and qform); the sform is taken.",)


def _raw_nifti_header(path: Path) -> nib.Nifti1Header | None:
    """Return the NIfTI-1 header as stored; nibabel replaces zero pixdims while it loads. None for NIfTI-2."""
    opener: Any = gzip.open if _is_packed(path) else open
    with opener(path, "rb") as stream:
        block = stream.read(348)
    return nib.Nifti1Header(block, check=False) if block[344:347] in (b"n+1", b"ni1") else None


def shape_problem(shape: Sequence[int]) -> str:
    """Say why a shape, trailing axes of length 1 dropped, is not that of one 3D volume; empty when it is."""
    text = " × ".join(map(str, shape))
    if len(shape) > 2 and min(shape) < 1:
        return f"has shape {text}, which holds no voxel. Convert it again from DICOM"
    if len(shape) > 3:
        return f"is {len(shape)}D ({text}): several time points or channels. Extract one 3D volume"
    if len(shape) < 3 or min(shape) < 2:
        return f"has shape {text}, which is not a 3D volume. Give all slices in one file"
    return ""
