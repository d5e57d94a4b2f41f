# SPDX-License-Identifier: Apache-2.0
"""What a task's finished run has to show: metrics of the best checkpoint, cases and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from unimedi_components.data.datalist import load_datalist, write_json
from unimedi_components.data.dataset import PretrainDataset
from unimedi_components.distributed import rank
from unimedi_components.engines.figures import draw_loss_curves
from unimedi_components.provenance import provenance

__all__ = ["after_task_training"]


def after_task_training(
    evaluate: Callable[..., dict[str, Any]],
    checkpoint: str | Path,
    training: PretrainDataset,
    validation: PretrainDataset,
    datalist_file: str | Path,
    output_dir: str | Path,
    history: Sequence[Mapping[str, float]] = (),
    device: torch.device | str = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """Measure the best checkpoint on the test split and draw the run's curves; on rank 0 alone.

    Where the run was given other items than the datalist's (MONAI Label, a federated client), it is measured on the
    run's own validation items.

    Args:
        evaluate: the task's, for example `evaluate_classifier`: called with the checkpoint, a datalist, the folder of
            its images, `output_dir`, and `device` and `options` by name.
        checkpoint: `models/model.pt` of the run.
        training: the run's training images.
        validation: the run's validation images.
        datalist_file: the datalist that the config names; it need not be there.
        output_dir: folder for what `evaluate` writes, for `loss_curves.png` and `run.json` (command, commit, machine).
        history: one dict per iteration, see `figures.draw_loss_curves`.
        device: where to run.
        options: of `evaluate`, such as `bootstrap`.

    Returns:
        the content of `metrics.json`; empty on other ranks.
    """
    if rank() != 0:
        return {}
    if history:
        draw_loss_curves(history, Path(output_dir) / "loss_curves.png")
    own = {"training": [], "validation": validation.data, "test": []}
    write_json(provenance(), Path(output_dir) / "run.json")
    lists = _datalist_of(training, Path(datalist_file)) or own
    return evaluate(checkpoint, lists, validation.root, output_dir, device=device, **options)


def _datalist_of(training: PretrainDataset, path: Path) -> dict[str, Any] | None:
    """The datalist at `path` if the training items are its own."""
    if not path.is_file():
        return None
    datalist = load_datalist(path)
    known = {item["id"] for item in datalist["training"]}
    return datalist if {item["id"] for item in training.data} <= known else None
