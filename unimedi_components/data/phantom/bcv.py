# SPDX-License-Identifier: Apache-2.0
"""Phantom abdominal CT in the layout of BCV (BTCV abdomen): 13 organs, lung bases to iliac crests."""

from pathlib import Path

import numpy as np

from .abdomen import make_abdomen
from .abdomen_files import axis_order, case_record, organ_truth, save_volume, second_seed
from .abdomen_organs import ORGANS
from .writer import Layout, PatientRecord, register

LABELS = ORGANS[:13]
_TRAINING = (*range(1, 11), *range(21, 32))
_TEST = tuple(range(32, 41))
_UNLABELLED = range(61, 81)
_UNLABELLED_EVERY = 15


def case_number(index: int) -> int:
    """Number of a patient's case, unique.

    The first 30 patients take the real set's 0001-0010 and 0021-0040 in an order in which every third, sixth and
    ninth of ten is one of the published test cases 32 to 40, so that any number of patients has about 30 % of
    them. Further patients take 0041-0060 and 0081 onwards.
    """
    if index < 30:
        tens, unit = divmod(index, 10)
        if unit in (2, 5, 8):
            return _TEST[3 * tens + unit // 3]
        return _TRAINING[7 * tens + unit - (unit + 1) // 3]
    return index + 11 if index < 50 else index + 31


def _write_patient(root: Path, index: int, seed: np.random.SeedSequence) -> PatientRecord:
    """One labelled case; beside every fifteenth patient one more without a label map, as for the challenge."""
    number, order = case_number(index), axis_order(index, seed)
    study = make_abdomen(seed, pelvis=False)
    image = f"RawData/Training/img/img{number:04d}.nii.gz"
    mask = f"RawData/Training/label/label{number:04d}.nii.gz"
    save_volume(root / image, study.hu, study.grid, order)
    labels = np.where(study.organs <= len(LABELS), study.organs, 0).astype(np.uint8)
    organs = organ_truth(*save_volume(root / mask, labels, study.grid, order), LABELS)
    extra = index // _UNLABELLED_EVERY
    if index % _UNLABELLED_EVERY == _UNLABELLED_EVERY - 1 and extra < len(_UNLABELLED):
        other = make_abdomen(second_seed(seed, 2), pelvis=False)
        save_volume(root / f"RawData/Testing/img/img{_UNLABELLED[extra]:04d}.nii.gz", other.hu, other.grid, order)
    return {"studies": {f"img{number:04d}": case_record(study, organs, image, mask)}}


BCV = register(Layout("bcv", 8, _write_patient))
