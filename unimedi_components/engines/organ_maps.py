# SPDX-License-Identifier: Apache-2.0
"""From the network's scores to a label map on the voxels of the file, and sliding windows with mirrored copies."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import deepcopy
from itertools import chain, combinations
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import Compose, Transform
from torch import Tensor

from unimedi_components.errors import ConfigError, DataError

__all__ = ["OrganInferer", "OrganMapd"]


class OrganInferer(SlidingWindowInferer):
    """Sliding windows with Gaussian blending (nnU-Net's and UniMiSS's), over mirrored copies too where asked for.

    A volume that is smaller than the window is padded with -1 (the lowest intensity), and the padding cut off again.

    Args:
        roi_size: D, H, W of a window: the size that the network was trained on.
        mirror_axes: of the axes 0 (D), 1 (H) and 2 (W), those to mirror; each combination of them is predicted once,
            mirrored back and averaged. None mirrors nothing.
        overlap: of neighbouring windows, as a share of their size.
        sw_batch_size: windows at a time.
        kwargs: of `monai.inferers.SlidingWindowInferer`.

    Raises:
        ConfigError: an axis that does not exist.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        mirror_axes: Sequence[int] | None = None,
        overlap: float = 0.5,
        sw_batch_size: int = 1,
        **kwargs: Any,
    ) -> None:
        axes = tuple(mirror_axes or ())
        if not set(axes) <= {0, 1, 2} or len(set(axes)) != len(axes):
            raise ConfigError(f"mirror_axes {list(axes)} must be different ones of 0 (depth), 1 (rows) and 2 (columns)")
        options = {"mode": "gaussian", "cval": -1.0, **kwargs}
        super().__init__(tuple(roi_size), sw_batch_size=sw_batch_size, overlap=overlap, **options)
        self.mirrors = list(chain.from_iterable(combinations(axes, count) for count in range(len(axes) + 1)))

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Scores (B, C, D, H, W) of volumes (B, 1, D, H, W)."""
        volume = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        total: Any = None
        for mirror in self.mirrors:
            dims = [axis + 2 for axis in mirror]
            scores: Any = super().__call__(volume.flip(dims), network, *args, **kwargs)
            total = scores.flip(dims) if total is None else total + scores.flip(dims)
        return total / len(self.mirrors)


class OrganMapd(Transform):
    """Scores on the network's grid to labels on the file's: each class is resampled back, then the largest one wins.

    What the preparation did to the image (orientation, spacing, size) is undone by MONAI's inverse transforms, one
    class at a time, so that memory holds two classes of the file's size; linear, so that surfaces stay smooth.

    Args:
        transform: the preparation that the image went through.
        keys: of the scores, (C, D, H, W), which the label map replaces.
        orig_keys: of the prepared image, a MetaTensor.
    """

    def __init__(self, transform: Compose | Sequence[Any], keys: str = "pred", orig_keys: str = "image") -> None:
        self.transform = transform if isinstance(transform, Compose) else Compose(list(transform))
        self.keys, self.orig_keys = keys, orig_keys

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return `data` with a uint8 MetaTensor (1, X, Y, Z) in the geometry of the image's file.

        Raises:
            DataError: the image has lost the record of its preparation.
        """
        scores, image = torch.as_tensor(data[self.keys]), data[self.orig_keys]
        if not isinstance(image, MetaTensor) or not image.applied_operations:
            raise DataError(
                f"{data.get('id', self.orig_keys)}: the image does not say how it was prepared, so that its labels "
                "cannot be brought back to its file; use a DenseDataset with keep_meta=True"
            )
        scores = scores.as_tensor() if isinstance(scores, MetaTensor) else scores
        operations = [_smooth(operation) for operation in image.applied_operations]
        best: Any = None
        labels: Any = None
        for index, score in enumerate(scores.float().cpu()):
            one = MetaTensor(score[None], meta=deepcopy(image.meta), applied_operations=deepcopy(operations))
            back: Any = self.transform.inverse({self.orig_keys: one})[self.orig_keys]
            if best is None:
                best, labels = back.as_tensor().clone(), torch.zeros(back.shape, dtype=torch.uint8)
                meta = deepcopy(back.meta)
                continue
            value = back.as_tensor()
            better = value > best
            labels[better], best = index, torch.maximum(best, value)
        return {**data, self.keys: MetaTensor(labels, meta=meta)}


def _smooth(operation: Any) -> Any:
    """A record of a resizing that is undone linearly: the area mode of images would give blocks."""
    if not isinstance(operation, Mapping) or operation.get("class") != "Resize":
        return operation
    extra = {**operation["extra_info"], "mode": "trilinear", "align_corners": False}
    return {**operation, "extra_info": extra}
