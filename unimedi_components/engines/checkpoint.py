# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of pre-training: written whole or not at all, and resumed bit for bit."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from unimedi_components.distributed import rank
from unimedi_components.engines.handlers import unwrap
from unimedi_components.errors import CheckpointError
from unimedi_components.networks.pretrained import CARD, FULL, TEXT, make_card, student_state
from unimedi_components.networks.weights import load_strict

__all__ = ["TrainingCheckpoint", "atomic_save"]

LAST = "last.pt"
logger = logging.getLogger(__name__)


def atomic_save(content: Any, path: Path) -> None:
    """`torch.save` under a temporary name, then rename: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    torch.save(content, temporary)
    os.replace(temporary, path)


class TrainingCheckpoint:
    """Save `last.pt`, `model.pt`, `unimedi.pt` and `model_best.pt` after every epoch, and resume from `last.pt`.

    `last.pt` holds the training state (networks, optimizer, schedule, loss, scaler, history, epoch); `model.pt` is the
    student vision encoder's flat state dict; `unimedi.pt` both towers; `model_best.pt` the encoder of the epoch with
    the best key metric. `model.json` and `report_encoder/` say how to build the network and its tokenizer again.

    Args:
        save_dir: the bundle's `models` folder.
        network: `UniMedI`, or its distributed wrapper.
        state: further objects with `state_dict`, by name: optimizer, lr_scheduler, loss, history.
        preprocessing: for the card, how images are prepared.
        tokenizer: saved once beside the report encoder's config.
        evaluator: validation engine whose key metric decides what is best, or None.
        resume: continue from `last.pt`; False starts anew and says so when an unfinished run is there.
        card: further entries of the card.
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
    ) -> None:
        self.folder = Path(save_dir)
        self.network = unwrap(network)
        self.state = dict(state)
        self.preprocessing, self.tokenizer, self.card = preprocessing, tokenizer, dict(card or {})
        self.evaluator = evaluator
        self.resume = resume
        self.best: float | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def start(self, engine: Engine) -> None:
        """Resume, or announce what an earlier run left.

        Raises:
            CheckpointError: `resume` without `last.pt`, or a `last.pt` that is damaged, of another network, of other
                steps per epoch or of a longer run.
        """
        path = self.folder / LAST
        if self.resume:
            self._load(engine, path)
        elif path.is_file():
            logger.warning("%s: an earlier run's checkpoint will be overwritten; `--resume True` continues it", path)
        if rank() == 0:
            self._write_card()

    def __call__(self, engine: Engine) -> None:
        improved = self._improved()
        if rank() != 0:
            return
        encoder = self.network.encoder.state_dict()
        atomic_save(encoder, self.folder / "model.pt")
        atomic_save(student_state(self.network), self.folder / FULL)
        if improved:
            atomic_save(encoder, self.folder / "model_best.pt")
        scaler = getattr(engine, "scaler", None)
        atomic_save(
            {
                "network": self.network.state_dict(),
                "epoch": engine.state.epoch,
                "epoch_length": engine.state.epoch_length,
                "best": self.best,
                "scaler": scaler.state_dict() if scaler is not None else {},
                **{name: part.state_dict() for name, part in self.state.items()},
            },
            self.folder / LAST,
        )

    def _improved(self) -> bool:
        """Whether this epoch's key metric is the best so far."""
        if self.evaluator is None or self.evaluator.state.epoch == 0:
            return False
        value = self.evaluator.state.metrics.get(self.evaluator.state.key_metric_name)
        if value is None or (self.best is not None and float(value) <= self.best):
            return False
        self.best = float(value)
        return True

    def _load(self, engine: Engine, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(
                f"{path}: nothing to resume; run without --resume first, or set ckpt_dir to the run's models folder"
            )
        content = _read_training_state(path)
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
        self.best = content["best"]
        engine.state.epoch = content["epoch"]
        engine.state.iteration = content["epoch"] * content["epoch_length"]
        logger.info("%s: resumed after epoch %d of %d", path, content["epoch"], engine.state.max_epochs)

    def _write_card(self) -> None:
        folder = self.folder / TEXT
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        self.network.report_encoder.model.config.save_pretrained(folder)
        card = make_card(self.network, self.preprocessing, **self.card)
        temporary = self.folder / f"{CARD}.tmp{os.getpid()}"
        temporary.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / CARD)


def _read_training_state(path: Path) -> dict[str, Any]:
    """Read `last.pt`.

    Raises:
        CheckpointError: damaged, or something else.
    """
    remedy = "name the run's own ckpt_dir, or start anew without --resume"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: cannot be read ({reason}); {remedy}") from error
    if not isinstance(content, dict) or not {"network", "epoch", "epoch_length", "best", "scaler"} <= content.keys():
        raise CheckpointError(f"{path}: holds no training state; {remedy}")
    return content
