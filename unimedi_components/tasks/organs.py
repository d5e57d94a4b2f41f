# SPDX-License-Identifier: Apache-2.0
"""Organs of CT volumes: how a segmenter is measured on the files' voxels, and the files written of its predictions."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from monai.data import MetaTensor, decollate_batch
from monai.inferers import SlidingWindowInferer
from monai.transforms import Compose, Orientation
from torch import Tensor

from unimedi_components.data.chains import task_transforms
from unimedi_components.data.restore import Restored
from unimedi_components.data.segmentation import segmentation_transforms
from unimedi_components.data.transforms import RAS_LABELS
from unimedi_components.data.volume_loading import with_part
from unimedi_components.errors import ConfigError
from unimedi_components.figures.panels import draw_organs
from unimedi_components.files import replacing
from unimedi_components.images.volume import find_stack
from unimedi_components.loading import ImageDataset
from unimedi_components.metrics.organs import METRICS, organ_metrics, organ_scores
from unimedi_components.networks.embed import to_tuple
from unimedi_components.tasks.dicom_outputs import write_label_map
from unimedi_components.tasks.evaluate import Row, TaskEvaluation
from unimedi_components.tasks.writer import PredictionWriter

#: Hounsfield units that figures show from black to white: soft tissue.
DISPLAY_WINDOW = (-175.0, 250.0)


class OrganInferer(SlidingWindowInferer):
    """Sliding windows with Gaussian blending (nnU-Net's and UniMiSS's), over mirrored copies too where asked for.

    A volume that is smaller than the window is padded with -1 (the lowest intensity), and the padding cut off again.
    Raises ConfigError: an axis that does not exist, or an overlap out of [0, 1).

    Args:
        roi_size: D, H, W of a window: the size that the network was trained on.
        mirror_axes: of the axes 0 (D), 1 (H) and 2 (W), those to mirror; each combination of them is predicted once,
            mirrored back and averaged. None mirrors nothing.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        mirror_axes: Sequence[int] | None = None,
        overlap: float = 0.5,
        sw_batch_size: int = 1,
        **kwargs: Any,
    ) -> None:
        axes = tuple(mirror_axes or ())
        if not set(axes) <= {0, 1, 2} or len(set(axes)) != len(axes):
            raise ConfigError(f"mirror_axes {list(axes)} must be different ones of 0 (depth), 1 (rows) and 2 (columns)")
        if not 0 <= overlap < 1:
            raise ConfigError(f"overlap must be in [0, 1), the share of a window, not {overlap}")
        options = {"mode": "gaussian", "cval": -1.0, **kwargs}
        super().__init__(to_tuple(roi_size, 3, "roi_size"), sw_batch_size=sw_batch_size, overlap=overlap, **options)
        self.mirrors = list(chain.from_iterable(combinations(axes, count) for count in range(len(axes) + 1)))

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        volume = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        total: Any = None
        for mirror in self.mirrors:
            dims = [axis + 2 for axis in mirror]
            scores: Any = super().__call__(volume.flip(dims), network, *args, **kwargs)
            total = scores.flip(dims) if total is None else total + scores.flip(dims)
        return total / len(self.mirrors)


class OrganEvaluation(TaskEvaluation):
    """Dice, surface Dice and HD95 of a CT segmenter, see `organ_metrics`.

    Predictions are brought back to the voxels of each case's file and compared there with its own label map.
    `cases.csv` has a line for each organ of each case; `<id>.png` shows a case.

    Args:
        tolerance_mm: of the surface Dice.
        overlap: of sliding windows, where a volume is larger than the network's size.
        figures: cases to draw, evenly spread from the best to the worst mean Dice.
    """

    unit = "volume"
    batch_size = 1
    dim = 3

    def __init__(
        self,
        network: Any,
        device: Any,
        tolerance_mm: float = 3.0,
        overlap: float = 0.5,
        mirror_axes: Sequence[int] | None = None,
        figures: int = 4,
    ) -> None:
        super().__init__(network, device)
        self.tolerance_mm, self.figures, self.organs = tolerance_mm, figures, self.label_names[1:]
        # label maps stay as they are filed: the prediction comes to them
        self.chain = Compose(task_transforms(network.card["preprocessing"], resize_labels=False))
        # windows are put together in main memory: the scores of a whole volume may take 20 GiB
        self.inferer = OrganInferer(network.hparams["vol_size"], mirror_axes, overlap, device="cpu")
        self.to_file = Restored(self.chain, labels=True)

    def dataset(self, items: Sequence[Row], root: Path, **options: Any) -> ImageDataset:
        return ImageDataset(items, self.chain.transforms, root, target="mask", dim=3, keep_meta=True, **options)

    def predict(self, batch: Mapping[str, Any]) -> list[Row]:
        (image,), (mask,) = decollate_batch(batch["image"]), decollate_batch(batch["label"])
        scores = self.finite(self.inferer(image[None].to(self.device), self.network)[0].float().cpu())
        labels = displayed(self.to_file({"image": image, "pred": scores})["pred"])
        truth = mask[0].numpy().astype(np.uint8)
        found = organ_scores(labels, truth, len(self.organs), voxel_spacing(mask), self.tolerance_mm)
        return [{"id": batch["id"][0], "patient": batch["patient"][0], "scores": found, "labels": labels}]

    def measure(self, rows: Sequence[Row], bootstrap: int, seed: int) -> dict[str, Any]:
        scores, patients = [row["scores"] for row in rows], [row["patient"] for row in rows]
        values = organ_metrics(scores, patients, self.organs, bootstrap, seed)
        return {"tolerance_mm": self.tolerance_mm, **values}

    def table(self, rows: Sequence[Row]) -> pd.DataFrame:
        fields = (*METRICS, "voxels", "predicted_voxels")
        cells = [
            [row["id"], row["patient"], organ, *(row["scores"][name][i] for name in fields)]
            for row in rows
            for i, organ in enumerate(self.organs)
        ]
        return pd.DataFrame(cells, columns=["id", "patient", "organ", *fields])

    def draw(self, rows: Sequence[Row], values: Mapping[str, Any], folder: Path) -> None:
        means = [float(np.nanmean(row["scores"]["dice"])) if row["scores"]["voxels"].any() else 0.0 for row in rows]
        ranked, count = np.argsort(means)[::-1], min(self.figures, len(rows))
        for place in np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int)):
            index = int(ranked[place])
            row = rows[index]
            source, item = self.item(row["id"])
            heading = f"{row['id']}, mean Dice {means[index]:.2f}"
            image, spacing = displayed_image({"image": str(self.data.root / source["image"])})
            file = folder / f"{row['id']}.png"
            draw_organs(heading, image, item["mask"][0].numpy(), row["labels"], self.organs, file, spacing)


