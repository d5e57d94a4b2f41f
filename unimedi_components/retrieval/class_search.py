# SPDX-License-Identifier: Apache-2.0
"""Search by class within and across X-rays, CT volumes and their reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unimedi_components.retrieval.class_retrieval import class_precision, same_findings_precision
from unimedi_components.retrieval.embeddings import Embeddings
from unimedi_components.retrieval.features import Paired
from unimedi_components.retrieval.label_tables import label_table
from unimedi_components.retrieval.prompts import PromptSet

__all__ = ["Studies", "class_search", "common_findings", "gather_studies"]

Array = npt.NDArray[Any]
Values = dict[str, Any]
KIND = {2: "xray", 3: "ct"}


@dataclass(frozen=True)
class Studies(Paired):
    """Studies of one dimension, embeddings of unit norm or zero where there is no report, with their labels.

    Args:
        names: F findings that the items are labelled for.
        labels: as of `label_table`, (N, F).
    """

    names: list[str]
    labels: Array


def gather_studies(
    items: Sequence[dict[str, Any]], images: Embeddings, reports: Embeddings | None, meta: Mapping[str, Any]
) -> dict[int, Studies]:
    known = {item["id"]: item for item in items}
    text_row = {} if reports is None else {name: row for row, name in enumerate(reports.ids)}
    parts = {}
    for dim in (2, 3):
        rows = [row for row, entry in enumerate(images.entries) if entry["dim"] == dim]
        if not rows:
            continue
        own = [known[images.ids[row]] for row in rows]
        text = np.zeros((len(rows), images.embed.shape[1]), np.float32)
        for place, item in enumerate(own):
            if reports is not None and item["id"] in text_row:
                text[place] = reports.embed[text_row[item["id"]]]
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
                values = class_precision(
                    query[kept],
                    candidates[held],
                    mine[kept],
                    theirs[held],
                    names,
                    [patient for patient, keep in zip(part.patients, kept, strict=True) if keep],
                    [patient for patient, keep in zip(other.patients, held, strict=True) if keep],
                )
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
