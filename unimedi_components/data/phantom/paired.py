# SPDX-License-Identifier: Apache-2.0
"""The chest film of a phantom patient whose CT was written: the same anatomy and findings, standing, ray-summed.

It is made as the layouts of X-rays make theirs, so that a network cannot tell it from those it was trained on. No data
set holds such a pair, and none is a training pair.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from ...files import replacing
from .studies import make_patient, make_xray
from .writer import LAYOUTS

PAIRED = ("bimcv",)
"""Layouts of CT whose truth lists one study for each patient, in their order, drawn by `make_patient` as it is."""


def write_paired_xray(path: Path, layout: str, seed: int, index: int) -> Path:
    """Write the frontal film of one patient of a layout as a JPEG, whole or not at all, unless the file is there."""
    if not path.is_file():
        patient, streams = make_patient(np.random.SeedSequence([seed, LAYOUTS[layout].code, index]))
        with replacing(path) as temporary:
            Image.fromarray(make_xray(patient, streams).film).save(temporary, format="jpeg", quality=90)
    return path
