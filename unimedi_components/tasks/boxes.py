# SPDX-License-Identifier: Apache-2.0
"""Boxes in X-rays: how a detector is measured, the files written of its predictions, and its batches for MONAI."""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from torch import Tensor, nn

from unimedi_components.arrays import Array
from unimedi_components.data.boxes import boxes_to_file, boxes_to_image
from unimedi_components.data.chains import task_transforms
from unimedi_components.data.roi_boxes import boxes_of_rois, rois_of_boxes
from unimedi_components.figures.charts import draw_precision_recall
from unimedi_components.figures.panels import BoxImage, draw_boxes
from unimedi_components.images.xray import XrayReader
from unimedi_components.loading import ImageDataset
from unimedi_components.metrics.boxes import (
    SHOWN,
    Detections,
    box_ious,
    detection_metrics,
    match_boxes,
    precision_recall,
)
from unimedi_components.tasks.dicom_outputs import write_boxes
from unimedi_components.tasks.evaluate import Row, TaskEvaluation
from unimedi_components.tasks.writer import PredictionWriter, check_finite, check_probability

Batch = tuple[Tensor, list[dict[str, Tensor]], tuple[Any, ...], dict[str, Any]]

CASE_IOU = 0.4
# images of `boxes.png`, pixels of a film's longer side in a figure
_EXAMPLES, _LARGEST_FIGURE = 8, 1024


class BoxEvaluation(TaskEvaluation):
    """Average precision of a detector, its boxes in pixels of the files, see `detection_metrics`.

    Items have "boxes" in pixels of the files (or MONAI Label's "box"). The files are `cases.csv` (see `table`),
    `precision_recall.png` and `boxes.png`. The metrics also have the "unit" of the boxes and "lowest_score".
    ``lowest_score``: boxes of lower score are not looked at; None: the network's own, as in its validation.
    """

    def __init__(self, network: Any, device: Any, lowest_score: float | None = None) -> None:
        super().__init__(network, device)
        options = network.hparams
        self.lowest_score = options["lowest_score"] if lowest_score is None else lowest_score
        self.threshold: float = options["score_threshold"]
        network.select_boxes(min(self.lowest_score, self.threshold), options["nms_threshold"], options["max_boxes"])
        self.items: dict[str, Row] = {}

    def dataset(self, items: Sequence[Row], root: Path, **options: Any) -> ImageDataset:
        chain = task_transforms(self.network.card["preprocessing"], target="boxes")
        dataset = ImageDataset(items, chain, root, target="boxes", dim=2, **options)
        self.items = {item["id"]: item for item in dataset.data}
        return dataset

    def predict(self, batch: Mapping[str, Any]) -> list[Row]:
        rows = []
        predicted = self.network(batch["image"].to(self.device))
        for name, patient, affine, found in zip(batch["id"], batch["patient"], batch["affine"], predicted, strict=True):
            boxes = boxes_to_file(self.finite(found["boxes"]), affine).numpy()
            scores = self.finite(found["scores"].double().cpu()).numpy()
            row = {"id": name, "patient": patient, "affine": affine, "boxes": boxes, "scores": scores}
            rows.append({**row, "truth": self._truth(self.items[name])})
        return rows

    def _truth(self, item: Row) -> Array:
        given = item.get("boxes")
        boxes = given if given is not None else boxes_of_rois(self.data.root / item["image"], item["box"])
        return np.asarray(boxes, dtype=np.float64).reshape(-1, 4)

    def fault(self, rows: Sequence[Row], split: str) -> str:
        empty = not any(len(row["truth"]) for row in rows)
        return f"no image of the {split} split has a box; there is nothing to find" if empty else ""

    def measure(self, rows: Sequence[Row], bootstrap: int, seed: int) -> dict[str, Any]:
        about = {"unit": "pixels of the files", "lowest_score": self.lowest_score}
        return {**about, **detection_metrics(_detections(rows), bootstrap=bootstrap, seed=seed)}

    def table(self, rows: Sequence[Row]) -> pd.DataFrame:
        """One row per box, in pixels of the file, "kind" predicted or true.

        Of a predicted box "score", the true box of the image that it finds at IoU 0.4 ("matched", an index from 0, -1
        for none) and "iou" with it (or with the nearest). Of a true box the index under "matched", and as "score" and
        "iou" those of the box that finds it, empty where it is missed. An image without any box has a row of kind
        "none".
        """
        cells: list[list[Any]] = []
        for row in rows:
            boxes, scores, truth = (row[name] for name in ("boxes", "scores", "truth"))
            matched = match_boxes(boxes, scores, truth, CASE_IOU)
            ious = box_ious(boxes, truth)
            about = [row["id"], row["patient"]]
            for box, score, match, iou in zip(boxes, scores, matched, ious, strict=True):
                overlap = iou[match] if match >= 0 else iou.max(initial=0.0)
                cells.append([*about, "predicted", float(score), *box, int(match), float(overlap)])
            for index, box in enumerate(truth):
                finder = np.flatnonzero(matched == index)
                at = (float(scores[finder[0]]), float(ious[finder[0], index])) if len(finder) else (None, None)
                cells.append([*about, "true", at[0], *box, index, at[1]])
            if not len(boxes) and not len(truth):
                cells.append([*about, "none", *[None] * 7])
        columns = ["id", "patient", "kind", "score", "x0", "y0", "x1", "y1", "matched", "iou"]
        digits = dict.fromkeys(["x0", "y0", "x1", "y1"], 3) | {"score": 6, "iou": 6}
        return pd.DataFrame(cells, columns=columns).round(digits).astype({"matched": "Int64"})

    def draw(self, rows: Sequence[Row], values: Mapping[str, Any], folder: Path) -> None:
        heading = f"{values['split']} split, {values['true_boxes']} boxes in {values['images']} images"
        curves = {}
        for iou in SHOWN:
            limits = values.get("intervals", {}).get(f"ap_{round(100 * iou)}")
            interval = f" ({limits[0]:.2f} to {limits[1]:.2f})" if limits else ""
            label = f"IoU {iou:g}: AP {values[f'ap_{round(100 * iou)}']:.3f}{interval}"
            curves[label] = precision_recall(_detections(rows), iou)
        draw_precision_recall(curves, folder / "precision_recall.png", f"Precision and recall, {heading}")
        draw_boxes([self._view(row) for row in _examples(rows)], folder / "boxes.png", f"Boxes, {heading}")

    def _view(self, row: Row) -> BoxImage:
        """An image as the network sees it, with the boxes that inference would show."""
        _, item = self.item(row["id"])
        kept = row["scores"] >= self.threshold
        found, truth = (boxes_to_image(boxes, row["affine"]).numpy() for boxes in (row["boxes"][kept], row["truth"]))
        return BoxImage(str(row["id"]), item["image"][0].numpy(), found, row["scores"][kept], truth)


