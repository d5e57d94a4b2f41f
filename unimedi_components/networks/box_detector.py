# SPDX-License-Identifier: Apache-2.0
"""MONAI's RetinaNet detector over head maps that are already there: anchors, matching, losses and box selection.

Matching and losses take all images at once and look at no value on the way, where MONAI's go image by image and make a
GPU wait dozens of times; matches and losses are the same.

Letters: B images, A anchors of an image, K classes, n boxes of the image that has most.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.apps.detection.networks.retinanet_detector import RetinaNetDetector
from monai.apps.detection.utils.anchor_utils import AnchorGenerator
from monai.losses.focal_loss import sigmoid_focal_loss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

CLASSIFICATION, REGRESSION = "classification", "box_regression"
# numbers of a matrix of boxes and anchors that are compared at once
_COMPARED = 2**26
# torchvision's, and MONAI's default
_SMOOTH_L1_BETA = 1 / 9


class _Heads(nn.Module):
    """What `RetinaNetDetector` asks of a network, whose maps are handed over instead."""

    spatial_dims, size_divisible = 2, 1
    cls_key, box_reg_key = CLASSIFICATION, REGRESSION

    def __init__(self, num_classes: int, num_anchors: int) -> None:
        super().__init__()
        self.num_classes, self.num_anchors = num_classes, num_anchors


class BoxDetector(RetinaNetDetector):
    """`RetinaNetDetector` for 2D without parameters, which reads the heads' maps; no torchvision.

    Boxes are [x0, y0, x1, y1], x along the columns (MONAI's own detectors count x along the first axis). Anchors are
    matched by ATSS (Zhang et al. 2020), since MONAI's other matcher is torchvision's. The classification loss is
    RetinaNet's focal loss over all anchors, divided by the number of matched ones, and draws nothing; MONAI's default
    is a mean. Raises ValueError: maps with different numbers of anchors.

    Args:
        num_classes: K, without background.
        anchor_sizes: side of the anchors in pixels of the image, one list per map.
        aspect_ratios: height over width of the anchors of each size.
        candidates: nearest anchors per map and box that ATSS chooses among, as a multiple of the anchors per place.
        alpha, gamma: of the focal loss.
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
        self.candidates, self.alpha, self.gamma = candidates, alpha, gamma
        self._anchors: tuple[Any, Tensor] = (None, torch.empty(0))

    def read(self, images: Tensor, maps: Mapping[str, Sequence[Tensor]]) -> tuple[dict[str, Tensor], Tensor, list[int]]:
        """Maps in a row: {key: (B, A, K or 4)}, the anchors (A, 4), which all images share, and places per map."""
        rows = {key: torch.cat([self._rows(x) for x in maps[key]], dim=1) for key in (CLASSIFICATION, REGRESSION)}
        sizes = [x.shape[2:] for x in maps[CLASSIFICATION]]
        key = (images.shape[2:], tuple(sizes), images.device)
        if self._anchors[0] != key:
            self._anchors = key, self.anchor_generator(images[:1], [x.float() for x in maps[CLASSIFICATION]])[0]
        return rows, self._anchors[1], [size.numel() for size in sizes]

    def _rows(self, x: Tensor) -> Tensor:
        """A map (B, anchors per place times C, h, w) as (B, h w times anchors per place, C)."""
        split = x.float().unflatten(1, (self.num_anchors_per_loc, -1))
        return split.permute(0, 3, 4, 1, 2).flatten(1, 3)

    def losses(
        self, images: Tensor, maps: Mapping[str, Sequence[Tensor]], targets: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """MONAI's dict of losses, "classification" and "box_regression", scalars over the batch.

        ``targets``: of each image "boxes" (n, 4) in pixels and "labels" (n,) from 0 to K - 1.
        """
        focal, distance, matched = self._terms(images, maps, targets)
        count = matched.sum().clamp(min=1)
        return {CLASSIFICATION: focal.sum() / count, REGRESSION: distance.sum() / (4 * count)}

    def losses_per_image(
        self, images: Tensor, maps: Mapping[str, Sequence[Tensor]], targets: Sequence[Mapping[str, Tensor]]
    ) -> Tensor:
        """The summed loss that each image has as a batch of its own, (B,)."""
        focal, distance, matched = self._terms(images, maps, targets)
        count = matched.clamp(min=1)
        return focal / count + distance / (4 * count)

    def _terms(
        self, images: Tensor, maps: Mapping[str, Sequence[Tensor]], targets: Sequence[Mapping[str, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of the focal loss and of the boxes' smooth L1 distance, and matched anchors, (B,) each."""
        rows, anchors, places = self.read(images, maps)
        boxes = pad_sequence([target["boxes"].to(anchors) for target in targets], batch_first=True)
        labels = pad_sequence([target["labels"] for target in targets], batch_first=True, padding_value=-1)
        if boxes.shape[1] == 0:
            boxes, labels = boxes.new_zeros(len(boxes), 1, 4), labels.new_full((len(labels), 1), -1)
        index = self.match(boxes, labels >= 0, anchors, places)
        matched, index = index >= 0, index.clamp(min=0)
        wanted = labels.gather(1, index)[..., None] == torch.arange(rows[CLASSIFICATION].shape[2], device=labels.device)
        focal = sigmoid_focal_loss(
            rows[CLASSIFICATION], (wanted & matched[..., None]).to(rows[CLASSIFICATION]), self.gamma, self.alpha
        )
        nearest = boxes.gather(1, index[..., None].expand(-1, -1, 4))
        # an anchor that is for no box stands for itself, which has a finite code
        nearest = torch.where(matched[..., None], nearest, anchors)
        codes = self.box_coder.encode_single(nearest.flatten(0, 1), anchors.repeat(len(boxes), 1)).view_as(nearest)
        distance = F.smooth_l1_loss(rows[REGRESSION], codes, reduction="none", beta=_SMOOTH_L1_BETA)
        distance = torch.where(matched[..., None], distance, 0.0)
        return focal.sum((1, 2)), distance.sum((1, 2)), matched.sum(1)

    def match(self, boxes: Tensor, real: Tensor, anchors: Tensor, places: Sequence[int]) -> Tensor:
        """Which box each anchor is for, by ATSS: MONAI's `ATSSMatcher` over all images at once; -1 for none, (B, A).

        Of the anchors of each map those nearest to a box's center are its candidates, and those of them are for it
        whose overlap is at least the candidates' mean plus deviation; an anchor for several boxes takes the best.
        ``boxes``: (B, n, 4). ``real``: False where an image has fewer boxes, (B, n).
        """
        size = max(1, _COMPARED // (boxes.shape[1] * len(anchors)))
        parts = zip(boxes.split(size), real.split(size), strict=True)
        return torch.cat([self._match(*part, anchors, places) for part in parts])

    def _match(self, boxes: Tensor, real: Tensor, anchors: Tensor, places: Sequence[int]) -> Tensor:
        flat = boxes.flatten(0, 1)
        distance = (_centers(flat)[:, None] - _centers(anchors)).square().sum(-1).sqrt()
        per_map = [count * self.num_anchors_per_loc for count in places]
        most = [min(self.candidates * self.num_anchors_per_loc, count) for count in places]
        near, start = [], 0
        for part, k in zip(distance.split(per_map, dim=1), most, strict=True):
            near.append(part.topk(k, dim=1, largest=False)[1] + start)
            start += part.shape[1]
        candidates = torch.cat(near, dim=1)
        overlap = _overlaps(flat, anchors).gather(1, candidates)
        # a single candidate has no deviation, and is taken
        deviation = overlap.std(dim=1) if overlap.shape[1] > 1 else 0.0
        chosen = (overlap >= (overlap.mean(dim=1) + deviation)[:, None]) & real.flatten()[:, None]
        value = overlap.new_full((len(flat), len(anchors)), -torch.inf)
        value.scatter_(1, candidates, torch.where(chosen, overlap, -torch.inf))
        best, index = value.unflatten(0, boxes.shape[:2]).max(dim=1)
        return torch.where(best > -torch.inf, index, -1)

    def boxes(
        self, images: Tensor, maps: Mapping[str, Sequence[Tensor]], lowest_score: float | None = None
    ) -> list[dict[str, Tensor]]:
        """Selected boxes of each image: "boxes" (n, 4) clipped to it, "labels" (n,), "scores" (n,), highest first.

        They are on the CPU: suppression asks box after box, and each question would make a GPU wait.
        """
        # MONAI's suppression copies the boxes, which those with a history refuse
        rows, anchors, places = self.read(images, {key: [x.detach() for x in value] for key, value in maps.items()})
        rows = {key: value.cpu() for key, value in rows.items()}
        if not all(torch.isfinite(value).all() for value in rows.values()):
            warnings.warn("the detector's maps are not finite, boxes are missing; train it again", stacklevel=2)
        size = [images.shape[-1], images.shape[-2]]
        usual = self.box_selector.score_thresh
        self.box_selector.score_thresh = usual if lowest_score is None else min(lowest_score, usual)
        try:
            found = self.postprocess_detections(rows, [anchors.cpu()] * len(images), [size] * len(images), places)
        finally:
            self.box_selector.score_thresh = usual
        names = {self.target_box_key: "boxes", self.target_label_key: "labels", self.pred_score_key: "scores"}
        return [{names[key]: value for key, value in row.items()} for row in found]


def _centers(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union, (N, 4) and (M, 4) to (N, M); MONAI's asks the GPU five times whether they are boxes."""
    low, high = torch.max(boxes[:, None, :2], others[:, :2]), torch.min(boxes[:, None, 2:], others[:, 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    area, other = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (boxes, others))
    return inter / (area[:, None] + other - inter + torch.finfo(boxes.dtype).eps)
