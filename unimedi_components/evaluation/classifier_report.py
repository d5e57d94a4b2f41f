# SPDX-License-Identifier: Apache-2.0
"""A trained classifier over a split of a datalist: metrics, a table of the cases, and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from sklearn.metrics import roc_curve
from tqdm.auto import tqdm

from unimedi_components.data.chains import task_transforms
from unimedi_components.data.datalist import load_datalist, write_json
from unimedi_components.data.labelled import LabelledDataset, labelled_loader
from unimedi_components.distributed import rank
from unimedi_components.engines.classification_figures import RocCurve, draw_confusion, draw_roc
from unimedi_components.engines.predictions import write_csv
from unimedi_components.errors import CheckpointError, DataError
from unimedi_components.evaluation.classification import classification_metrics, predicted_labels
from unimedi_components.evaluation.report_inputs import check_labels, split_items
from unimedi_components.losses.classification import UNCERTAIN, probabilities
from unimedi_components.networks.classifier import ImageClassifier, load_classifier

__all__ = ["evaluate_classifier"]

Array = npt.NDArray[Any]
Datalist = dict[str, Any]


def evaluate_classifier(
    checkpoint: str | Path,
    datalist: str | Path | Datalist,
    dataset_dir: str | Path,
    output_dir: str | Path | None = None,
    split: str = "test",
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    num_workers: int = 0,
    cache_dir: str | Path | None = None,
    transform: Sequence[Any] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a trained classifier on one split; on rank 0, the others return at once.

    Args:
        checkpoint: `models/model.pt` of a run, with `model.json` beside it.
        datalist: file or parsed, with the labels that the classifier was trained for.
        dataset_dir: folder that its image paths are relative to.
        output_dir: folder for `metrics.json`, `cases.csv` (one line per case: labels, probabilities, prediction),
            `roc.png` and `confusion.png`; None writes nothing.
        split: "test" (or the validation split where there is no test item), "validation" or "training".
        device: where to run.
        batch_size: images at a time.
        num_workers: loading processes.
        cache_dir: folder to keep prepared images in.
        transform: list of transforms; None takes those that the classifier's card describes.
        bootstrap: resamples of the patients for intervals.
        seed: of the resamples.

    Returns:
        the content of `metrics.json`: "split", "task", "checkpoint", "skipped_files" (images that could not be read)
        and the values of `classification_metrics`; empty on other ranks.

    Raises:
        CheckpointError: the checkpoint does not load, or its training diverged.
        DataError: the labels are not those of the classifier, or all uncertain, the split is empty, or no image can
            be read.
    """
    if rank() != 0:
        return {}
    network = load_classifier(checkpoint, device)
    lists = datalist if isinstance(datalist, dict) else load_datalist(datalist, dataset_dir)
    shown = "the datalist" if isinstance(datalist, dict) else str(datalist)
    check_labels(network.card, lists, str(checkpoint), shown)
    split, items = split_items(lists, split, network.spatial_dims, shown)
    task, names = network.card["task"], network.card["label_names"]
    chain = task_transforms(network.card["preprocessing"]) if transform is None else transform
    dataset = LabelledDataset(items, chain, dataset_dir, names, task, network.spatial_dims, cache_dir=cache_dir)
    cases = _run(network, dataset, device, batch_size, num_workers, f"{split} images")
    if not np.isfinite(cases["probability"]).all():
        raise CheckpointError(f"{checkpoint}: gives values that are not finite; its training diverged, train again")
    if (cases["label"] == UNCERTAIN).all():
        raise DataError(f"{shown}: every label of the {split} split is uncertain; nothing can be measured on it")
    arguments = (cases["probability"], cases["label"], task, names, cases["patient"])
    values = {
        "split": split,
        "task": task,
        "checkpoint": Path(checkpoint).name,
        "skipped_files": len(items) - len(cases["id"]),
        **classification_metrics(*arguments, bootstrap=bootstrap, seed=seed),
    }
    if output_dir is not None:
        _write(Path(output_dir), values, cases)
    return values


@torch.no_grad()
def _run(
    network: ImageClassifier,
    dataset: LabelledDataset,
    device: torch.device | str,
    batch_size: int,
    num_workers: int,
    desc: str,
) -> dict[str, Any]:
    """Lists "id" and "patient", and arrays "label" and "probability", of the images that could be read."""
    task = network.card["task"]
    rows: dict[str, list[Any]] = {"id": [], "patient": [], "label": [], "probability": []}
    with tqdm(total=len(dataset), desc=desc, unit="image") as bar:
        for batch in labelled_loader(dataset, batch_size, num_workers=num_workers):
            logits = network(batch["image"].to(device)).double().cpu()
            rows["id"] += batch["id"]
            rows["patient"] += batch["patient"]
            rows["label"].append(batch["label"].numpy())
            rows["probability"].append(probabilities(logits, task).numpy())
            bar.update(len(logits))
    if not rows["id"]:
        skipped = dataset.skipped
        first = f", first {skipped[0].file}: {skipped[0].reason}" if skipped else ""
        raise DataError(f"none of {len(dataset)} images can be read{first}; check `dataset_dir` and the files")
    return {**rows, "label": np.concatenate(rows["label"]), "probability": np.concatenate(rows["probability"])}


def _write(folder: Path, values: dict[str, Any], cases: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(values, folder / "metrics.json")
    write_csv(_table(cases, values["task"], values["label_names"]), folder / "cases.csv")
    heading = f"{values['split']} split, {values['cases']} images of {values['patients']} patients"
    draw_roc(_curves(cases, values), folder / "roc.png", f"ROC, {heading}")
    matrix = values["confusion_matrix"]
    if values["task"] == "multilabel":
        draw_confusion(matrix, ["absent", "present"], folder / "confusion.png", f"Confusion at 0.5, {heading}")
    else:
        draw_confusion({"": matrix}, values["label_names"], folder / "confusion.png", f"Confusion, {heading}")


def _table(cases: Mapping[str, Any], task: str, names: Sequence[str]) -> pd.DataFrame:
    """One row per case; classes by name, findings as 1, 0 or -1 (uncertain)."""
    label, probability = cases["label"], cases["probability"]
    predicted = predicted_labels(probability, task)
    table: dict[str, Any] = {"id": cases["id"], "patient": cases["patient"]}
    if task == "multilabel":
        table |= {f"label_{name}": label[:, i] for i, name in enumerate(names)}
        table |= {f"probability_{name}": probability[:, i] for i, name in enumerate(names)}
        table |= {f"predicted_{name}": predicted[:, i] for i, name in enumerate(names)}
    else:
        columns = names[1:] if task == "binary" else names
        table["label"] = np.asarray(names)[label]
        table |= {f"probability_{name}": probability[:, i] for i, name in enumerate(columns)}
        table["predicted"] = np.asarray(names)[predicted.reshape(-1)]
    return pd.DataFrame(table)


def _curves(cases: Mapping[str, Any], values: Mapping[str, Any]) -> list[RocCurve]:
    intervals = values.get("intervals", {}).get("auroc", {})
    curves = []
    for i, (name, auroc) in enumerate(values["auroc"].items()):
        label, score = cases["label"], cases["probability"][:, i]
        truth = (label == i).astype(int) if values["task"] == "multiclass" else label.reshape(len(score), -1)[:, i]
        known = truth != UNCERTAIN
        false, true = (np.empty(0),) * 2 if auroc is None else roc_curve(truth[known], score[known])[:2]
        curves.append(RocCurve(name, false, true, auroc, intervals.get(name)))
    return curves
