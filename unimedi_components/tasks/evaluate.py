# SPDX-License-Identifier: Apache-2.0
"""Measure a task's trained network over a split of a datalist: metrics, a table of the cases, and figures."""

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from unimedi_components.data.datalist import load_datalist, select, write_json, write_metrics
from unimedi_components.distributed import rank
from unimedi_components.errors import CheckpointError, ConfigError, DataError
from unimedi_components.figures.curves import draw_loss_curves
from unimedi_components.loading import ImageDataset, ImageLoader, Skipped
from unimedi_components.networks.cards import load_network
from unimedi_components.provenance import provenance
from unimedi_components.tasks.writer import Row, write_csv

Datalist = dict[str, Any]

#: Kind of network -> module here and class.
TASKS = {
    "classifier": ("classification", "ClassifierEvaluation"),
    "setr_pup": ("xray_masks", "MaskEvaluation"),
    "unetr": ("organs", "OrganEvaluation"),
    "vitdet": ("boxes", "BoxEvaluation"),
}


class TaskEvaluation(ABC):
    """What one task measures: batches to rows, rows to numbers, a table and figures."""

    unit = "image"
    batch_size = 16
    #: 2 or 3, of the items that are measured.
    dim = 2

    def __init__(self, network: Any, device: torch.device | str) -> None:
        self.network, self.device = network, device
        self.label_names: list[str] = network.card["label_names"]
        self.data: Any = None

    @abstractmethod
    def dataset(self, items: Sequence[Row], root: Path, **options: Any) -> ImageDataset:
        """The items with their truth; `options` are those of `ImageDataset`. The frame keeps it as `data`."""

    @abstractmethod
    def predict(self, batch: Mapping[str, Any]) -> list[Row]:
        """A row for each image of a batch, on the CPU, with "id" and "patient"; runs without gradients."""

    def fault(self, rows: Sequence[Row], split: str) -> str:
        """Why nothing can be measured on the rows; "" where it can."""
        return ""

    @abstractmethod
    def measure(self, rows: Sequence[Row], bootstrap: int, seed: int) -> dict[str, Any]:
        """Values for `metrics.json`."""

    @abstractmethod
    def table(self, rows: Sequence[Row]) -> pd.DataFrame:
        """The content of `cases.csv`."""

    @abstractmethod
    def draw(self, rows: Sequence[Row], values: Mapping[str, Any], folder: Path) -> None:
        """Write the figures."""

    def finite(self, values: Tensor) -> Tensor:
        """The values of the network. Raises CheckpointError: one is not finite."""
        if not torch.isfinite(values).all():
            raise CheckpointError("gives values that are not finite; its training diverged, train again")
        return values

    def item(self, name: str) -> tuple[Row, Any]:
        """An item by its id, as the datalist has it and prepared."""
        index = next(i for i, item in enumerate(self.data.data) if item["id"] == name)
        return self.data.data[index], self.data[index]