def _detections(rows: Sequence[Row]) -> Detections:
    return Detections(*([row[name] for row in rows] for name in ("boxes", "scores", "truth", "patient")))


def _examples(rows: Sequence[Row]) -> list[Row]:
    """The first images with boxes, and those with the highest false alarms among the others."""
    positive = [row for row in rows if len(row["truth"])]
    alarms = [row for row in rows if not len(row["truth"])]
    alarms = sorted(alarms, key=lambda row: -max(row["scores"], default=0.0))[: _EXAMPLES // 4]
    return [*positive[: _EXAMPLES - len(alarms)], *alarms]


def boxes_in_file(boxes: Any, affine: Any, width: int, height: int) -> np.ndarray:
    """Boxes (n, 4) of the network's input in pixels of the file, clipped to it: float64 (n, 4)."""
    limits = np.asarray([width, height, width, height], dtype=np.float64)
    return np.clip(boxes_to_file(boxes, affine).numpy(), 0, limits)


class SaveBoxes(PredictionWriter):
    """Write the boxes of images and a figure of each; a postprocessing step over whole batches.

    - `predictions.csv`, one line per box: "id", "source", "label", "score", "x0", "y0", "x1", "y1".
    - `predictions.json`: by image, with the size of the file, the threshold and what could not be read.
    - `<id>.png`: the film with its boxes.

    Boxes are in pixels of the file as `XrayReader` reads it: upright, a picture's EXIF rotation applied; x along the
    columns, x1 and y1 just beyond the box.
    ``threshold``: boxes of lower score are left out, None keeps what the network returns; ValueError where it is none.
    ``dicom``: write `<id>.dcm` too, a DICOM structured report, of each DICOM film that has a box.
    """

    def __init__(
        self,
        output_dir: str | Path,
        network: Any,
        figures: bool = True,
        threshold: float | None = None,
        dicom: bool = False,
    ) -> None:
        super().__init__(output_dir, figures, dicom)
        self.threshold = check_probability(network.hparams["score_threshold"] if threshold is None else threshold)
        # the first name is the background's
        self.label_names: list[str] = network.card["label_names"][1:]

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Take in a batch with "image" (B, 1, H, W) MetaTensor, "id", "source" and "pred", and return it unchanged."""
        for i, name in enumerate(data.get("id", ())):
            super().__call__({key: data[key][i] for key in ("image", "source", "pred")} | {"id": name})
        return data

    def row(self, name: str, data: Mapping[Hashable, Any]) -> Row:
        found, image = data["pred"], data["image"]
        assert isinstance(image, MetaTensor)
        boxes, scores = (torch.as_tensor(found[key]).double().cpu() for key in ("boxes", "scores"))
        check_finite(name, torch.cat([boxes.flatten(), scores]), "boxes")
        kept = scores >= self.threshold
        film, meta = XrayReader().get_data(str(data["source"]))
        height, width = film.shape
        placed = boxes_in_file(boxes[kept], image.affine, width, height)
        labels = [self.label_names[int(label)] for label in torch.as_tensor(found["labels"])[kept.to(boxes.device)]]
        if self.figures:
            # a film of 3000 pixels would make the same figure slower
            step = max(1, max(film.shape) // _LARGEST_FIGURE)
            shown = BoxImage(name, film[::step, ::step], placed / step, scores[kept].numpy())
            title = f"{len(placed)} of a score from {self.threshold:g} on"
            draw_boxes([shown], self.folder / f"{name}.png", title)
        rows: list[Row] = [
            {"label": label, "score": round(float(score), 6), "box": [round(float(v), 3) for v in box]}
            for label, score, box in zip(labels, scores[kept], placed, strict=True)
        ]
        if self.dicom:
            named = [(row["box"], row["label"], row["score"]) for row in rows]
            write_boxes(str(data["source"]), named, self.folder / f"{name}.dcm")
        return {"width": width, "height": height, "film_values": meta["film_values"], "boxes": rows}

    def about(self) -> Row:
        return {
            "label_names": self.label_names,
            "threshold": self.threshold,
            "boxes": "[x0, y0, x1, y1] in pixels of the upright file, x1 and y1 just beyond the box",
        }

    def tables(self, rows: list[Row]) -> dict[str, pd.DataFrame]:
        cells = [
            [row["id"], row["source"], found["label"], found["score"], *found["box"]]
            for row in rows
            for found in row["boxes"]
        ]
        columns = ["id", "source", "label", "score", "x0", "y0", "x1", "y1"]
        return {"predictions.csv": pd.DataFrame(cells, columns=columns)}


def prepare_boxes(
    batchdata: Mapping[str, Any], device: torch.device | str, non_blocking: bool = False, **kwargs: Any
) -> Batch:
    """A batch for MONAI's trainers and evaluators, whose detector takes the targets with the images.

    ``batchdata``: "image" (B, 1, H, W), "boxes": (n, 4) of each image; all boxes are of the first class.

    Returns:
        images, targets, and the targets once more for the network's forward; without "boxes" images alone.
    """
    images = batchdata["image"].to(device=device, non_blocking=non_blocking, **kwargs)
    if "boxes" not in batchdata:
        return images, [], (), {}
    targets = []
    for boxes in batchdata["boxes"]:
        own = boxes.to(device=device, dtype=torch.float32, non_blocking=non_blocking).reshape(-1, 4)
        targets.append({"boxes": own, "labels": torch.zeros(len(own), dtype=torch.int64, device=own.device)})
    return images, targets, (targets,), {}


class ServedDetector(nn.Module):
    """A detector as MONAI Label's `BundleInferTask` calls one: it sets `network`, and reads "box" and "label"."""

    def __init__(
        self, network: nn.Module, score_threshold: float = 0.3, nms_threshold: float = 0.5, max_boxes: int = 100
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.select_boxes(score_threshold, nms_threshold, max_boxes)

    def select_boxes(self, score_threshold: float, nms_threshold: float, max_boxes: int = 100) -> None:
        self.selection = (score_threshold, nms_threshold, max_boxes)

    def forward(self, image: Tensor, use_inferer: bool = False) -> list[dict[str, Tensor]]:
        """For each image (B, 1, H, W) in [-1, 1] "box" (n, 4) in its pixels, "label" (n,) and "label_scores" (n,).

        MONAI's detectors have `use_inferer`; films are read whole, without sliding windows.
        """
        self.network.select_boxes(*self.selection)
        names = {"boxes": "box", "labels": "label", "scores": "label_scores"}
        return [{names[key]: value for key, value in row.items()} for row in self.network(image)]


class RoisOfBoxesd(Transform):
    """Boxes of the network's input as regions of interest in the film's world, as Slicer shows them.

    "box" (n, 4) becomes (n, 6), centre and size of what lies in the film "image_path", see `rois_of_boxes`; the input
    "image" is a MetaTensor that says where its pixels lie in the file, and how large that is. Items that no server asks
    for, with "pred" in place of "box", pass untouched.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        if "image_path" in result and "box" in result:
            image = result["image"]
            height, width = (int(side) for side in image.meta["spatial_shape"][:2])
            boxes = boxes_in_file(result["box"], image.affine, width, height)
            rois = rois_of_boxes(str(result["image_path"]), boxes.tolist())
            result["box"] = torch.tensor(rois, dtype=torch.float64).reshape(-1, 6)
        return result
