# SPDX-License-Identifier: Apache-2.0
"""Search by class: of the K results nearest to a query with a finding, how many have it too?

Within and across X-rays, CT volumes and their reports, whatever their data sets call and count their labels.
Letters: N queries, M candidates, E width of the common space, F findings.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unimedi_components.arrays import Array
from unimedi_components.errors import DataError
from unimedi_components.retrieval.embeddings import Embeddings
from unimedi_components.retrieval.features import Paired
from unimedi_components.retrieval.prompts import PromptSet
from unimedi_components.retrieval.recall import group_index, precision_at_k

Values = dict[str, Any]

KS = (5, 10, 100)
"""GLoRIA's and MGCA's K."""
PRESENT, ABSENT, UNCERTAIN, NOT_MENTIONED = 1, 0, -1, -2
KIND = {2: "xray", 3: "ct"}


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

    ``query_labels``: 1 present, 0 absent, -1 uncertain, below -1 not mentioned, (N, F). Uncertain candidates are none
    for that finding; not mentioned counts as absent.

    Returns "precision_at_K" and "precision_at_K_chance" (a random order's), means over the findings that have queries
    and candidates, and under "by_finding" the same for each with its "queries" and "candidates" that have it.
    """
    own = _own(query_groups, candidate_groups, len(query), len(candidates))
    by_finding: dict[str, Values] = {}
    for column, asked, known, having in queries_by_finding(query_labels, candidate_labels):
        excluded = None if own is None else own[asked][:, known]
        values = _p_at_k(query[asked], candidates[known], having.expand(len(asked), -1), excluded, ks)
        if values:
            by_finding[names[column]] = {**values, "queries": len(asked), "candidates": int(having.sum())}
    keys = dict.fromkeys(key for values in by_finding.values() for key in values if key.startswith("precision"))
    means = {key: float(np.mean([v[key] for v in by_finding.values() if key in v])) for key in keys}
    return {**means, "by_finding": by_finding}


def same_findings_precision(
    query: Tensor, candidates: Tensor, query_labels: Array, candidate_labels: Array, ks: Sequence[int] = (5, 10)
) -> Values:
    """P@K where a candidate is right if it has exactly the query's findings; queries without a right one are left out.

    Returns "precision_at_K" and "precision_at_K_chance"; empty where no query has a right candidate.
    """
    same = same_findings(query_labels, candidate_labels)
    asked = same.any(1)
    return _p_at_k(query[asked], candidates, same[asked], None, ks) if asked.any() else {}


def queries_by_finding(query_labels: Array, candidate_labels: Array) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """For each finding that a query and a candidate have: its column, the queries that have it, and the candidates."""
    for column in range(query_labels.shape[1]):
        asked = torch.from_numpy(np.flatnonzero(query_labels[:, column] == PRESENT))
        known = torch.from_numpy(np.flatnonzero(candidate_labels[:, column] != UNCERTAIN))
        having = torch.from_numpy(candidate_labels[:, column] == PRESENT)[known]
        if len(asked) and having.any():
            yield column, asked, known, having


def same_findings(query_labels: Array, candidate_labels: Array) -> Tensor:
    """Which candidates have exactly a query's findings, bool (N, M); all but 1 counts as absent."""
    mine, other = (torch.from_numpy(labels == PRESENT) for labels in (query_labels, candidate_labels))
    return (mine[:, None] == other[None]).all(-1)


def _p_at_k(query: Tensor, candidates: Tensor, correct: Tensor, excluded: Tensor | None, ks: Sequence[int]) -> Values:
    most = len(candidates) if excluded is None else int((~excluded).sum(1).min())
    values: Values = {}
    for k in ks:
        if k <= most:
            rows, chance = precision_at_k(query, candidates, correct, k, excluded)
            values[f"precision_at_{k}"] = rows.mean().item()
            values[f"precision_at_{k}_chance"] = chance.mean().item()
    return values


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
    key = group_index([*query_groups, *candidate_groups], queries + candidates)
    return key[:queries, None] == key[None, queries:]


@dataclass(frozen=True)
class Studies(Paired):
    """Studies of one dimension, embeddings of unit norm or zero where there is no report, with their labels.

    ``names``: F findings that the items are labelled for. ``labels``: as of `label_table`, (N, F).
    """

    names: list[str]
    labels: Array


