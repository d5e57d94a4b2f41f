# SPDX-License-Identifier: Apache-2.0
"""Search by class: of the K results nearest to a query with a finding, how many have it too?

Letters: N queries, M candidates, E width of the common space, F findings.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unimedi_components.retrieval.recall import precision_at_k

__all__ = ["KS", "class_precision", "same_findings_precision"]

Array = npt.NDArray[Any]
Values = dict[str, Any]

KS = (5, 10, 100)
"""GLoRIA's and MGCA's K."""
PRESENT, ABSENT, UNCERTAIN = 1, 0, -1


def class_precision(
    query: Tensor,
    candidates: Tensor,
    query_labels: Array,
    candidate_labels: Array,
    names: Sequence[str],
    query_groups: Sequence[Hashable] | None = None,
    candidate_groups: Sequence[Hashable] | None = None,
    ks: Sequence[int] = KS,
) -> Values:
    """P@K by finding: queries that have it, and the share of their K nearest candidates that have it.

    Args:
        query: (N, E), normalised here.
        candidates: (M, E), normalised here.
        query_labels: 1 present, 0 absent, -1 uncertain, below -1 not mentioned, (N, F).
        candidate_labels: the same of the candidates, (M, F). Uncertain ones are no candidates for that finding; not
            mentioned counts as absent.
        query_groups: patients of the queries; candidates of the query's own patient are left out. None: none is.
        candidate_groups: patients of the candidates, given with `query_groups`.
        ks: the K; one that exceeds the candidates of a query is left out.

    Returns:
        "precision_at_K" and "precision_at_K_chance" (a random order's), means over the findings that have queries and
        candidates, and under "by_finding" the same for each with its "queries" and "candidates" that have it.
    """
    own = _own(query_groups, candidate_groups, len(query), len(candidates))
    by_finding: dict[str, Values] = {}
    for column, name in enumerate(names):
        asked = torch.from_numpy(np.flatnonzero(query_labels[:, column] == PRESENT))
        known = torch.from_numpy(np.flatnonzero(candidate_labels[:, column] != UNCERTAIN))
        having = torch.from_numpy(candidate_labels[:, column] == PRESENT)[known]
        if not len(asked) or not having.any():
            continue
        excluded = None if own is None else own[asked][:, known]
        values = _precisions(query[asked], candidates[known], having.expand(len(asked), -1), excluded, ks)
        if values:
            by_finding[name] = {**values, "queries": len(asked), "candidates": int(having.sum())}
    return {**_means(by_finding), "by_finding": by_finding}


def same_findings_precision(
    query: Tensor, candidates: Tensor, query_labels: Array, candidate_labels: Array, ks: Sequence[int] = (5, 10)
) -> Values:
    """P@K where a candidate is right if it has exactly the query's findings; queries without a right one are left out.

    Args:
        query, candidates, query_labels, candidate_labels: as of `class_precision`; all but 1 counts as absent.

    Returns:
        "precision_at_K" and "precision_at_K_chance"; empty where no query has a right candidate.
    """
    mine, other = (torch.from_numpy(labels == PRESENT) for labels in (query_labels, candidate_labels))
    same = (mine[:, None] == other[None]).all(-1)
    asked = same.any(1)
    return _precisions(query[asked], candidates, same[asked], None, ks) if asked.any() else {}


def _precisions(
    query: Tensor, candidates: Tensor, correct: Tensor, excluded: Tensor | None, ks: Sequence[int]
) -> Values:
    left = torch.full((len(query),), len(candidates)) if excluded is None else (~excluded).sum(1)
    right = correct.sum(1) if excluded is None else (correct & ~excluded).sum(1)
    values: Values = {}
    for k in ks:
        if k <= int(left.min()):
            values[f"precision_at_{k}"] = precision_at_k(query, candidates, correct, k, excluded)
            values[f"precision_at_{k}_chance"] = float((right.double() / left).mean())
    return values


def _means(by_finding: dict[str, Values]) -> Values:
    keys = dict.fromkeys(key for values in by_finding.values() for key in values if key.startswith("precision"))
    return {key: float(np.mean([v[key] for v in by_finding.values() if key in v])) for key in keys}


def _own(
    query_groups: Sequence[Hashable] | None, candidate_groups: Sequence[Hashable] | None, queries: int, candidates: int
) -> Tensor | None:
    """Which candidates are of the query's own patient, bool (N, M)."""
    if query_groups is None or candidate_groups is None:
        return None
    if len(query_groups) != queries or len(candidate_groups) != candidates:
        raise ValueError(
            f"{queries} queries and {candidates} candidates, but {len(query_groups)} and {len(candidate_groups)} groups"
        )
    index: dict[Hashable, int] = {}
    mine, other = (
        torch.tensor([index.setdefault(group, len(index)) for group in groups])
        for groups in (query_groups, candidate_groups)
    )
    return mine[:, None] == other[None]
