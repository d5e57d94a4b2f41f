# SPDX-License-Identifier: Apache-2.0
"""CT volumes with label maps of organs: the way from files to network input, and back for predictions."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.data import NibabelReader
from monai.transforms import (
    EnsureChannelFirstd,
    EnsureTyped,
    Orientationd,
    Resized,
    ScaleIntensityRanged,
    Spacingd,
    Transform,
)

from unimedi_components.data.label_maps import geometry_difference, unknown_labels
from unimedi_components.data.transforms import RAS_LABELS, CheckVolumed
from unimedi_components.data.volume_loading import LoadVolumed, Uprightd
from unimedi_components.errors import DataError
from unimedi_components.images.itk_loading import load_imaged


class CheckLabelMapd(Transform):
    """Let a label map pass that has its image's voxels and whole numbers; give it the image's affine.

    The same affine on both keeps differences of rounding out of the resampling that follows. ``num_classes``: number of
    labels with the background; None allows any up to 255.
    """

    def __init__(self, num_classes: int | None = None) -> None:
        self.num_classes = num_classes

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return ``data`` with the mask rounded to whole numbers.

        Raises DataError: shape or affine differ from the image's, or a value is no label.
        """
        image, mask = data["image"], data["mask"]
        name = _name(mask)
        difference = geometry_difference(image.shape[1:], image.affine, mask.shape[1:], mask.affine)
        if difference:
            raise DataError(f"{name}: {difference}; resample the label map to {_name(image)}")
        unknown = unknown_labels(mask.numpy(), 256 if self.num_classes is None else self.num_classes)
        if unknown:
            raise DataError(f"{name}: {unknown}; give the label map with the data set's own labels")
        mask = mask.round()
        mask.affine = image.affine.clone()
        return {**data, "mask": mask}


def _name(volume: Any) -> str:
    return str(volume.meta.get("filename_or_obj", "the volume"))


def segmentation_transforms(
    spatial_size: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
    window: tuple[float, float] = (-175.0, 250.0),
    num_classes: int | None = None,
    label_map: bool = True,
    resize_labels: bool = True,
    upright: bool = True,
) -> list[Transform]:
    """Transforms of one CT item with its label map, without random ones.

    ``"image"`` becomes float32 (1, D, H, W) in [-1, 1], ``"mask"`` uint8 (1, D, H, W). Axes run to Superior, Posterior
    and Left as in :func:`~unimedi_components.data.transforms.ct_transforms`. Both stay MetaTensors, so that
    ``Restored`` brings a prediction back to the file's shape, affine and orientation. Raises DataError: (when run, as
    MONAI's RuntimeError's cause) a file is not one 3D volume with a usable affine, a voxel is not finite, or the label
    map differs from its image in geometry or holds unknown values.

    Args:
        spatial_size: D, H, W to resize the whole field of view to (areas for the image, nearest voxel for the
            label map); None keeps the voxels.
        spacing: mm along D, H, W to resample to first (linear, nearest); None keeps the file's.
        window: Hounsfield units that become -1 and 1; values beyond are clipped. MONAI's for the abdomen.
        num_classes: number of labels with the background, to check the label map; None allows any up to 255.
        label_map: False leaves ``"mask"`` out, for images that have none.
        resize_labels: False turns ``"mask"`` alone and keeps its voxels, for an evaluation on the file's grid.
        upright: resample volumes of a tilted gantry; see :class:`~unimedi_components.data.volume_loading.Uprightd`.
    """
    keys = ("image", "mask") if label_map else ("image",)
    steps: list[Transform] = [LoadVolumed("image")]
    if label_map:
        steps += [
            load_imaged("mask", NibabelReader(squeeze_non_spatial_dims=True)),
            EnsureChannelFirstd("mask"),
            CheckVolumed("mask"),
            CheckLabelMapd(num_classes),
        ]
    steps.append(Orientationd(keys, axcodes="SPL", labels=RAS_LABELS))
    resized = keys if resize_labels else ("image",)
    if upright:
        # a label map that keeps its voxels stays on the file's own, tilted grid
        steps.append(Uprightd(resized))
    if spacing is not None:
        steps.append(Spacingd(resized, pixdim=tuple(spacing), mode=("bilinear", "nearest")[: len(resized)]))
    steps.append(ScaleIntensityRanged("image", a_min=window[0], a_max=window[1], b_min=-1, b_max=1, clip=True))
    if spatial_size is not None:
        modes = ("area", "nearest-exact")[: len(resized)]
        steps.append(Resized(resized, spatial_size=tuple(spatial_size), mode=modes))
    return [*steps, EnsureTyped(keys, dtype=(torch.float32, torch.uint8)[: len(keys)], track_meta=True)]
