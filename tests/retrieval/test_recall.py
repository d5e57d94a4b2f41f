# SPDX-License-Identifier: Apache-2.0
"""Recall@K against loops, its chance level against all orders, and the Ignite metrics against both.

The file is also the program that each rank runs: `python test_retrieval.py RANK FOLDER`.
"""

import sys
from itertools import permutations
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine
from torch import nn

from tests.common import on_two_ranks
from unimedi_components import distributed
from unimedi_components.networks.output import UniMediOutput
from unimedi_components.retrieval.recall import (
    ContrastiveLossMetric,
    RetrievalRecall,
    chance_of_hit,
    first_correct_rank,
    precision_at_k,
    recall_at_k,
    recall_chance,
)


def loop_recall(query, candidates, k, groups):
    """Sort the candidates of each query, wrong before right among equals, and look at the first k."""
    hits = 0
    for i in range(len(query)):
        scored = []
        for j in range(len(candidates)):
            cosine = float(query[i] @ candidates[j] / query[i].norm() / candidates[j].norm())
            scored.append((-round(cosine, 9), groups[i] == groups[j]))
        hits += any(correct for _, correct in sorted(scored)[:k])
    return hits / len(query)


@pytest.mark.parametrize("with_groups", [False, True])
def test_recall_equals_loops_with_ties_and_groups(with_groups):
    generator = torch.Generator().manual_seed(3)
    # few distinct directions, so that many candidates tie
    image = torch.randint(-1, 2, (30, 3), generator=generator).double() + 0.1
    text = torch.randint(-1, 2, (30, 3), generator=generator).double() + 0.1
    text[10:14] = text[0]
    groups = ["same" if i in (0, 10, 11, 12, 13) else f"report {i}" for i in range(30)] if with_groups else range(30)
    found = recall_at_k(image, text, (1, 3, 5, 29, 30), groups if with_groups else None)
    for k in (1, 3, 5, 29, 30):
        assert found[f"image_to_report_at_{k}"] == pytest.approx(loop_recall(image, text, k, groups))
        assert found[f"report_to_image_at_{k}"] == pytest.approx(loop_recall(text, image, k, groups))


def test_ranks_worked_by_hand():
    text = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
    image = torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 0.1], [1.0, 0.0]])
    assert first_correct_rank(image, text).tolist() == [1, 2, 3, 4]
    assert first_correct_rank(image, text, ["a", "a", "b", "b"]).tolist() == [1, 1, 3, 3]


def test_more_rows_than_one_chunk_are_ranked_alike():
    rows = torch.nn.functional.normalize(torch.randn(1500, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    assert first_correct_rank(rows, rows).tolist() == [1] * 1500
    assert first_correct_rank(rows, -rows).tolist() == [1500] * 1500


def test_collapsed_embeddings_find_nothing():
    found = recall_at_k(torch.full((12, 7), 0.3), torch.full((12, 7), 0.3), (1, 5, 11, 12))
    assert [found[f"image_to_report_at_{k}"] for k in (1, 5, 11, 12)] == [0, 0, 0, 1]


def test_a_diverged_network_finds_nothing():
    broken = torch.eye(6)
    broken[2, 0] = float("nan")
    assert first_correct_rank(broken, torch.eye(6)).tolist() == [1, 1, 6, 1, 1, 1]
    assert first_correct_rank(torch.eye(6), broken)[2] == 6
    assert first_correct_rank(torch.full((6, 6), float("nan")), torch.eye(6)).tolist() == [6] * 6
    assert first_correct_rank(torch.zeros(6, 6), torch.eye(6)).tolist() == [6] * 6


def test_precision_by_hand():
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    candidates = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.0], [0.0, 1.0]])
    correct = torch.tensor([[True, True, False, False], [False, False, False, True]])
    # candidates 0 and 2 tie for the first query, and the wrong one counts as the first
    assert precision_at_k(query, candidates, correct, k=1)[0].mean() == 0.5
    assert precision_at_k(query, candidates, correct, k=2)[0].mean() == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert precision_at_k(query, candidates, correct, k=4)[0].mean() == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert precision_at_k(query, candidates, correct, k=9)[0].mean() == pytest.approx((2 / 4 + 1 / 4) / 2)
    with pytest.raises(ValueError, match="does not fit 2 queries, 4 candidates"):
        precision_at_k(query, candidates, correct.T)


