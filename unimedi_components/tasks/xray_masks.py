# SPDX-License-Identifier: Apache-2.0
"""Masks of X-rays: how a segmenter is measured, and the files that are written of its predictions."""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.transforms import Transform
from PIL import Image
from torch import Tensor

from unimedi_components.data.chains import task_transforms
from unimedi_components.data.roi_boxes import film_affine
from unimedi_components.figures.panels import MaskView, draw_masks
from unimedi_components.files import replacing
from unimedi_components.images.xray import XrayReader
from unimedi_components.loading import ImageDataset
from unimedi_components.metrics.masks import mask_counts, mask_metrics, mask_scores
from unimedi_components.tasks.dicom_outputs import write_mask
from unimedi_components.tasks.evaluate import Row, TaskEvaluation
from unimedi_components.tasks.writer import PredictionWriter, check_finite, check_probability

# of the images with a mask, from the best Dice to the worst; of those without, by size of the false alarm
_QUANTILES, _EMPTY = (0.0, 0.25, 0.5, 0.75, 1.0), 3


class MaskEvaluation(TaskEvaluation):
    """Dice and IoU of an X-ray segmenter on its input's grid, see `mask_metrics`.

    Items have "boxes", of which masks are painted, or "mask" files. `cases.csv` has per image the pixels of the true
    and the predicted mask, Dice, IoU and the highest probability; `masks.png` shows the best, middling and worst images
    and false alarms. The metrics also have the "threshold" and the "grid" (pixels per side). ``threshold``: a pixel
    belongs to the predicted mask from this probability on.
    """

    def __init__(self, network: Any, device: Any, threshold: float = 0.5) -> None:
        super().__init__(network, device)
        self.threshold = threshold
        self.grid: list[int] = []

    def dataset(self, items: Sequence[Row], root: Path, **options: Any) -> ImageDataset:
        chain = task_transforms(self.network.card["preprocessing"], target="mask")
        return ImageDataset(items, chain, root, target="mask", dim=2, **options)

    def _probability(self, image: Tensor) -> Tensor:
        return self.finite(self.network(image.to(self.device)).float().sigmoid().cpu())

    def predict(self, batch: Mapping[str, Any]) -> list[Row]:
        probability = self._probability(batch["image"])
        self.grid = list(probability.shape[2:])
        counts = mask_counts(probability >= self.threshold, batch["label"] > 0.5)
        highest = probability.flatten(1).amax(1).double().numpy()
        columns = zip(batch["id"], batch["patient"], counts, highest, strict=True)
        return [dict(zip(("id", "patient", "counts", "probability"), row, strict=True)) for row in columns]

    def measure(self, rows: Sequence[Row], bootstrap: int, seed: int) -> dict[str, Any]:
        counts, patients = np.stack([row["counts"] for row in rows]), [row["patient"] for row in rows]
        return {"threshold": self.threshold, "grid": self.grid, **mask_metrics(counts, patients, bootstrap, seed)}

    def table(self, rows: Sequence[Row]) -> pd.DataFrame:
        counts = np.stack([row["counts"] for row in rows])
        scores = mask_scores(counts)
        table = pd.DataFrame(rows, columns=["id", "patient"])
        table["true_pixels"], table["predicted_pixels"] = counts[:, 1], counts[:, 0]
        table["dice"], table["iou"] = scores["dice"].round(6), scores["iou"].round(6)
        table["probability"] = np.asarray([row["probability"] for row in rows]).round(6)
        return table

    def draw(self, rows: Sequence[Row], values: Mapping[str, Any], folder: Path) -> None:
        heading = f"{values['split']} split: Dice {values['dice']:.3f} over {values['cases']} images"
        if values["dice_positive"] is not None:
            heading += f", {values['dice_positive']:.3f} over the {values['positive']} with {self.label_names[1]}"
        table = self.table(rows)
        views = [self._view(table.loc[row]) for row in _examples(table)]
        draw_masks(views, folder / "masks.png", heading)

    def _view(self, case: pd.Series) -> MaskView:
        _, item = self.item(case["id"])
        mask = (self._probability(item["image"][None])[0, 0] >= self.threshold).numpy()
        note = f"Dice {case['dice']:.2f}" if case["true_pixels"] else "false alarm" if mask.any() else "right: none"
        return MaskView(str(case["id"]), item["image"][0].numpy(), mask, item["mask"][0].numpy() > 0.5, note)


