# SPDX-License-Identifier: Apache-2.0
"""What an evaluation collects: values by key, their intervals over patients, and what is left without the case."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from unimedi_components.metrics.bootstrap import PatientResamples, percentile_interval

Array = npt.NDArray[Any]


class Measures:
    """Values by key, each with its 95% interval where it is made of cases of known patients.

    Args:
        resamples: of the patients of all cases; None gives no intervals.
    """

    def __init__(self, resamples: PatientResamples | None = None) -> None:
        self.resamples = resamples
        self.values: dict[str, Any] = {}
        self.intervals: dict[str, list[float]] = {}

    def add(self, key: str, value: Any, resampled: npt.NDArray[Any] | None = None) -> None:
        """Keep a value; `resampled` is the same in each resample, (R,), NaN where it is not defined."""
        self.values[key] = value
        interval = None if resampled is None else percentile_interval(resampled)
        if interval is not None:
            self.intervals[key] = interval

    def mean(self, key: str, rows: npt.ArrayLike, patients: Sequence[Hashable] | None = None) -> None:
        """Keep the mean of one number for each of N cases; without cases, nothing.

        Candidates of a search are no cases: they stay the same in every resample.
        """
        array = np.asarray(rows, dtype=np.float64)
        if not len(array):
            return
        wanted = self.resamples is not None and patients is not None
        self.add(key, float(array.mean()), self.resamples.mean(array, patients) if wanted else None)  # type: ignore[union-attr,arg-type]

    def per_finding(self, key: str, rows: npt.ArrayLike, findings: Sequence[Sequence[str]]) -> None:
        """Keep under KEY_per_finding the means over the cases that have each finding, in the order of their names."""
        array = np.asarray(rows, dtype=np.float64)
        names = sorted({name for case in findings for name in case})
        having = {name: [name in case for case in findings] for name in names}
        if names:
            self.values[f"{key}_per_finding"] = {name: float(array[mask].mean()) for name, mask in having.items()}

    def content(self) -> dict[str, Any]:
        """The values, with the intervals under "intervals" where there is any."""
        return {**self.values, **({"intervals": dict(self.intervals)} if self.intervals else {})}


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
