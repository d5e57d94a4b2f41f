# SPDX-License-Identifier: Apache-2.0
"""The watch over the self-distillation targets: its numbers, when it counts, and its one warning."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from ignite.engine import Engine

from unimedi_components.engines.handlers import History
from unimedi_components.engines.target_information import WatchTargets


class Loss:
    """Gives back the rows themselves as targets."""

    last: ClassVar[dict[str, Any]] = {}

    def targets_of(self, teacher: torch.Tensor, prototypes: torch.Tensor, group: int) -> torch.Tensor:
        assert group in (0, 1) and prototypes.shape == (4, 4)
        return teacher


def run(two_d: list[torch.Tensor], three_d: torch.Tensor, epochs: int = 2, **options: Any) -> tuple[Engine, History]:
    """Epochs of as many steps as `two_d` has entries; the volumes are the same in every step."""

    def step(engine: Engine, index: int) -> dict[str, Any]:
        rows = torch.cat([two_d[index], three_d])
        output = SimpleNamespace(
            teacher_cls=rows, teacher_prototypes=torch.eye(4), cls_groups=(len(two_d[index]), len(three_d))
        )
        return {"loss": torch.tensor(1.0), "pred": output}

    engine = Engine(step)
    engine.loss_function = Loss()
    history = History(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5))
    for handler in (WatchTargets(Loss(), **options), history):
        handler.attach(engine)
    engine.run(list(range(len(two_d))), max_epochs=epochs)
    return engine, history


def test_counts_the_last_steps_and_joins_the_history() -> None:
    eye = torch.eye(4)
    engine, history = run([eye[:1], eye[:2], eye[2:]], eye[:2], steps=2)
    assert engine.state.metrics["sd_cls_information_2d"] == pytest.approx(math.log(4))
    assert engine.state.metrics["sd_cls_prototypes_3d"] == pytest.approx(2)
    assert history.rows[-1]["sd_cls_information_3d"] == pytest.approx(math.log(2))
    assert "sd_cls_information_3d" not in history.rows[-2]


def test_warns_once_of_collapse_after_the_warm_up(caplog: pytest.LogCaptureFixture) -> None:
    eye = torch.eye(4)
    constant = eye[:1].expand(3, 4)
    with caplog.at_level(logging.WARNING):
        run([eye, eye], constant, epochs=1, warmup_epochs=1)
        assert not caplog.records
        run([eye, eye], constant, epochs=4, warmup_epochs=1)
    assert len(caplog.records) == 1
    text = caplog.records[0].getMessage()
    assert (
        "3D images (0.00)" in text and "2D" not in text and 'loss_def#targets "sinkhorn"' in text and "\n" not in text
    )


def test_without_self_distillation_nothing_is_said() -> None:
    engine = Engine(lambda engine, index: {"loss": torch.tensor(1.0), "pred": SimpleNamespace(teacher_cls=None)})
    WatchTargets(Loss()).attach(engine)
    engine.run([0, 1])
    assert engine.state.metrics == {}
