# SPDX-License-Identifier: Apache-2.0
"""Boxes of a 2D image: from pixels of the file to masks, to pixels of the network's input, and back.

A box is ``[x0, y0, x1, y1]``: x along the columns, y along the rows, x1 and y1 just beyond it, so that pixel i covers
[i, i + 1) and its centre lies at i + 0.5; boxes that are not (N, 4), finite and with an area are a DataError. Where the
image's pixels lie in the file is told by the affine of its MetaTensor, which MONAI's resizing, padding, cropping,
flipping and rotating transforms keep up to date: row and column *index* of the image to row and column index of the
file. The image must come from `XrayReader`, whose affine starts as the identity.
"""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from torch import Tensor

from unimedi_components.errors import DataError


def boxes_to_image(boxes: Any, affine: Tensor) -> Tensor:
    """Bring boxes from pixels of the file to pixels of the image.

    ``affine``: of the image as it is now, (3, 3) or (4, 4).

    Returns:
        (N, 4) float64, not clipped to the image. Where the image is rotated by other than right angles, the
        box around the rotated box.
    """
    return _map_boxes(_checked(boxes), torch.linalg.inv(_plane(affine)))


def boxes_to_file(boxes: Any, affine: Tensor) -> Tensor:
    """Bring boxes, such as a network's predictions, from pixels of the image back to the file's: float64 (N, 4).

    ``affine``: what `BoxesToImaged` stored for this image.
    """
    return _map_boxes(_checked(boxes), _plane(affine))


def _plane(affine: Tensor) -> Tensor:
    """The affine of rows and columns alone, (3, 3) float64: MONAI's has a third axis, even for films."""
    affine = torch.as_tensor(affine, dtype=torch.float64).cpu()
    plane = torch.eye(3, dtype=torch.float64)
    plane[:2, :2], plane[:2, 2] = affine[:2, :2], affine[:2, -1]
    return plane


def _checked(boxes: Any) -> Tensor:
    found = torch.as_tensor(boxes, dtype=torch.float64).cpu()
    if found.numel() == 0:
        return found.reshape(0, 4)
    if found.ndim != 2 or found.shape[1] != 4:
        raise DataError(f"boxes have the shape {tuple(found.shape)}; give a list of [x0, y0, x1, y1]")
    if not torch.isfinite(found).all() or (found[:, 2:] <= found[:, :2]).any():
        raise DataError(f"boxes {found.tolist()}: every box needs finite numbers, x1 beyond x0 and y1 beyond y0")
    return found


def _map_boxes(boxes: Tensor, matrix: Tensor) -> Tensor:
    corners = torch.stack((boxes[:, [1, 0]], boxes[:, [1, 2]], boxes[:, [3, 0]], boxes[:, [3, 2]]), 1)
    # index coordinates count from the centre of the first pixel, box coordinates from its edge
    corners = (corners - 0.5) @ matrix[:2, :2].T + matrix[:2, 2] + 0.5
    return torch.cat((corners.amin(1).flip(-1), corners.amax(1).flip(-1)), 1)


def _affine_of(data: Mapping[Hashable, Any]) -> Tensor:
    image = data["image"]
    if not isinstance(image, MetaTensor):
        raise DataError(
            f"'image' of item {data.get('id')!r} is no MetaTensor, so its place in the file is unknown; "
            "put the box transforms before anything that drops the meta data"
        )
    return torch.as_tensor(image.affine, dtype=torch.float64).cpu()


class BoxesToMaskd(Transform):
    """Paint boxes as a mask on the image's present grid.

    A pixel belongs to a box if its centre, taken to pixels of the file, lies in [x0, x1) and [y0, y1). After
    a resize this is what nearest neighbours give for a mask painted in the file's size, at less cost.

    Of "boxes" in pixels of the file, as a datalist holds them, and the MetaTensor "image" (C, H, W) comes "mask", a
    MetaTensor (1, H, W) of float32 0 and 1 with the image's affine.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        boxes, affine = _checked(data["boxes"]), _affine_of(data)
        plane, shape = _plane(affine), data["image"].shape[-2:]
        rows, columns = (torch.arange(n, dtype=torch.float64) for n in shape)
        rows, columns = rows[:, None], columns[None, :]
        # rounded, so that a centre on the edge of a box is decided by [x0, x1), not by the last bit
        y, x = ((plane[i, 0] * rows + plane[i, 1] * columns + plane[i, 2] + 0.5).round(decimals=6) for i in (0, 1))
        mask = torch.zeros(shape, dtype=torch.bool)
        for x0, y0, x1, y1 in boxes.tolist():
            mask |= (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
        return {**data, "mask": MetaTensor(mask[None].to(torch.float32), affine=affine)}


class BoxesToImaged(Transform):
    """Bring boxes from pixels of the file to pixels of the image as transformed so far, clipped to it.

    It belongs after the last transform that moves pixels and before anything that drops the meta data.

    "boxes" become (N, 4) float32, and "affine" is the one of the MetaTensor "image" (C, H, W), (4, 4) float64, for
    `boxes_to_file`. ``min_visible``: a box of which less than this share of the area is left in the image is removed.
    The default keeps what a centre crop leaves of a box at the border, and drops slivers.
    """

    def __init__(self, min_visible: float = 0.2) -> None:
        if not 0 <= min_visible <= 1:
            raise DataError(f"min_visible {min_visible} is not in [0, 1]: it is a share of a box's area")
        self.min_visible = min_visible

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        affine = _affine_of(data)
        height, width = data["image"].shape[-2:]
        whole = boxes_to_image(data["boxes"], affine)
        limits = torch.tensor([width, height, width, height], dtype=torch.float64)
        inside = torch.minimum(whole.clamp(min=0), limits)
        area, left = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (whole, inside))
        # the margin keeps a box that lies inside where min_visible is 1
        keep = (left > 0) & (left >= (self.min_visible - 1e-9) * area)
        return {**data, "boxes": inside[keep].to(torch.float32), "affine": affine.clone()}
