# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole or not at all, the best by the key metric, and what resuming restores and refuses."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import torch
from monai.engines import SupervisedTrainer
from torch import Tensor
from transformers.models.bert.tokenization_bert import BertTokenizer

from unimedi_components.engines import build_optimizer, prepare_mixed_batch, warmup_cosine
from unimedi_components.engines.checkpoint import TrainingCheckpoint, atomic_save
from unimedi_components.engines.handlers import EpochSeed, GradientCare, History, TeacherUpdate
from unimedi_components.errors import CheckpointError
from unimedi_components.losses import UniMediLoss
from unimedi_components.networks import DINOHead, ProjectionHead, ReportEncoder, UnifiedViT, UniMedI

TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 30, "num_attention_heads": 2}
STEPS = 2
FILES = ["last.pt", "model.json", "model.pt", "report_encoder", "unimedi.pt"]


class Batches:
    """Batches that torch's global random state decides, as random transforms would."""

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Any:
        for _ in range(STEPS):
            yield {
                "image2d": torch.randn(3, 1, 16, 16),
                "image3d": torch.randn(2, 1, 8, 16, 16),
                "input_ids": torch.randint(5, 30, (5, 6)),
                "attention_mask": torch.ones(5, 6, dtype=torch.long),
                "id": list("abcde"),
            }


class Validation:
    """Stands for an evaluator: gives one value of the key metric, or none, after each epoch."""

    def __init__(self, values: list[float | None]) -> None:
        self.values = values
        self.state = SimpleNamespace(epoch=0, metrics={}, key_metric_name="val_recall")

    def attach(self, engine: Any) -> None:
        engine.add_event_handler("EPOCH_COMPLETED", self)

    def __call__(self, engine: Any) -> None:
        self.state.epoch = engine.state.epoch
        value = self.values[engine.state.epoch - 1]
        self.state.metrics = {} if value is None else {"val_recall": value}


class Run:
    """A training run of two steps an epoch, with all that a checkpoint holds."""

    def __init__(
        self, folder: Path, epochs: int = 3, resume: bool = False, width: int = 16, total: int = 3, metrics: Any = ()
    ) -> None:
        torch.manual_seed(0)
        encoder = UnifiedViT(
            16, (8, 16, 16), patch_size=8, patch_size_3d=(4, 8, 8), embed_dim=width, depth=1, num_heads=2
        )
        heads = ProjectionHead(width, 24, 8), ProjectionHead(16, 24, 8)
        text = ReportEncoder(config=TEXT)
        self.network = UniMedI(encoder, text, *heads, DINOHead(width, 20, 24, 12), num_slices=1)
        self.loss = UniMediLoss(out_dim=20)
        self.optimizer = build_optimizer(self.network, lr=1e-3, weight_decay=0.05)
        self.schedule = warmup_cosine(self.optimizer, STEPS, total, 0.5, start_lr=1e-5)
        self.history = History(self.optimizer)
        state = {"optimizer": self.optimizer, "lr_scheduler": self.schedule, "loss": self.loss, "history": self.history}
        self.evaluator = Validation(list(metrics)) if metrics else None
        tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"))})
        self.checkpoint = TrainingCheckpoint(
            str(folder),
            self.network,
            state,
            {"xray": {"size": 16}, "ct": {"spatial_size": [8, 16, 16]}, "max_length": 6},
            tokenizer,
            evaluator=self.evaluator,
            resume=resume,
            card={"phantom_seed": 7},
        )
        step = SimpleNamespace(
            attach=lambda engine: engine.add_event_handler("ITERATION_COMPLETED", lambda _: self.schedule.step())
        )
        steps = total * STEPS
        validation = [self.evaluator] if self.evaluator else []
        handlers = [EpochSeed(3, None, self.loss), GradientCare(self.network), TeacherUpdate(self.network, 0.9, steps)]
        self.trainer = SupervisedTrainer(
            device="cpu",
            max_epochs=epochs,
            train_data_loader=Batches(),
            epoch_length=STEPS,
            network=self.network,
            optimizer=self.optimizer,
            loss_function=self.loss,
            prepare_batch=prepare_mixed_batch,
            train_handlers=[*handlers, self.history, step, *validation, self.checkpoint],
            decollate=False,
        )

    def run(self) -> Run:
        self.trainer.run()
        return self


