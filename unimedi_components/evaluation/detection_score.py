# SPDX-License-Identifier: Apache-2.0
"""Validation metrics of detectors for Ignite, summed over batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ignite.exceptions import NotComputableError
from ignite.metrics import Metric

from unimedi_components.distributed import gather_objects
from unimedi_components.evaluation.detection import Detections, detection_metrics

__all__ = ["DetectionLossMetric", "DetectionScore"]


def _pred_and_label(output: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return output["pred"], output["label"]


class _PerImage(Metric):
    """Keeps a row per image; `compute` sees those of all ranks, which may hold different numbers, or none."""

    def __init__(self, output_transform: Callable[[Any], Any] = _pred_and_label) -> None:
        self.rows: list[Any] = []
        super().__init__(output_transform)

    def reset(self) -> None:
        """Forget all images."""
        self.rows = []

    def _all(self) -> list[Any]:
        rows = [row for part in gather_objects(self.rows) for row in part]
        if not rows:
            raise NotComputableError(f"{type(self).__name__} saw no image; is the validation split empty?")
        return rows


class DetectionLossMetric(_PerImage):
    """Mean over the images of the loss that each has alone, "loss" of `ViTDet` in evaluation with targets.

    Args:
        output_transform: engine output to (predictions, targets), lists of dicts by image.
    """

    def update(self, output: tuple[Sequence[Mapping[str, Any]], Any]) -> None:
        """Take in a batch."""
        self.rows += [float(row["loss"]) for row in output[0]]

    def compute(self) -> float:
        """The mean, equal on all ranks.

        Raises:
            NotComputableError: no image came in.
        """
        return float(np.mean(self._all()))


class DetectionScore(_PerImage):
    """A value of `detection_metrics` over the images, such as "map_coco"; NaN where it is not defined.

    Boxes are in pixels of the network's input.

    Args:
        name: of the value.
        output_transform: see `DetectionLossMetric`.
    """

    def __init__(self, name: str = "map_coco", output_transform: Callable[[Any], Any] = _pred_and_label) -> None:
        self.name = name
        super().__init__(output_transform)

    def update(self, output: tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]) -> None:
        """Take in a batch."""
        for found, true in zip(*output, strict=True):
            tensors = (found["boxes"], found["scores"], true["boxes"])
            self.rows.append(tuple(tensor.detach().float().cpu().numpy() for tensor in tensors))

    def compute(self) -> float:
        """The value, equal on all ranks.

        Raises:
            NotComputableError: no image came in.
        """
        boxes, scores, truth = zip(*self._all(), strict=True)
        finite = all(np.isfinite(part).all() for row in (*boxes, *scores) for part in (row,))
        if not finite or not any(len(part) for part in truth):
            return float("nan")
        value = detection_metrics(Detections(boxes, scores, truth), bootstrap=0)[self.name]
        return float("nan") if value is None else float(value)
