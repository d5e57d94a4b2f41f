# SPDX-License-Identifier: Apache-2.0
"""The files that are written of a volume's predicted organs."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientation, Transform

from unimedi_components.data.dense import DenseDataset
from unimedi_components.data.segmentation import segmentation_transforms
from unimedi_components.data.transforms import RAS_LABELS
from unimedi_components.engines.organ_figures import draw_organs
from unimedi_components.engines.predictions import check_any_read, prediction_rows, write_predictions

__all__ = ["SaveOrgans", "displayed", "voxel_spacing"]

logger = logging.getLogger(__name__)

#: Hounsfield units that figures show from black to white: soft tissue.
DISPLAY_WINDOW = (-175.0, 250.0)


class SaveOrgans(Transform):
    """Write label maps in the geometry of their input; a postprocessing step after `OrganMapd`.

    - `<id>_organs.nii.gz`: labels, uint8, with the shape and affine of the file that was read (of a DICOM series, its
      volume).
    - `<id>.png`: slices with the organs over them; see `draw_organs`.
    - `predictions.json`: volume of each organ in millilitres, and the inputs that could not be read.

    Items without "id" pass untouched: a server's request is no image of a data set.

    Args:
        output_dir: folder to write to; made when missing.
        label_names: background first.
        figures: write the PNG files, for which each image is read once more.
    """

    def __init__(self, output_dir: str | Path, label_names: Sequence[str], figures: bool = True) -> None:
        self.folder, self.label_names, self.figures = Path(output_dir), list(label_names), figures
        self.rows: dict[str, dict[str, Any]] = {}
        self._display = Compose(segmentation_transforms(window=DISPLAY_WINDOW, label_map=False))

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Take in one decollated item with "pred", labels (1, X, Y, Z) with their affine, and return it unchanged."""
        if "id" not in data:
            return data
        name, labels = str(data["id"]), data["pred"]
        file = self.folder / f"{name}_organs.nii.gz"
        affine = labels.affine.double().cpu().numpy()
        values = labels.as_tensor()[0].cpu().numpy().astype(np.uint8)
        _save_labels(values, affine, file)
        litre = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
        counts = np.bincount(values.reshape(-1), minlength=len(self.label_names))
        volumes = {organ: round(float(counts[i]) * litre, 3) for i, organ in enumerate(self.label_names) if i}
        self.rows[name] = {"labels": file.name, "volume_ml": volumes}
        if self.figures:
            source = data.get("source") or data["image"].meta["filename_or_obj"]
            image = self._display({"image": str(source)})["image"]
            shown = displayed(labels)
            spacing = voxel_spacing(image)
            organs = self.label_names[1:]
            draw_organs(name, image[0].numpy(), None, shown, organs, self.folder / f"{name}.png", spacing)
        return data

    def finish(self, dataset: DenseDataset) -> None:
        """Write `predictions.json`, and say how many inputs could not be read.

        Args:
            dataset: what was gone through, with "source" in its items.

        Raises:
            DataError: not one input could be read.
        """
        rows = prediction_rows(dataset, self.rows)
        about = {"task": "segmentation", "label_names": self.label_names}
        write_predictions(self.folder, about, rows, dataset)
        check_any_read(self.folder, rows, dataset)
        logger.info("%s: organs of %d inputs; %d could not be read", self.folder, len(rows), len(dataset.skipped))


def displayed(labels: MetaTensor) -> np.ndarray:
    """Labels (1, X, Y, Z) of a file as radiologists see them, uint8 (D, H, W); axes to Superior, Posterior, Left."""
    turned: Any = Orientation(axcodes="SPL", labels=RAS_LABELS)(labels)
    return torch.as_tensor(turned)[0].cpu().numpy().astype(np.uint8)


def voxel_spacing(volume: MetaTensor) -> tuple[float, ...]:
    """mm between voxels along the three axes of a volume (1, ...)."""
    return tuple(float(step) for step in volume.affine[:3, :3].double().norm(dim=0))


def _save_labels(values: np.ndarray, affine: np.ndarray, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    # the ending decides about compression
    temporary = file.with_name(f".{os.getpid()}.{file.name}")
    nib.save(image, temporary)
    os.replace(temporary, file)
