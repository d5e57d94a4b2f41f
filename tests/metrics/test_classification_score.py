# SPDX-License-Identifier: Apache-2.0
"""Ignite's metrics of a classifier against all cases measured at once, on one rank and on two.

The file is also the program that each rank runs: `python test_classification_score.py RANK FOLDER`.
"""

import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine
from ignite.exceptions import NotComputableError
from monai.engines import SupervisedEvaluator
from torch import nn

from tests.common import on_two_ranks
from unimedi_components import distributed
from unimedi_components.losses import ClassificationLoss
from unimedi_components.metrics.classification import (
    ClassificationLossMetric,
    ClassificationScore,
    classification_metrics,
)


def batches(task, sizes=(7, 7, 3)):
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        logits = torch.randn(size, 1 if task == "binary" else 3, generator=generator)
        if task == "multilabel":
            label = torch.randint(-1, 2, (size, 3), generator=generator)
        else:
            label = torch.randint(0, 2 if task == "binary" else 3, (size,), generator=generator)
        yield {"image": logits, "label": label}


def measure(task, data):
    engine = Engine(lambda _, batch: {"pred": batch["image"], "label": batch["label"]})
    ClassificationScore(task).attach(engine, "score")
    ClassificationLossMetric(task).attach(engine, "loss")
    return dict(engine.run(data).metrics)


@pytest.mark.parametrize("task", ["binary", "multilabel", "multiclass"])
def test_metrics_of_an_evaluator(task):
    """The loss of all labels at once, and the score of all cases at once, whatever the batches."""
    data = list(batches(task))
    logits, label = (torch.cat([batch[key] for batch in data]) for key in ("image", "label"))
    evaluator = SupervisedEvaluator(
        "cpu",
        data,
        nn.Identity(),
        key_val_metric={"val_loss": ClassificationLossMetric(task)},
        additional_metrics={"val_score": ClassificationScore(task)},
        decollate=False,
    )
    for _ in range(2):
        evaluator.run()
    probabilities = logits.softmax(1) if task == "multiclass" else logits.sigmoid()
    names = ["no", "yes"] if task == "binary" else "abc"
    expected = classification_metrics(probabilities, label, task, names, bootstrap=0)
    key = "accuracy" if task == "multiclass" else "macro_auroc"
    assert evaluator.state.metrics["val_score"] == pytest.approx(expected[key])
    loss = ClassificationLoss(task)(logits, label).item()
    assert evaluator.state.metrics["val_loss"] == pytest.approx(loss, rel=1e-5)


def test_half_precision_logits_are_measured():
    data = [{"image": batch["image"].bfloat16(), "label": batch["label"]} for batch in batches("multilabel")]
    assert 0 <= measure("multilabel", data)["score"] <= 1


def test_undefined_scores_are_nan_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_class = [{"image": torch.randn(4, 2), "label": torch.zeros(4, 2, dtype=torch.int64)} for _ in range(3)]
        found = measure("multilabel", one_class)
        assert math.isnan(found["score"])
        assert found["loss"] > 0
        broken = [{"image": torch.full((4, 3), torch.nan), "label": torch.tensor([0, 1, 2, 0])}]
        assert math.isnan(measure("multiclass", broken)["score"])
        part = [{"image": torch.tensor([[0.1, 0.0], [0.9, 1.0]]), "label": torch.tensor([[0, 0], [1, 0]])}]
        assert measure("multilabel", part)["score"] == 1.0


def test_metrics_refuse_unknown_tasks_and_empty_runs():
    for metric in (ClassificationScore, ClassificationLossMetric):
        with pytest.raises(ValueError, match="task must be one of"):
            metric("detection")
    with pytest.raises(NotComputableError, match="validation split"):
        ClassificationScore("binary").compute()


def test_two_ranks_with_unequal_shares_equal_one_process(tmp_path):
    ranks = on_two_ranks(__file__, tmp_path)
    for task in ("multilabel", "multiclass"):
        expected = measure(task, list(batches(task)))
        assert all(found[task] == pytest.approx(expected) for found in ranks)
    assert all(found["empty"] == pytest.approx(expected["score"]) for found in ranks)


def rank_program(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for task in ("multilabel", "multiclass"):
        data = list(batches(task))
        found[task] = measure(task, data[:2] if rank == 0 else data[2:])
    score = ClassificationScore("multiclass")
    for batch in data if rank == 0 else ():
        score.update((batch["image"], batch["label"]))
    found["empty"] = score.compute()
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.stop()


if __name__ == "__main__":
    rank_program(int(sys.argv[1]), sys.argv[2])
