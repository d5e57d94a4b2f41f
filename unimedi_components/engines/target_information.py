# SPDX-License-Identifier: Apache-2.0
"""Watches in training whether the self-distillation targets tell images apart."""

import logging
from typing import Any

from ignite.engine import Engine, Events
from monai.utils import CommonKeys

from unimedi_components.distributed import rank
from unimedi_components.metrics.information import TargetInformation

logger = logging.getLogger(__name__)

#: Nats of the CLS targets below which a run is called collapsed.
COLLAPSED = 0.5
REMEDY = 'train with loss_def#targets "sinkhorn" and network_def#dino_head#center_kinds 5'


class WatchTargets:
    """Information of the CLS targets over the last steps of every epoch, as metrics of the trainer.

    They are named as in `evaluate`: "sd_cls_information_2d", "sd_cls_prototypes_2d" and the same for 3D, of this
    rank's samples. What reads the trainer's metrics (TensorBoard, the history) must stand behind this handler. Targets
    that say next to nothing after the warm-up are warned of, once.

    Args:
        steps: steps at the end of an epoch that are counted; fewer see less of the teacher's own change.
        warmup_epochs: epochs before the first warning.
    """

    def __init__(self, loss: Any, steps: int = 16, warmup_epochs: float = 1.0) -> None:
        self.loss, self.steps, self.warmup_epochs = loss, steps, warmup_epochs
        self.warned = False
        self._found: dict[int, TargetInformation] = {}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.finish)

    def start(self) -> None:
        """Forget the last epoch."""
        self._found = {2: TargetInformation(), 3: TargetInformation()}

    def __call__(self, engine: Engine) -> None:
        length = engine.state.epoch_length or 1
        if (engine.state.iteration - 1) % length < length - self.steps:
            return
        output = engine.state.output[CommonKeys.PRED]
        if output.teacher_cls is None or output.cls_groups is None:
            return
        for group, rows in enumerate(output.teacher_cls.split(output.cls_groups)):
            if len(rows):
                self._found[2 + group].add(self.loss.targets_of(rows, output.teacher_prototypes, group))

    def finish(self, engine: Engine) -> None:
        """Give the trainer its metrics, and warn of targets that have collapsed."""
        results = {dim: targets.result() for dim, targets in self._found.items() if targets.count > 1}
        for dim, values in results.items():
            engine.state.metrics[f"sd_cls_information_{dim}d"] = values.information
            engine.state.metrics[f"sd_cls_prototypes_{dim}d"] = values.prototypes
        low = {dim: values.information for dim, values in results.items() if values.information < COLLAPSED}
        if low and not self.warned and engine.state.epoch > self.warmup_epochs and rank() == 0:
            self.warned = True
            logger.warning(
                "self-distillation has collapsed: the CLS targets of %s carry less than %.1f nats, so that L_icl and "
                "L_pcl teach next to nothing however low they are; %s",
                " and ".join(f"{dim}D images ({value:.2f})" for dim, value in low.items()),
                COLLAPSED,
                REMEDY,
            )
