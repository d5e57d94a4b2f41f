# SPDX-License-Identifier: Apache-2.0
"""GLoRIA's 5x200 and ConVIRT's 8x200: images of one finding each, as candidates of a search by class.

Measured are P@K by class, and the class by its prompts. The sets are drawn anew from a datalist with their own seed:
the published lists of image names are those papers' own.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from torch.nn import functional as F

from unimedi_components.errors import ConfigError, DataError
from unimedi_components.retrieval.class_search import PRESENT, UNCERTAIN, class_precision
from unimedi_components.retrieval.embedder import Embedder
from unimedi_components.retrieval.embeddings import Embeddings
from unimedi_components.retrieval.prompts import PromptSet

logger = logging.getLogger(__name__)

PROTOCOLS: Mapping[str, tuple[str, ...]] = {
    # GLoRIA (ICCV 2021), also MGCA's and MedCLIP's
    "5x200": ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"),
    # ConVIRT (2020)
    "8x200": (
        *("No Finding", "Cardiomegaly", "Edema", "Pneumonia", "Atelectasis", "Pneumothorax"),
        *("Pleural Effusion", "Fracture"),
    ),
}


@dataclass(frozen=True)
class ClassSample:
    """The images of a protocol: those to find and those to search with, each with the index of its class.

    No patient is in both. ``classes``: findings that the data have enough images of, C.
    """

    name: str
    classes: tuple[str, ...]
    missing: dict[str, str]
    per_class: int
    candidates: list[tuple[dict[str, Any], int]]
    queries: list[tuple[dict[str, Any], int]]


def exclusive_sample(
    items: Sequence[dict[str, Any]],
    label_names: Sequence[str],
    protocol: str,
    per_class: int = 200,
    queries: int = 10,
    seed: int = 0,
    exact: bool = True,
) -> ClassSample:
    """Draw the images of a protocol: positive for one of its findings, neither positive nor uncertain for another.

    Raises ConfigError: an unknown protocol; DataError: fewer than two classes are left, or too few images and `exact`.

    Args:
        items: with "label", 1, 0, -1 (uncertain) or less (not mentioned) for each of `label_names`, and "patient".
        queries: further images of each class, of other patients, to search with (ConVIRT's 10).
        exact: too few images of a class are an error. Otherwise every class gets as many candidates as the rarest one
            has, at least as many as `queries`, and classes rarer than that are left out.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol {protocol!r} is unknown; use one of {', '.join(PROTOCOLS)}")
    rng = np.random.default_rng(seed)
    wanted = PROTOCOLS[protocol]
    missing = {name: "no such label" for name in wanted if name not in label_names}
    found = _exclusive(items, label_names, [name for name in wanted if name not in missing])
    pools: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
    for name, own in found.items():
        order = [own[i] for i in rng.permutation(len(own))]
        asking, rest = _apart(order, queries)
        least = per_class if exact else max(queries, 1)
        if len(asking) < queries or len(rest) < least:
            missing[name] = f"{len(own)} images of it alone, {queries} + {least} are needed"
        else:
            pools[name] = asking, rest
    if (exact and missing) or len(pools) < 2:
        lacking = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise DataError(
            f"the protocol {protocol} cannot be drawn from {len(items)} images ({lacking}); give more images, ask for "
            f"fewer (per_class, queries{', exact=False' if exact else ''}), or leave it out of `protocols`"
        )
    count = min(per_class, *(len(rest) for _, rest in pools.values()))
    for name, reason in missing.items():
        logger.warning("protocol %s goes without %s: %s", protocol, name, reason)
    candidates = [(item, i) for i, (_, rest) in enumerate(pools.values()) for item in rest[:count]]
    asked = [(item, i) for i, (asking, _) in enumerate(pools.values()) for item in asking]
    return ClassSample(protocol, tuple(pools), missing, count, candidates, asked)


def _exclusive(
    items: Sequence[dict[str, Any]], label_names: Sequence[str], classes: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Items by the one class that they have."""
    columns = [list(label_names).index(name) for name in classes]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in classes}
    for item in items:
        values = [item["label"][column] for column in columns] if "label" in item else []
        if values.count(PRESENT) == 1 and UNCERTAIN not in values:
            found[classes[values.index(PRESENT)]].append(item)
    return found


def _apart(order: Sequence[dict[str, Any]], queries: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The first `queries` items, one of a patient, and those of other patients."""
    asking: list[dict[str, Any]] = []
    taken: set[str] = set()
    for item in order:
        if len(asking) < queries and item["patient"] not in taken:
            asking.append(item)
            taken.add(item["patient"])
    return asking, [item for item in order if item["patient"] not in taken]


def protocol_metrics(embedder: Embedder, prompts: PromptSet, sample: ClassSample, images: Embeddings) -> dict[str, Any]:
    """Measure one protocol.

    Args:
        prompts: phrasings of the findings; the positive ones of each class are its textual queries.
        sample: the images; those that could not be read are left out.

    Returns:
        "classes", "missing", "per_class", counts, and by direction the values of `class_precision`:
        "image_to_image" (queries against candidates), "text_to_image" (each phrasing against candidates), where the
        candidates have reports "image_to_report" and "report_to_image" among the candidates (GLoRIA), and
        "zero_shot": "accuracy" and "macro_f1" of the class whose mean phrasing is nearest to a candidate.
    """
    rows = {name: row for row, name in enumerate(images.ids)}
    embed = torch.from_numpy(images.embed)
    cand, cand_class = _readable(sample.candidates, rows)
    asked, asked_class = _readable(sample.queries, rows)
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
        one_hot = np.eye(len(sample.classes), dtype=np.int64)
        mine, theirs = (one_hot[np.asarray(index, dtype=np.int64)] for index in (query_class, cand_class))
        return class_precision(query, other, mine, theirs, sample.classes)

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


def _readable(pairs: Sequence[tuple[dict[str, Any], int]], rows: dict[str, int]) -> tuple[list[Any], list[int]]:
    kept = [(item, index) for item, index in pairs if item["id"] in rows]
    return [item for item, _ in kept], [index for _, index in kept]
