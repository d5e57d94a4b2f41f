# SPDX-License-Identifier: Apache-2.0
"""Handlers of the training run: each against numbers worked out by hand, on an engine of a few steps."""

from __future__ import annotations

import io
import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents, SupervisedTrainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from unimedi_components.engines import EndWithLoader, ValidationLog, prepare_mixed_batch
from unimedi_components.engines.handlers import (
    EpochSeed,
    GradientCare,
    History,
    TeacherUpdate,
    TensorBoardLosses,
    losses,
)
from unimedi_components.engines.progress import TrainingProgress


def run(
    *handlers: Any,
    epochs: int = 2,
    steps: int = 3,
    process: Any = None,
    start: int = 0,
    accumulation_steps: int = 1,
    **parts: float,
) -> Engine:
    """An engine whose loss at iteration i is i, with the given parts beside it."""
    engine = Engine(process or (lambda engine, batch: {"loss": torch.tensor(float(engine.state.iteration))}))
    engine.register_events(*IterationEvents)
    engine.accumulation_steps = accumulation_steps
    engine.loss_function = SimpleNamespace(last={name: torch.tensor(value) for name, value in parts.items()})
    if start:

        def resume(engine: Engine) -> None:
            engine.state.epoch, engine.state.iteration = start, start * steps

        engine.add_event_handler(Events.STARTED, resume)
    for handler in handlers:
        handler.attach(engine)
    engine.run(list(range(steps)), max_epochs=epochs)
    return engine


class Recorder:
    """Stands for a loader, a data set or a loss: remembers the epochs that it was moved to."""

    def __init__(self, **parts: Any) -> None:
        self.epochs: list[int] = []
        self.__dict__.update(parts)

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def draws(seed: int, start: int = 0, epochs: int = 3, steps: int = 2) -> list[float]:
    values: list[float] = []

    def process(engine: Engine, batch: Any) -> dict[str, Any]:
        values.append(float(torch.rand(())))
        return {"loss": torch.tensor(0.0)}

    run(EpochSeed(seed, None), epochs=epochs, steps=steps, process=process, start=start)
    return values


def test_epoch_seed_makes_an_epoch_a_function_of_seed_and_number() -> None:
    whole = draws(5)
    assert len(set(whole)) == 6
    assert draws(5) == whole
    assert draws(5, start=2) == whole[4:]
    assert not set(draws(6)) & set(whole)
    torch.manual_seed((5 * 1_000_003 + 1) * 1_009)
    assert [float(torch.rand(())), float(torch.rand(()))] == whole[2:4]


def test_epoch_seed_differs_between_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    first = draws(5)
    monkeypatch.setattr("unimedi_components.engines.handlers.rank", lambda: 1)
    assert not set(draws(5)) & set(first)


def test_epoch_seed_moves_loader_sampler_data_and_loss() -> None:
    dataset, sampler, loss = Recorder(), Recorder(), Recorder()
    loader = Recorder(dataset=dataset, batch_sampler=sampler)
    run(EpochSeed(0, loader, loss), epochs=3)
    assert loader.epochs == sampler.epochs == dataset.epochs == loss.epochs == [0, 1, 2]
    run(EpochSeed(0, [1, 2]), epochs=1)


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.momenta: list[float] = []

    def update_teacher(self, momentum: float) -> None:
        self.momenta.append(momentum)


def test_teacher_momentum_rises_on_a_cosine() -> None:
    network = Teacher()
    handler = TeacherUpdate(network, momentum=0.9, total_steps=6)
    assert [handler.momentum_at(step) for step in (0, 3, 6, 9)] == pytest.approx([0.9, 0.95, 1.0, 1.0])
    run(handler)
    # 1 - 0.1 * (1 + cos(pi t)) / 2 at t = 0, 1/6, ... 5/6
    expected = [0.9, 0.9066987298107780, 0.925, 0.95, 0.975, 0.9933012701892219]
    assert network.momenta == pytest.approx(expected, abs=1e-12)
    assert TeacherUpdate(network, 0.8, 4, momentum_end=0.9).momentum_at(2) == pytest.approx(0.85)


