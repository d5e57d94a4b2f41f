# SPDX-License-Identifier: Apache-2.0
"""Does the selector of Eq. 2 choose the slices that show the lesions? Needs known lesion slices.

The truth counts slices of the file, n from inferior to superior; the selector counts slices of the network's
input, D from inferior to superior. Resampling spreads both over the same extent, so slice s of D covers the
file's slices [s n / D, (s + 1) n / D). A slice of the input is a *lesion slice* if lesion slices of the file
fill at least half of what it covers; where no slice reaches half, as with a thin lesion in a deep volume,
those that come closest are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unimedi_components.errors import DataError
from unimedi_components.evaluation.retrieval import chance_of_hit

__all__ = ["FOCAL_SHARE", "SliceScore", "is_focal", "lesion_mask", "slice_metrics", "slice_score"]

#: A study is focal if its lesions touch some slices, but at most this share of them; in the others chance is
# high.
FOCAL_SHARE = 1 / 3


@dataclass(frozen=True)
class SliceScore:
    """Selected slices of one study against its lesion slices; each value beside what chance would give.

    Args:
        precision: share of the selected slices that are lesion slices.
        recall: share of the slabs with a lesion slice that are selected. It stays below 1 with more such
            slabs than k.
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


def lesion_mask(lesion_slices: Sequence[int], n_slices: int, depth: int) -> npt.NDArray[np.bool_]:
    """Which slices of the network's input are lesion slices, bool (D,).

    Args:
        lesion_slices: indices in the file, inferior to superior.
        n_slices: slices of the file, n.
        depth: slices of the input, D.

    Raises:
        DataError: an index outside the file.
    """
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
    """Score one study.

    Args:
        selected: k chosen slices of the input.
        lesion_slices: true lesion slices in the file, at least one.
        n_slices: slices of the file.
        depth: slices of the input, D.
        patch_depth: slices per slab.
        expand: how slabs became slices, see `selection.select_slices`; it decides what chance can choose
            from.

    Raises:
        DataError: no lesion slice, or an index outside the file.
    """
    mask: npt.NDArray[Any] = lesion_mask(lesion_slices, n_slices, depth)
    if not mask.any():
        raise DataError("a study without lesion slices has no slice precision; leave it out")
    chosen = np.asarray(selected, dtype=np.int64)
    by_slab = mask.reshape(-1, patch_depth)
    slabs, k = len(by_slab), len(chosen)
    with_lesion: npt.NDArray[np.bool_] = np.asarray(by_slab.any(1))
    return SliceScore(
        precision=float(mask[chosen].mean()),
        precision_chance=_precision_chance(by_slab, k, expand),
        recall=float(with_lesion[np.unique(chosen // patch_depth)].sum() / with_lesion.sum()),
        recall_chance=(k if expand == "centre" else -(-k // patch_depth)) / slabs,
        hit=float(mask[chosen].any()),
        hit_chance=_hit_chance(by_slab, k, expand),
    )


def _precision_chance(by_slab: npt.NDArray[np.bool_], k: int, expand: str) -> float:
    """Each slab is equally likely at each rank; "centre" takes its centre, "repeat" its slices from below."""
    slabs, patch_depth = by_slab.shape
    if expand == "centre":
        return float(by_slab[:, patch_depth // 2].mean())
    full, rest = divmod(k, patch_depth)
    return float((full * by_slab.sum() + by_slab[:, :rest].sum()) / slabs / k)


def _hit_chance(by_slab: npt.NDArray[np.bool_], k: int, expand: str) -> float:
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
    selected: Sequence[Sequence[int]],
    truths: Sequence[Mapping[str, Any] | None],
    depth: int,
    patch_depth: int,
    expand: str = "centre",
) -> dict[str, float | int]:
    """Means over the focal studies.

    Args:
        selected: the chosen slices of each study.
        truths: "lesion_slices" and "n_slices" of each study, or None where they are not known.
        depth, patch_depth, expand: as in `slice_score`.

    Returns:
        "slice_precision", "slice_recall", "slice_hit", each also with "_chance"; "slice_studies", how many
        studies are focal, and "slice_studies_known", how many have a truth. Without focal studies the two
        counts alone.
    """
    known = [(chosen, truth) for chosen, truth in zip(selected, truths, strict=True) if truth is not None]
    scores = [
        slice_score(chosen, truth["lesion_slices"], truth["n_slices"], depth, patch_depth, expand)
        for chosen, truth in known
        if is_focal(truth["lesion_slices"], truth["n_slices"])
    ]
    result: dict[str, float | int] = {"slice_studies": len(scores), "slice_studies_known": len(known)}
    for name in SliceScore.__dataclass_fields__ if scores else ():
        result[f"slice_{name}"] = float(np.mean([getattr(score, name) for score in scores]))
    return result
