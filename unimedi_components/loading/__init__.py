# SPDX-License-Identifier: Apache-2.0
"""Datalists to batches: data sets with a cache on disk, samplers, loaders."""

from unimedi_components.loading.dataset import PretrainDataset
from unimedi_components.loading.dense import DenseDataset
from unimedi_components.loading.labelled import FeatureDataset, LabelledDataset, labelled_loader
from unimedi_components.loading.loader import MixedCollate, MixedDataLoader, build_loader, eval_loader
from unimedi_components.loading.repeated import RepeatedDataset
from unimedi_components.loading.sampler import MixedBatchSampler, rank_share

__all__ = [
    "DenseDataset",
    "FeatureDataset",
    "LabelledDataset",
    "MixedBatchSampler",
    "MixedCollate",
    "MixedDataLoader",
    "PretrainDataset",
    "RepeatedDataset",
    "build_loader",
    "eval_loader",
    "labelled_loader",
    "rank_share",
]
