# SPDX-License-Identifier: Apache-2.0
"""Early stopping and the checkpoints of a classification run, with validation losses given by hand."""

from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events

from unimedi_components.engines.checkpoint import TaskCheckpoint
from unimedi_components.engines.early_stop import EarlyStop
from unimedi_components.networks import UnifiedViT
from unimedi_components.networks.cards import network_card
from unimedi_components.networks.classifier import ImageClassifier, load_classifier

SIZES = {"patch_size": 8, "patch_size_3d": (2, 8, 8), "embed_dim": 8, "depth": 1, "num_heads": 2}


class Run:
    """A run whose network counts epochs in the bias of its head, and whose validation losses are given."""

    def __init__(self, folder, values, patience=2, resume=False, max_epochs=None):
        self.network = ImageClassifier(UnifiedViT(16, (4, 16, 16), **SIZES), 2)
        self.values = values
        self.evaluator = SimpleNamespace(state=SimpleNamespace(epoch=0, metrics={}, key_metric_name="val_loss"))
        self.trainer = Engine(lambda engine, batch: None)
        self.epochs = []
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.epoch)
        self.stop = EarlyStop(self.evaluator, patience)
        self.stop.attach(self.trainer)
        card = network_card(self.network, "multiclass", ["a", "b"], {"xray": {"size": 16}})
        state = {"early_stop": self.stop}
        self.checkpoint = TaskCheckpoint(str(folder), self.network, state, card, self.evaluator, resume)
        self.checkpoint.attach(self.trainer)
        self.folder, self.max_epochs = folder, max_epochs or len(values)

    def epoch(self, engine):
        self.epochs.append(engine.state.epoch)
        with torch.no_grad():
            self.network.head.bias.fill_(engine.state.epoch)
        value = self.values[engine.state.epoch - 1]
        self.evaluator.state.epoch = engine.state.epoch if value is not None else 0
        self.evaluator.state.metrics = {"val_loss": value}

    def __call__(self):
        self.trainer.run([0, 1], max_epochs=self.max_epochs)
        return self

    def written(self):
        """Epochs of `model.pt` and `last.ckpt`."""
        last = torch.load(self.folder / "last.ckpt", weights_only=True)
        assert last["network"]["head.bias"].tolist() == [last["epoch"]] * 2
        return int(load_classifier(self.folder / "model.pt").head.bias[0]), last["epoch"]


@pytest.mark.parametrize(
    ("values", "patience", "ended", "best"),
    [
        ([5.0, 4.0, 3.0, 2.0], 2, 4, 4),
        ([5.0, 4.0, 4.5, 4.2, 1.0], 2, 4, 2),
        # an equal loss is no lower one
        ([5.0, 5.0, 5.0, 1.0], 2, 3, 1),
        ([5.0, 6.0, 4.0, 6.0, 3.0, 7.0, 8.0, 1.0], 2, 7, 5),
        ([5.0, 6.0, 1.0], 1, 2, 1),
        ([5.0, 6.0, 7.0, 8.0], None, 4, 1),
    ],
)
def test_the_epoch_that_ends_a_run_and_the_one_that_is_kept(tmp_path, values, patience, ended, best):
    run = Run(tmp_path, values, patience)()
    assert run.written() == (best, ended)
    assert run.epochs == list(range(1, ended + 1))


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_patience_outlives_an_interruption(tmp_path, first):
    values = [5.0, 4.0, 4.5, 4.2, 4.1, 1.0, 0.5]
    Run(tmp_path, values, patience=3, max_epochs=first)()
    resumed = Run(tmp_path, values, patience=3, resume=True)()
    assert resumed.epochs == list(range(first + 1, 6))
    assert resumed.written() == (2, 5)
    assert resumed.stop.state_dict() == {"counter": 3, "best_score": -4.0}


def test_a_run_that_had_ended_ends_at_once(tmp_path):
    values = [5.0, 6.0, 7.0, 1.0]
    assert Run(tmp_path, values)().written() == (1, 3)
    again = Run(tmp_path, values, resume=True)()
    assert again.epochs == []
    assert again.written() == (1, 3)
    # more patience continues it
    assert Run(tmp_path, values, patience=3, resume=True)().written() == (4, 4)


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path):
    nan = float("nan")
    assert Run(tmp_path, [nan, 5.0, nan, 4.0, nan], patience=None)().written() == (4, 5)
    assert Run(tmp_path / "b", [3.0, nan, nan, nan], patience=2)().written() == (1, 3)


def test_without_validation_the_newest_epoch_counts(tmp_path):
    assert Run(tmp_path, [None, None], patience=None)().written() == (2, 2)