def _examples(table: pd.DataFrame) -> list[int]:
    """Rows of images with a mask, from the best Dice to the worst; then of those without, the largest false alarms."""
    positive = table[table["true_pixels"] > 0].sort_values("dice", ascending=False, kind="stable")
    empty = table[table["true_pixels"] == 0].sort_values("predicted_pixels", ascending=False, kind="stable")
    places = sorted({round(q * (len(positive) - 1)) for q in _QUANTILES}) if len(positive) else []
    return [*positive.index[places], *empty.index[:_EMPTY]]


class SaveMasks(PredictionWriter):
    """Write the mask of each image in its file's own pixels; a postprocessing step after `Restored`.

    - `masks/<id>.png`: as many rows and columns as the film, 255 in the mask and 0 elsewhere.
    - `predictions.csv` and `predictions.json`: by image "id", "source", "mask", "width", "height", "area" (pixels),
      "share" (of the film) and "probability" (the highest of its pixels); the json also has the label, the threshold
      and the inputs that could not be read.
    - `<id>.png`: the film and the mask over it.

    Pixels are those of the file as `XrayReader` reads it: upright, a picture's EXIF rotation applied.
    ``threshold``: a pixel belongs to the mask from this probability on; ValueError where it is none.
    ``dicom``: write `masks/<id>.dcm` too, a DICOM Segmentation, of each DICOM film.
    """

    def __init__(
        self, output_dir: str | Path, network: Any, figures: bool = True, threshold: float = 0.5, dicom: bool = False
    ) -> None:
        super().__init__(output_dir, figures, dicom)
        self.threshold = check_probability(threshold)
        # the first name is the background's
        self.label_names: list[str] = network.card["label_names"][1:]

    def row(self, name: str, data: Mapping[Hashable, Any]) -> Row:
        """File and size of a mask, from probabilities (1, H, W) of the file's pixels."""
        probability = torch.as_tensor(data["pred"])[0].float().cpu().numpy()
        check_finite(name, probability)
        mask = probability >= self.threshold
        target = self.folder / "masks" / f"{name}.png"
        with replacing(target) as temporary:
            Image.fromarray(mask.astype(np.uint8) * 255).save(temporary, format="PNG")
        if self.dicom:
            write_mask(str(data["source"]), mask, self.label_names[0], target.with_suffix(".dcm"))
        if self.figures:
            film, _ = XrayReader().get_data(str(data["source"]))
            view = MaskView(name, film, mask, note=f"{self.label_names[0]}: {100 * mask.mean():.1f}% of the film")
            draw_masks([view], self.folder / f"{name}.png", f"{self.label_names[0]} from {self.threshold:g} on")
        return {
            "mask": str(target),
            "width": mask.shape[1],
            "height": mask.shape[0],
            "area": int(mask.sum()),
            "share": round(float(mask.mean()), 6),
            "probability": round(float(probability.max()), 6),
        }

    def about(self) -> Row:
        return {"label_names": self.label_names, "threshold": self.threshold}

    def tables(self, rows: list[Row]) -> dict[str, pd.DataFrame]:
        columns = ["id", "source", "mask", "width", "height", "area", "share", "probability"]
        return {"predictions.csv": pd.DataFrame(rows, columns=columns)}


class ServedMaskd(Transform):
    """Give a server's request its mask as ITK and NIfTI order it, columns before rows; the last postprocessing step.

    MONAI Label writes an array as if its first axis ran along the columns, while `XrayReader`'s runs along the rows;
    and it would take the channel of a 2D mask for an axis of space. Items with "id", which are images of a data set,
    pass untouched. MONAI Label gives the mask "spatial_shape" and "original_affine" of the image.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Return `data` with the mask uint8 (W, H); (W, H, 1) of a film that has a place, which is written only so."""
        if "id" in data:
            return data
        mask = torch.as_tensor(data["pred"])[0].to(torch.uint8).T.contiguous()
        image = data["image"].clone()
        if "image_path" in data:
            affine = film_affine(data["image_path"])
            image.meta["original_affine"] = affine
            if not np.array_equal(np.abs(affine), np.eye(4)):
                mask = mask[..., None]
        image.meta["spatial_shape"] = np.asarray(mask.shape)
        return {**data, "pred": mask, "image": image}
