# SPDX-License-Identifier: Apache-2.0
"""A trained detector over a split of a datalist: metrics, a table of the boxes, and figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from tqdm.auto import tqdm

from unimedi_components.data.boxes import boxes_to_file, boxes_to_image
from unimedi_components.data.chains import task_transforms
from unimedi_components.data.datalist import load_datalist, write_json
from unimedi_components.data.dense import DenseDataset
from unimedi_components.data.labelled import labelled_loader
from unimedi_components.data.roi_boxes import boxes_of_rois
from unimedi_components.distributed import rank
from unimedi_components.engines.detection_figures import BoxImage, draw_boxes, draw_precision_recall
from unimedi_components.engines.predictions import write_csv
from unimedi_components.errors import CheckpointError, DataError
from unimedi_components.evaluation.detection import (
    Detections,
    box_ious,
    detection_metrics,
    match_boxes,
    precision_recall,
)
from unimedi_components.evaluation.report_inputs import check_labels, split_items
from unimedi_components.networks.cards import load_network

__all__ = ["evaluate_detector"]

Array = npt.NDArray[Any]
Datalist = dict[str, Any]

CASE_IOU = 0.4
_SHOWN = 8


def evaluate_detector(
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
    lowest_score: float | None = None,
) -> dict[str, Any]:
    """Measure a trained detector on one split, its boxes in pixels of the files; on rank 0, the others return at once.

    Args:
        checkpoint: `models/model.pt` of a run, with `model.json` beside it.
        datalist: file or parsed, its items with "boxes" in pixels of the files (or MONAI Label's "box").
        dataset_dir: folder that its image paths are relative to.
        output_dir: folder for `metrics.json`, `cases.csv` (see `_table`), `precision_recall.png` and `boxes.png`; None
            writes nothing.
        split: "test" (or the validation split where there is no test item), "validation" or "training".
        device: where to run.
        batch_size: images at a time.
        num_workers: loading processes.
        cache_dir: folder to keep prepared images in.
        bootstrap: resamples of the patients for intervals.
        seed: of the resamples.
        lowest_score: boxes of lower score are not looked at; None: the network's own, as in its validation.

    Returns:
        the content of `metrics.json`: "split", "task", "checkpoint", "skipped_files" (images that could not be read)
        and the values of `detection_metrics`; empty on other ranks.

    Raises:
        CheckpointError: the checkpoint does not load, or its training diverged.
        DataError: the data is labelled for something else, the split is empty or without any box, or no image can be
            read.
    """
    if rank() != 0:
        return {}
    network = load_network(checkpoint, device, kind="vitdet")
    own = network.hparams
    lowest = own["lowest_score"] if lowest_score is None else lowest_score
    network.select_boxes(min(lowest, own["score_threshold"]), own["nms_threshold"], own["max_boxes"])
    lists = datalist if isinstance(datalist, dict) else load_datalist(datalist, dataset_dir)
    shown = "the datalist" if isinstance(datalist, dict) else str(datalist)
    check_labels(network.card, lists, str(checkpoint), shown)
    split, items = split_items(lists, split, 2, shown)
    chain = task_transforms(network.card["preprocessing"], target="boxes")
    dataset = DenseDataset(items, chain, dataset_dir, target="boxes", dim=2, cache_dir=cache_dir)
    cases = _run(network, dataset, device, batch_size, num_workers, f"{split} images")
    if not all(np.isfinite(part).all() for key in ("boxes", "scores") for part in cases[key]):
        raise CheckpointError(f"{checkpoint}: gives boxes that are not finite; its training diverged, train again")
    if not any(map(len, cases["truth"])):
        raise DataError(f"{shown}: no image of the {split} split has a box; there is nothing to find")
    found = Detections(cases["boxes"], cases["scores"], cases["truth"], cases["patient"])
    values = {
        "split": split,
        "task": network.card["task"],
        "label_names": network.card["label_names"],
        "checkpoint": Path(checkpoint).name,
        "skipped_files": len(items) - len(cases["id"]),
        "unit": "pixels of the files",
        "lowest_score": lowest,
        **detection_metrics(found, bootstrap=bootstrap, seed=seed),
    }
    if output_dir is not None:
        _write(Path(output_dir), values, cases, dataset, own["score_threshold"])
    return values


@torch.no_grad()
def _run(
    network: Any,
    dataset: DenseDataset,
    device: torch.device | str,
    batch_size: int,
    num_workers: int,
    desc: str,
) -> dict[str, list[Any]]:
    """Lists by image: "id", "patient", "image" (H, W), "boxes", "scores" and "truth", in pixels of the files."""
    known = {item["id"]: item for item in dataset.data}
    rows: dict[str, list[Any]] = {key: [] for key in ("id", "patient", "affine", "boxes", "scores", "truth")}
    with tqdm(total=len(dataset), desc=desc, unit="image") as bar:
        for batch in labelled_loader(dataset, batch_size, num_workers=num_workers):
            found = network(batch["image"].to(device))
            rows["id"] += batch["id"]
            rows["patient"] += batch["patient"]
            rows["affine"] += list(batch["affine"])
            for name, row, affine in zip(batch["id"], found, batch["affine"], strict=True):
                finite = torch.isfinite(row["boxes"]).all()
                rows["boxes"].append((boxes_to_file if finite else _as_they_are)(row["boxes"], affine).numpy())
                rows["scores"].append(row["scores"].double().cpu().numpy())
                rows["truth"].append(_truth(known[name], dataset.root))
            bar.update(len(found))
    if not rows["id"]:
        skipped = dataset.skipped
        first = f", first {skipped[0].file}: {skipped[0].reason}" if skipped else ""
        raise DataError(f"none of {len(dataset)} images can be read{first}; check `dataset_dir` and the files")
    return rows


def _as_they_are(boxes: torch.Tensor, affine: torch.Tensor) -> torch.Tensor:
    return boxes.double().cpu()


def _truth(item: Mapping[str, Any], root: Path) -> Array:
    boxes = item["boxes"] if item.get("boxes") is not None else boxes_of_rois(root / item["image"], item["box"])
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4)


def _write(
    folder: Path, values: dict[str, Any], cases: Mapping[str, Any], dataset: DenseDataset, threshold: float
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(values, folder / "metrics.json")
    write_csv(_table(cases), folder / "cases.csv")
    heading = f"{values['split']} split, {values['true_boxes']} boxes in {values['images']} images"
    found = Detections(cases["boxes"], cases["scores"], cases["truth"])
    curves = {}
    for iou in (0.4, 0.5, 0.75):
        limits = values.get("intervals", {}).get(f"ap_{round(100 * iou)}")
        interval = f" ({limits[0]:.2f} to {limits[1]:.2f})" if limits else ""
        curves[f"IoU {iou:g}: AP {values[f'ap_{round(100 * iou)}']:.3f}{interval}"] = precision_recall(found, iou)
    draw_precision_recall(curves, folder / "precision_recall.png", f"Precision and recall, {heading}")
    draw_boxes(_examples(cases, dataset, threshold), folder / "boxes.png", f"Boxes, {heading}")


def _table(cases: Mapping[str, Any]) -> pd.DataFrame:
    """One row per box, in pixels of the file, "kind" predicted or true.

    Of a predicted box "score", the true box of the image that it finds at IoU 0.4 ("matched", an index from 0, -1 for
    none) and "iou" with it (or with the nearest). Of a true box the index under "matched", and as "score" and "iou"
    those of the box that finds it, empty where it is missed. An image without any box has a row of kind "none".
    """
    rows: list[list[Any]] = []
    for i, name in enumerate(cases["id"]):
        boxes, scores, truth = (cases[key][i] for key in ("boxes", "scores", "truth"))
        matched = match_boxes(boxes, scores, truth, CASE_IOU)
        ious = box_ious(boxes, truth)
        about = [name, cases["patient"][i]]
        for box, score, match, iou in zip(boxes, scores, matched, ious, strict=True):
            overlap = iou[match] if match >= 0 else iou.max(initial=0.0)
            rows.append([*about, "predicted", float(score), *box, int(match), float(overlap)])
        for index, box in enumerate(truth):
            finder = np.flatnonzero(matched == index)
            at = (float(scores[finder[0]]), float(ious[finder[0], index])) if len(finder) else (None, None)
            rows.append([*about, "true", at[0], *box, index, at[1]])
        if not len(boxes) and not len(truth):
            rows.append([*about, "none", *[None] * 7])
    columns = ["id", "patient", "kind", "score", "x0", "y0", "x1", "y1", "matched", "iou"]
    table = pd.DataFrame(rows, columns=columns)
    return table.round(dict.fromkeys(["x0", "y0", "x1", "y1"], 3) | {"score": 6, "iou": 6}).astype({"matched": "Int64"})


def _examples(cases: Mapping[str, Any], dataset: DenseDataset, threshold: float) -> list[BoxImage]:
    """The first images with boxes, and with the highest false alarms among those without, as the network sees them."""
    truths = [len(truth) for truth in cases["truth"]]
    alarms = sorted(
        (i for i, count in enumerate(truths) if count == 0), key=lambda i: -max(cases["scores"][i], default=0.0)
    )
    positive = [i for i, count in enumerate(truths) if count]
    chosen = [*positive[: _SHOWN - min(len(alarms), _SHOWN // 4)], *alarms[: _SHOWN // 4]]
    place = {item["id"]: index for index, item in enumerate(dataset.data)}
    images = []
    for i in chosen:
        item: Any = dataset[place[cases["id"][i]]]
        affine = cases["affine"][i]
        kept = cases["scores"][i] >= threshold
        found, truth = (_in_image(boxes, affine) for boxes in (cases["boxes"][i][kept], cases["truth"][i]))
        images.append(BoxImage(str(cases["id"][i]), item["image"][0].numpy(), found, cases["scores"][i][kept], truth))
    return images


def _in_image(boxes: Array, affine: torch.Tensor) -> Array:
    return boxes_to_image(boxes, affine).numpy()
