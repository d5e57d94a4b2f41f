# SPDX-License-Identifier: Apache-2.0
"""The way back from the network's grid to the voxels and pixels of the file."""

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Transform
from monai.transforms.utils import allow_missing_keys_mode

from unimedi_components.errors import DataError


class Restored(Transform):
    """Bring "pred", scores (C, H, W) or (C, D, H, W), from the grid of "image" back to the geometry of its file.

    What the preparation did to the image (orientation, spacing, size, padding) is undone by MONAI's inverse transforms,
    one class at a time, so that memory holds two classes of the file's size; linear, so that outlines stay smooth.
    ``labels``: give the class of the highest score, uint8 (1, ...), in place of the scores, float32 (C, ...).
    """

    def __init__(self, transform: Compose | Sequence[Any], labels: bool = False) -> None:
        self.transform = transform if isinstance(transform, Compose) else Compose(list(transform))
        self.labels = labels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return `data` with a MetaTensor in the geometry of the image's file.

        Raises DataError: the image has lost the record of its preparation.
        """
        scores, image = torch.as_tensor(data["pred"]), data["image"]
        if not isinstance(image, MetaTensor) or not image.applied_operations:
            raise DataError(
                f"{data.get('id', 'image')}: the image does not say how it was prepared, so that its labels "
                "cannot be brought back to its file; use an ImageDataset with keep_meta=True"
            )
        scores = scores.as_tensor() if isinstance(scores, MetaTensor) else scores
        operations = [_smooth(operation, image.ndim - 1) for operation in image.applied_operations]
        kept: list[torch.Tensor] = []
        meta: Any = None
        for index, score in enumerate(scores.float().cpu()):
            one = MetaTensor(score[None], meta=deepcopy(image.meta), applied_operations=deepcopy(operations))
            with allow_missing_keys_mode(self.transform):
                back: Any = self.transform.inverse({"image": one})["image"]
            value = back.as_tensor()
            if meta is None:
                meta = deepcopy(back.meta)
                best, labels = value.clone(), torch.zeros(back.shape, dtype=torch.uint8)
            elif self.labels:
                labels[value > best] = index
                best = torch.maximum(best, value)
            if not self.labels:
                kept.append(value)
        return {**data, "pred": MetaTensor(labels if self.labels else torch.cat(kept), meta=meta)}


def _smooth(operation: Any, dims: int) -> Any:
    """A record of a resizing that is undone linearly: the area mode of images would give blocks."""
    if not isinstance(operation, Mapping) or operation.get("class") != "Resize":
        return operation
    mode = "trilinear" if dims == 3 else "bilinear"
    return {**operation, "extra_info": {**operation["extra_info"], "mode": mode, "align_corners": False}}