def evaluate_task(
    checkpoint: str | Path,
    datalist: str | Path | Datalist,
    dataset_dir: str | Path,
    output_dir: str | Path | None = None,
    split: str = "test",
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    num_workers: int = 0,
    cache_dir: str | Path | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Measure a task's trained network on one split; on rank 0, the others return at once.

    Raises CheckpointError: the checkpoint does not load, or its training diverged; ConfigError: an option that the task
    does not have; DataError: the data is labelled for something else, the split is empty, no image can be read, or the
    truth leaves nothing to measure.

    Args:
        checkpoint: `models/model.pt` of a run, with `model.json` beside it, which says what the task is.
        datalist: file or parsed, with the labels that the network was trained for.
        output_dir: folder for `metrics.json`, `cases.csv` and the task's figures; None writes nothing.
        split: "test" (or the validation split where there is no test item), "validation" or "training".
        batch_size: images at a time; None for the task's own number. Volumes with organs come one by one.
        bootstrap: resamples of the patients for intervals.

    Returns:
        the content of `metrics.json`: "split", "task", "label_names", "checkpoint", "skipped_files" (images that could
        not be read) and the task's values; empty on other ranks.
    """
    if rank() != 0:
        return {}
    network = load_network(checkpoint, device)
    task = _task_of(network, device, options)
    lists = datalist if isinstance(datalist, dict) else load_datalist(datalist, dataset_dir)
    shown = "the datalist" if isinstance(datalist, dict) else str(datalist)
    _check_labels(network.card, lists, str(checkpoint), shown)
    split, items = split_items(lists, split, task.dim, shown)
    # cases of different sizes cannot be stacked
    batch_size = task.batch_size if batch_size is None or task.batch_size == 1 else batch_size
    task.data = task.dataset(items, Path(dataset_dir), cache_dir=cache_dir)
    rows: list[Row] = []
    with tqdm(total=len(items), desc=f"{split} {task.unit}s", unit=task.unit) as bar, torch.no_grad():
        for batch in ImageLoader(task.data, batch_size, num_workers=num_workers):
            try:
                rows += task.predict(batch)
            except CheckpointError as error:
                raise CheckpointError(f"{checkpoint}: {error}") from error
            bar.update(len(batch["id"]))
    if not rows:
        skipped: list[Skipped] = task.data.skipped
        first = f", first {skipped[0].file}: {skipped[0].reason}" if skipped else ""
        raise DataError(f"none of {len(items)} {task.unit}s can be read{first}; check `dataset_dir` and the files")
    if fault := task.fault(rows, split):
        raise DataError(f"{shown}: {fault}")
    values = {
        "split": split,
        "task": network.card["task"],
        "label_names": network.card["label_names"],
        "checkpoint": Path(checkpoint).name,
        "skipped_files": len(items) - len(rows),
        **task.measure(rows, bootstrap, seed),
    }
    if output_dir is not None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_metrics(values, folder)
        write_csv(task.table(rows), folder / "cases.csv")
        with torch.no_grad():
            task.draw(rows, values, folder)
    return values


def _task_of(network: Any, device: torch.device | str, options: Mapping[str, Any]) -> TaskEvaluation:
    module, name = TASKS[network.kind]
    build = getattr(importlib.import_module(f"unimedi_components.tasks.{module}"), name)
    taken = set(inspect.signature(build).parameters) - {"network", "device"}
    if unknown := sorted(set(options) - taken):
        raise ConfigError(
            f"the evaluation of a {network.kind} network has no option {', '.join(unknown)}; "
            f"it takes {', '.join(sorted(taken)) or 'none'}"
        )
    return build(network, device, **options)


def _check_labels(card: Mapping[str, Any], lists: Datalist, checkpoint: str, datalist: str) -> None:
    """Compare what a network was trained for with what a datalist holds; one that names neither passes."""
    meta = lists.get("meta", {})
    trained = (card["task"], list(card["label_names"]))
    given = (meta.get("task", trained[0]), list(meta.get("label_names", trained[1])))
    if trained != given:
        raise DataError(
            f"{checkpoint} was trained for the {trained[0]} labels {', '.join(trained[1])}, but {datalist} holds the "
            f"{given[0]} labels {', '.join(given[1])}; prepare the data with the former, in this order, or train on "
            "the latter"
        )


def split_items(lists: Datalist, split: str, dim: int, datalist: str) -> tuple[str, list[dict[str, Any]]]:
    """The items of a split and its name; for "test" those of the validation split where there is no test item.

    Raises DataError: there is no item.
    """
    tried = [split, "validation"] if split == "test" else [split]
    for name in tried:
        if items := select(lists, name, dim):
            return name, items
    raise DataError(f"{datalist}: no {dim}D item in the {' or '.join(tried)} split; prepare the data with one")


def measure_run(run: Any, datalist_file: str | Path, output_dir: str | Path, **evaluation: Any) -> dict[str, Any]:
    """Measure the best checkpoint of a finished training and draw the run's curves; on rank 0 alone.

    Where the run was given other items than the datalist's (MONAI Label, a federated client), it is measured on the
    run's own validation items.

    Args:
        datalist_file: the datalist that the config names; it need not be there.
        output_dir: folder for what `evaluate_task` writes, for `loss_curves.png` and `run.json` (command, commit,
            machine).
    """
    if rank() != 0:
        return {}
    if run.history.rows:
        draw_loss_curves(run.history.rows, Path(output_dir) / "loss_curves.png")
    write_json(provenance(), Path(output_dir) / "run.json")
    training, validation = run.datasets
    lists: Datalist = {"training": [], "validation": validation.data, "test": []}
    if Path(datalist_file).is_file():
        datalist = load_datalist(datalist_file)
        if {item["id"] for item in training.data} <= {item["id"] for item in datalist["training"]}:
            lists = datalist
    return evaluate_task(datalist=lists, output_dir=output_dir, **evaluation)
