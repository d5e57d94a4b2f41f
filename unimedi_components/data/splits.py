# SPDX-License-Identifier: Apache-2.0
"""Seeded splits and nested fractions by patient.

Patients are put into an order by a hash of seed and name. So an order does not depend on the rows' order, on
the machine or on a random generator's version, and a smaller fraction is always contained in a larger one. A
fraction takes patients of every label in turn, so that even a small one keeps the labels' proportions.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from unimedi_components.errors import DataError

_RARE = 10


def patient_order(patients: Iterable[str], seed: int) -> list[str]:
    """The distinct patients in the seeded order that splits and fractions share."""
    return sorted(set(patients), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())


def strata_by_dim(items: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Map each patient to the kinds of image they have: ``"2"``, ``"3"`` or ``"23"``."""
    dims: dict[str, set[int]] = defaultdict(set)
    for item in items:
        dims[item["patient"]].add(int(item["dim"]))
    return {patient: "".join(map(str, sorted(kinds))) for patient, kinds in dims.items()}


def strata_by_label(items: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Map each patient to the labels of their images, joined; without labels to an empty string."""
    labels: dict[str, set[str]] = defaultdict(set)
    for item in items:
        labels[item["patient"]].add(str(item["label"]) if "label" in item else "")
    return {patient: "+".join(sorted(kinds)) for patient, kinds in labels.items()}


def hold_out(images: Mapping[str, int], count: int, seed: int) -> set[str]:
    """Choose patients, in the seed's order, that have ``count`` images together.

    One whose images would exceed the number is passed over, so that there are fewer where no patient with few enough
    is left.
    """
    chosen = set()
    for patient in patient_order(images, seed):
        if images[patient] <= count:
            chosen.add(patient)
            count -= images[patient]
        if not count:
            break
    return chosen


def split_patients(
    strata: Mapping[str, str], validation_fraction: float, test_fraction: float, seed: int
) -> dict[str, str]:
    """Assign every patient to training, validation or test.

    ``strata``: patient -> group; each group is split by itself, so that X-rays and CTs reach every split. Raises
    DataError: the shares are negative or leave nothing for training.

    Returns:
        patient -> split. A group of three or more has at least one patient in each split whose share is not 0.
    """
    if min(validation_fraction, test_fraction) < 0 or validation_fraction + test_fraction >= 1:
        raise DataError(
            f"validation_fraction {validation_fraction} and test_fraction {test_fraction} "
            "leave no training data. Both must be at least 0 and together below 1."
        )
    assigned, shares = {}, (validation_fraction, test_fraction)
    for group in sorted(set(strata.values())):
        order = patient_order((name for name, own in strata.items() if own == group), seed)
        counts = [int(share * len(order) + 0.5) for share in shares]
        if len(order) >= 3:
            counts = [max(n, int(share > 0)) for n, share in zip(counts, shares, strict=True)]
        n_validation, n_test = counts
        for rank, patient in enumerate(order):
            in_test = n_validation <= rank < n_validation + n_test
            assigned[patient] = "validation" if rank < n_validation else "test" if in_test else "training"
    return assigned


def nested_fraction(items: Sequence[dict[str, Any]], fraction: float, seed: int = 42) -> list[dict[str, Any]]:
    """Keep the items of a fraction of the patients, in their order, stratified by label.

    Each label (each combination of labels, where an image has several) keeps its share of the patients, to within one
    patient; those of fewer than ten patients as one. Raises DataError: the fraction is not in (0, 1].

    Args:
        fraction: share of the patients in (0, 1], taken among X-ray and among CT patients alike, rounded to
            the nearest number and at least one (20, 40 and 100% of 21 are 4, 8 and 21).
        seed: seed of the order. With one seed the items of 0.01 are contained in those of 0.1, and these in 1.0.
    """
    if not 0 < fraction <= 1:
        raise DataError(f"fraction {fraction} is not in (0, 1]. Use for example 0.01, 0.1 or 1.0.")
    dims, labels = strata_by_dim(items), strata_by_label(items)
    kept: set[str] = set()
    for group in set(dims.values()):
        order = _stratified_order({name: labels[name] for name, own in dims.items() if own == group}, seed)
        # The small margin lets 0.3 * 5 = 1.4999999999999998 round up as 1.5 does.
        kept.update(order[: max(1, int(fraction * len(order) + 0.5 + 1e-9))])
    return [item for item in items if item["patient"] in kept]


def _stratified_order(strata: Mapping[str, str], seed: int) -> list[str]:
    """Return the patients so that every beginning of the list holds each stratum in proportion."""
    sizes = Counter(strata.values())
    members: dict[str, list[str]] = defaultdict(list)
    for patient in patient_order(strata, seed):
        # Rare combinations of labels share a stratum: alone, each would wait for the same place in the list.
        members[strata[patient] if sizes[strata[patient]] >= _RARE else ""].append(patient)
    place = {
        patient: ((rank + 0.5) / len(patients), patient)
        for patients in members.values()
        for rank, patient in enumerate(patients)
    }
    return sorted(place, key=place.__getitem__)
