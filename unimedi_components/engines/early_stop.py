# SPDX-License-Identifier: Apache-2.0
"""Early stopping whose state outlives an interruption."""

import math
from collections.abc import Mapping
from typing import Any

from ignite.engine import Engine
from monai.handlers import EarlyStopHandler


class EarlyStop(EarlyStopHandler):
    """MONAI's early stopping by the validation's key metric, with a state that a resumed run takes up.

    Args:
        patience: epochs without a better value after which the run ends; None never ends it.
    """

    def __init__(self, evaluator: Engine, patience: int | None, greater_is_better: bool = False) -> None:
        self.enabled = patience is not None
        self.evaluator, self.sign = evaluator, 1.0 if greater_is_better else -1.0
        super().__init__(patience or 1, self.score)

    def attach(self, engine: Engine) -> None:
        self.set_trainer(engine)
        if self.enabled:
            super().attach(engine)

    def score(self, engine: Engine) -> float:
        """The key metric, or a loss's negative; one that is no number is as bad as any can be."""
        state: Any = self.evaluator.state
        value = float(state.metrics[state.key_metric_name])
        return -math.inf if math.isnan(value) else self.sign * value

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
