# SPDX-License-Identifier: Apache-2.0
"""Ignite handlers beyond MONAI's: EMA teacher, epoch seeds, gradient care, history."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from monai.handlers import StatsHandler, TensorBoardStatsHandler
from torch import Tensor, nn

from unimedi_components.data.datalist import write_json
from unimedi_components.distributed import rank, unwrap

logger = logging.getLogger(__name__)


def prepare_mixed_batch(
    batchdata: Mapping[str, Any], device: torch.device | str | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[dict[str, Any], None]:
    """MONAI's `prepare_batch` for a mixed batch: its tensors on the device; the loss needs no target."""
    moved = {
        name: value.to(device, non_blocking=non_blocking, **kwargs) if isinstance(value, Tensor) else value
        for name, value in batchdata.items()
    }
    return moved, None


class EpochSeed:
    """Make each epoch a function of (seed, epoch, rank) alone, so that a resumed run repeats it bit for bit.

    Seeds torch, moves the loader's sampler and data set, and the loss's temperature schedule, to the epoch.

    Args:
        loader: training loader; its `batch_sampler` and `dataset` are moved with `set_epoch` where they have it.
        loss: training loss with `set_epoch`, or None.
    """

    def __init__(self, seed: int, loader: Any, loss: Any = None) -> None:
        self.seed = seed
        self.targets = [loader, getattr(loader, "batch_sampler", None), getattr(loader, "dataset", None), loss]

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        epoch = engine.state.epoch - 1
        torch.manual_seed((self.seed * 1_000_003 + epoch) * 1_009 + rank())
        for target in self.targets:
            if hasattr(target, "set_epoch"):
                target.set_epoch(epoch)


class TeacherUpdate:
    """Move the EMA teacher after every optimizer step, with a momentum that rises on a cosine (DINO, iBOT, A-CLIP).

    Args:
        momentum: at the first step.
        momentum_end: at the last step.
        total_steps: optimizer steps of the whole run.
    """

    def __init__(self, network: nn.Module, momentum: float, total_steps: int, momentum_end: float = 1.0) -> None:
        self.network = unwrap(network)
        self.momentum, self.momentum_end, self.total_steps = momentum, momentum_end, total_steps

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def momentum_at(self, step: int) -> float:
        """Momentum of optimizer step `step`, counted from 0."""
        progress = min(step / max(1, self.total_steps), 1.0)
        return self.momentum_end - (self.momentum_end - self.momentum) * (1 + math.cos(math.pi * progress)) / 2

    def __call__(self, engine: Engine) -> None:
        if not optimizer_steps(engine):
            return
        batches, group = engine.state.epoch_length or 1, _accumulation(engine)
        epoch, within = divmod(engine.state.iteration - 1, batches)
        self.network.update_teacher(self.momentum_at(epoch * math.ceil(batches / group) + within // group))


def _accumulation(engine: Engine) -> int:
    return int(getattr(engine, "accumulation_steps", 1))


def optimizer_steps(engine: Engine) -> bool:
    """Whether MONAI's trainer steps after this batch: the last of a group of `accumulation_steps`, or of an epoch."""
    batches = engine.state.epoch_length or 1
    within = (engine.state.iteration - 1) % batches + 1
    return within % _accumulation(engine) == 0 or within == batches


class GradientCare:
    """Check the loss, clip the gradient, hold the DINO head's prototypes still at first (DINO's `freeze_last_layer`).

    Args:
        max_norm: largest gradient norm over all parameters; None does not clip.
        freeze_last_layer_epochs: epochs in which the prototypes get no gradient.
    """

    def __init__(self, network: nn.Module, max_norm: float | None = 3.0, freeze_last_layer_epochs: int = 1) -> None:
        self.network = unwrap(network)
        self.max_norm = max_norm
        self.freeze_last_layer_epochs = freeze_last_layer_epochs

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.check_loss)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def check_loss(self, engine: Engine) -> None:
        """Stop at the first loss that is not finite.

        Raises:
            FloatingPointError: naming the loss's parts and the studies of the batch.
        """
        read = losses(engine)
        if math.isfinite(read["loss"]):
            return
        values = "".join(f", {name}={value:.4g}" for name, value in read.items() if name != "loss")
        ids = ", ".join(map(str, engine.state.batch.get("id", [])))
        raise FloatingPointError(
            f"the loss is not finite at iteration {engine.state.iteration}{values}; images: {ids}. "
            "Lower the learning rate, or check these images"
        )

    def __call__(self, engine: Engine) -> None:
        if not optimizer_steps(engine):
            # the gradient is not whole yet, and GradScaler unscales it once
            return
        head = getattr(self.network, "dino_head", None)
        if head is not None and engine.state.epoch <= self.freeze_last_layer_epochs:
            for parameter in head.last_layer.parameters():
                parameter.grad = None
        if self.max_norm is not None:
            scaler = getattr(engine, "scaler", None)
            if scaler is not None and scaler.is_enabled():
                scaler.unscale_(engine.optimizer)  # type: ignore[attr-defined]
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)


