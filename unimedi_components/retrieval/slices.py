# SPDX-License-Identifier: Apache-2.0
"""Does the selector of Eq. 2 choose the slices that show the lesions? Needs known lesion slices.

The truth counts slices of the file, n from inferior to superior; the selector counts slices of the network's input, D
from inferior to superior. Resampling spreads both over the same extent, so slice s of D covers the file's slices [s n /
D, (s + 1) n / D). A slice of the input is a *lesion slice* if lesion slices of the file fill at least half of what it
covers; where no slice reaches half, as with a thin lesion in a deep volume, those that come closest are.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unimedi_components.arrays import Array
from unimedi_components.errors import DataError
from unimedi_components.metrics.bootstrap import Measures, others_mean
from unimedi_components.metrics.slice_choice import (
    best_choice,
    expected_minimum,
    fixed_choices,
    lesion_distance,
    reachable,
)
from unimedi_components.retrieval.recall import chance_of_hit

#: A study is focal if its lesions touch some slices, but at most this share of them; in the others chance is
# high.
FOCAL_SHARE = 1 / 3


@dataclass(frozen=True)
class SliceScore:
    """Selected slices of one study against its lesion slices; each value beside what chance would give.

    Args:
        precision: share of the selected slices that are lesion slices.
        recall: share of the slabs with a lesion slice that are selected. It stays below 1 with more such slabs than k.
        hit: whether any selected slice is a lesion slice, 0 or 1.
    """

    precision: float
    precision_chance: float
    recall: float
    recall_chance: float
    hit: float
    hit_chance: float


def is_focal(lesion_slices: Sequence[int], n_slices: int) -> bool:
    """Whether lesions fill some slices and at most `FOCAL_SHARE` of them."""
    return 0 < len(set(lesion_slices)) <= FOCAL_SHARE * n_slices


def lesion_mask(lesion_slices: Sequence[int], n_slices: int, depth: int) -> Array:
    """Which slices of the network's input are lesion slices, bool (D,). Raises DataError: an index outside the file."""
    lesions = np.zeros(n_slices, dtype=bool)
    index = np.asarray(sorted(set(lesion_slices)), dtype=np.int64)
    if len(index) and not (index[0] >= 0 and index[-1] < n_slices):
        raise DataError(f"lesion slices {index[0]} to {index[-1]} lie outside a volume of {n_slices} slices")
    lesions[index] = True
    # Integers in units of 1 / (n D) of the extent keep "at least half" exact.
    raw, new = np.arange(n_slices) * depth, np.arange(depth)[:, None] * n_slices
    overlap = np.minimum(raw + depth, new + n_slices) - np.maximum(raw, new)
    covered = overlap.clip(min=0)[:, lesions].sum(1)
    most = int(covered.max())
    return (covered * 2 >= n_slices) | ((covered == most) & (0 < 2 * most < n_slices))


