# SPDX-License-Identifier: Apache-2.0
"""Datalists to batches: images with their targets, kept on disk, in batches that are the same on every machine."""

from unimedi_components.loading.collate import MixedCollate
from unimedi_components.loading.dataset import ImageDataset
from unimedi_components.loading.derived import FeatureDataset, RepeatedDataset
from unimedi_components.loading.loader import ImageLoader
from unimedi_components.loading.sampler import MixedBatchSampler, rank_share
from unimedi_components.loading.targets import Skipped

__all__ = [
    "FeatureDataset",
    "ImageDataset",
    "ImageLoader",
    "MixedBatchSampler",
    "MixedCollate",
    "RepeatedDataset",
    "Skipped",
    "rank_share",
]
