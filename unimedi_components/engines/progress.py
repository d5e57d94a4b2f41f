# SPDX-License-Identifier: Apache-2.0
"""The progress bar of a training run."""

import sys
from contextlib import ExitStack
from typing import Any, TextIO

from ignite.engine import Engine, Events
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from unimedi_components.distributed import rank
from unimedi_components.engines.handlers import losses


class TrainingProgress:
    """One tqdm bar over all iterations of the run, with the epoch and the newest losses; on rank 0 alone.

    A resumed run's bar begins where it goes on. On a terminal, log lines are written above the bar; anywhere else a
    new state of the bar is printed at most every `interval` seconds.

    Args:
        interval: seconds between two states of the bar where they pile up in a file.
        file: stream to write to; standard error by default.
        total: steps of the run, where it ends before its last epoch does.
    """

    def __init__(
        self, desc: str = "pre-training", interval: float = 10.0, file: TextIO | None = None, total: int | None = None
    ) -> None:
        self.desc, self.interval, self.file, self.total = desc, interval, file, total
        self.bar: Any = None
        self._logging = ExitStack()

    def attach(self, engine: Engine) -> None:
        if rank() != 0:
            return
        engine.add_event_handler(Events.EPOCH_STARTED, self.show)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.close)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.failed)

    def show(self, engine: Engine) -> None:
        """Open the bar at the run's first epoch, and name the epoch."""
        state = engine.state
        if self.bar is None:
            file = self.file if self.file is not None else sys.stderr
            live = file.isatty()
            pause = 0.1 if live else self.interval
            self.bar = tqdm(
                total=self.total or state.max_epochs * state.epoch_length,
                initial=state.iteration,
                unit="step",
                file=file,
                dynamic_ncols=True,
                mininterval=pause,
                maxinterval=max(pause, 10.0),
            )
            if live:
                self._logging.enter_context(logging_redirect_tqdm())
        self.bar.set_description(f"{self.desc}, epoch {state.epoch}/{state.max_epochs}", refresh=False)

    def __call__(self, engine: Engine) -> None:
        values = losses(engine)
        self.bar.set_postfix_str(" ".join(f"{name}={value:.3f}" for name, value in values.items()), refresh=False)
        self.bar.update(engine.state.iteration - self.bar.n)

    def close(self, engine: Engine) -> None:
        """Leave the last state of the bar on the screen."""
        self._logging.close()
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def failed(self, engine: Engine, error: BaseException) -> None:
        """Close the bar, so that the error's message stands below it."""
        self.close(engine)
        raise error
