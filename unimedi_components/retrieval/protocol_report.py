# SPDX-License-Identifier: Apache-2.0
"""What a network reaches in the 5x200 and 8x200 protocols: P@K by class, and the class by its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from torch.nn import functional as F

from unimedi_components.retrieval.class_retrieval import KS, class_precision
from unimedi_components.retrieval.embedder import Embedder
from unimedi_components.retrieval.embeddings import Embeddings
from unimedi_components.retrieval.prompts import PromptSet
from unimedi_components.retrieval.protocols import ClassSample

__all__ = ["protocol_metrics"]

Array = npt.NDArray[Any]


def protocol_metrics(
    embedder: Embedder, prompts: PromptSet, sample: ClassSample, images: Embeddings, ks: Sequence[int] = KS
) -> dict[str, Any]:
    """Measure one protocol.

    Args:
        prompts: phrasings of the findings; the positive ones of each class are its textual queries.
        sample: the images; those that could not be read are left out.
        images: their embeddings, and any others.

    Returns:
        "classes", "missing", "per_class", counts, and by direction the values of `class_precision`:
        "image_to_image" (queries against candidates), "text_to_image" (each phrasing against candidates), where the
        candidates have reports "image_to_report" and "report_to_image" among the candidates (GLoRIA), and
        "zero_shot": "accuracy" and "macro_f1" of the class whose mean phrasing is nearest to a candidate.
    """
    rows = {name: row for row, name in enumerate(images.ids)}
    embed = torch.from_numpy(images.embed)
    cand, cand_class = _read(sample.candidates, sample.candidate_class, rows)
    asked, asked_class = _read(sample.queries, sample.query_class, rows)
    texts = [list(prompts.select([name]).findings[name]["positive"]) for name in sample.classes]
    text_class = [i for i, own in enumerate(texts) for _ in own]
    text = embedder.sentences([line for own in texts for line in own], prompts.dim)
    found: dict[str, Any] = {
        "classes": list(sample.classes),
        "missing": sample.missing,
        "per_class": sample.per_class,
        "candidates": len(cand),
        "queries": len(asked),
        "phrasings": len(text),
    }
    candidates = embed[[rows[item["id"]] for item in cand]]

    def search(query: Tensor, query_class: list[int], other: Tensor) -> dict[str, Any]:
        mine, theirs = (_one_hot(index, len(sample.classes)) for index in (query_class, cand_class))
        return class_precision(query, other, mine, theirs, sample.classes, ks=ks)

    if asked:
        found["image_to_image"] = search(embed[[rows[item["id"]] for item in asked]], asked_class, candidates)
    found["text_to_image"] = search(text, text_class, candidates)
    if all(item.get("report") for item in cand):
        reports = embedder.sentences([item["report"] for item in cand], prompts.dim)
        found["image_to_report"] = search(candidates, cand_class, reports)
        found["report_to_image"] = search(reports, cand_class, candidates)
    mean = torch.stack([part.mean(0) for part in text.split([len(own) for own in texts])])
    nearest = (candidates @ F.normalize(mean, dim=-1).T).argmax(1).numpy()
    found["zero_shot"] = {
        "accuracy": float(accuracy_score(cand_class, nearest)),
        "macro_f1": float(f1_score(cand_class, nearest, average="macro")),
        "chance": 1 / len(sample.classes),
    }
    return found


def _read(
    items: Sequence[dict[str, Any]], classes: Sequence[int], rows: dict[str, int]
) -> tuple[list[dict[str, Any]], list[int]]:
    kept = [(item, index) for item, index in zip(items, classes, strict=True) if item["id"] in rows]
    return [item for item, _ in kept], [index for _, index in kept]


def _one_hot(index: Sequence[int], count: int) -> Array:
    return np.eye(count, dtype=np.int64)[np.asarray(index, dtype=np.int64)]
