# SPDX-License-Identifier: Apache-2.0
"""MONAI's RetinaNet detector over head maps that are already there: anchors, matching, losses and box selection.

Letters: B images, A anchors of an image, K classes, n boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.apps.detection.networks.retinanet_detector import RetinaNetDetector
from monai.apps.detection.utils.anchor_utils import AnchorGenerator
from monai.losses.focal_loss import sigmoid_focal_loss
from torch import Tensor, nn

__all__ = ["BoxDetector"]

CLASSIFICATION, REGRESSION = "classification", "box_regression"


class _Heads(nn.Module):
    """What `RetinaNetDetector` asks of a network, whose maps are handed over instead."""

    spatial_dims, size_divisible = 2, 1
    cls_key, box_reg_key = CLASSIFICATION, REGRESSION

    def __init__(self, num_classes: int, num_anchors: int) -> None:
        super().__init__()
        self.num_classes, self.num_anchors = num_classes, num_anchors


class _FocalSum(nn.Module):
    """Sum of the focal loss over anchors and classes; MONAI's `FocalLoss` has no such reduction for (N, K)."""

    def __init__(self, alpha: float, gamma: float) -> None:
        super().__init__()
        self.alpha, self.gamma = alpha, gamma

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return sigmoid_focal_loss(logits, target, self.gamma, self.alpha).sum()


class BoxDetector(RetinaNetDetector):
    """`RetinaNetDetector` for 2D without parameters, which reads the heads' maps; no torchvision.

    Boxes are [x0, y0, x1, y1], x along the columns (MONAI's own detectors count x along the first axis). Anchors are
    matched by ATSS, since MONAI's other matcher is torchvision's. The classification loss is RetinaNet's focal loss
    over all anchors, divided by the number of matched ones, and draws nothing; MONAI's default is a mean.

    Args:
        num_classes: K, without background.
        anchor_sizes: side of the anchors in pixels of the image, one list per map.
        aspect_ratios: height over width of the anchors of each size.
        candidates: nearest anchors per map and box that ATSS chooses among, as a multiple of the anchors per place.
        alpha, gamma: of the focal loss.

    Raises:
        ValueError: maps with different numbers of anchors.
    """

    def __init__(
        self,
        num_classes: int,
        anchor_sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        candidates: int = 4,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        sizes: Any = tuple(tuple(level) for level in anchor_sizes)
        if len({len(level) for level in sizes}) != 1 or not sizes[0]:
            raise ValueError(f"anchor_sizes {sizes}: one head serves all maps, so each needs the same number of sizes")
        anchors = AnchorGenerator(sizes, (tuple(aspect_ratios),) * len(sizes), indexing="xy")
        super().__init__(_Heads(num_classes, anchors.num_anchors_per_location()[0]), anchors)
        self.set_atss_matcher(num_candidates=candidates, center_in_gt=False)
        self.set_cls_loss(_FocalSum(alpha, gamma))

    def read(
        self, images: Tensor, maps: Mapping[str, Sequence[Tensor]]
    ) -> tuple[dict[str, Tensor], list[Tensor], list[int]]:
        """Maps in a row: {key: (B, A, K or 4)}, the anchors (A, 4) of each image, places per map."""
        logits = [x.float() for x in maps[CLASSIFICATION]]
        rows = {
            CLASSIFICATION: self._reshape_maps(logits),
            REGRESSION: self._reshape_maps([x.float() for x in maps[REGRESSION]]),
        }
        return rows, self.anchor_generator(images, logits), [x.shape[2:].numel() for x in logits]

    def losses(
        self, images: Tensor, maps: Mapping[str, Sequence[Tensor]], targets: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """MONAI's dict of losses, "classification" and "box_regression", scalars over the batch.

        Args:
            images: (B, 1, H, W); their size is read.
            maps: as `ViTDet.head_maps` returns them.
            targets: of each image "boxes" (n, 4) in pixels and "labels" (n,) from 0 to K - 1.
        """
        rows, anchors, places = self.read(images, maps)
        return self.compute_loss(rows, [dict(target) for target in targets], anchors, places)

    def losses_per_image(
        self, images: Tensor, maps: Mapping[str, Sequence[Tensor]], targets: Sequence[Mapping[str, Tensor]]
    ) -> list[Tensor]:
        """The summed loss that each image has as a batch of its own."""
        rows, anchors, places = self.read(images, maps)
        found = []
        for i, target in enumerate(targets):
            own = {key: value[i : i + 1] for key, value in rows.items()}
            losses = self.compute_loss(own, [dict(target)], anchors[i : i + 1], places)
            found.append(torch.stack(list(losses.values())).sum())
        return found

    def boxes(
        self, images: Tensor, maps: Mapping[str, Sequence[Tensor]], lowest_score: float | None = None
    ) -> list[dict[str, Tensor]]:
        """Selected boxes of each image: "boxes" (n, 4) clipped to it, "labels" (n,), "scores" (n,), highest first.

        Args:
            images, maps: see `losses`.
            lowest_score: for this call in place of the selector's threshold, where it is lower.
        """
        # MONAI's suppression copies the boxes, which those with a history refuse
        rows, anchors, places = self.read(images, {key: [x.detach() for x in value] for key, value in maps.items()})
        size = [images.shape[-1], images.shape[-2]]
        usual = self.box_selector.score_thresh
        self.box_selector.score_thresh = usual if lowest_score is None else min(lowest_score, usual)
        try:
            found = self.postprocess_detections(rows, anchors, [size] * len(images), places)
        finally:
            self.box_selector.score_thresh = usual
        names = {self.target_box_key: "boxes", self.target_label_key: "labels", self.pred_score_key: "scores"}
        return [{names[key]: value for key, value in row.items()} for row in found]

    def compute_anchor_matched_idxs(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]], num_anchor_locs_per_level: Sequence[int]
    ) -> list[Tensor]:
        """Which box each anchor is for, -1 for none, (A,) of each image; overridden: MONAI's needs torchvision."""
        found = []
        for own, target in zip(anchors, targets, strict=True):
            boxes = target[self.target_box_key].to(own)
            _, index = self.proposal_matcher(boxes, own, num_anchor_locs_per_level, self.num_anchors_per_loc)
            found.append(index.to(own.device))
        return found

    def compute_cls_loss(
        self, cls_logits: Tensor, targets: list[dict[str, Tensor]], matched_idxs: list[Tensor]
    ) -> Tensor:
        """Focal loss over all anchors of the batch per matched anchor (Lin et al., RetinaNet, section 4.1)."""
        matched = sum(int((index >= 0).sum()) for index in matched_idxs)
        return super().compute_cls_loss(cls_logits, targets, matched_idxs) / max(1, matched)

    def compute_box_loss(
        self,
        box_regression: Tensor,
        targets: list[dict[str, Tensor]],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> Tensor:
        """MONAI's, but for a batch without boxes a zero that the heads' parameters take part in, as DDP needs."""
        if not any((index >= 0).any() for index in matched_idxs):
            return box_regression.sum() * 0.0
        return super().compute_box_loss(box_regression, targets, anchors, matched_idxs)
