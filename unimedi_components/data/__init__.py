# SPDX-License-Identifier: Apache-2.0
"""Data sets to images: converters, datalists, transforms, phantoms.

Names are loaded when first used: the phantom writers' processes need neither torch nor MONAI.
"""

from typing import Any

from unimedi_components.lazy import import_lazily

_HOMES = {
    "augment": "RandSimilarityd RowsFirstBoxesd ToInputBoxesd",
    "chains": "task_transforms",
    "datalist": "load_datalist select write_json",
    "films": "film_transforms",
    "inputs": "find_images",
    "made": "load_task pretraining_datalist report_tokenizer task_datalist",
    "restore": "Restored",
    "segmentation": "segmentation_transforms",
    "transforms": "ByDimension ct_transforms xray_transforms",
}


def __getattr__(name: str) -> Any:
    return import_lazily(globals(), _HOMES, name)
