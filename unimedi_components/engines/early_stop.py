# SPDX-License-Identifier: Apache-2.0
"""Early stopping whose state outlives an interruption."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ignite.engine import Engine
from monai.handlers import EarlyStopHandler

__all__ = ["EarlyStop"]


class EarlyStop(EarlyStopHandler):
    """MONAI's early stopping by the validation loss, with a state that a resumed run takes up.

    Args:
        evaluator: validation engine with the loss among its metrics.
        patience: epochs without a lower loss after which the run ends; None never ends it.
        metric: name of the loss.
    """

    def __init__(self, evaluator: Engine, patience: int | None, metric: str = "val_loss") -> None:
        self.enabled = patience is not None
        self.evaluator, self.metric = evaluator, metric
        super().__init__(patience or 1, self.score)

    def attach(self, engine: Engine) -> None:
        self.set_trainer(engine)
        if self.enabled:
            super().attach(engine)

    def score(self, engine: Engine) -> float:
        """The negative loss; a loss that is no number is as bad as any can be."""
        loss = float(self.evaluator.state.metrics[self.metric])
        return -math.inf if math.isnan(loss) else -loss

    @property
    def _stopping(self) -> Any:
        return self._handler

    def state_dict(self) -> dict[str, Any]:
        stopping = self._stopping
        return {"counter": stopping.counter, "best_score": stopping.best_score}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state; a run that had ended by it ends at once, without another epoch."""
        self._stopping.counter, self._stopping.best_score = state["counter"], state["best_score"]
        if self.enabled and self._stopping.counter >= self.patience:
            self._stopping.trainer.terminate()


class EarlyStopByScore(EarlyStop):
    """Early stopping by a validation score, of which more is better, such as MGCA's detector's mean average precision.

    Args:
        evaluator, patience: see `EarlyStop`.
        metric: name of the score.
    """

    def __init__(self, evaluator: Engine, patience: int | None, metric: str = "val_map") -> None:
        super().__init__(evaluator, patience, metric)

    def score(self, engine: Engine) -> float:
        """The score; one that is no number is as bad as any can be."""
        value = float(self.evaluator.state.metrics[self.metric])
        return -math.inf if math.isnan(value) else value
