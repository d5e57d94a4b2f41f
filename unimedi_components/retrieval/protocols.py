# SPDX-License-Identifier: Apache-2.0
"""GLoRIA's 5x200 and ConVIRT's 8x200: images of one finding each, as candidates of a search by class.

The sets are drawn anew from a datalist with their own seed: the published lists of image names are those papers' own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unimedi_components.errors import ConfigError, DataError
from unimedi_components.retrieval.class_retrieval import PRESENT, UNCERTAIN

__all__ = ["PROTOCOLS", "ClassSample", "exclusive_sample"]

logger = logging.getLogger(__name__)

PROTOCOLS: Mapping[str, tuple[str, ...]] = {
    # GLoRIA (ICCV 2021), also MGCA's and MedCLIP's
    "5x200": ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"),
    # ConVIRT (2020)
    "8x200": (
        "No Finding",
        "Cardiomegaly",
        "Edema",
        "Pneumonia",
        "Atelectasis",
        "Pneumothorax",
        "Pleural Effusion",
        "Fracture",
    ),
}


@dataclass(frozen=True)
class ClassSample:
    """The images of a protocol.

    Args:
        classes: findings that the data have enough images of, C.
        missing: findings of the protocol that are left out, with the reason.
        per_class: candidates of each class.
        candidates, queries: items, class by class; no patient is in both.
        candidate_class, query_class: index of each one's class.
    """

    name: str
    classes: tuple[str, ...]
    missing: dict[str, str]
    per_class: int
    candidates: list[dict[str, Any]]
    queries: list[dict[str, Any]]
    candidate_class: list[int]
    query_class: list[int]


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

    Args:
        items: with "label", 1, 0, -1 (uncertain) or less (not mentioned) for each of `label_names`, and "patient".
        protocol: "5x200" or "8x200".
        per_class: candidates of each class.
        queries: further images of each class, of other patients, to search with (ConVIRT's 10).
        exact: too few images of a class are an error. Otherwise every class gets as many candidates as the rarest one
            has, at least as many as `queries`, and classes rarer than that are left out.

    Raises:
        ConfigError: an unknown protocol.
        DataError: fewer than two classes are left, or too few images and `exact`.
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
            f"the protocol {protocol} cannot be drawn from {len(items)} images ({lacking}); give more images, a lower "
            "per_class, or exact=False for as many as there are"
        )
    count = min(per_class, *(len(rest) for _, rest in pools.values()))
    for name, reason in missing.items():
        logger.warning("protocol %s goes without %s: %s", protocol, name, reason)
    classes = tuple(pools)
    return ClassSample(
        name=protocol,
        classes=classes,
        missing=missing,
        per_class=count,
        candidates=[item for _, rest in pools.values() for item in rest[:count]],
        queries=[item for asking, _ in pools.values() for item in asking],
        candidate_class=[i for i in range(len(classes)) for _ in range(count)],
        query_class=[i for i in range(len(classes)) for _ in range(queries)],
    )


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
