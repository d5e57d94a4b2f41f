# SPDX-License-Identifier: Apache-2.0
"""Data sets to batches: converters, datalists, transforms, mixed loading, phantoms.

Names are loaded when first used: the phantom writers' processes need neither torch nor MONAI.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "ByDimension": "transforms",
    "DenseDataset": "dense",
    "FeatureDataset": "labelled",
    "LabelledDataset": "labelled",
    "MixedBatchSampler": "sampler",
    "MixedCollate": "loading",
    "MixedDataLoader": "loading",
    "PretrainDataset": "dataset",
    "RandSimilarityd": "similarity",
    "Restored": "restore",
    "RowsFirstBoxesd": "box_augment",
    "ToInputBoxesd": "box_augment",
    "build_loader": "loading",
    "ct_transforms": "transforms",
    "eval_loader": "loading",
    "film_transforms": "films",
    "find_images": "inputs",
    "image_loader": "inputs",
    "labelled_loader": "labelled",
    "load_datalist": "datalist",
    "load_task": "tasks",
    "pretraining_datalist": "pretraining",
    "rank_share": "sampler",
    "report_tokenizer": "pretraining",
    "segmentation_transforms": "segmentation",
    "select": "datalist",
    "task_datalist": "tasks",
    "task_transforms": "chains",
    "write_json": "datalist",
    "xray_transforms": "transforms",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value
