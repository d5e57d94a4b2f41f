# SPDX-License-Identifier: Apache-2.0
"""Masks of X-rays in their files' own pixels, and the files that are written of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from monai.transforms.utils import convert_applied_interp_mode
from PIL import Image

from unimedi_components.data.dense import DenseDataset
from unimedi_components.data.transforms import XrayReader
from unimedi_components.engines.mask_figures import MaskView, draw_masks
from unimedi_components.engines.predictions import check_any_read, prediction_rows, write_csv, write_predictions
from unimedi_components.errors import CheckpointError

__all__ = ["SaveMasks", "ServedMaskd", "SmoothInverted"]

logger = logging.getLogger(__name__)


class SmoothInverted(Transform):
    """Let MONAI's `Invertd`, which follows, resize probabilities bilinearly.

    The image was resized by areas, and `Invertd` repeats what was done to it: its pixels would become blocks.

    Args:
        image: key of the MetaTensor whose history is inverted.
        pred: key of the probabilities, which become float32.
    """

    def __init__(self, image: str = "image", pred: str = "pred") -> None:
        self.image, self.pred = image, pred

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return `data` with the image's history changed."""
        image: MetaTensor = data[self.image].clone()
        image.applied_operations = convert_applied_interp_mode(
            image.applied_operations, mode="bilinear", align_corners=False
        )
        pred = data[self.pred]
        pred = pred.as_tensor() if isinstance(pred, MetaTensor) else torch.as_tensor(pred)
        # Invertd looks at no history but a MetaTensor's
        return {**data, self.image: image, self.pred: MetaTensor(pred.float().cpu())}


class SaveMasks(Transform):
    """Write the mask of each image in its file's own pixels; a postprocessing step after `Invertd`.

    - `masks/<id>.png`: as many rows and columns as the film, 255 in the mask and 0 elsewhere.
    - `predictions.csv` and `predictions.json`: by image "id", "source", "mask", "width", "height", "area" (pixels),
      "share" (of the film) and "probability" (the highest of its pixels); the json also has the label, the threshold
      and the inputs that could not be read.
    - `<id>.png`: the film and the mask over it.

    Pixels are those of the file as `XrayReader` reads it: upright, a picture's EXIF rotation applied. Items without
    "id" pass untouched: a server's request is no image of a data set.

    Args:
        output_dir: folder to write to; made when missing.
        network: of `load_network`; its card names the label.
        figures: write the PNG files.
        threshold: a pixel belongs to the mask from this probability on.

    Raises:
        ValueError: a threshold that is no probability.
    """

    def __init__(self, output_dir: str | Path, network: Any, figures: bool = True, threshold: float = 0.5) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be a probability from 0 to 1, not {threshold!r}")
        self.folder, self.figures, self.threshold = Path(output_dir), figures, threshold
        # the first name is the background's
        self.label_names: list[str] = network.card["label_names"][1:]
        self.rows: dict[str, dict[str, Any]] = {}

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Take in one decollated item with "pred", probabilities (1, H, W) of the file's pixels, and return it as is.

        Raises:
            CheckpointError: values that are not finite.
        """
        if "id" not in data:
            return data
        name, probability = str(data["id"]), torch.as_tensor(data["pred"])[0].float().cpu().numpy()
        if not np.isfinite(probability).all():
            raise CheckpointError(f"{name}: probabilities that are not finite; the network diverged, train it again")
        mask = probability >= self.threshold
        target = self.folder / "masks" / f"{name}.png"
        _write_mask(mask, target)
        self.rows[name] = {
            "mask": str(target),
            "width": mask.shape[1],
            "height": mask.shape[0],
            "area": int(mask.sum()),
            "share": round(float(mask.mean()), 6),
            "probability": round(float(probability.max()), 6),
        }
        if self.figures:
            film, _ = XrayReader().get_data(str(data["source"]))
            view = MaskView(name, film, mask, note=f"{self.label_names[0]}: {100 * mask.mean():.1f}% of the film")
            draw_masks([view], self.folder / f"{name}.png", f"{self.label_names[0]} from {self.threshold:g} on")
        return data

    def finish(self, dataset: DenseDataset) -> None:
        """Write `predictions.csv` and `predictions.json`, and say how many inputs could not be read.

        Args:
            dataset: what was gone through, with "source" in its items.

        Raises:
            DataError: not one input could be read.
        """
        rows = prediction_rows(dataset, self.rows)
        about = {"label_names": self.label_names, "threshold": self.threshold}
        write_predictions(self.folder, about, rows, dataset)
        columns = ["id", "source", "mask", "width", "height", "area", "share", "probability"]
        write_csv(pd.DataFrame(rows, columns=columns), self.folder / "predictions.csv")
        check_any_read(self.folder, rows, dataset)
        logger.info("%s: masks of %d images; %d could not be read", self.folder, len(rows), len(dataset.skipped))


def _write_mask(mask: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    Image.fromarray(mask.astype(np.uint8) * 255).save(temporary, format="PNG")
    os.replace(temporary, path)


class ServedMaskd(Transform):
    """Give a server's request its mask as ITK and NIfTI order it, columns before rows; the last postprocessing step.

    MONAI Label writes an array as if its first axis ran along the columns, while `XrayReader`'s runs along the rows;
    and it would take the channel of a 2D mask for an axis of space. Items with "id", which are images of a data set,
    pass untouched.

    Args:
        image: key of the image, whose "spatial_shape" MONAI Label compares the mask's with.
        pred: key of the mask, (1, H, W).
    """

    def __init__(self, image: str = "image", pred: str = "pred") -> None:
        self.image, self.pred = image, pred

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Return `data` with the mask uint8 (W, H)."""
        if "id" in data:
            return data
        mask = torch.as_tensor(data[self.pred])[0].to(torch.uint8).T.contiguous()
        image = data[self.image].clone()
        image.meta["spatial_shape"] = np.asarray(mask.shape)
        return {**data, self.pred: mask, self.image: image}
