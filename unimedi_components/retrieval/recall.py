# SPDX-License-Identifier: Apache-2.0
"""Image-report retrieval: Recall@K both ways, its exact chance level, and metrics for an Ignite evaluator.

The paper claims retrieval and prints no table; R@1/5/10 over all candidates is the usual protocol (CLIP, ConVIRT).
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from ignite.metrics import Metric
from torch import Tensor
from torch.nn import functional as F

from unimedi_components.distributed import all_reduce_sum, gather_with_grad
from unimedi_components.losses.contrastive import contrastive_loss
from unimedi_components.networks.output import UniMediOutput

# Cosines in float64 that differ by less are the same number: equal rows may round differently in a matrix
# product.
_TIE = 1e-9
_CHUNK = 1024


def first_correct_rank(query: Tensor, candidates: Tensor, groups: Sequence[Hashable] | None = None) -> Tensor:
    """Rank of the best correct candidate of each query (N, E), 1 for the first; ties count against the query.

    Candidate i is the right one for query i; both are normalised here. A collapsed network, for which all candidates
    look alike, therefore finds nothing instead of everything. ``groups``: N keys; every candidate with the query's key
    is correct. Returns 1 + the number of wrong candidates at least as similar as the best correct one, int64 (N,).
    """
    if query.shape != candidates.shape or query.ndim != 2 or not len(query):
        raise ValueError(f"expected two (N, E) tensors, got {tuple(query.shape)} and {tuple(candidates.shape)}")
    key = group_index(groups, len(query))
    # On the CPU: not every device has float64.
    x, y = (F.normalize(embed.detach().cpu().double(), dim=-1) for embed in (query, candidates))
    ranks = []
    for start in range(0, len(x), _CHUNK):
        similarity = x[start : start + _CHUNK] @ y.T
        correct = key[start : start + _CHUNK, None] == key[None]
        best = similarity.masked_fill(~correct, -math.inf).amax(1, keepdim=True)
        # Not "at least as similar": what is not a number must count against the query too.
        behind = similarity < best - _TIE
        ranks.append(1 + (~behind & ~correct).sum(1))
    return torch.cat(ranks)


def recall_at_k(
    image_embed: Tensor, text_embed: Tensor, ks: Sequence[int] = (1, 5, 10), groups: Sequence[Hashable] | None = None
) -> dict[str, float]:
    """Share of queries with a correct candidate among the K most similar.

    Args:
        image_embed: (N, E).
        text_embed: (N, E), row i is the report of image i.
        groups: see `first_correct_rank`; give the report texts, so that word-for-word equal reports all count
            as correct, since nothing in the image can tell them apart.

    Returns:
        "image_to_report_at_K" and "report_to_image_at_K" for each K.
    """
    result = {}
    pairs = {"image_to_report": (image_embed, text_embed), "report_to_image": (text_embed, image_embed)}
    for name, (query, candidates) in pairs.items():
        rank = first_correct_rank(query, candidates, groups)
        result.update({f"{name}_at_{k}": (rank <= k).double().mean().item() for k in ks})
    return result


def chance_of_hit(correct: int, total: int, draws: int) -> float:
    """Probability that `draws` of `total` candidates, without replacement, hold one of the `correct` ones."""
    draws = min(draws, total)
    orders = math.comb(total, draws)
    return (orders - math.comb(total - correct, draws)) / orders


def recall_chance(n: int, ks: Sequence[int] = (1, 5, 10), groups: Sequence[Hashable] | None = None) -> dict[int, float]:
    """Exact expectation of Recall@K over random orders of `n` candidates, the same in both directions.

    Returns the expectation for each K; K / n without groups.
    """
    key = group_index(groups, n)
    sizes, queries = torch.unique(torch.bincount(key)[key], return_counts=True)
    parts = list(zip(sizes.tolist(), queries.tolist(), strict=True))
    return {k: sum(count * chance_of_hit(size, n, k) for size, count in parts) / n for k in ks}


def precision_at_k(
    query: Tensor, candidates: Tensor, correct: Tensor, k: int = 5, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Share of correct ones among the K candidates most similar to each query (the terms of GLoRIA's and MGCA's P@K).

    Args:
        query: (N, E), normalised here.
        candidates: (M, E), normalised here.
        correct: which candidates are correct for which query, bool (N, M).
        k: candidates looked at; at most M. Ties count against the query.
        excluded: which candidates a query does not look at, such as itself, bool (N, M); at least `k` must be left.

    Returns:
        the shares, and beside them what a random order gives, (N,) float64 each.
    """
    if correct.shape != (len(query), len(candidates)) or not correct.numel():
        raise ValueError(
            f"correct {tuple(correct.shape)} does not fit {len(query)} queries, {len(candidates)} candidates"
        )
    x, y = (F.normalize(embed.detach().cpu().double(), dim=-1) for embed in (query, candidates))
    correct = correct.cpu()
    similarity = (x @ y.T / _TIE).round()
    left = torch.full((len(query),), len(candidates))
    if excluded is not None:
        excluded = excluded.cpu()
        if excluded.shape != correct.shape or int((~excluded).sum(1).min()) < k:
            raise ValueError(f"excluded {tuple(excluded.shape)} leaves a query fewer than {k} candidates, or fits none")
        similarity = similarity.masked_fill(excluded, -math.inf)
        correct, left = correct & ~excluded, (~excluded).sum(1)
    # Wrong ones first, so that the stable sort by similarity keeps them in front of right ones that tie with
    # them.
    order = correct.long().sort(dim=1, stable=True).indices
    best = similarity.gather(1, order).sort(dim=1, descending=True, stable=True).indices[:, :k]
    return correct.gather(1, order).gather(1, best).double().mean(1), correct.sum(1).double() / left


