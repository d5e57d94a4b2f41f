# SPDX-License-Identifier: Apache-2.0
"""Measurements of a pre-trained network: retrieval, slice selection, linear probes, and what a finished run writes."""

from unimedi_components.evaluation.retrieval import ContrastiveLossMetric, RetrievalRecall, recall_at_k
from unimedi_components.evaluation.summary import after_training, evaluate_datalist

__all__ = ["ContrastiveLossMetric", "RetrievalRecall", "after_training", "evaluate_datalist", "recall_at_k"]
