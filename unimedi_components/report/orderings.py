# SPDX-License-Identifier: Apache-2.0
"""Whether the orderings of the paper's Table 7 and Fig. 6 come out, in words computed from the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unimedi_components.report.sources import Experiment
from unimedi_components.report.statistics import Comparison, compare
from unimedi_components.report.tables import COLLAPSED, SHARES

__all__ = ["Ordering", "orderings"]

_COLUMNS = {
    "chexpert_macro_auroc": ("CheXpert", 2),
    "rsna_macro_auroc": ("RSNA", 2),
    "cc_ccii_accuracy": ("CC-CCII", 3),
    "probe_auroc_2d": ("phantom X-rays", 2),
    "probe_auroc_3d": ("phantom CT", 3),
}
_SINGLE = {2: "2d_only", 3: "3d_only"}


@dataclass(frozen=True)
class Ordering:
    """One "a is above b" of the paper, as it came out.

    Args:
        place: "Table 7" or "Fig. 6".
        text: what is compared, on what, with the difference and its interval.
        verdict: "holds", "fails", "undecided" or "not measured".
        why: what is known about a verdict that is not "holds"; may be empty.
    """

    place: str
    text: str
    verdict: str
    why: str


def orderings(experiment: Experiment) -> list[Ordering]:
    """All orderings of Table 7 (VL < + SD < + Attn) and Fig. 6 (separate < joint < UniMedI), column by column."""
    found = []
    for prefix, (name, dim) in _COLUMNS.items():
        steps = [
            ("Table 7", "self-distillation over VL alone", "vl_sd", "vl"),
            ("Table 7", "attentive over random slices", "ours", "vl_sd"),
            ("Fig. 6", "joint over separate training", "joint", _SINGLE[dim]),
            ("Fig. 6", "the whole method over joint training", "ours", "joint"),
        ]
        for share, title in SHARES.items():
            key = f"{prefix}_{share}"
            if not any(key in measures for measures in experiment.variants.values()):
                continue
            for place, what, higher, lower in steps:
                result = compare(experiment.variants, key, higher, lower)
                text = f"{what}, {name}, {title} of the labels{_numbers(result)}"
                why = "" if result.verdict in ("holds", "not measured") else _why(experiment, result, higher)
                found.append(Ordering(place, text, result.verdict, why))
    return found


def _numbers(result: Comparison) -> str:
    if not result.differences:
        return ""
    interval = result.interval
    spread = f", 95% interval {interval[0] * 100:+.1f} to {interval[1] * 100:+.1f}" if interval else ""
    seeds = len(result.differences)
    return f": {result.mean * 100:+.1f} points{spread}, {seeds} seed{'s' if seeds > 1 else ''}"


def _why(experiment: Experiment, result: Comparison, higher: str) -> str:
    reasons = []
    if len(result.differences) < 2:
        reasons.append("one seed gives no interval")
    elif result.verdict == "undecided":
        signs = {difference > 0 for difference in result.differences}
        reasons.append("the seeds disagree in sign" if len(signs) > 1 else "the interval over seeds includes 0")
    collapsed = [
        f"{name} targets of {experiment.variants[higher]['title']} carry {value['mean']:.2f} nats"
        for dim, name in ((2, "X-ray"), (3, "CT"))
        if (value := _information(experiment, higher, dim)) and value["mean"] < COLLAPSED
    ]
    return "; ".join(reasons + collapsed)


def _information(experiment: Experiment, variant: str, dim: int) -> dict[str, Any] | None:
    return experiment.summary(variant, f"sd_cls_information_{dim}d")