def test_teacher_follows_optimizer_steps_not_batches() -> None:
    network = Teacher()
    # 5 batches in groups of 2: steps after batches 2, 4 and, at the epoch's end, 5
    handler = TeacherUpdate(network, momentum=0.0, total_steps=6)
    counts: list[int] = []
    engine_end = SimpleNamespace(
        attach=lambda engine: engine.add_event_handler(
            Events.ITERATION_COMPLETED, lambda _: counts.append(len(network.momenta))
        )
    )
    run(handler, engine_end, steps=5, accumulation_steps=2)
    assert counts == [0, 1, 1, 2, 3, 3, 4, 4, 5, 6]
    assert network.momenta == pytest.approx([(1 - math.cos(math.pi * step / 6)) / 2 for step in range(6)], abs=1e-12)


class Student(nn.Module):
    """Two parameters and a DINO head whose gradients are known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        self.dino_head = nn.Module()
        self.dino_head.last_layer = nn.Linear(1, 1, bias=False)

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        return (self.weight * batch["factor"]).sum() + self.dino_head.last_layer.weight.sum()


class Sum(nn.Module):
    """The network's output is the loss."""

    def forward(self, output: torch.Tensor, target: Any) -> torch.Tensor:
        self.last = {"vl": output.detach() / 2, "icl": torch.tensor(0.25)}
        return output


def trainer(network: nn.Module, handlers: list[Any], factors: list[float], epochs: int) -> SupervisedTrainer:
    batches = [{"factor": torch.tensor(factor), "id": ["a", "b"]} for factor in factors]
    return SupervisedTrainer(
        device="cpu",
        max_epochs=epochs,
        train_data_loader=batches,
        epoch_length=len(batches),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=Sum(),
        prepare_batch=prepare_mixed_batch,
        train_handlers=handlers,
        decollate=False,
    )


def test_gradient_is_clipped_and_prototypes_rest_in_the_first_epoch() -> None:
    network = Student()
    start = network.dino_head.last_layer.weight.item()
    trainer(network, [GradientCare(network, max_norm=None)], [1.0], epochs=1).run()
    # not clipped: the gradient is 1 for both weights, and none for the prototypes
    assert network.weight.tolist() == pytest.approx([2.9, 3.9])
    assert network.dino_head.last_layer.weight.item() == start
    network = Student()
    start = network.dino_head.last_layer.weight.item()
    seen: list[float] = []
    record = SimpleNamespace(
        attach=lambda engine: engine.add_event_handler(
            IterationEvents.MODEL_COMPLETED,
            lambda _: seen.append(
                math.sqrt(sum(float(p.grad.square().sum()) for p in network.parameters() if p.grad is not None))
            ),
        )
    )
    trainer(network, [GradientCare(network, max_norm=0.5), record], [10.0, 0.1], epochs=2).run()
    # clipped 10 * sqrt(2) to exactly 0.5: each weight moves by 0.1 * 0.5 / sqrt(2); then 0.1 * sqrt(2) is left as it is
    step = 0.1 * 0.5 / math.sqrt(2)
    after_first = [3 - step - 0.01, 4 - step - 0.01]
    # in epoch 2 the prototypes have a gradient of 1 as well, so that both batches are clipped
    norms = [math.sqrt(201.0), math.sqrt(1.02)]
    moved = [0.1 * 0.5 * factor / norm for factor, norm in zip((10.0, 0.1), norms, strict=True)]
    assert network.weight.tolist() == pytest.approx([value - sum(moved) for value in after_first], abs=1e-6)
    expected = start - 0.1 * 0.5 * sum(1 / norm for norm in norms)
    assert network.dino_head.last_layer.weight.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_parts_and_studies(value: float) -> None:
    network = Student()
    before = [p.clone() for p in network.parameters()]
    engine = trainer(network, [GradientCare(network)], [1.0, value], epochs=1)
    with pytest.raises(FloatingPointError) as caught:
        engine.run()
    text = str(caught.value)
    assert "not finite at iteration 2" in text and "images: a, b." in text and "icl=0.25" in text
    assert f"vl={value:.4g}" in text and "Lower the learning rate" in text
    assert all(torch.isfinite(p).all() for p in network.parameters())
    assert not torch.equal(before[0], network.weight)


