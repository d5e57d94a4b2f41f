# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of training runs: written whole or not at all, and resumed bit for bit."""

import copy
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from unimedi_components.data.datalist import write_json
from unimedi_components.distributed import rank, unwrap
from unimedi_components.engines.settings import check_settings, run_settings
from unimedi_components.errors import CheckpointError
from unimedi_components.images.greys import FILM_VALUES
from unimedi_components.networks.pretrained import CARD, FULL, TEXT, make_card, student_state
from unimedi_components.networks.weights import load_strict

LAST = "last.pt"
# MONAI Label offers every *.pt of a models folder as a model, and takes the first one
LAST_OF_TASK = "last.ckpt"
logger = logging.getLogger(__name__)


def atomic_save(content: Any, path: Path) -> None:
    """`torch.save` under a temporary name, then rename: a kill leaves the old file or the new one.

    Tensors of a GPU are saved as copies on the CPU, so that a plain `torch.load` needs no GPU.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    # by a stream, of which a full or read-only disk is an OSError
    with open(temporary, "wb") as stream:
        torch.save(_on_cpu(content), stream)
    os.replace(temporary, path)


def _on_cpu(content: Any) -> Any:
    if isinstance(content, Tensor):
        return content.cpu()
    if isinstance(content, Mapping):
        copied = copy.copy(content)  # keeps the versions that a module's state dict carries
        copied.update((name, _on_cpu(value)) for name, value in content.items())  # type: ignore[attr-defined]
        return copied
    if isinstance(content, list | tuple):
        return type(content)(map(_on_cpu, content))
    return content


class ResumableCheckpoint:
    """Save the training state as `last.pt` after every epoch, and resume from it bit for bit.

    `last.pt` holds networks, optimizer, schedule, scaler, history, epoch and what the run was started with, see
    `check_settings`. What else is written, and when, is up to the subclass: `write_weights` after every epoch,
    `write_card` at the start.

    Args:
        state: further objects with `state_dict`, by name: optimizer, lr_scheduler, loss, history.
        evaluator: validation engine whose key metric decides what is best, or None.
        resume: continue from `last.pt`; False starts anew and says so when an unfinished run is there.
        greater_is_better: False where the key metric is a loss.
        dataset: of the training, see `run_settings`.
    """

    last = LAST

    def __init__(
        self,
        save_dir: str,
        network: nn.Module,
        state: Mapping[str, Any],
        evaluator: Engine | None = None,
        resume: bool = False,
        greater_is_better: bool = True,
        dataset: Any = None,
    ) -> None:
        self.folder = Path(save_dir)
        self.network = unwrap(network)
        self.state = dict(state)
        self.evaluator = evaluator
        self.resume = resume
        self.sign = 1.0 if greater_is_better else -1.0
        self.best: float | None = None
        self.best_epoch = 0
        self.dataset = dataset
        self.settings: dict[str, Any] = {}
        #: Of the card: the type that a run with mixed precision computes in.
        self.precision: dict[str, str] = {}

    def write_weights(self, improved: bool) -> None:
        """Write what an epoch leaves; `improved` says whether its key metric is the best so far."""
        raise NotImplementedError

    def write_card(self) -> None:
        """Write what says how to build the network again."""
        raise NotImplementedError

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def start(self, engine: Engine) -> None:
        """Resume, or announce what an earlier run left.

        Raises:
            CheckpointError: `resume` without `last.pt`, or a `last.pt` that is damaged, of another network, other
                settings or other steps per epoch, or of a longer run.
        """
        path = self.folder / self.last
        self.settings = run_settings(self.folder, self.dataset)
        if self.resume:
            self._load(engine, path)
        elif path.is_file() and rank() == 0:
            logger.warning("%s: an earlier run's checkpoint will be overwritten; `--resume True` continues it", path)
        if getattr(engine, "amp", False):
            kind = getattr(engine, "amp_kwargs", {}).get("dtype", torch.float16)
            self.precision = {"amp_dtype": str(kind).removeprefix("torch.")}
        if rank() == 0:
            self.write_card()

    def __call__(self, engine: Engine) -> None:
        improved = self._improved()
        if rank() != 0:
            return
        self.write_weights(improved)
        scaler = getattr(engine, "scaler", None)
        atomic_save(
            {
                "network": self.network.state_dict(),
                "epoch": engine.state.epoch,
                "epoch_length": engine.state.epoch_length,
                "best": self.best,
                "best_epoch": self.best_epoch,
                "settings": self.settings,
                "scaler": scaler.state_dict() if scaler is not None else {},
                **{name: part.state_dict() for name, part in self.state.items()},
            },
            self.folder / self.last,
        )

    def _improved(self) -> bool:
        """Whether this epoch's key metric is the best so far."""
        if self.evaluator is None or self.evaluator.state.epoch == 0:
            return False
        value = self.evaluator.state.metrics.get(self.evaluator.state.key_metric_name)
        if value is None or not math.isfinite(float(value)):
            return False
        if self.best is not None and self.sign * float(value) <= self.sign * self.best:
            return False
        self.best, self.best_epoch = float(value), self.evaluator.state.epoch
        return True

    def _load(self, engine: Engine, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(
                f"{path}: nothing to resume; run without --resume first, or set ckpt_dir to the run's models folder"
            )
        content = _read_training_state(path)
        check_settings(content.get("settings", {}), self.settings, path)
        if content["epoch_length"] != engine.state.epoch_length:
            raise CheckpointError(
                f"{path}: was trained with {content['epoch_length']} steps per epoch, this run has "
                f"{engine.state.epoch_length}; resume with the data and batch sizes that it was started with"
            )
        if content["epoch"] > engine.state.max_epochs:
            raise CheckpointError(
                f"{path}: is at epoch {content['epoch']}, beyond max_epochs {engine.state.max_epochs}; raise max_epochs"
            )
        load_strict(self.network, content["network"], str(path))
        try:
            for name, part in self.state.items():
                part.load_state_dict(content[name])
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{path}: does not fit this run's {name} ({' '.join(str(error).split())}); resume with its config"
            ) from error
        if content["scaler"] and getattr(engine, "scaler", None) is not None:
            engine.scaler.load_state_dict(content["scaler"])  # type: ignore[attr-defined]
        self.best, self.best_epoch = content["best"], content.get("best_epoch", content["epoch"])
        if self.evaluator is not None and self.best is not None:
            # MONAI's log names it after every validation
            state: Any = self.evaluator.state
            state.best_metric, state.best_metric_epoch = self.best, self.best_epoch
        engine.state.epoch = content["epoch"]
        engine.state.iteration = content["epoch"] * content["epoch_length"]
        logger.info("%s: resumed after epoch %d of %d", path, content["epoch"], engine.state.max_epochs)