def gather_studies(
    items: Sequence[dict[str, Any]], images: Embeddings, reports: Embeddings | None, meta: Mapping[str, Any]
) -> dict[int, Studies]:
    known, ids = {item["id"]: item for item in items}, images.ids
    texts = {} if reports is None else dict(zip(reports.ids, reports.embed, strict=True))
    parts = {}
    for dim in (2, 3):
        rows = [row for row, entry in enumerate(images.entries) if entry["dim"] == dim]
        if not rows:
            continue
        own = [known[ids[row]] for row in rows]
        none = np.zeros(images.embed.shape[1], np.float32)
        text = np.stack([texts.get(item["id"], none) for item in own])
        names, labels = label_table(own, meta)
        parts[dim] = Studies(own, torch.from_numpy(images.embed[rows]), torch.from_numpy(text), names, labels)
    return parts


def class_search(parts: Mapping[int, Studies], sets: Mapping[int, PromptSet]) -> Values:
    """P@K by finding for every pair of query and candidates, within and across dimensions."""
    found: Values = {}
    for dim, part in parts.items():
        for other_dim, other in parts.items():
            pairs = common_findings(part.names, other.names, sets)
            if not pairs:
                continue
            mine, theirs = part.labels[:, [a for _, a, _ in pairs]], other.labels[:, [b for _, _, b in pairs]]
            names = [name for name, _, _ in pairs]
            for query_kind, candidate_kind in (("", ""), ("", "_report"), ("_report", "")):
                query, kept = _side(part, query_kind)
                candidates, held = _side(other, candidate_kind)
                if not kept.any() or not held.any():
                    continue
                people = np.asarray(part.patients)[kept].tolist(), np.asarray(other.patients)[held].tolist()
                values = class_precision(query[kept], candidates[held], mine[kept], theirs[held], names, *people)
                if query_kind == candidate_kind == "" and dim != other_dim:
                    values["same_findings"] = same_findings_precision(query, candidates, mine, theirs)
                found[f"{KIND[dim]}{query_kind}_to_{KIND[other_dim]}{candidate_kind}"] = values
    return found


def _side(part: Studies, kind: str) -> tuple[Tensor, Array]:
    """Embeddings of images or reports, and which of them there are."""
    if not kind:
        return part.image_embed, np.ones(len(part.items), bool)
    return part.text_embed, np.asarray([bool(text) for text in part.reports])


def common_findings(
    names: Sequence[str], others: Sequence[str], sets: Mapping[int, PromptSet]
) -> list[tuple[str, int, int]]:
    """(name here, index here, index there) of findings that both have, by name or by a prompt set's aliases."""

    def keys(name: str) -> set[str]:
        found = {finding for prompts in sets.values() if (finding := prompts.finding_of(name))}
        return found or {name.lower()}

    theirs = [keys(name) for name in others]
    pairs: list[tuple[str, int, int]] = []
    for column, name in enumerate(names):
        match = next((i for i, found in enumerate(theirs) if found & keys(name)), None)
        if match is not None and match not in {taken for _, _, taken in pairs}:
            pairs.append((name, column, match))
    return pairs


def label_table(items: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> tuple[list[str], Array]:
    """Labels of items by finding. Raises DataError: a label does not fit its names.

    ``meta``: of the datalist: "label_names", of all items or by source for a joined datalist, whose patients are called
    SOURCE-PATIENT.

    Returns:
        the names, in the order of their first source, and int64 (N, F): 1 present, 0 absent, -1 uncertain, -2 not
        mentioned, as for an item without labels or of a source that does not know the finding.
    """
    known = meta.get("label_names") or {}
    by_source: dict[str, list[str]] = known if isinstance(known, dict) else {"": list(known)}
    rows = []
    for item in items:
        sources = (names for source, names in by_source.items() if item["patient"].startswith(f"{source}-"))
        rows.append(_row(item, by_source[""] if "" in by_source else next(sources, [])))
    # only of sources that have items here: X-rays alone need no column of the CT data
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = np.asarray([[row.get(name, NOT_MENTIONED) for name in names] for row in rows], dtype=np.int64)
    return names, table.reshape(len(rows), len(names))


def _row(item: Mapping[str, Any], names: Sequence[str]) -> dict[str, int]:
    label = item.get("label")
    if label is None or not names:
        return {}
    if isinstance(label, int):
        if not -1 <= label < len(names):
            raise DataError(f"{item['id']}: label {label} is no index of {len(names)} classes; prepare the data again")
        return {name: int(label == i) if label >= 0 else -1 for i, name in enumerate(names)}
    if len(label) != len(names):
        raise DataError(f"{item['id']}: {len(label)} labels for {len(names)} label names; prepare the data again")
    return dict(zip(names, label, strict=True))
