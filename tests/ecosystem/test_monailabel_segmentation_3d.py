# SPDX-License-Identifier: Apache-2.0
"""MONAI Label's own tasks over the abdomen bundle: inference in the image's geometry, training, and both in turn."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.usefixtures("in_process")
NAME = "abdomen_ct_segmentation"
# turned by 3-4-5 about the left-right axis
AFFINE = np.array([[-2.0, 0, 0, 40], [0, 1.2, -2.4, -30], [0, 0.9, 3.2, 10], [0, 0, 0, 1]])


@pytest.fixture
def bundle(app_folder: Path, tiny_bundle: Any) -> Path:
    """The bundle in the app's `model` folder, alone: without the repository, its pretrain bundle and its data."""
    return tiny_bundle(NAME, app_folder / "model")


def write_case(folder: Path, number: int) -> tuple[Path, Path]:
    """A volume with two organs, as files of a datastore."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(number)
    values, labels = rng.normal(-800, 50, (26, 30, 19)), np.zeros((26, 30, 19), np.uint8)
    labels[4:14, 6:18, 4:14], labels[16:24, 10:22, 5:12] = 6, 1
    values[labels == 6], values[labels == 1] = 100, 200
    image, label = folder / f"{number}.nii.gz", folder / f"{number}_label.nii.gz"
    nib.save(nib.Nifti1Image(values.astype(np.int16), AFFINE), image)
    nib.save(nib.Nifti1Image(labels, AFFINE), label)
    return image, label


def test_inference_restores_the_geometry(bundle: Path, monailabel: Any, tmp_path: Path) -> None:
    image, _ = write_case(tmp_path / "images", 0)
    before = sorted(path.relative_to(bundle) for path in bundle.rglob("*"))
    task = monailabel.BundleInferTask(str(bundle), {})
    assert task.is_valid()
    info = task.info()
    assert (str(info["type"].value), info["dimension"]) == ("segmentation", 3)
    assert info["labels"]["spleen"] == 1 and info["labels"]["left adrenal gland"] == 13
    assert "background" not in info["labels"]
    assert task.config()["sw_overlap"] == 0.5
    request = {
        "model": NAME,
        "image": str(image),
        "device": "cpu",
        "result_extension": ".nii.gz",
        "result_dtype": "uint8",
    }
    file, _ = task({**task.config(), **request})
    written = nib.load(file)
    assert written.shape == (26, 30, 19)
    assert np.allclose(written.affine, AFFINE, atol=1e-4)
    labels = np.asarray(written.dataobj)
    assert len(np.unique(labels)) > 2 and labels.max() <= 13
    assert sorted(path.relative_to(bundle) for path in bundle.rglob("*")) == before
    # the same as inference.json by itself
    from monai.bundle import ConfigWorkflow

    made = ConfigWorkflow(
        str(bundle / "configs" / "inference.json"),
        workflow_type="inference",
        logging_file=False,
        bundle_root=str(bundle),
        inputs=str(image),
        output_dir=str(tmp_path / "out"),
        figures=False,
        device="cpu",
    )
    made.initialize()
    made.run()
    own = np.asarray(nib.load(tmp_path / "out" / "0_organs.nii.gz").dataobj)
    assert np.array_equal(own, labels)


def test_training_and_then_inference(bundle: Path, monailabel: Any, tmp_path: Path) -> None:
    cases = [write_case(tmp_path / "images", number) for number in range(3)]
    items = [{"image": str(image), "label": str(label), "meta": {"name": "not used"}} for image, label in cases]
    store = SimpleNamespace(datalist=lambda: items)
    before = torch.load(bundle / "models" / "model.pt")
    task = monailabel.BundleTrainTask(str(bundle), {})
    assert task.is_valid()
    options = {"max_epochs": 2, "val_split": 0.34, "device": "cpu", "multi_gpu": False, "pretrained": True}
    assert task({"model": NAME, **options}, store) == {}
    after = torch.load(bundle / "models" / "model.pt")
    assert before.keys() == after.keys()
    assert not torch.equal(after["out.conv.conv.weight"], before["out.conv.conv.weight"])
    assert not torch.equal(after["encoder.blocks.0.attn.qkv.weight"], before["encoder.blocks.0.attn.qkv.weight"])
    metrics = json.loads((bundle / "eval" / "metrics.json").read_text())
    assert (metrics["split"], metrics["cases"]) == ("validation", 1)
    assert metrics["cases_with"]["liver"] == metrics["cases_with"]["spleen"] == 1
    state = torch.load(bundle / "models" / "last.ckpt")
    # with a validation case the best epoch counts
    assert state["best"] == max(row["val_dice"] for row in state["history"]["rows"] if "val_dice" in row)
    # images of the datastore alone: no phantoms
    assert [path.name for path in (bundle / "data").iterdir()] == ["cache"]
    infer = monailabel.BundleInferTask(str(bundle), {})
    file, _ = infer({**infer.config(), "model": NAME, "image": items[0]["image"], "device": "cpu"})
    assert nib.load(file).shape == (26, 30, 19)
    assert infer.config()["model_filename"] == ["model.pt"]
