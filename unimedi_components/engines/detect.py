# SPDX-License-Identifier: Apache-2.0
"""Batches of images with boxes for MONAI's engines, and a detector as MONAI Label calls one."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from ignite.engine import Engine
from monai.transforms import MapTransform
from torch import Tensor, nn

from unimedi_components.data.boxes import boxes_to_file
from unimedi_components.data.roi_boxes import rois_of_boxes
from unimedi_components.engines.early_stop import EarlyStop

__all__ = ["EarlyStopByScore", "RoisOfBoxesd", "ServedDetector", "prepare_boxes"]

Batch = tuple[Tensor, list[dict[str, Tensor]], tuple[Any, ...], dict[str, Any]]


def prepare_boxes(
    batchdata: Mapping[str, Any], device: torch.device | str, non_blocking: bool = False, **kwargs: Any
) -> Batch:
    """A batch for MONAI's trainers and evaluators, whose detector takes the targets with the images.

    Args:
        batchdata: "image" (B, 1, H, W), "boxes": (n, 4) of each image; all boxes are of the first class.
        device: where they are needed.
        non_blocking: of `Tensor.to`.
        kwargs: of `Tensor.to`.

    Returns:
        images, targets, and the targets once more for the network's forward; without "boxes" images alone.
    """
    images = batchdata["image"].to(device=device, non_blocking=non_blocking, **kwargs)
    if "boxes" not in batchdata:
        return images, [], (), {}
    targets = []
    for boxes in batchdata["boxes"]:
        own = boxes.to(device=device, dtype=torch.float32, non_blocking=non_blocking).reshape(-1, 4)
        targets.append({"boxes": own, "labels": torch.zeros(len(own), dtype=torch.int64, device=own.device)})
    return images, targets, (targets,), {}


class ServedDetector(nn.Module):
    """A detector as MONAI Label's `BundleInferTask` calls one: it sets `network`, and reads "box" and "label".

    Args:
        network: of `load_network`.
        score_threshold, nms_threshold, max_boxes: see `ViTDet`; `select_boxes` changes them.
    """

    def __init__(
        self, network: nn.Module, score_threshold: float = 0.3, nms_threshold: float = 0.5, max_boxes: int = 100
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.select_boxes(score_threshold, nms_threshold, max_boxes)

    def select_boxes(self, score_threshold: float, nms_threshold: float, max_boxes: int = 100) -> None:
        """Set which boxes are returned."""
        self.selection = (score_threshold, nms_threshold, max_boxes)

    def forward(self, image: Tensor, use_inferer: bool = False) -> list[dict[str, Tensor]]:
        """Detect.

        Args:
            image: (B, 1, H, W) in [-1, 1].
            use_inferer: MONAI's detectors have it; films are read whole, without sliding windows.

        Returns:
            for each image "box" (n, 4) in its pixels, "label" (n,) and "label_scores" (n,).
        """
        self.network.select_boxes(*self.selection)
        names = {"boxes": "box", "labels": "label", "scores": "label_scores"}
        return [{names[key]: value for key, value in row.items()} for row in self.network(image)]


class RoisOfBoxesd(MapTransform):
    """Boxes of the network's input as regions of interest in the film's world, as Slicer shows them.

    Items that no server asks for, with "pred" in place of "box", pass untouched.

    Args:
        box_key: (n, 4) in pixels of the input; becomes (n, 6), centre and size, see `rois_of_boxes`.
        path_key: the film's file.
        image_key: the input as a MetaTensor, whose affine says where its pixels lie in the file.
    """

    def __init__(self, box_key: str = "box", path_key: str = "image_path", image_key: str = "image") -> None:
        super().__init__(box_key, allow_missing_keys=True)
        self.box_key, self.path_key, self.image_key = box_key, path_key, image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return `data` with regions of interest."""
        result = dict(data)
        if self.path_key in result and self.box_key in result:
            boxes = boxes_to_file(result[self.box_key], result[self.image_key].affine)
            rois = rois_of_boxes(str(result[self.path_key]), boxes.tolist())
            result[self.box_key] = torch.tensor(rois, dtype=torch.float64).reshape(-1, 6)
        return result


class EarlyStopByScore(EarlyStop):
    """Early stopping by a validation score, of which more is better, such as MGCA's detector's mean average precision.

    Args:
        evaluator, patience: see `EarlyStop`.
        metric: name of the score.
    """

    def __init__(self, evaluator: Engine, patience: int | None, metric: str = "val_map") -> None:
        super().__init__(evaluator, patience, metric)

    def score(self, engine: Engine) -> float:
        """The score; one that is no number is as bad as any can be."""
        value = float(self.evaluator.state.metrics[self.metric])
        return -math.inf if math.isnan(value) else value
