# SPDX-License-Identifier: Apache-2.0
"""What a finished classification run has to show: metrics of the best checkpoint, cases and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from unimedi_components.data.datalist import load_datalist
from unimedi_components.data.labelled import LabelledDataset
from unimedi_components.distributed import rank
from unimedi_components.engines.figures import draw_loss_curves
from unimedi_components.evaluation.classifier_report import evaluate_classifier

__all__ = ["after_classifier_training"]


def after_classifier_training(
    checkpoint: str | Path,
    training: LabelledDataset,
    validation: LabelledDataset,
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
        checkpoint: `models/model.pt` of the run.
        training: the run's training images.
        validation: the run's validation images.
        datalist_file: the datalist that the config names; it need not be there.
        output_dir: folder for what `evaluate_classifier` writes and for `loss_curves.png`.
        history: one dict per iteration, see `figures.draw_loss_curves`.
        device: where to run.
        options: of `evaluate_classifier`, such as `bootstrap`.

    Returns:
        the content of `metrics.json`; empty on other ranks.
    """
    if rank() != 0:
        return {}
    if history:
        draw_loss_curves(history, Path(output_dir) / "loss_curves.png")
    own = {"training": [], "validation": validation.data, "test": []}
    lists = _datalist_of(training, Path(datalist_file)) or own
    common = {"device": device, "cache_dir": validation.cache_dir, **options}
    return evaluate_classifier(checkpoint, lists, validation.root, output_dir, **common)


def _datalist_of(training: LabelledDataset, path: Path) -> dict[str, Any] | None:
    """The datalist at `path` if the training items are its own."""
    if not path.is_file():
        return None
    datalist = load_datalist(path)
    known = {item["id"] for item in datalist["training"]}
    return datalist if {item["id"] for item in training.data} <= known else None
