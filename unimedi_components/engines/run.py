# SPDX-License-Identifier: Apache-2.0
"""All that a training run does beside its schedule and its validation, as one handler."""

from collections.abc import Mapping, Sequence
from typing import Any

import monai
import torch
from ignite.engine import Engine, Events
from torch import nn

from unimedi_components.distributed import cores, world_size
from unimedi_components.engines.calibration import CalibrateProjection
from unimedi_components.engines.checkpoint import TaskCheckpoint, TrainingCheckpoint
from unimedi_components.engines.early_stop import EarlyStop
from unimedi_components.engines.handlers import (
    EpochSeed,
    GradientCare,
    History,
    SkippedStudies,
    TeacherUpdate,
    TensorBoardLosses,
)
from unimedi_components.engines.optim import use_amp
from unimedi_components.engines.progress import TrainingProgress
from unimedi_components.engines.target_information import WatchTargets
from unimedi_components.engines.whitening import WhitenTokenizers
from unimedi_components.networks.cards import network_card

# fewer images are prepared sooner than a process for them is started
_WORTH_A_PROCESS = 32


def set_up(seed: int, device: torch.device | str, matmul_precision: str | None = None) -> None:
    """Settings of the process: seeds, flash attention on a GPU alone, and how float32 matrices are multiplied.

    On a CPU also torch's deterministic algorithms, which cost nothing there: a run gives the same weights again.

    Args:
        matmul_precision: of `torch.set_float32_matmul_precision`; None leaves it.
    """
    monai.utils.set_determinism(seed)
    if torch.device(device).type == "cpu":
        # threads would sum the gradients of indexed tokens in any order
        torch.use_deterministic_algorithms(True, warn_only=True)
    if matmul_precision is not None:
        torch.set_float32_matmul_precision(matmul_precision)
    torch.backends.cuda.enable_flash_sdp(use_amp("auto", device))


class _Run:
    """Handlers in the order in which a trainer's events reach them, behind its schedule and its validation."""

    def __init__(self, history: History, loader: Any, datasets: Sequence[Any], parts: Sequence[Any]) -> None:
        self.history, self.loader, self.datasets, self.parts = history, loader, datasets, parts

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._prepare_images)
        for part in self.parts:
            part.attach(engine)

    def _prepare_images(self) -> None:
        """Prepare with every core what a lone process without workers would prepare step by step with one."""
        if self.loader.num_workers or world_size() > 1 or cores() == 1:
            return
        for dataset in self.datasets:
            if count := len(missing := dataset.missing()) // _WORTH_A_PROCESS:
                dataset.prepare(missing, min(count, cores()))


class TaskRun(_Run):
    """Seeds, checks of loss and gradient, history, early stopping, checkpoints and logs of a task's training.

    The last of a trainer's handlers: what an epoch leaves is written after its validation.

    Args:
        optimizer, lr_scheduler: kept in `last.ckpt`, as the history is.
        loader: training loader, moved to each epoch.
        datasets: training and validation images, whose unreadable files are listed.
        card: "task", "label_names" and "preprocessing" of the network's card.
        resume: continue from `last.ckpt`.
        total_steps: the run ends there, before its last epoch does, which is validated and kept as any other.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Any,
        lr_scheduler: Any,
        loader: Any,
        evaluator: Engine,
        datasets: Sequence[Any],
        card: Mapping[str, Any],
        ckpt_dir: str,
        output_dir: str,
        seed: int = 0,
        resume: bool = False,
        max_grad_norm: float | None = None,
        patience: int | None = None,
        greater_is_better: bool = False,
        total_steps: int | None = None,
    ) -> None:
        self.total_steps = total_steps
        history = History(optimizer, evaluator)
        state = {"optimizer": optimizer, "lr_scheduler": lr_scheduler, "history": history}
        stop = EarlyStop(evaluator, patience, greater_is_better)
        if patience is not None:
            state["early_stop"] = stop
        parts = [
            EpochSeed(seed, loader),
            GradientCare(network, max_grad_norm),
            history,
            stop,
            TaskCheckpoint(
                *(ckpt_dir, network, state, network_card(network, **card), evaluator, resume, greater_is_better),
                datasets[0],
            ),
            TensorBoardLosses(output_dir),
            TrainingProgress("training", total=total_steps),
            SkippedStudies(datasets, output_dir),
        ]
        super().__init__(history, loader, datasets, parts)

    def attach(self, engine: Engine) -> None:
        super().attach(engine)
        if self.total_steps is not None:
            last = Events.ITERATION_COMPLETED(once=self.total_steps)
            engine.add_event_handler(last, lambda: engine.terminate_epoch())


class PretrainingRun(_Run):
    """What `TaskRun` is to a task, with the teacher, the start of the tokenizers and the last calibration.

    Args:
        optimizer, lr_scheduler, loader, evaluator, datasets: see `TaskRun`.
        preprocessing, tokenizer, card: see `TrainingCheckpoint`.
        total_steps: optimizer steps of the whole run, for the teacher's momentum.
        warmup_epochs: epochs in which collapsed targets are not warned of.
        whiten_tokenizers, whiten_eps, position_std: start new runs with whitened tokenizers, see `WhitenTokenizers`.
        calibrate: see `CalibrateProjection`.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Any,
        optimizer: Any,
        lr_scheduler: Any,
        loader: Any,
        evaluator: Engine,
        datasets: Sequence[Any],
        preprocessing: Mapping[str, Any],
        tokenizer: Any,
        card: Mapping[str, Any],
        total_steps: int,
        ckpt_dir: str,
        output_dir: str,
        seed: int = 0,
        resume: bool = False,
        max_grad_norm: float | None = 3.0,
        freeze_last_layer_epochs: int = 1,
        momentum_teacher: float = 0.996,
        warmup_epochs: float = 1.0,
        whiten_tokenizers: bool = False,
        whiten_eps: float = 10.0,
        position_std: float | None = 0.2,
        calibrate: bool = True,
    ) -> None:
        history = History(optimizer, evaluator)
        state = {"optimizer": optimizer, "lr_scheduler": lr_scheduler, "loss": loss, "history": history}
        self.checkpoint = TrainingCheckpoint(
            ckpt_dir, network, state, preprocessing, tokenizer, evaluator, resume, card, datasets[0]
        )
        whiten = WhitenTokenizers(network, datasets[0], whiten_eps, position_std)
        calibration = CalibrateProjection(network, datasets[0])
        parts = [
            *([whiten] if whiten_tokenizers and not resume else []),
            EpochSeed(seed, loader, loss),
            GradientCare(network, max_grad_norm, freeze_last_layer_epochs),
            TeacherUpdate(network, momentum_teacher, total_steps),
            WatchTargets(loss, warmup_epochs=warmup_epochs),
            history,
            *([calibration] if calibrate else []),
            self.checkpoint,
            TensorBoardLosses(output_dir),
            TrainingProgress(),
            SkippedStudies(datasets, output_dir),
        ]
        super().__init__(history, loader, datasets, parts)
