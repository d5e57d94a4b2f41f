# SPDX-License-Identifier: Apache-2.0
"""Pure functions from outputs and truth to numbers, with one bootstrap over patients, and their forms for Ignite."""

from unimedi_components.metrics.boxes import DetectionLossMetric, Detections, DetectionScore, detection_metrics
from unimedi_components.metrics.classification import (
    ClassificationLossMetric,
    ClassificationScore,
    classification_metrics,
)
from unimedi_components.metrics.masks import MaskLossMetric, MaskScore, mask_metrics
from unimedi_components.metrics.organs import OrganDice, organ_metrics
