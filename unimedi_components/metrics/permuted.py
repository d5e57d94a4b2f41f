# SPDX-License-Identifier: Apache-2.0
"""The score that a case gets from other patients' outputs: what remains of a score without looking at the case."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["others_mean"]

Array = npt.NDArray[Any]


def others_mean(scores: Array, patients: Sequence[Hashable]) -> Array:
    """Expectation of each case's score under the output of a case of another patient, all equally likely.

    Args:
        scores: of case i under the output of case j, (N, N).

    Returns:
        (N,); NaN for a case without a case of another patient.
    """
    index: dict[Hashable, int] = {}
    key = np.asarray([index.setdefault(patient, len(index)) for patient in patients])
    other = key[:, None] != key[None]
    count = other.sum(1)
    return np.divide((scores * other).sum(1), count, out=np.full(len(key), np.nan), where=count > 0)
