# SPDX-License-Identifier: Apache-2.0
"""Detection in X-rays: ViTDet's simple feature pyramid over the unified encoder, and MONAI's RetinaNet heads.

Letters: B images, D width of the encoder, A anchors per place, K classes, n boxes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from monai.apps.detection.networks.retinanet_network import RetinaNetClassificationHead, RetinaNetRegressionHead
from monai.data import MetaTensor
from torch import Tensor, nn

from unimedi_components.networks.box_detector import CLASSIFICATION, REGRESSION, BoxDetector
from unimedi_components.networks.feature_pyramid import SCALES, SimpleFeaturePyramid
from unimedi_components.networks.task_network import TaskNetwork, at_least_float16
from unimedi_components.networks.unified_vit import UnifiedViT

Targets = Sequence[Mapping[str, Tensor]]
OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))


class ViTDet(TaskNetwork):
    """A one-stage detector over the last map of a plain ViT.

    The pyramid is ViTDet's; the detector is MONAI's RetinaNet where ViTDet has Mask R-CNN, see `BoxDetector`. Raises
    ValueError: no class, more head convolutions than RetinaNet's 4, a width that 8 does not divide, or anchor sizes
    that do not fit the pyramid's maps.

    Args:
        encoder: reads X-rays; its patch tokens after the final norm are the map.
        freeze_encoder: train pyramid and heads alone (the encoder gets no gradient and stays in evaluation mode).
        width: channels of the pyramid and the heads, a multiple of 8; ViTDet has 256.
        scales, last_pool: of the pyramid, see `SimpleFeaturePyramid`.
        head_convs: 3x3 convolutions before the last one in each head; RetinaNet has 4.
        anchor_sizes: side of the anchors in pixels of the input, one list per map or one for all; None: RetinaNet's, 4
            times the map's stride times 1, 2^(1/3), 2^(2/3).
        candidates, alpha, gamma: see `BoxDetector`.
        score_threshold: boxes of lower score are left out.
        lowest_score: the same where targets are given: average precision counts unlikely boxes too.

    Example:
        >>> encoder = UnifiedViT(img_size=32, vol_size=(8, 32, 32), embed_dim=24, depth=2, num_heads=2)
        >>> sorted(ViTDet(encoder, 1, width=16).eval()(torch.zeros(1, 1, 64, 64))[0])
        ['boxes', 'labels', 'scores']
    """

    kind = "vitdet"

    def __init__(
        self,
        encoder: UnifiedViT,
        num_classes: int = 1,
        *,
        freeze_encoder: bool = True,
        width: int = 256,
        scales: Sequence[float] = SCALES,
        last_pool: bool = True,
        head_convs: int = 4,
        anchor_sizes: Sequence[Sequence[float]] | None = None,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        candidates: int = 4,
        alpha: float = 0.25,
        gamma: float = 2.0,
        score_threshold: float = 0.05,
        lowest_score: float = 0.02,
        nms_threshold: float = 0.5,
        max_boxes: int = 100,
    ) -> None:
        super().__init__(locals())
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {num_classes}; the background is none")
        if not 0 <= head_convs <= 4:
            raise ValueError(f"head_convs must be from 0 to 4, not {head_convs}")
        if width % 8:
            raise ValueError(f"width {width} must be a multiple of 8, the groups of the heads' norms")
        self.pyramid = SimpleFeaturePyramid(encoder.embed_dim, width, scales, last_pool)
        sizes = _default_sizes(encoder, scales, last_pool) if anchor_sizes is None else anchor_sizes
        sizes = list(sizes) * (self.pyramid.num_levels if len(sizes) == 1 else 1)
        if len(sizes) != self.pyramid.num_levels:
            raise ValueError(f"{len(sizes)} lists of anchor_sizes for {self.pyramid.num_levels} maps of the pyramid")
        levels = tuple(tuple(float(size) for size in level) for level in sizes)
        self.hparams |= {"scales": tuple(scales), "anchor_sizes": levels, "aspect_ratios": tuple(aspect_ratios)}
        self.hold(encoder)
        self.detector = BoxDetector(num_classes, sizes, aspect_ratios, candidates, alpha, gamma)
        anchors = self.detector.num_anchors_per_loc
        self.classification_head = RetinaNetClassificationHead(width, anchors, num_classes, spatial_dims=2)
        self.regression_head = RetinaNetRegressionHead(width, anchors, spatial_dims=2)
        for head in (self.classification_head, self.regression_head):
            # convolution, norm and activation each
            head.conv = nn.Sequential(*list(head.conv)[: 3 * head_convs])
        self.select_boxes(score_threshold, nms_threshold, max_boxes)

    def select_boxes(self, score_threshold: float, nms_threshold: float, max_boxes: int = 100) -> None:
        """Set which boxes are returned; see the class's arguments."""
        self.detector.set_box_selector_parameters(
            score_thresh=score_threshold, nms_thresh=nms_threshold, detections_per_img=max_boxes
        )

    def features(self, image: Tensor) -> Tensor:
        """The encoder's map (B, D, h, w) of X-rays (B, 1, H, W); without gradient if the encoder is frozen."""
        return self.on_grid(self.encoded(image).patches, image)

    def head_maps(self, image: Tensor) -> dict[str, list[Tensor]]:
        """ "classification" (B, A K, ...) and "box_regression" (B, 4 A, ...): logits on each map of the pyramid."""
        return self._decode(self.features(image))

    @at_least_float16
    def _decode(self, last: Tensor) -> dict[str, list[Tensor]]:
        maps = self.pyramid(last)
        # MONAI's heads ask the GPU at every map whether all is finite
        scores, boxes = self.classification_head, self.regression_head
        return {
            CLASSIFICATION: [scores.cls_logits(scores.conv(x)) for x in maps],
            REGRESSION: [boxes.bbox_reg(boxes.conv(x)) for x in maps],
        }

    def forward(self, image: Tensor, targets: Targets | None = None) -> Any:
        """Losses in training, boxes in evaluation.

        Raises ValueError: images of another shape, no targets in training, or another number of them.

        Args:
            image: X-rays (B, 1, H, W) in [-1, 1]; patch size times 2 should divide their sides.
            targets: of each image "boxes" (n, 4), [x0, y0, x1, y1] in pixels of the image, x along the columns, and
                "labels" (n,) from 0 to K - 1.

        Returns:
            in training {"classification", "box_regression"}, scalars; in evaluation for each image "boxes" (n, 4),
            "labels" (n,), "scores" (n,), highest first, and with targets "loss", the image's summed losses.
        """
        if image.ndim != 4:
            raise ValueError(f"expected X-rays (B, 1, H, W), got {tuple(image.shape)}")
        if targets is None and self.training:
            raise ValueError("a detector in training needs targets: boxes and labels of each image")
        if targets is not None and len(targets) != len(image):
            raise ValueError(f"{len(image)} images but {len(targets)} targets")
        # meta data would cling to every map
        image = image.as_tensor() if isinstance(image, MetaTensor) else image
        maps = self.head_maps(image)
        if self.training:
            assert targets is not None
            return self.detector.losses(image, maps, targets)
        if targets is None:
            return self.detector.boxes(image, maps)
        found = self.detector.boxes(image, maps, self.hparams["lowest_score"])
        losses = self.detector.losses_per_image(image, maps, targets)
        return [{**row, "loss": loss} for row, loss in zip(found, losses, strict=True)]


def _default_sizes(encoder: UnifiedViT, scales: Sequence[float], last_pool: bool) -> list[list[float]]:
    patch = encoder.patch_embed.proj.kernel_size[0]
    strides = [patch / scale for scale in scales]
    strides += [2 * strides[-1]] if last_pool else []
    return [[4 * stride * octave for octave in OCTAVES] for stride in strides]
