# SPDX-License-Identifier: Apache-2.0
"""Measurements: retrieval, slice selection, linear probes, and what a finished run writes."""

from unimedi_components.evaluation.after_task import after_task_training
from unimedi_components.evaluation.classification import (
    ClassificationLossMetric,
    ClassificationScore,
    classification_metrics,
)
from unimedi_components.evaluation.classifier_report import evaluate_classifier
from unimedi_components.evaluation.detection import Detections, detection_metrics
from unimedi_components.evaluation.detection_score import DetectionLossMetric, DetectionScore
from unimedi_components.evaluation.detector_report import evaluate_detector
from unimedi_components.evaluation.retrieval import ContrastiveLossMetric, RetrievalRecall, recall_at_k
from unimedi_components.evaluation.segmentation import MaskLossMetric, MaskScore, mask_metrics
from unimedi_components.evaluation.segmenter_report import evaluate_segmenter
from unimedi_components.evaluation.summary import after_training, evaluate_datalist

__all__ = [
    "ClassificationLossMetric",
    "ClassificationScore",
    "ContrastiveLossMetric",
    "DetectionLossMetric",
    "DetectionScore",
    "Detections",
    "MaskLossMetric",
    "MaskScore",
    "RetrievalRecall",
    "after_task_training",
    "after_training",
    "classification_metrics",
    "detection_metrics",
    "evaluate_classifier",
    "evaluate_datalist",
    "evaluate_detector",
    "evaluate_segmenter",
    "mask_metrics",
    "recall_at_k",
]
