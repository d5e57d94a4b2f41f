# SPDX-License-Identifier: Apache-2.0
"""What a choice of slices is held against: fixed slabs learned on other patients, the best choice, and chance.

Letters: N volumes, D slices of the network's input, S slabs of d slices, k chosen slices. `expand` says how slabs
become slices, see `selection.select_slices`: "centre" takes the centre of each of the k best slabs; "repeat" takes
whole slabs, best first, and of the last one the lowest slices.
"""

from collections.abc import Hashable, Sequence

import numpy as np
import torch

from unimedi_components import selection
from unimedi_components.arrays import Array


def best_choice(mask: Array, k: int, patch_depth: int, expand: str = "centre") -> Array:
    """Slices that an oracle would choose, (k,): those with the most lesion slices of `mask`, (D,), among them."""
    by_slab = mask.reshape(-1, patch_depth)
    if expand == "centre":
        return _chosen(by_slab[:, patch_depth // 2], k, patch_depth, expand)
    full, rest = divmod(k, patch_depth)
    whole, part = by_slab.sum(1).astype(float), by_slab[:, :rest].sum(1)
    tried = []
    for last in range(len(by_slab)) if rest else ():
        # the last slab is ranked behind the whole ones and before all others
        scores = np.where(np.arange(len(whole)) == last, -1.0, whole)
        order = np.argsort(-scores, kind="stable")[:full]
        tried.append((whole[order].sum() + part[last], [*order, last]))
    slabs = max(tried, key=lambda entry: entry[0])[1] if tried else np.argsort(-whole, kind="stable")[:full]
    ranks = np.zeros(len(whole))
    ranks[slabs] = np.arange(len(slabs), 0, -1)
    return _chosen(ranks, k, patch_depth, expand)


def fixed_choices(
    masks: Array,
    patients: Sequence[Hashable],
    k: int,
    patch_depth: int,
    expand: str = "centre",
    folds: int = 5,
    seed: int = 0,
) -> Array | None:
    """The same slabs for every volume, (N, k): those that show lesions most often in other patients, cross-validated.

    ``masks``: lesion slices, bool (N, D). A patient's volumes stay in one fold. None with a single patient.
    """
    names = list(dict.fromkeys(patients))
    folds = min(folds, len(names))
    if folds < 2:
        return None
    fold = dict(zip(names, np.random.default_rng(seed).permutation(len(names)) % folds, strict=True))
    own = np.asarray([fold[patient] for patient in patients])
    by_slab = masks.reshape(len(masks), -1, patch_depth)
    seen = by_slab[:, :, patch_depth // 2] if expand == "centre" else by_slab.mean(2)
    by_fold = [_chosen(seen[own != number].mean(0), k, patch_depth, expand) for number in range(folds)]
    return np.stack([by_fold[number] for number in own])


def _chosen(scores: Array, k: int, patch_depth: int, expand: str) -> Array:
    """The slices that the selector takes for slab scores (S,)."""
    rows = torch.as_tensor(np.asarray(scores, dtype=np.float64))[None]
    return selection.select_slices(rows, k, patch_depth, expand=expand)[0].numpy()


def reachable(depth: int, k: int, patch_depth: int, expand: str = "centre") -> Array:
    """The slices of D that some order of the slabs leads to, ascending."""
    place = np.arange(depth) % patch_depth
    return np.flatnonzero(place == patch_depth // 2 if expand == "centre" else place < k)


def lesion_distance(mask: Array) -> Array:
    """Slices from each slice to the nearest lesion slice, 0 for a lesion slice: bool (D,) to int (D,)."""
    lesions = np.flatnonzero(mask)
    return np.abs(np.arange(len(mask))[:, None] - lesions[None]).min(1)


def expected_minimum(values: Array, k: int, patch_depth: int, expand: str = "centre") -> float:
    """Expectation of the smallest value among the slices chosen at random. ``values``: one for each slice, (D,)."""
    by_slab = values.reshape(-1, patch_depth)
    if expand == "centre":
        return _minimum_of(by_slab[:, patch_depth // 2], k)
    full, rest = divmod(k, patch_depth)
    whole = by_slab.min(1)
    if not rest:
        return _minimum_of(whole, full)
    part = by_slab[:, :rest].min(1)
    each = [_minimum_of(np.minimum(np.delete(whole, s), part[s]), full) if full else part[s] for s in range(len(part))]
    return float(np.mean(each))


def _minimum_of(values: Array, draws: int) -> float:
    """Expectation of the smallest of `draws` values (n,) drawn without replacement."""
    ordered, count = np.sort(values.astype(float)), len(values)
    # chance that all draws lie at or behind each place, from that of the place before
    behind = np.ones(count + 1)
    for place in range(count):
        left = count - place
        behind[place + 1] = behind[place] * max(left - draws, 0) / left
    return float(((behind[:-1] - behind[1:]) * ordered).sum())
