# SPDX-License-Identifier: Apache-2.0
"""The abdomen bundle on real CT: one volume learned by heart, and a label map of another in its own geometry.

Set UNIMEDI_REAL_DATA to a folder with `ct3d/<case>/{ct,label}.nii.gz` and `info.json`, which names the labels.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.common import REPOSITORY, run_bundle

CONFIGS = REPOSITORY / "bundles" / "abdomen_ct_segmentation" / "configs"
REAL = Path(os.environ.get("UNIMEDI_REAL_DATA", ""), "ct3d")
ORGANS = ["spleen", "kidney_right", "kidney_left", "liver"]
MARGIN = 4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("in_process"),
    pytest.mark.skipif(
        not (REAL / "totalseg_trunk" / "label.nii.gz").is_file(), reason="UNIMEDI_REAL_DATA does not name ct3d"
    ),
]


def test_one_volume_by_heart_and_another_segmented(tmp_path: Path) -> None:
    case = REAL / "totalseg_trunk"
    names = {label: int(number) for number, label in json.loads((case / "info.json").read_text())["labels"].items()}
    source = nib.load(case / "label.nii.gz")
    labels = np.asarray(source.dataobj)
    organs = sum(((labels == names[name]) * (i + 1) for i, name in enumerate(ORGANS)), np.zeros_like(labels))
    # the part of the body that holds them: seconds of training on one core
    box = tuple(slice(max(0, axis.min() - MARGIN), axis.max() + 1 + MARGIN) for axis in np.nonzero(organs))
    nib.save(nib.Nifti1Image(organs.astype(np.uint8), source.affine).slicer[box], tmp_path / "organs.nii.gz")
    nib.save(nib.load(case / "ct.nii.gz").slicer[box], tmp_path / "ct.nii.gz")
    item = {"id": "trunk", "patient": "trunk", "dim": 3, "image": "ct.nii.gz", "mask": "organs.nii.gz"}
    meta = {"task": "segmentation", "label_names": ["background", *ORGANS]}
    datalist = {"training": [item], "validation": [], "test": [], "meta": meta}
    (tmp_path / "list.json").write_text(json.dumps(datalist))
    folders = {"dataset_dir": str(tmp_path), "datalist_file": str(tmp_path / "list.json")}
    folders |= {"cache_dir": str(tmp_path / "cache"), "ckpt_dir": str(tmp_path / "models")}
    sizes = {"vol_size": [24, 48, 48], "encoder_weights": "none", "train#repeated#steps": 110, "epochs": 1}
    # the evaluation of a run wants a test split: the volume itself is measured below
    run_bundle(
        CONFIGS / "train.json",
        "train",
        device="cpu",
        **folders,
        **sizes,
        label_names=meta["label_names"],
        output_dir=str(tmp_path / "run"),
        **{"train#random_transforms": [], "run": ["$@train#trainer.run()"]},
    )
    measured = {"evaluation#split": "training", "output_dir": str(tmp_path / "eval"), "evaluation#figures": 1}
    measured |= {"label_names": meta["label_names"], "device": "cpu"}
    run_bundle([CONFIGS / "train.json", CONFIGS / "evaluate.json"], "train", **folders, **sizes, **measured)
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["cases"] == 1
    assert metrics["mean_dice"] > 0.90, metrics["dice"]
    assert all(count == 1 for count in metrics["cases_with"].values())
    other = REAL / "totalseg_dicom_slab" / "ct.nii.gz"
    run_bundle(
        CONFIGS / "inference.json",
        "inference",
        device="cpu",
        inputs=str(other),
        checkpoint=str(tmp_path / "models" / "model.pt"),
        output_dir=str(tmp_path / "out"),
    )
    (row,) = json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"]
    written, image = nib.load(tmp_path / "out" / row["labels"]), nib.load(other)
    assert written.shape == image.shape
    assert np.allclose(written.affine, image.affine, atol=1e-4)
    assert (tmp_path / "out" / f"{row['id']}.png").stat().st_size > 0