def slice_score(
    selected: Sequence[int],
    lesion_slices: Sequence[int],
    n_slices: int,
    depth: int,
    patch_depth: int,
    expand: str = "centre",
) -> SliceScore:
    """Score one study. Raises DataError: no lesion slice, or an index outside the file.

    ``expand``: how slabs became slices, see `selection.select_slices`; it decides what chance can choose from.
    """
    mask = lesion_mask(lesion_slices, n_slices, depth)
    if not mask.any():
        raise DataError("a study without lesion slices has no slice precision; leave it out")
    chosen = np.asarray(selected, dtype=np.int64)
    by_slab = mask.reshape(-1, patch_depth)
    slabs, k = len(by_slab), len(chosen)
    with_lesion: Array = np.asarray(by_slab.any(1))
    return SliceScore(
        precision=float(mask[chosen].mean()),
        precision_chance=_precision_chance(by_slab, k, expand),
        recall=float(with_lesion[np.unique(chosen // patch_depth)].sum() / with_lesion.sum()),
        recall_chance=(k if expand == "centre" else -(-k // patch_depth)) / slabs,
        hit=float(mask[chosen].any()),
        hit_chance=_hit_chance(by_slab, k, expand),
    )


def _precision_chance(by_slab: Array, k: int, expand: str) -> float:
    """Each slab is equally likely at each rank; "centre" takes its centre, "repeat" its slices from below."""
    slabs, patch_depth = by_slab.shape
    if expand == "centre":
        return float(by_slab[:, patch_depth // 2].mean())
    full, rest = divmod(k, patch_depth)
    return float((full * by_slab.sum() + by_slab[:, :rest].sum()) / slabs / k)


def _hit_chance(by_slab: Array, k: int, expand: str) -> float:
    slabs, patch_depth = by_slab.shape
    if expand == "centre":
        return chance_of_hit(int(by_slab[:, patch_depth // 2].sum()), slabs, k)
    full, rest = divmod(k, patch_depth)
    lesions, lowest = int(by_slab.any(1).sum()), int(by_slab[:, :rest].any(1).sum())
    miss = 1.0 - chance_of_hit(lesions, slabs, full)
    if rest and miss > 0.0:
        miss *= 1.0 - lowest / (slabs - full)
    return 1.0 - miss


def slice_metrics(
    kept: Measures,
    selected: Sequence[Sequence[int]],
    truths: Sequence[Mapping[str, Any] | None],
    depth: int,
    patch_depth: int,
    expand: str = "centre",
    patients: Sequence[Hashable] | None = None,
    spacing: Sequence[float] | None = None,
) -> None:
    """Means over the focal studies, beside what other ways to choose would reach on them.

    Args:
        truths: "lesion_slices" and "n_slices" of each study, and "findings" where they are to be told apart, or None
            where they are not known.
        spacing: mm between the slices of each study's file; None measures no distance.

    Keeps: "slice_studies", how many studies are focal, and "slice_studies_known", how many have a truth; without focal
        studies these alone. "slice_precision", "slice_recall" and "slice_hit", each also with "_chance".
        "slice_distance_mm": from the chosen slice that is nearest to a lesion slice to that one. Precision and distance
        also with "_permuted" (the selection of another patient, expectation over all of them), "_fixed" (the same slabs
        for all, learned on other patients, see `fixed_choices`), "_oracle" (the best choice there is), distance with
        "_chance"; precisions also as "_per_finding", means over the focal studies that have a finding.
    """
    people = list(range(len(truths))) if patients is None else list(patients)
    rows = [i for i, truth in enumerate(truths) if truth and is_focal(truth["lesion_slices"], truth["n_slices"])]
    kept.add("slice_studies", len(rows))
    kept.add("slice_studies_known", sum(truth is not None for truth in truths))
    if not rows:
        return
    studies = [truth for i in rows if (truth := truths[i]) is not None]
    chosen, own = np.asarray([selected[i] for i in rows], dtype=np.int64), [people[i] for i in rows]
    findings = [[finding["name"] for finding in study.get("findings", ())] for study in studies]
    scores = [
        slice_score(c.tolist(), study["lesion_slices"], study["n_slices"], depth, patch_depth, expand)
        for c, study in zip(chosen, studies, strict=True)
    ]
    for name in SliceScore.__dataclass_fields__:
        per_study = [getattr(score, name) for score in scores]
        kept.mean(f"slice_{name}", per_study, own)
        if name.startswith("precision"):
            kept.per_finding(f"slice_{name}", per_study, findings)
    masks = np.stack([lesion_mask(study["lesion_slices"], study["n_slices"], depth) for study in studies])
    others = _other_choices(masks, chosen, own, patch_depth, expand)
    for name, choices in others.items():
        values = _scores_of(masks, choices, own, "mean")
        kept.mean(f"slice_precision_{name}", values, own)
        kept.per_finding(f"slice_precision_{name}", values, findings)
    if spacing is not None:
        # slices of the input lie extent / D apart
        steps = [spacing[i] * study["n_slices"] / depth for i, study in zip(rows, studies, strict=True)]
        away = np.stack([lesion_distance(mask) * step for mask, step in zip(masks, steps, strict=True)])
        k = chosen.shape[1]
        within = reachable(depth, k, patch_depth, expand)
        others["oracle"] = within[away[:, within].argmin(1)][:, None, None]
        for suffix, choices in {"": chosen[:, None], **{f"_{name}": c for name, c in others.items()}}.items():
            kept.mean(f"slice_distance_mm{suffix}", _scores_of(away, choices, own, "min"), own)
        chance = [expected_minimum(values, k, patch_depth, expand) for values in away]
        kept.mean("slice_distance_mm_chance", chance, own)


def _other_choices(
    masks: Array, chosen: Array, patients: Sequence[Hashable], patch_depth: int, expand: str
) -> dict[str, Array]:
    """Slices that other ways choose for each of N studies, (N, C, k) for one of C choices."""
    k = chosen.shape[1]
    others: dict[str, Array] = {}
    if len(set(patients)) > 1:
        others["permuted"] = np.broadcast_to(chosen, (len(masks), *chosen.shape))
        fixed = fixed_choices(masks, patients, k, patch_depth, expand)
        assert fixed is not None
        others["fixed"] = fixed[:, None]
    best = np.stack([best_choice(mask, k, patch_depth, expand) for mask in masks])
    return {**others, "oracle": best[:, None]}


def _scores_of(values: Array, choices: Array, patients: Sequence[Hashable], kind: str) -> Array:
    """Mean or smallest value of each study's chosen slices, (N,): values (N, D), choices (N, C, k)."""
    taken = values[np.arange(len(values))[:, None, None], choices]
    scores = taken.mean(2) if kind == "mean" else taken.min(2)
    return scores[:, 0] if scores.shape[1] == 1 else others_mean(scores, patients)
