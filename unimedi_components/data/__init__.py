# SPDX-License-Identifier: Apache-2.0
"""Data sets to batches: converters, datalists, transforms, mixed loading, phantoms."""

from unimedi_components.data.datalist import load_datalist, select
from unimedi_components.data.dataset import PretrainDataset
from unimedi_components.data.loading import MixedCollate, MixedDataLoader, build_loader, eval_loader
from unimedi_components.data.pretraining import pretraining_datalist, report_tokenizer
from unimedi_components.data.sampler import MixedBatchSampler
from unimedi_components.data.transforms import ByDimension, ct_transforms, xray_transforms

__all__ = [
    "ByDimension",
    "MixedBatchSampler",
    "MixedCollate",
    "MixedDataLoader",
    "PretrainDataset",
    "build_loader",
    "ct_transforms",
    "eval_loader",
    "load_datalist",
    "pretraining_datalist",
    "report_tokenizer",
    "select",
    "xray_transforms",
]
