# SPDX-License-Identifier: Apache-2.0
"""Data sets to images: converters, datalists, transforms, phantoms.

Names are loaded when first used: the phantom writers' processes need neither torch nor MONAI.
"""

import importlib
from typing import Any

_EXPORTS = {
    "ByDimension": "transforms",
    "RandSimilarityd": "similarity",
    "Restored": "restore",
    "RowsFirstBoxesd": "box_augment",
    "ToInputBoxesd": "box_augment",
    "ct_transforms": "transforms",
    "film_transforms": "films",
    "find_images": "inputs",
    "load_datalist": "datalist",
    "load_task": "tasks",
    "pretraining_datalist": "pretraining",
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
