# SPDX-License-Identifier: Apache-2.0
"""evaluate_task of a CT segmenter: predictions on the files' own voxels, against the network alone."""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.transforms import Compose

from unimedi_components.data import segmentation_transforms
from unimedi_components.errors import DataError
from unimedi_components.networks import UnifiedViT, network_card
from unimedi_components.networks.unetr import UnifiedUNETR
from unimedi_components.tasks import evaluate_task

SIZE, NAMES = (8, 24, 24), ["background", "liver", "spleen"]
# columns to the right, rows to the front: the network sees both turned
AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    encoder = UnifiedViT(32, SIZE, patch_size_3d=(4, 12, 12), embed_dim=16, depth=2, num_heads=2)
    made = UnifiedUNETR(encoder, len(NAMES), hidden_states=(0, 1), feature_size=4)
    torch.nn.init.normal_(made.out.conv.conv.weight, std=1.0)
    return made.eval()


@pytest.fixture
def checkpoint(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "model.pt")
    organs = {"spatial_size": SIZE, "spacing": None, "window": (-175, 250), "num_classes": len(NAMES)}
    card = network_card(network, "segmentation", NAMES, {"organs": organs})
    (tmp_path / "model.json").write_text(json.dumps(card))
    return tmp_path / "model.pt"


def write(folder, name, mask_shape=(24, 24, 8)):
    rng = np.random.default_rng(ord(name))
    nib.save(nib.Nifti1Image(rng.integers(-200, 300, (24, 24, 8)).astype(np.int16), AFFINE), folder / f"{name}.nii.gz")
    nib.save(nib.Nifti1Image(rng.integers(0, 3, mask_shape).astype(np.uint8), AFFINE), folder / f"{name}_mask.nii.gz")
    return {"id": name, "patient": name, "dim": 3, "image": f"{name}.nii.gz", "mask": f"{name}_mask.nii.gz"}


def test_scores_are_those_of_the_files_voxels(checkpoint, network, tmp_path):
    items = [write(tmp_path, "a"), write(tmp_path, "b", mask_shape=(24, 24, 7)), write(tmp_path, "c")]
    lists = {"training": [], "validation": [], "test": items}
    values = evaluate_task(checkpoint, lists, tmp_path, tmp_path / "eval", batch_size=2, bootstrap=0, figures=1)
    # a label map of another shape is left out, and counted
    assert (values["cases"], values["skipped_files"], values["task"]) == (2, 1, "segmentation")
    table = pd.read_csv(tmp_path / "eval" / "cases.csv")
    chain = Compose(segmentation_transforms(label_map=False))
    for name in "ac":
        with torch.no_grad():
            labels = network(chain({"image": str(tmp_path / f"{name}.nii.gz")})["image"][None])[0].argmax(0).numpy()
        # slices from foot to head, rows from front to back, columns to the patient's left
        found = labels[:, ::-1, ::-1].transpose(2, 1, 0)
        truth = np.asarray(nib.load(tmp_path / f"{name}_mask.nii.gz").dataobj)
        rows = table[table["id"] == name].set_index("organ")
        for index, organ in enumerate(NAMES[1:], start=1):
            both, sizes = ((found == index) & (truth == index)).sum(), [(m == index).sum() for m in (found, truth)]
            assert rows.loc[organ, "dice"] == pytest.approx(2 * both / sum(sizes))
            assert rows.loc[organ, ["predicted_voxels", "voxels"]].tolist() == sizes
    assert len(list((tmp_path / "eval").glob("*.png"))) == 1


def test_nothing_readable_names_the_first_file(checkpoint, tmp_path):
    item = write(tmp_path, "b", mask_shape=(24, 24, 7))
    with pytest.raises(DataError, match=r"none of 1 volumes can be read, first .*b\.nii\.gz: .*24x24x7"):
        evaluate_task(checkpoint, {"training": [], "validation": [], "test": [item]}, tmp_path)