def read(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal to the bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_a_failing_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "last.pt"
    atomic_save({"value": torch.ones(2)}, path)

    def half(content: Any, stream: BinaryIO) -> None:
        stream.write(b"PK" + bytes(18))
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        atomic_save({"value": torch.zeros(2)}, path)
    assert read(path)["value"].tolist() == [1.0, 1.0]


def test_files_and_their_contents(tmp_path: Path) -> None:
    run = Run(tmp_path, epochs=2).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    last, full, encoder = (read(tmp_path / name) for name in ("last.pt", "unimedi.pt", "model.pt"))
    assert same(encoder, dict(run.network.encoder.state_dict()))
    assert same(last["network"], dict(run.network.state_dict()))
    assert full.keys() == {n for n in last["network"] if not n.startswith(("teacher", "dino_head"))}
    assert all(torch.equal(full[f"encoder.{name}"], value) for name, value in encoder.items())
    assert (last["epoch"], last["epoch_length"], last["best"], last["scaler"]) == (2, STEPS, None, {})
    assert same(last["optimizer"], run.optimizer.state_dict())
    assert last["lr_scheduler"]["last_epoch"] == 2 * STEPS
    assert last["loss"]["center_cls"].abs().sum() > 0
    assert [row["iteration"] for row in last["history"]["rows"]] == [1, 2, 3, 4]
    card = json.loads((tmp_path / "model.json").read_text())
    assert card["format"] == 1 and card["phantom_seed"] == 7
    assert card["encoder"]["embed_dim"] == 16 and card["selection"]["num_slices"] == 1
    assert card["preprocessing"]["ct"] == {"spatial_size": [8, 16, 16]}
    assert json.loads((tmp_path / "report_encoder" / "config.json").read_text())["hidden_size"] == 16


def test_the_best_epoch_by_the_key_metric(tmp_path: Path) -> None:
    run = Run(tmp_path, epochs=3, metrics=(0.2, 0.5, 0.5))
    saved: list[Any] = []
    run.trainer.add_event_handler("EPOCH_COMPLETED", lambda _: saved.append(read(tmp_path / "model_best.pt")))
    run.run()
    # the second epoch is best; the third only equals it
    assert same(saved[1], saved[2]) and not same(saved[0], saved[1])
    assert not same(saved[2], read(tmp_path / "model.pt"))
    assert read(tmp_path / "last.pt")["best"] == 0.5


def test_the_best_is_remembered_over_a_resume(tmp_path: Path) -> None:
    Run(tmp_path, epochs=1, metrics=(0.5,)).run()
    best = read(tmp_path / "model_best.pt")
    resumed = Run(tmp_path, epochs=3, resume=True, metrics=(0.5, 0.4, None))
    resumed.run()
    # as MONAI's log names it
    state = resumed.evaluator.state
    assert (state.best_metric, state.best_metric_epoch) == (0.5, 1)
    assert same(read(tmp_path / "model_best.pt"), best)
    assert read(tmp_path / "last.pt")["best"] == 0.5


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    Run(tmp_path / "whole").run()
    Run(tmp_path / "parts", epochs=1).run()
    resumed = Run(tmp_path / "parts", resume=True)
    with torch.no_grad():
        for parameter in resumed.network.parameters():
            parameter.add_(1.0)
    resumed.run()
    assert (resumed.trainer.state.epoch, resumed.trainer.state.iteration) == (3, 3 * STEPS)
    whole, parts = (read(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    for name in whole:
        assert same(whole[name], parts[name]), name
    for name in ("model.pt", "unimedi.pt"):
        assert same(read(tmp_path / "whole" / name), read(tmp_path / "parts" / name))


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    Run(tmp_path, epochs=1).run()
    before = read(tmp_path / "last.pt")
    again = Run(tmp_path, epochs=1, resume=True).run()
    assert again.trainer.state.iteration == STEPS and len(again.history.rows) == STEPS
    assert same(before, read(tmp_path / "last.pt"))


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"last\.pt: nothing to resume; run without --resume first, or set ckpt"):
        Run(tmp_path, resume=True).run()
    Run(tmp_path, epochs=2).run()
    with pytest.raises(CheckpointError, match=r"last\.pt: is at epoch 2, beyond max_epochs 1; raise max_epochs"):
        Run(tmp_path, epochs=1, resume=True).run()
    other = Run(tmp_path, resume=True)
    other.trainer.state.epoch_length = 5
    with pytest.raises(CheckpointError, match=r"last\.pt: was trained with 2 steps per epoch, this run has 5; resume"):
        other.checkpoint.start(other.trainer)
    unlike = Run(tmp_path, resume=True)
    unlike.loss.register_buffer("center_cls", torch.zeros(3))
    with pytest.raises(
        CheckpointError, match=r"last\.pt: does not fit this run's loss \(Error.* resume with its config"
    ):
        unlike.run()
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"last\.pt: cannot be read .*start anew"):
        Run(tmp_path, resume=True).run()
    (tmp_path / "last.pt").write_bytes((tmp_path / "model.pt").read_bytes())
    with pytest.raises(CheckpointError, match=r"last\.pt: holds no training state; name the run's own ckpt_dir, or"):
        Run(tmp_path, resume=True).run()


def test_the_message_about_another_network_is_one_short_line(tmp_path: Path) -> None:
    Run(tmp_path, epochs=1).run()
    with pytest.raises(CheckpointError) as caught:
        Run(tmp_path, resume=True, width=32).run()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 800
    assert "encoder.cls_token: (1, 1, 16) in the file, (1, 1, 32) in the network" in text


def test_starting_anew_over_an_earlier_run_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Run(tmp_path, epochs=1).run()
    with caplog.at_level(logging.WARNING):
        Run(tmp_path, epochs=1).run()
    assert f"{tmp_path / 'last.pt'}: an earlier run's checkpoint will be overwritten" in caplog.text


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unimedi_components.engines.checkpoint.rank", lambda: 1)
    Run(tmp_path, epochs=1).run()
    assert not list(tmp_path.iterdir())
