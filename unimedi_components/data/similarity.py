# SPDX-License-Identifier: Apache-2.0
"""Random rotation and scale of an image and its mask, with one scale factor for all axes."""

from collections.abc import Sequence
from typing import Any

from monai.config import KeysCollection
from monai.transforms import RandAffined
from monai.transforms.spatial.array import RandAffineGrid


class _OneScaleGrid(RandAffineGrid):
    def randomize(self, data: Any | None = None) -> None:
        super().randomize(data)
        # MONAI takes as many of the three as the image has axes.
        self.scale_params = (self.scale_params or [1.0])[:1] * 3


class RandSimilarityd(RandAffined):
    """`monai.transforms.RandAffined` without shear and shift, whose scale factor is the same along each axis.

    RandAffined draws a factor for each axis, and a flat list as a range for each.

    Args:
        keys: of images and masks (C, *size), all moved alike.
        scale_range: (min, max); 1 is added. Above 0 the content shrinks, since it scales the sampling grid.
        prob: of a drawn transform for a case.
        mode: interpolation, for each key.

    Raises:
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
