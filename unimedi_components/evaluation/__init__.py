# SPDX-License-Identifier: Apache-2.0
"""Measurements: retrieval, slice selection, linear probes, and what a finished run writes."""

from unimedi_components.evaluation.after_classification import after_classifier_training
from unimedi_components.evaluation.classification import (
    ClassificationLossMetric,
    ClassificationScore,
    classification_metrics,
)
from unimedi_components.evaluation.classifier_report import evaluate_classifier
from unimedi_components.evaluation.retrieval import ContrastiveLossMetric, RetrievalRecall, recall_at_k
from unimedi_components.evaluation.summary import after_training, evaluate_datalist

__all__ = [
    "ClassificationLossMetric",
    "ClassificationScore",
    "ContrastiveLossMetric",
    "RetrievalRecall",
    "after_classifier_training",
    "after_training",
    "classification_metrics",
    "evaluate_classifier",
    "evaluate_datalist",
    "recall_at_k",
]
