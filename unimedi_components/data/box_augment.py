# SPDX-License-Identifier: Apache-2.0
"""What stands between MONAI's random box transforms and this package's boxes.

MONAI's boxes name the first axis of the image, its rows, x; boxes here are [x0, y0, x1, y1] with x along the columns.
"""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.transforms import MapTransform
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