class TrainingCheckpoint(ResumableCheckpoint):
    """Checkpoints of pre-training: `last.pt`, `model.pt`, `unimedi.pt` and `model_best.pt` after every epoch.

    `model.pt` is the student vision encoder's flat state dict; `unimedi.pt` both towers; `model_best.pt` the encoder of
    the epoch with the best key metric. `model.json` and `report_encoder/` say how to build the network and its
    tokenizer again.

    Args:
        tokenizer: saved once beside the report encoder's config.
    """

    def __init__(
        self,
        save_dir: str,
        network: nn.Module,
        state: Mapping[str, Any],
        preprocessing: Mapping[str, Any],
        tokenizer: Any,
        evaluator: Engine | None = None,
        resume: bool = False,
        card: Mapping[str, Any] | None = None,
        dataset: Any = None,
    ) -> None:
        super().__init__(save_dir, network, state, evaluator, resume, dataset=dataset)
        self.preprocessing, self.tokenizer, self.card = preprocessing, tokenizer, dict(card or {})

    def write_weights(self, improved: bool) -> None:
        encoder = self.network.encoder.state_dict()
        atomic_save(encoder, self.folder / "model.pt")
        atomic_save(student_state(self.network), self.folder / FULL)
        if improved:
            atomic_save(encoder, self.folder / "model_best.pt")

    def write_card(self) -> None:
        folder = self.folder / TEXT
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        self.network.report_encoder.model.config.save_pretrained(folder)
        more = {**_film_values(self.preprocessing), **self.precision, **self.card}
        write_json(make_card(self.network, self.preprocessing, **more), self.folder / CARD)


class TaskCheckpoint(ResumableCheckpoint):
    """Checkpoints of a task's run: `model.pt` is the epoch with the best key metric, `last.ckpt` the newest.

    `model.json` says how to build the network, what its outputs mean and how its input is prepared.

    Args:
        card: of `networks.network_card`. The others: see `ResumableCheckpoint`.
    """

    last = LAST_OF_TASK

    def __init__(
        self,
        save_dir: str,
        network: nn.Module,
        state: Mapping[str, Any],
        card: Mapping[str, Any],
        evaluator: Engine | None = None,
        resume: bool = False,
        greater_is_better: bool = False,
        dataset: Any = None,
    ) -> None:
        super().__init__(save_dir, network, state, evaluator, resume, greater_is_better, dataset)
        self.card = dict(card)

    def write_weights(self, improved: bool) -> None:
        # Without validation data there is no best epoch: the newest one counts.
        if improved or self.best is None:
            atomic_save(self.network.state_dict(), self.folder / "model.pt")

    def write_card(self) -> None:
        films = _film_values(self.card.get("preprocessing", {}))
        write_json({**self.card, **films, **self.precision}, self.folder / CARD)


def _film_values(preprocessing: Mapping[str, Any]) -> dict[str, str]:
    """A line of a card on what the values of films become, where the network reads any."""
    return {"film_values": FILM_VALUES} if {"xray", "film"} & set(preprocessing) else {}


def _read_training_state(path: Path) -> dict[str, Any]:
    """Read `last.pt`. Raises CheckpointError: damaged, or something else."""
    remedy = "name the run's own ckpt_dir, or start anew without --resume"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: cannot be read ({reason}); {remedy}") from error
    if not isinstance(content, dict) or not {"network", "epoch", "epoch_length", "best", "scaler"} <= content.keys():
        raise CheckpointError(f"{path}: holds no training state; {remedy}")
    return content