def test_chance_equals_all_orders():
    groups = ["a", "a", "a", "b", "c"]
    orders = list(permutations(range(5)))
    for k in (1, 2, 3, 9):
        hits = sum(any(groups[j] == groups[i] for j in order[:k]) for order in orders for i in range(5))
        assert recall_chance(5, (k,), groups)[k] == pytest.approx(hits / len(orders) / 5)
    assert recall_chance(200, (1, 5)) == pytest.approx({1: 1 / 200, 5: 5 / 200})
    assert chance_of_hit(0, 4, 2) == 0.0
    assert chance_of_hit(4, 4, 1) == 1.0


@pytest.mark.parametrize(
    ("image", "text", "groups", "message"),
    [
        (torch.ones(3, 2), torch.ones(4, 2), None, r"\(3, 2\) and \(4, 2\)"),
        (torch.ones(0, 2), torch.ones(0, 2), None, r"\(0, 2\)"),
        (torch.ones(3, 2), torch.ones(3, 2), ["a"], "3 rows but 1 groups"),
    ],
)
def test_wrong_shapes_are_named(image, text, groups, message):
    with pytest.raises(ValueError, match=message):
        recall_at_k(image, text, groups=groups)


def outputs(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        image = torch.randn(size, 6, generator=generator)
        text = image + torch.randn(size, 6, generator=generator)
        yield UniMediOutput(image, text, torch.tensor(5.0), torch.zeros(size, dtype=torch.int64))


def test_metrics_over_an_evaluator_run():
    batches = list(outputs((7, 7, 3)))
    engine = Engine(lambda _, batch: {"pred": batch})
    RetrievalRecall(k=2).attach(engine, "val_recall_at_2")
    ContrastiveLossMetric().attach(engine, "val_loss")
    for _ in range(2):  # a second run starts from nothing
        metrics = engine.run(batches).metrics
    image, text = (torch.cat([getattr(b, name) for b in batches]) for name in ("image_embed", "text_embed"))
    expected = (loop_recall(image, text, 2, range(17)) + loop_recall(text, image, 2, range(17))) / 2
    assert metrics["val_recall_at_2"] == pytest.approx(expected)
    total = 0.0
    for batch in batches:
        normal = nn.functional.normalize
        logits = 5.0 * normal(batch.image_embed, dim=1) @ normal(batch.text_embed, dim=1).T
        target = torch.arange(len(logits))
        cross_entropy = nn.functional.cross_entropy
        total += len(logits) * (cross_entropy(logits, target) + cross_entropy(logits.T, target)).item() / 2
    assert metrics["val_loss"] == pytest.approx(total / 17, rel=1e-5)


def test_metrics_without_a_batch_say_so():
    for metric in (RetrievalRecall(), ContrastiveLossMetric()):
        with pytest.raises(ValueError, match="validation split"):
            metric.compute()


def run_metrics(batches):
    engine = Engine(lambda _, batch: {"pred": batch})
    RetrievalRecall(k=2).attach(engine, "recall")
    ContrastiveLossMetric().attach(engine, "loss")
    return engine.run(batches).metrics


def test_two_ranks_with_unequal_shares_equal_one_process(tmp_path):
    expected = run_metrics(list(outputs((7, 7, 3))))
    for found in on_two_ranks(__file__, tmp_path):
        assert found == pytest.approx(expected)


def rank_program(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    batches = list(outputs((7, 7, 3)))
    torch.save(run_metrics(batches[:2] if rank == 0 else batches[2:]), Path(folder) / f"{rank}.pt")
    distributed.stop()


if __name__ == "__main__":
    rank_program(int(sys.argv[1]), sys.argv[2])
