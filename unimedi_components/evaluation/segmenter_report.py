# SPDX-License-Identifier: Apache-2.0
"""A trained X-ray segmenter over a split of a datalist: metrics, a table of the cases, and figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from tqdm.auto import tqdm

from unimedi_components.data.chains import task_transforms
from unimedi_components.data.datalist import load_datalist, write_json
from unimedi_components.data.dense import DenseDataset
from unimedi_components.data.labelled import labelled_loader
from unimedi_components.distributed import rank
from unimedi_components.engines.mask_figures import MaskView, draw_masks
from unimedi_components.engines.predictions import write_csv
from unimedi_components.errors import CheckpointError, DataError
from unimedi_components.evaluation.report_inputs import check_labels, split_items
from unimedi_components.evaluation.segmentation import mask_counts, mask_metrics, mask_scores
from unimedi_components.networks.cards import load_network

__all__ = ["evaluate_segmenter"]

Array = npt.NDArray[Any]
Datalist = dict[str, Any]

# of the images with a mask, from the best Dice to the worst; of those without, by size of the false alarm
_QUANTILES, _EMPTY = (0.0, 0.25, 0.5, 0.75, 1.0), 3


def evaluate_segmenter(
    checkpoint: str | Path,
    datalist: str | Path | Datalist,
    dataset_dir: str | Path,
    output_dir: str | Path | None = None,
    split: str = "test",
    device: torch.device | str = "cpu",
    batch_size: int = 16,
    num_workers: int = 0,
    cache_dir: str | Path | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    threshold: float = 0.5,
) -> dict[str, Any]:
    """Measure a trained segmenter on one split, on its input's grid; on rank 0, the others return at once.

    Args:
        checkpoint: `models/model.pt` of a run, with `model.json` beside it.
        datalist: file or parsed; its items have "boxes", of which masks are painted, or "mask" files.
        dataset_dir: folder that its image paths are relative to.
        output_dir: folder for `metrics.json`, `cases.csv` (per image the pixels of the true and the predicted mask,
            Dice, IoU, the highest probability) and `masks.png` (best, middling and worst images, and false alarms);
            None writes nothing.
        split: "test" (or the validation split where there is no test item), "validation" or "training".
        device: where to run.
        batch_size: images at a time.
        num_workers: loading processes.
        cache_dir: folder to keep prepared images in.
        bootstrap: resamples of the patients for intervals.
        seed: of the resamples.
        threshold: a pixel belongs to the predicted mask from this probability on.

    Returns:
        the content of `metrics.json`: "split", "task", "label_names", "checkpoint", "skipped_files" (images that could
        not be read), "threshold", "grid" (pixels per side) and the values of `mask_metrics`; empty on other ranks.

    Raises:
        CheckpointError: the checkpoint does not load, or its training diverged.
        DataError: the data is labelled for something else, the split is empty, or no image can be read.
    """
    if rank() != 0:
        return {}
    network = load_network(checkpoint, device, kind="setr_pup")
    lists = datalist if isinstance(datalist, dict) else load_datalist(datalist, dataset_dir)
    shown = "the datalist" if isinstance(datalist, dict) else str(datalist)
    check_labels(network.card, lists, str(checkpoint), shown)
    split, items = split_items(lists, split, 2, shown)
    chain = task_transforms(network.card["preprocessing"], target="mask")
    dataset = DenseDataset(items, chain, dataset_dir, target="mask", dim=2, cache_dir=cache_dir)
    cases = _run(network, dataset, device, batch_size, num_workers, threshold, f"{split} images")
    if not np.isfinite(cases["probability"]).all():
        raise CheckpointError(f"{checkpoint}: gives values that are not finite; its training diverged, train again")
    values = {
        "split": split,
        "task": network.card["task"],
        "label_names": network.card["label_names"],
        "checkpoint": Path(checkpoint).name,
        "skipped_files": len(items) - len(cases["id"]),
        "threshold": threshold,
        "grid": cases["grid"],
        **mask_metrics(cases["counts"], cases["patient"], bootstrap=bootstrap, seed=seed),
    }
    if output_dir is not None:
        _write(Path(output_dir), values, cases, network, dataset, device)
    return values


@torch.no_grad()
def _run(
    network: Any,
    dataset: DenseDataset,
    device: torch.device | str,
    batch_size: int,
    num_workers: int,
    threshold: float,
    desc: str,
) -> dict[str, Any]:
    """Lists "id" and "patient", arrays "counts" (N, 3) and "probability" (N,), and "grid" of the input."""
    rows: dict[str, list[Any]] = {key: [] for key in ("id", "patient", "counts", "probability")}
    grid: list[int] = []
    with tqdm(total=len(dataset), desc=desc, unit="image") as bar:
        for batch in labelled_loader(dataset, batch_size, num_workers=num_workers):
            probability = network(batch["image"].to(device)).float().sigmoid().cpu()
            rows["id"] += batch["id"]
            rows["patient"] += batch["patient"]
            rows["counts"].append(mask_counts(probability >= threshold, batch["label"] > 0.5))
            rows["probability"].append(probability.flatten(1).amax(1).double().numpy())
            grid = list(probability.shape[2:])
            bar.update(len(probability))
    if not rows["id"]:
        skipped = dataset.skipped
        first = f", first {skipped[0].file}: {skipped[0].reason}" if skipped else ""
        raise DataError(f"none of {len(dataset)} images can be read{first}; check `dataset_dir` and the files")
    joined = {key: np.concatenate(rows[key]) for key in ("counts", "probability")}
    return {**rows, **joined, "grid": grid}


def _write(
    folder: Path,
    values: dict[str, Any],
    cases: Mapping[str, Any],
    network: Any,
    dataset: DenseDataset,
    device: torch.device | str,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(values, folder / "metrics.json")
    scores = mask_scores(cases["counts"])
    table = pd.DataFrame(
        {
            "id": cases["id"],
            "patient": cases["patient"],
            "true_pixels": cases["counts"][:, 1],
            "predicted_pixels": cases["counts"][:, 0],
            "dice": scores["dice"].round(6),
            "iou": scores["iou"].round(6),
            "probability": cases["probability"].round(6),
        }
    )
    write_csv(table, folder / "cases.csv")
    heading = f"{values['split']} split: Dice {values['dice']:.3f} over {values['cases']} images"
    if values["dice_positive"] is not None:
        heading += f", {values['dice_positive']:.3f} over the {values['positive']} with {values['label_names'][1]}"
    views = _views(_examples(table), table, network, dataset, device, values["threshold"])
    draw_masks(views, folder / "masks.png", heading)


def _examples(table: pd.DataFrame) -> list[int]:
    """Rows of images with a mask, from the best Dice to the worst; then of those without, the largest false alarms."""
    positive = table[table["true_pixels"] > 0].sort_values("dice", ascending=False, kind="stable")
    empty = table[table["true_pixels"] == 0].sort_values("predicted_pixels", ascending=False, kind="stable")
    places = sorted({round(q * (len(positive) - 1)) for q in _QUANTILES}) if len(positive) else []
    return [*positive.index[places], *empty.index[:_EMPTY]]


@torch.no_grad()
def _views(
    rows: list[int],
    table: pd.DataFrame,
    network: Any,
    dataset: DenseDataset,
    device: torch.device | str,
    threshold: float,
) -> list[MaskView]:
    place = {item["id"]: index for index, item in enumerate(dataset.data)}
    views = []
    for row in rows:
        case = table.loc[row]
        item: Any = dataset[place[case["id"]]]
        found = network(item["image"][None].to(device)).float().sigmoid()[0, 0].cpu() >= threshold
        note = f"Dice {case['dice']:.2f}" if case["true_pixels"] else "false alarm" if found.any() else "right: none"
        image, truth = item["image"][0].numpy(), item["mask"][0].numpy() > 0.5
        views.append(MaskView(str(case["id"]), image, found.numpy(), truth, note))
    return views