def test_history_holds_every_iteration_and_joins_the_validation() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    evaluator = Engine(lambda engine, batch: None)
    history = History(optimizer, evaluator)

    class Validate:
        def attach(self, engine: Engine) -> None:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

        def __call__(self, engine: Engine) -> None:
            evaluator.state.metrics = {"val_recall": 0.1 * engine.state.epoch, "matrix": torch.zeros(2)}
            evaluator.run([0])
            optimizer.param_groups[0]["lr"] /= 2

    # ignite empties the metrics when a run starts
    evaluator.add_event_handler(
        Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(val_recall=0.25, matrix=torch.zeros(2))
    )
    run(history, Validate(), epochs=2, steps=2, vl=1.5)
    assert history.rows == [
        {"iteration": 1, "epoch": 1, "lr": 0.5, "loss": 1.0, "vl": 1.5},
        {"iteration": 2, "epoch": 1, "lr": 0.5, "loss": 2.0, "vl": 1.5, "val_recall": 0.25},
        {"iteration": 3, "epoch": 2, "lr": 0.25, "loss": 3.0, "vl": 1.5},
        {"iteration": 4, "epoch": 2, "lr": 0.25, "loss": 4.0, "vl": 1.5, "val_recall": 0.25},
    ]
    other = History(optimizer)
    other.load_state_dict(history.state_dict())
    run(other, epochs=1, steps=1)
    assert len(history.rows) == 4 and other.rows[:4] == history.rows and other.rows[4]["loss"] == 1.0


def test_losses_are_floats_of_the_newest_step() -> None:
    assert losses(run(vl=1.5, icl=0.5)) == {"loss": 6.0, "vl": 1.5, "icl": 0.5}


def test_losses_are_read_once_an_iteration() -> None:
    reads: list[dict[str, float]] = []

    class Twice:
        def attach(self, engine: Engine) -> None:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self)

        def __call__(self, engine: Engine) -> None:
            for value in (engine.state.iteration, -1.0):
                # the second value is never read: it would be a second wait for the GPU
                engine.loss_function.last["vl"] = torch.tensor(float(value))
                reads.append(losses(engine))

    run(Twice(), epochs=1, steps=2, vl=0.0)
    assert reads == [{"loss": 1.0, "vl": 1.0}] * 2 + [{"loss": 2.0, "vl": 2.0}] * 2


def test_gradient_of_a_group_of_batches_is_unscaled_and_clipped_once() -> None:
    network = Student()
    calls: list[int] = []
    scaler = SimpleNamespace(is_enabled=lambda: True, unscale_=lambda optimizer: calls.append(optimizer))

    def process(engine: Engine, batch: Any) -> dict[str, Any]:
        engine.state.output = {"loss": torch.tensor(1.0)}
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        return engine.state.output

    engine = Engine(process)
    engine.register_events(*IterationEvents)
    engine.accumulation_steps, engine.scaler, engine.optimizer = 2, scaler, 7
    engine.add_event_handler(Events.ITERATION_STARTED, lambda e: calls.append(-e.state.iteration))
    GradientCare(network).attach(engine)
    engine.run([0] * 5, max_epochs=1)
    assert calls == [-1, -2, 7, -3, -4, 7, -5, 7]


