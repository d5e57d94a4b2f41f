# SPDX-License-Identifier: Apache-2.0
"""Mean, deviation and interval over training seeds, and whether two variants differ."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

# Student's t, two-sided 95%, by degrees of freedom; the normal's beyond
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_NORMAL = 1.96


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95% interval of the mean over seeds by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    quantile = _T[freedom - 1] if freedom <= len(_T) else _NORMAL
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def summarise(values: Mapping[int, float], patients: Sequence[Sequence[float] | None] = ()) -> dict[str, Any]:
    """Summary of a measure over training seeds, from its value by seed, at least one; rounded to 5 decimals.

    "mean", "sd" (None for one seed), "interval" of the mean over seeds (see `t_interval`), "patients", the mean of the
    limits of each seed's bootstrap interval over `patients`, where it has one, and "values" by seed.
    """
    numbers = list(values.values())
    limits = [interval for interval in patients if interval]
    return {
        "mean": round(statistics.fmean(numbers), 5),
        "sd": round(statistics.stdev(numbers), 5) if len(numbers) > 1 else None,
        "interval": [round(limit, 5) for limit in interval] if (interval := t_interval(numbers)) else None,
        "patients": [round(statistics.fmean(side), 5) for side in zip(*limits, strict=True)] if limits else None,
        "values": {str(seed): round(value, 5) for seed, value in values.items()},
    }


class Comparison:
    """Two variants' difference over the seeds that both have."""

    def __init__(self, higher: Mapping[str, float], lower: Mapping[str, float]) -> None:
        self.differences = [higher[seed] - lower[seed] for seed in higher if seed in lower]
        self.mean = statistics.fmean(self.differences) if self.differences else math.nan
        self.interval = t_interval(self.differences)

    @property
    def verdict(self) -> str:
        """ "holds", "fails" (the interval lies on one side of 0), or "undecided", or "not measured"."""
        if not self.differences:
            return "not measured"
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return "undecided"
        return "holds" if self.mean > 0 else "fails"


def compare(variants: Mapping[str, Any], key: str, higher: str, lower: str) -> Comparison:
    """Compare two variants of an experiment's summary on one measure."""
    values = [variants.get(name, {}).get(key, {}).get("values", {}) for name in (higher, lower)]
    return Comparison(*values)