class History:
    """Loss, its parts and the learning rate of every iteration, and the metrics of every epoch.

    Kept in the training checkpoint, so that a resumed run's curves begin at its first epoch.

    Args:
        optimizer: gives the learning rate.
        evaluator: validation engine whose scalar metrics are added after each epoch, or None.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, evaluator: Engine | None = None) -> None:
        self.optimizer = optimizer
        self.evaluator = evaluator
        self.rows: list[dict[str, float]] = []
        self._lr = 0.0

    def attach(self, engine: Engine) -> None:
        # a schedule that was attached before has moved on when the step is completed
        engine.add_event_handler(Events.ITERATION_STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.validated)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.COMPLETED, self.validated)

    def started(self) -> None:
        """Keep the learning rate of the step."""
        self._lr = self.optimizer.param_groups[0]["lr"]

    def __call__(self, engine: Engine) -> None:
        state = engine.state
        self.rows.append({"iteration": state.iteration, "epoch": state.epoch, "lr": self._lr, **losses(engine)})

    def validated(self, engine: Engine) -> None:
        """Add the scalar metrics of the trainer or the evaluator to the newest row."""
        if self.rows:
            scalars = {k: float(v) for k, v in engine.state.metrics.items() if isinstance(v, float | int)}
            self.rows[-1].update(scalars)

    def state_dict(self) -> dict[str, list[dict[str, float]]]:
        return {"rows": self.rows}

    def load_state_dict(self, state: Mapping[str, list[dict[str, float]]]) -> None:
        self.rows = list(state["rows"])


def defined_handler(handler: Any) -> Any:
    """The handler itself: puts one that a config defines under a key of its own into the list of handlers.

    MONAI reads each entry of such a list as a component with a `_target_`, and MONAI Label inserts one of its own
    before them, so that neither a plain reference nor a position would do.
    """
    return handler


def losses(engine: Engine) -> dict[str, float]:
    """The newest loss of a trainer and its unweighted parts, as floats: for logs, TensorBoard and the history.

    They are read from the device together and once an iteration, whoever asks first: a read waits for the GPU.
    """
    state = engine.state
    if getattr(state, "read_losses", (None,))[0] != state.iteration:
        parts = {"loss": state.output["loss"], **getattr(engine.loss_function, "last", {})}  # type: ignore[attr-defined]
        values = torch.stack([value.detach() for value in parts.values()]).tolist()
        state.read_losses = (state.iteration, dict(zip(parts, values, strict=True)))
    read: dict[str, float] = state.read_losses[1]
    return dict(read)


class TensorBoardLosses(TensorBoardStatsHandler):
    """MONAI's TensorBoard handler with the loss and its parts as one scalar each, from rank 0 alone."""

    def __init__(self, log_dir: str) -> None:
        # the base class opens an event file at once
        if rank() == 0:
            super().__init__(log_dir=log_dir)

    def attach(self, engine: Engine) -> None:
        self.output_transform = lambda _: losses(engine)
        if rank() == 0:
            super().attach(engine)


class SkippedStudies:
    """At the end of a run, count the studies that could not be read and list them in `skipped.json`; rank 0's alone.

    Args:
        output_dir: folder to write to; a list that an earlier run left there is removed.
    """

    def __init__(self, datasets: Sequence[Any], output_dir: str) -> None:
        self.datasets = datasets
        self.path = Path(output_dir) / "skipped.json"

    def attach(self, engine: Engine) -> None:
        if rank() == 0:
            engine.add_event_handler(Events.STARTED, lambda: self.path.unlink(missing_ok=True))
            engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        found = [record for dataset in self.datasets for record in dataset.skipped]
        if found:
            write_json([record._asdict() for record in found], self.path)
            total = sum(len(dataset) for dataset in self.datasets)
            logger.warning("%d of %d studies could not be read and were left out; see %s", len(found), total, self.path)


class EndWithLoader:
    """End an evaluator's epoch where its loader ends.

    A batch of unreadable files alone is not yielded, and Ignite would make up for it from the loader's beginning:
    studies would be counted twice.
    """

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, self)

    def __call__(self, engine: Engine) -> None:
        engine.terminate_epoch()


class ValidationLog(EndWithLoader):
    """What a validation says after its epoch, in the log and in TensorBoard, from rank 0; ends with the loader."""

    def __init__(self, log_dir: str) -> None:
        self.parts: list[Any] = []
        if rank() == 0:
            self.parts = [
                # by the engine's logger: MONAI's own for it hands nothing on, and `run.log` would lack the values
                StatsHandler(iteration_log=False, name=None),
                TensorBoardStatsHandler(log_dir=log_dir, iteration_log=False),
            ]

    def attach(self, engine: Engine) -> None:
        for part in self.parts:
            part.attach(engine)
        super().attach(engine)
