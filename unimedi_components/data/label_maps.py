# SPDX-License-Identifier: Apache-2.0
"""CT volumes with label maps of organs: checks of the file pairs before they enter a datalist.

A label map is a volume of integers on the voxels of its image: 0 is background, the others index the data
set's list of organs. Both files must agree in shape and affine, since the label of a voxel is found by index.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from unimedi_components.data.datalist import DatalistBuilder
from unimedi_components.data.sources import check_choice, progress_map
from unimedi_components.errors import reason_of
from unimedi_components.images.checks import CTLimits, check_ct
from unimedi_components.images.volume import read_volume_header
from unimedi_components.images.xray_checks import IMAGE_CHECKS

BACKGROUND = "background"
#: Header fields are rounded differently by each tool; by more than this share of a voxel two grids differ.
GEOMETRY_TOLERANCE = 0.1
_LIMITS = CTLimits(min_slices=2, min_megabytes=0.0)
#: Labels stored with a scale factor come back as whole numbers up to rounding.
_ROUNDING = 1e-3
_LISTED_VALUES = 5
NOT_HOUNSFIELD = "not Hounsfield units"


@dataclass(frozen=True)
class Case:
    """One image with its label map: split, id, and both paths relative to the data set's root."""

    split: str
    name: str
    image: str
    mask: str


def add_cases(
    builder: DatalistBuilder,
    root: Path,
    cases: Sequence[Case],
    organs: Sequence[str],
    check: str,
    assume_hu: bool,
    num_workers: int,
    progress: bool,
) -> None:
    """Check the cases, add the sound ones to the builder and drop the others; each case is a patient.

    An image whose values do not look like Hounsfield units is only dropped by the check ``"full"`` or under ``strict``.
    Otherwise it is kept, named in the meta block (``"not_hounsfield_units"``) and in the remedies: a small volume, or
    one cropped to the abdomen, may hold no air. ``builder``: gets items ``{"id", "patient", "image", "mask", "dim":
    3}``, the task and the label names.
    """
    names = [BACKGROUND, *organs]
    builder.meta |= {"task": "segmentation", "label_names": names}

    doubts: dict[str, str] = {}

    def fault_of(case: Case) -> tuple[str, str] | None:
        image, mask = root / case.image, root / case.mask
        fault = pair_fault(image, mask, len(names), check, hounsfield=not assume_hu)
        if fault is not None and fault[0] == NOT_HOUNSFIELD and check == "quick" and not builder.strict:
            doubt, fault = fault[1], pair_fault(image, mask, len(names), check, hounsfield=False)
            if fault is None:
                doubts[case.name] = doubt
        return fault

    faults = progress_map(fault_of, cases, "CT volumes", num_workers, progress)
    if doubts:
        builder.meta["not_hounsfield_units"] = sorted(doubts)
        builder.remedies.append(
            f"{len(doubts)} of {len(cases)} images do not look like Hounsfield units and were kept, e.g. "
            f"{doubts[min(doubts)]}. "
            "--check_images full leaves such images out."
        )
    for case, fault in zip(cases, faults, strict=True):
        item = {"id": case.name, "patient": case.name, "image": case.image, "mask": case.mask, "dim": 3}
        builder.add(case.split, item, fault)


def pair_fault(
    image: Path, mask: Path, num_classes: int, check: str = "quick", hounsfield: bool = True
) -> tuple[str, str] | None:
    """Say what is wrong with an image and its label map, of values 0 to ``num_classes - 1``: reason and detail.

    Reasons: those of :func:`~unimedi_components.images.checks.check_ct`, ``missing mask``, ``unreadable mask``, ``mask
    and image differ in geometry`` and ``unknown label values``.
    ``check``: ``"quick"`` reads the headers, some slices of the image (Hounsfield units) and the whole label map;
    ``"full"`` reads every voxel of the image too; ``"exists"`` only asks whether the files are there; ``"none"`` does
    not look at all.
    """
    check_choice("check_images", check, IMAGE_CHECKS)
    if check == "none":
        return None
    for path, what in ((image, "image"), (mask, "mask")):
        if not path.is_file():
            return f"missing {what}", f"{path}: no such file"
    if check == "exists":
        return None
    if (fault := check_ct(image, replace(_LIMITS, hounsfield=hounsfield))) is not None:
        return fault.reason, fault.detail
    if check == "full":
        proxy: Any = nib.load(image).dataobj  # type: ignore[attr-defined]
        # Slope and intercept are known to be finite from the sample; applying them would copy into floats.
        if not np.isfinite(proxy.get_unscaled()).all():
            return "non-finite voxels", f"{image}: some voxels are NaN or infinite. Convert it again from DICOM"
    return _mask_fault(image, mask, num_classes)


def _mask_fault(image: Path, mask: Path, num_classes: int) -> tuple[str, str] | None:
    first = read_volume_header(image)
    try:
        second = read_volume_header(mask)
        difference = geometry_difference(first.shape, first.affine, second.shape, second.affine)
        values = np.asanyarray(nib.load(mask).dataobj)  # type: ignore[attr-defined]
        unknown = "" if difference else unknown_labels(values, num_classes)
    except Exception as error:
        return "unreadable mask", f"{mask}: {reason_of(error, mask)}"
    if difference:
        return "mask and image differ in geometry", f"{mask}: {difference}. Resample the label map to its image"
    if unknown:
        return "unknown label values", f"{mask}: {unknown}. Give the label map with the data set's own labels"
    return None


def unknown_labels(values: np.ndarray, num_classes: int) -> str:
    """Name the values that are no label; empty when all are."""
    if _are_labels(values, num_classes).all():
        return ""
    found = np.unique(values)
    unknown = found[~_are_labels(found, num_classes)]
    listed = ", ".join(f"{value:g}" for value in unknown[:_LISTED_VALUES]) + ", ..." * (len(unknown) > _LISTED_VALUES)
    return f"holds {listed} where labels are 0 to {num_classes - 1}"


def _are_labels(values: np.ndarray, num_classes: int) -> np.ndarray:
    inside = (values > -0.5) & (values < num_classes - 0.5)
    if np.issubdtype(values.dtype, np.integer):
        return inside
    with np.errstate(invalid="ignore"):  # infinity has no distance to a whole number
        return inside & (np.abs(values - np.round(values)) <= _ROUNDING)


def geometry_difference(
    image_shape: Sequence[int], image_affine: Any, mask_shape: Sequence[int], mask_affine: Any
) -> str:
    """Say how a label map's voxels lie elsewhere than its image's, corners by over a tenth of a voxel; "" if not."""
    if tuple(image_shape) != tuple(mask_shape):
        sizes = ["x".join(map(str, shape)) for shape in (mask_shape, image_shape)]
        return f"shape {sizes[0]} where the image has {sizes[1]}"
    image_affine, mask_affine = (np.asarray(affine, dtype=float) for affine in (image_affine, mask_affine))
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in image_shape], [1])).reshape(4, -1)
    apart = np.abs(np.linalg.solve(image_affine, mask_affine @ corners) - corners).max()
    if apart <= GEOMETRY_TOLERANCE:  # NaN is not
        return ""
    first, second = (np.round(affine[:3], 4).tolist() for affine in (mask_affine, image_affine))
    return f"affine {first} where the image has {second}, up to {apart:.3g} voxels apart"
