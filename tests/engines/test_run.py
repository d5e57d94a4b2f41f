# SPDX-License-Identifier: Apache-2.0
"""What a run does before its first epoch."""

from types import SimpleNamespace
from typing import Any

import pytest
from ignite.engine import Engine

from unimedi_components.engines import TaskRun, run


class Images(list):  # type: ignore[type-arg]
    """A data set of which `lacking` images are not in the cache."""

    def __init__(self, lacking: int) -> None:
        super().__init__(range(500))
        self.lacking, self.calls = lacking, []

    def missing(self) -> list[int]:
        return list(range(self.lacking))

    def prepare(self, indices: list[int], workers: int) -> None:
        self.calls.append((len(indices), workers))


@pytest.mark.parametrize(
    ("lacking", "cores", "workers", "ranks", "calls"),
    [
        (200, 4, 0, 1, [(200, 4)]),
        (70, 4, 0, 1, [(70, 2)]),
        (31, 4, 0, 1, []),
        (200, 1, 0, 1, []),
        (200, 4, 2, 1, []),
        (200, 4, 0, 2, []),
    ],
)
def test_a_lone_process_without_workers_prepares_with_every_core(
    lacking: int, cores: int, workers: int, ranks: int, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than 32 images a process; loaders with workers and runs of several ranks have processes of their own."""
    monkeypatch.setattr(run, "cores", lambda: cores)
    monkeypatch.setattr(run, "world_size", lambda: ranks)
    images = Images(lacking)
    task = object.__new__(TaskRun)
    run._Run.__init__(task, SimpleNamespace(), SimpleNamespace(num_workers=workers), [images], [])
    task.total_steps = None
    engine = Engine(lambda *_: None)
    task.attach(engine)
    engine.run([0], max_epochs=1)
    assert images.calls == calls