class SaveOrgans(PredictionWriter):
    """Write label maps in the geometry of their input; a postprocessing step after `Restored`.

    - `<id>_organs.nii.gz`: labels, uint8, with the shape and affine of the file that was read (of a DICOM series, its
      volume).
    - `<id>.png`: slices with the organs over them; see `draw_organs`.
    - `predictions.json`: volume of each organ in millilitres, and the inputs that could not be read.

    Args:
        dicom: write `<id>_organs.dcm` too, a DICOM Segmentation, of each series of DICOM slices.
    """

    def __init__(
        self, output_dir: str | Path, label_names: Sequence[str], figures: bool = True, dicom: bool = False
    ) -> None:
        super().__init__(output_dir, figures, dicom)
        self.label_names = list(label_names)

    def row(self, name: str, data: Mapping[Hashable, Any]) -> Row:
        """File and volumes of the organs, from labels (1, X, Y, Z) with their affine."""
        labels, file = data["pred"], self.folder / f"{name}_organs.nii.gz"
        affine = labels.affine.double().cpu().numpy()
        values = labels.as_tensor()[0].cpu().numpy().astype(np.uint8)
        volume = nib.Nifti1Image(values, affine)
        volume.header.set_xyzt_units("mm")
        volume.set_qform(affine, code=1)
        volume.set_sform(affine, code=1)
        with replacing(file) as temporary:
            nib.save(volume, temporary)
        litre = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
        counts = np.bincount(values.reshape(-1), minlength=len(self.label_names))
        source = data.get("source") or data["image"].meta["filename_or_obj"]
        place = with_part(source, data["image"].meta.get("part"))
        if self.dicom:
            stack = find_stack(Path(source), place.get("files") or (), bool(place.get("assume_hu")))
            if stack is not None:
                write_label_map(stack, values, affine, self.label_names, self.folder / f"{name}_organs.dcm")
        if self.figures:
            image, spacing = displayed_image(place)
            organs = self.label_names[1:]
            draw_organs(name, image, None, displayed(labels), organs, self.folder / f"{name}.png", spacing)
        volumes = {organ: round(float(counts[i]) * litre, 3) for i, organ in enumerate(self.label_names) if i}
        return {"labels": file.name, "volume_ml": volumes}

    def about(self) -> Row:
        return {"task": "segmentation", "label_names": self.label_names}


def displayed(labels: MetaTensor) -> np.ndarray:
    """Labels (1, X, Y, Z) of a file as radiologists see them, uint8 (D, H, W); axes to Superior, Posterior, Left."""
    turned: Any = Orientation(axcodes="SPL", labels=RAS_LABELS)(labels)
    return torch.as_tensor(turned)[0].cpu().numpy().astype(np.uint8)


def displayed_image(item: Mapping[str, Any]) -> tuple[np.ndarray, tuple[float, ...]]:
    """A volume as `displayed` turns its labels, (D, H, W) in `DISPLAY_WINDOW`, and its spacing."""
    chain = segmentation_transforms(window=DISPLAY_WINDOW, label_map=False, upright=False)
    image = Compose(chain)(item)["image"]
    return image[0].numpy(), voxel_spacing(image)


def voxel_spacing(volume: MetaTensor) -> tuple[float, ...]:
    """mm between voxels along the three axes of a volume (1, ...)."""
    return tuple(float(step) for step in volume.affine[:3, :3].double().norm(dim=0))