def group_index(groups: Sequence[Hashable] | None, n: int) -> Tensor:
    """Each row's group as a number, in the order of their first rows: (n,); None: every row is its own."""
    if groups is None:
        return torch.arange(n)
    if len(groups) != n:
        raise ValueError(f"{n} rows but {len(groups)} groups; give one per row")
    index: dict[Hashable, int] = {}
    return torch.tensor([index.setdefault(group, len(index)) for group in groups])


class _OfBatches(Metric):
    """Keeps a tensor of each batch of an evaluator run. Computing it raises ValueError: no batch came in."""

    def __init__(self, output_transform: Callable[[Any], Any] = lambda output: output["pred"]) -> None:
        super().__init__(output_transform=output_transform, skip_unrolling=True)

    def reset(self) -> None:
        self._parts: list[Tensor] = []

    def _kept(self) -> list[Tensor]:
        if not self._parts:
            raise ValueError(f"{type(self).__name__} saw no batch; is the validation split empty?")
        return self._parts


class RetrievalRecall(_OfBatches):
    """Recall@K over all batches and ranks of an evaluator run, image to report and back, averaged.

    As MONAI's `key_val_metric` it needs no report texts, so only a query's own candidate counts as correct.
    Over several ranks, each must see its own share of the items.
    """

    def __init__(self, k: int = 5, **options: Any) -> None:
        self.k = k
        super().__init__(**options)

    def update(self, output: UniMediOutput) -> None:
        embeds = (output.image_embed, output.text_embed)
        self._parts.append(torch.cat([F.normalize(embed.detach().float(), dim=-1) for embed in embeds], dim=1))

    def compute(self) -> float:
        with torch.no_grad():
            image, text = gather_with_grad(torch.cat(self._kept())).chunk(2, dim=1)
        return sum(recall_at_k(image, text, (self.k,)).values()) / 2


class ContrastiveLossMetric(_OfBatches):
    """Mean of L_vl over the batches of an evaluator run on all ranks, weighted by their rows.

    Each batch is its own pool, as in training on one rank; the value depends on the batch size.
    """

    def update(self, output: UniMediOutput) -> None:
        with torch.no_grad():
            loss = contrastive_loss(output.image_embed, output.text_embed, output.logit_scale, gather=False)
        rows = len(output.image_embed)
        self._parts.append(torch.stack([loss.float() * rows, loss.new_tensor(rows, dtype=torch.float32)]))

    def compute(self) -> float:
        total, rows = all_reduce_sum(torch.stack(self._kept()).sum(0)).tolist()
        return total / rows
