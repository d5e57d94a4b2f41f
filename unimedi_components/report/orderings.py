# SPDX-License-Identifier: Apache-2.0
"""Whether the orderings of the paper's Table 7, Fig. 6 and Fig. 2 come out, in words computed from the numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from unimedi_components.engines.target_information import COLLAPSED
from unimedi_components.report.sources import Experiment
from unimedi_components.report.statistics import Comparison, compare
from unimedi_components.report.tables import COLUMNS, SHARES, boxed_table

_DISTANCES = {"centroid_distance_embed": "over spread, projected", "centroid_distance_cls": "over spread, CLS"}
_WORDS = {word: word for word in ("holds", "undecided", "fails", "not measured")} | {"fails": "comes out the other way"}


@dataclass(frozen=True)
class Ordering:
    """One "a is better than b" of the paper on one column, as it came out.

    Args:
        result: the difference over the seeds, positive where it is as in the paper.
        scale: 100 where the measure is shown in percent.
    """

    step: str
    column: str
    result: Comparison
    scale: float
    why: str

    @property
    def numbers(self) -> str:
        """The difference with its interval."""
        mean, interval = self.scale * self.result.mean, self.result.interval
        digits = 1 if self.scale == 100 else 2
        limits = " to ".join(f"{self.scale * limit:+.{digits}f}" for limit in interval or ())
        return f"{mean:+.{digits}f}{f', {limits}' if limits else ''}"


def orderings(experiment: Experiment) -> list[Ordering]:
    """Table 7 (VL < + SD < + Attn) and Fig. 6 (separate < joint < UniMedI) by column, and Fig. 2's distance."""
    found = []
    for prefix, (name, _, single) in COLUMNS.items():
        for share, title in SHARES.items():
            key = f"{prefix}_{share}"
            if any(key in measures for measures in experiment.variants.values()):
                steps = {
                    "Table 7: self-distillation over VL alone": ("vl_sd", "vl"),
                    "Table 7: attentive over random slices": ("ours", "vl_sd"),
                    "Fig. 6: joint over separate training": ("joint", single),
                    "Fig. 6: the whole method over joint training": ("ours", "joint"),
                }
                for step, pair in steps.items():
                    found.append(_ordering(experiment, step, f"{name}, {title}", key, *pair))
    step = "Fig. 2: X-ray and CT centroids nearer than in joint training"
    for key, column in _DISTANCES.items():
        if any(key in measures for measures in experiment.variants.values()):
            found.append(_ordering(experiment, step, column, key, "joint", "ours", scale=1))
    return found


def _ordering(
    experiment: Experiment, step: str, column: str, key: str, higher: str, lower: str, scale: float = 100
) -> Ordering:
    result = compare(experiment.variants, key, higher, lower)
    why = "" if result.verdict in ("holds", "not measured") else _why(experiment, result, higher)
    return Ordering(step, column, result, scale, why)


def _why(experiment: Experiment, result: Comparison, higher: str) -> str:
    reasons = []
    if len(result.differences) < 2:
        reasons.append("one seed gives no interval")
    elif result.verdict == "undecided":
        signs = {difference > 0 for difference in result.differences}
        reasons.append("the seeds disagree in sign" if len(signs) > 1 else "the interval over seeds includes 0")
    for dim, name in ((2, "X-ray"), (3, "CT")):
        information = experiment.summary(higher, f"sd_cls_information_{dim}d")
        if information and information["mean"] < COLLAPSED:
            reasons.append(f"the {name} targets carry {information['mean']:.2f} nats")
    return "; ".join(reasons)


def orderings_html(found: Sequence[Ordering]) -> str:
    """A table of differences, a row per comparison, and a sentence on each comparison that does not hold throughout."""
    if not found:
        return '<p class="none">Not measured.</p>'
    steps = list(dict.fromkeys(ordering.step for ordering in found))
    parts = [
        "<p>Differences in points, positive where they are as in the paper, with the 95% interval over seeds, "
        "paired by seed. An ordering holds where the interval lies above 0.</p>"
    ]
    for percent in (True, False):
        columns = dict.fromkeys(ordering.column for ordering in found if (ordering.scale == 100) == percent)
        body = [
            f'<tr class="ours"><th>{escape(step)}</th>{"".join(_cell(o) for o in found if o.step == step)}</tr>'
            for step in steps
            if any(o.step == step and o.column in columns for o in found)
        ]
        if body:
            head = "<th>Comparison</th>" + "".join(f"<th>{escape(column)}</th>" for column in columns)
            parts.append(boxed_table([head], body))
    parts.append(f"<ul>{''.join(f'<li>{escape(_sentence(step, found))}</li>' for step in steps)}</ul>")
    return "".join(parts)


def _cell(ordering: Ordering) -> str:
    verdict = ordering.result.verdict
    if verdict == "not measured":
        return '<td class="none">not run</td>'
    value, _, interval = ordering.numbers.partition(", ")
    return f'<td><b class="{verdict}">{value}</b><small>{interval or "one seed"}<br>{_WORDS[verdict]}</small></td>'


def _sentence(step: str, found: Sequence[Ordering]) -> str:
    own = [ordering for ordering in found if ordering.step == step]
    parts = []
    for verdict, words in _WORDS.items():
        cases = [ordering for ordering in own if ordering.result.verdict == verdict]
        if len(cases) == len(own) and verdict in ("holds", "not measured"):
            return f"{step}: {words}{' everywhere' if verdict == 'holds' else ''}."
        for why in dict.fromkeys(case.why for case in cases):
            columns = "; ".join(
                case.column if verdict in ("holds", "not measured") else f"{case.column} ({case.numbers})"
                for case in cases
                if case.why == why
            )
            parts.append(f"{words} on {columns}{f': {why}' if why else ''}")
    return f"{step}: {'. '.join(part[0].upper() + part[1:] for part in parts)}."
