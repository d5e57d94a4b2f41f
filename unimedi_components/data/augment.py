# SPDX-License-Identifier: Apache-2.0
"""Random transforms of images with their boxes or masks, where MONAI's own are not what a task needs.

MONAI's boxes name the first axis of the image, its rows, x; boxes here are [x0, y0, x1, y1] with x along the columns.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandAffined
from monai.transforms.spatial.array import RandAffineGrid
from torch import Tensor


class RowsFirstBoxesd(MapTransform):
    """Boxes (N, 4) to [y0, x0, y1, x1], as `monai.apps.detection.transforms` reads them, or back from it."""

    def __init__(self, keys: str = "boxes") -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {**data, **{key: _exchanged(data[key]) for key in self.key_iterator(dict(data))}}


class ToInputBoxesd(MapTransform):
    """MONAI's boxes back to [x0, y0, x1, y1], clipped to the image; the last of the random transforms.

    Args:
        keys: of boxes (N, 4), rows first.
        min_visible: a box of which less than this share of the area is left in "image" (1, H, W) is removed.
    """

    def __init__(self, keys: str = "boxes", min_visible: float = 0.2) -> None:
        super().__init__(keys)
        self.min_visible = min_visible

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        height, width = data["image"].shape[-2:]
        limits = torch.tensor([width, height, width, height], dtype=torch.float32)
        result = dict(data)
        for key in self.key_iterator(result):
            whole = _exchanged(data[key])
            inside = torch.minimum(whole.clamp(min=0), limits)
            area, left = ((b[:, 2:] - b[:, :2]).clamp(min=0).prod(1) for b in (whole, inside))
            result[key] = inside[(left > 0) & (left >= self.min_visible * area)]
        return result


def _exchanged(boxes: Any) -> Tensor:
    return torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)[:, [1, 0, 3, 2]]


class _OneScaleGrid(RandAffineGrid):
    def randomize(self, data: Any | None = None) -> None:
        super().randomize(data)
        # MONAI takes as many of the three as the image has axes.
        self.scale_params = (self.scale_params or [1.0])[:1] * 3


class RandSimilarityd(RandAffined):
    """`monai.transforms.RandAffined` without shear and shift, whose scale factor is the same along each axis.

    ``scale_range``: (min, max); 1 is added. Above 0 the content shrinks, since it scales the sampling grid. Raises
    ValueError: `scale_range` is not a pair.
    """

    def __init__(
        self,
        keys: KeysCollection,
        scale_range: tuple[float, float],
        rotate_range: Sequence[tuple[float, float] | float] | float,
        prob: float,
        mode: Sequence[str] | str = "bilinear",
        padding_mode: Sequence[str] | str = "zeros",
    ) -> None:
        if len(scale_range) != 2 or not -1 < scale_range[0] <= scale_range[1]:
            raise ValueError(f"scale_range must be (min, max) with min above -1, got {scale_range!r}")
        super().__init__(keys, prob=prob, rotate_range=rotate_range, mode=mode, padding_mode=padding_mode)
        grid = _OneScaleGrid(rotate_range=rotate_range, scale_range=[(scale_range[0], scale_range[1])])
        self.rand_affine.rand_affine_grid = grid
