# SPDX-License-Identifier: Apache-2.0
"""A trained CT segmenter over a split of a datalist: metrics on the voxels of the files, a table of cases, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from unimedi_components.data.chains import task_transforms
from unimedi_components.data.datalist import load_datalist, write_json
from unimedi_components.data.dataset import Skipped
from unimedi_components.data.dense import DenseDataset
from unimedi_components.data.segmentation import segmentation_transforms
from unimedi_components.distributed import rank
from unimedi_components.engines.organ_figures import draw_organs
from unimedi_components.engines.organ_maps import OrganInferer, OrganMapd
from unimedi_components.engines.predictions import write_csv
from unimedi_components.engines.save_organs import DISPLAY_WINDOW, displayed, voxel_spacing
from unimedi_components.errors import CheckpointError, DataError
from unimedi_components.evaluation.organs import METRICS, organ_metrics, organ_scores
from unimedi_components.evaluation.report_inputs import split_items
from unimedi_components.networks.cards import load_network

__all__ = ["evaluate_organs"]

Datalist = dict[str, Any]


def evaluate_organs(
    checkpoint: str | Path,
    datalist: str | Path | Datalist,
    dataset_dir: str | Path,
    output_dir: str | Path | None = None,
    split: str = "test",
    device: torch.device | str = "cpu",
    tolerance_mm: float = 3.0,
    overlap: float = 0.5,
    mirror_axes: Sequence[int] | None = None,
    figures: int = 4,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a trained segmenter on one split; on rank 0, the others return at once.

    Predictions are brought back to the voxels of each case's file and compared there with its own label map.

    Args:
        checkpoint: `models/model.pt` of a run, with `model.json` beside it.
        datalist: file or parsed, with label maps of the organs that the segmenter was trained for.
        dataset_dir: folder that its paths are relative to.
        output_dir: folder for `metrics.json`, `cases.csv` (a line for each organ of each case) and `<id>.png`; None
            writes nothing.
        split: "test" (or the validation split where there is no test item), "validation" or "training".
        device: where to run.
        tolerance_mm: of the surface Dice.
        overlap: of sliding windows, where a volume is larger than the network's size.
        mirror_axes: see `OrganInferer`.
        figures: cases to draw, evenly spread from the best to the worst mean Dice.
        bootstrap: resamples of the patients for intervals.
        seed: of the resamples.

    Returns:
        the content of `metrics.json`: "split", "checkpoint", "label_names", "tolerance_mm", "skipped_files" (cases that
        could not be read) and the values of `organ_metrics`; empty on other ranks.

    Raises:
        CheckpointError: the checkpoint does not load, or its training diverged.
        DataError: the labels are not those of the segmenter, the split is empty, or no case can be read.
    """
    if rank() != 0:
        return {}
    network = load_network(checkpoint, device, kind="unetr")
    lists = datalist if isinstance(datalist, dict) else load_datalist(datalist, dataset_dir)
    shown = "the datalist" if isinstance(datalist, dict) else str(datalist)
    names = list(network.card["label_names"])
    found = list(lists.get("meta", {}).get("label_names", names))
    if found != names:
        raise DataError(
            f"{checkpoint} was trained for the labels {', '.join(names)}, but {shown} holds {', '.join(found)}; "
            "prepare the data set that it was trained for, or train on this one"
        )
    split, items = split_items(lists, split, 3, shown)
    chain = task_transforms(network.card["preprocessing"], label_map=False)
    volumes = DenseDataset(items, chain, dataset_dir, target=None, dim=3, keep_meta=True, require_target=False)
    as_filed = segmentation_transforms(window=DISPLAY_WINDOW, num_classes=len(names))
    truths = DenseDataset(items, as_filed, dataset_dir, dim=3, keep_meta=True)
    inferer = OrganInferer(network.hparams["vol_size"], mirror_axes, overlap)
    to_file = OrganMapd(volumes.transform.cached.branches[3])
    rows: list[dict[str, Any]] = []
    for index in tqdm(range(len(items)), desc=f"{split} volumes", unit="volume"):
        item, truth = volumes[index], truths[index]
        if isinstance(item, Skipped) or isinstance(truth, Skipped):
            continue
        with torch.no_grad():
            scores = inferer(item["image"][None].to(device), network)[0].float().cpu()
        if not torch.isfinite(scores).all():
            raise CheckpointError(f"{checkpoint}: gives values that are not finite; its training diverged, train again")
        labels = displayed(to_file({"image": item["image"], "pred": scores})["pred"])
        wanted = truth["mask"][0].numpy().astype(np.uint8)
        spacing = voxel_spacing(truth["mask"])
        rows.append(
            {
                "id": item["id"],
                "patient": item["patient"],
                "scores": organ_scores(labels, wanted, len(names) - 1, spacing, tolerance_mm),
                "index": index,
                "labels": labels,
            }
        )
    if not rows:
        skipped = [*volumes.skipped, *truths.skipped]
        first = f", first {skipped[0].file}: {skipped[0].reason}" if skipped else ""
        raise DataError(f"none of {len(items)} volumes can be read{first}; check `dataset_dir` and the files")
    values = {
        "split": split,
        "checkpoint": Path(checkpoint).name,
        "label_names": names,
        "tolerance_mm": tolerance_mm,
        "skipped_files": len(items) - len(rows),
        **organ_metrics([row["scores"] for row in rows], [row["patient"] for row in rows], names[1:], bootstrap, seed),
    }
    if output_dir is not None:
        _write(Path(output_dir), values, rows, truths, names[1:], figures)
    return values


def _write(
    folder: Path,
    values: dict[str, Any],
    rows: Sequence[Mapping[str, Any]],
    truths: DenseDataset,
    organs: Sequence[str],
    figures: int,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(values, folder / "metrics.json")
    write_csv(_table(rows, organs), folder / "cases.csv")
    means = [float(np.nanmean(row["scores"]["dice"])) if row["scores"]["voxels"].any() else 0.0 for row in rows]
    ranked = np.argsort(means)[::-1]
    chosen: Any = (
        np.unique(np.linspace(0, len(rows) - 1, min(figures, len(rows))).round().astype(int)) if figures else []
    )
    for place in chosen:
        row = rows[int(ranked[place])]
        truth: Any = truths[row["index"]]
        heading = f"{row['id']}, mean Dice {means[int(ranked[place])]:.2f}"
        image, mask = truth["image"][0].numpy(), truth["mask"][0].numpy()
        file = folder / f"{row['id']}.png"
        draw_organs(heading, image, mask, row["labels"], organs, file, voxel_spacing(truth["image"]))


def _table(rows: Sequence[Mapping[str, Any]], organs: Sequence[str]) -> pd.DataFrame:
    """One row for each organ of each case."""
    fields = (*METRICS, "voxels", "predicted_voxels")
    cells = [
        {
            "id": row["id"],
            "patient": row["patient"],
            "organ": organ,
            **{name: row["scores"][name][i] for name in fields},
        }
        for row in rows
        for i, organ in enumerate(organs)
    ]
    return pd.DataFrame(cells)