@pytest.mark.filterwarnings("ignore:.*CUDA is not available.*")
def test_accumulated_batches_with_a_scaler_step_as_their_joint_batch() -> None:
    x, target = torch.randn(8, 3), torch.randn(8, 1)

    def trained(batch_size: int, **options: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        network = nn.Linear(3, 1)
        rows = zip(x.split(batch_size), target.split(batch_size), strict=True)
        trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=1,
            train_data_loader=[{"image": image, "label": label} for image, label in rows],
            network=network,
            optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
            loss_function=nn.MSELoss(),
            train_handlers=[GradientCare(network, max_norm=0.5)],
            decollate=False,
            **options,
        )
        # MONAI makes one for CUDA in `run`, which does nothing here
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if options.get("amp") else None
        trainer.add_event_handler(Events.STARTED, lambda: setattr(trainer, "scaler", scaler))
        trainer.run()
        return [parameter.detach() for parameter in network.parameters()]

    expected = trained(4)
    for amp in (False, True):
        found = trained(2, accumulation_steps=2, amp=amp)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_tensorboard_has_the_loss_and_its_parts(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run(TensorBoardLosses(str(tmp_path)), vl=1.5, pcl=0.5)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    steps = range(1, 7)
    assert found == {
        "loss": [(step, float(step)) for step in steps],
        "vl": [(step, 1.5) for step in steps],
        "pcl": [(step, 0.5) for step in steps],
    }
    other = tmp_path / "rank1"
    monkeypatch.setattr("unimedi_components.engines.handlers.rank", lambda: 1)
    run(TensorBoardLosses(str(other)), vl=1.5)
    assert not list(other.glob("*tfevents*"))


def test_validation_speaks_from_rank_0_alone_and_ends_with_its_loader(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def validate(log_dir: Any) -> list[int]:
        seen: list[int] = []
        engine = Engine(lambda engine, batch: seen.append(batch))
        ValidationLog(str(log_dir)).attach(engine)
        engine.add_event_handler(Events.EPOCH_STARTED, lambda e: e.state.metrics.update(val_loss=0.5))
        engine.run(iter([1, 2]), epoch_length=5)
        return seen

    with caplog.at_level(logging.INFO):
        assert validate(tmp_path) == [1, 2]
    # a handler of the root, such as that of `run.log`, has the values
    assert "Epoch[1] Metrics -- val_loss: 0.5000" in caplog.text
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("val_loss")] == [0.5]
    monkeypatch.setattr("unimedi_components.engines.handlers.rank", lambda: 1)
    assert validate(tmp_path / "rank1") == [1, 2] and not (tmp_path / "rank1").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_counts_over_the_whole_run() -> None:
    stream = io.StringIO()
    bar = TrainingProgress(file=stream)
    run(bar, epochs=3, steps=4, vl=0.5)
    last = stream.getvalue().split("\r")[-1]
    assert (
        "pre-training, epoch 3/3: 100%" in last and "12/12" in last and last.rstrip().endswith("loss=12.000 vl=0.500]")
    )
    # where it piles up in a file, a fast run shows its beginning and its end
    assert stream.getvalue().count("\r") == 2 and stream.getvalue().count("\n") == 1
    assert bar.bar is None


def test_progress_of_a_resumed_run_goes_on_where_it_stopped() -> None:
    stream = Terminal()
    run(TrainingProgress(file=stream), epochs=3, steps=4, start=2)
    states = stream.getvalue().split("\r")
    assert "8/12" in states[1] and "12/12" in states[-1] and "epoch 3/3" in states[-1]
    stream = io.StringIO()
    run(TrainingProgress(file=stream), epochs=2, steps=4, start=2)
    assert stream.getvalue() == ""


def test_progress_lets_an_error_through_and_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    bar = TrainingProgress(file=stream)

    def process(engine: Engine, batch: int) -> dict[str, Any]:
        if engine.state.iteration == 2:
            raise FloatingPointError("stop here")
        return {"loss": torch.tensor(1.0)}

    with pytest.raises(FloatingPointError, match="stop here"):
        run(bar, process=process)
    assert "1/6" in stream.getvalue() and bar.bar is None
    monkeypatch.setattr("unimedi_components.engines.progress.rank", lambda: 1)
    stream = io.StringIO()
    run(TrainingProgress(file=stream))
    assert stream.getvalue() == ""


class Short:
    """A loader that says three batches and yields two."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        return iter(("first", "second"))


def test_an_epoch_ends_with_its_loader() -> None:
    seen: list[str] = []
    engine = Engine(lambda engine, batch: seen.append(batch))
    ended: list[int] = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: ended.append(e.state.epoch))
    EndWithLoader().attach(engine)
    for _ in range(2):
        engine.run(Short(), max_epochs=1)
    assert seen == ["first", "second"] * 2 and ended == [1, 1]
