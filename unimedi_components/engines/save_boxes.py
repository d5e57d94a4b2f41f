# SPDX-License-Identifier: Apache-2.0
"""What a trained detector finds in images, in pixels of their files, and the files that are written of it."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.data import MetaTensor
from monai.transforms import Transform

from unimedi_components.data.boxes import boxes_to_file
from unimedi_components.data.dense import DenseDataset
from unimedi_components.data.transforms import XrayReader
from unimedi_components.engines.detection_figures import BoxImage, draw_boxes
from unimedi_components.engines.predictions import check_any_read, prediction_rows, write_csv, write_predictions
from unimedi_components.errors import CheckpointError

__all__ = ["SaveBoxes", "boxes_in_file"]

logger = logging.getLogger(__name__)

_LARGEST_FIGURE = 1024


def boxes_in_file(boxes: Any, affine: Any, width: int, height: int) -> np.ndarray:
    """Boxes of the network's input in pixels of the file, clipped to it: float64 (n, 4).

    Args:
        boxes: (n, 4) in pixels of the input.
        affine: of the input's MetaTensor, see `boxes_to_file`.
        width: columns of the file.
        height: rows of the file.
    """
    limits = np.asarray([width, height, width, height], dtype=np.float64)
    return np.clip(boxes_to_file(boxes, affine).numpy(), 0, limits)


class SaveBoxes(Transform):
    """Collect the boxes of images and write a figure of each; a postprocessing step over whole batches.

    - `predictions.csv`, one line per box: "id", "source", "label", "score", "x0", "y0", "x1", "y1".
    - `predictions.json`: by image, with the size of the file, the threshold and what could not be read.
    - `<id>.png`: the film with its boxes.

    Boxes are in pixels of the file as `XrayReader` reads it: upright, a picture's EXIF rotation applied; x along the
    columns, x1 and y1 just beyond the box. Batches without "id" pass untouched: a server's request is no data set.

    Args:
        output_dir: folder to write to; made when missing.
        network: of `load_network`; its card gives the labels' names.
        figures: write the PNG files.
        threshold: boxes of lower score are left out; None keeps what the network returns.

    Raises:
        ValueError: a threshold that is no probability.
    """

    def __init__(
        self, output_dir: str | Path, network: Any, figures: bool = True, threshold: float | None = None
    ) -> None:
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be a score from 0 to 1, not {threshold!r}")
        self.folder, self.figures = Path(output_dir), figures
        self.threshold = network.hparams["score_threshold"] if threshold is None else threshold
        # the first name is the background's
        self.label_names: list[str] = network.card["label_names"][1:]
        self.rows: dict[str, dict[str, Any]] = {}

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Take in a batch with "image" (B, 1, H, W) MetaTensor, "id", "source" and "pred", and return it unchanged.

        Raises:
            CheckpointError: boxes that are not finite.
        """
        if "id" not in data:
            return data
        images = data["image"]
        for i, (name, found) in enumerate(zip(data["id"], data["pred"], strict=True)):
            image = images[i]
            assert isinstance(image, MetaTensor)
            self._take(str(name), str(data["source"][i]), image, found)
        return data

    def _take(self, name: str, source: str, image: MetaTensor, found: Mapping[str, Any]) -> None:
        boxes, scores = (torch.as_tensor(found[key]).double().cpu() for key in ("boxes", "scores"))
        if not (torch.isfinite(boxes).all() and torch.isfinite(scores).all()):
            raise CheckpointError(f"{name}: boxes that are not finite; the network diverged, train it again")
        kept = scores >= self.threshold
        film, _ = XrayReader().get_data(source)
        height, width = film.shape
        own = boxes_in_file(boxes[kept], image.affine, width, height)
        labels = [self.label_names[int(label)] for label in torch.as_tensor(found["labels"])[kept.to(boxes.device)]]
        self.rows[name] = {
            "width": width,
            "height": height,
            "boxes": [
                {"label": label, "score": round(float(score), 6), "box": [round(float(v), 3) for v in box]}
                for label, score, box in zip(labels, scores[kept], own, strict=True)
            ],
        }
        if self.figures:
            # a film of 3000 pixels would make the same figure slower
            step = max(1, max(film.shape) // _LARGEST_FIGURE)
            shown = BoxImage(name, film[::step, ::step], own / step, scores[kept].numpy())
            draw_boxes([shown], self.folder / f"{name}.png", f"{len(own)} of a score from {self.threshold:g} on")

    def finish(self, dataset: DenseDataset) -> None:
        """Write `predictions.csv` and `predictions.json`, and say how many inputs could not be read.

        Args:
            dataset: what was gone through, with "source" in its items.

        Raises:
            DataError: not one input could be read.
        """
        rows = prediction_rows(dataset, self.rows)
        about = {
            "label_names": self.label_names,
            "threshold": self.threshold,
            "boxes": "[x0, y0, x1, y1] in pixels of the upright file, x1 and y1 just beyond the box",
        }
        write_predictions(self.folder, about, rows, dataset)
        cells = [
            [row["id"], row["source"], found["label"], found["score"], *found["box"]]
            for row in rows
            for found in row["boxes"]
        ]
        columns = ["id", "source", "label", "score", "x0", "y0", "x1", "y1"]
        write_csv(pd.DataFrame(cells, columns=columns), self.folder / "predictions.csv")
        check_any_read(self.folder, rows, dataset)
        logger.info(
            "%s: %d boxes in %d images; %d could not be read", self.folder, len(cells), len(rows), len(dataset.skipped)
        )
