# SPDX-License-Identifier: Apache-2.0
"""Transform chains by name: the same images as the functions that the names stand for."""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose
from PIL import Image

from unimedi_components.data import ct_transforms, xray_transforms
from unimedi_components.data.chains import CHAINS, task_transforms
from unimedi_components.data.cubes import luna_cube_transforms
from unimedi_components.data.films import film_transforms
from unimedi_components.data.fingerprint import fingerprint
from unimedi_components.data.segmentation import segmentation_transforms
from unimedi_components.data.slices import slice_volume_transforms
from unimedi_components.errors import ConfigError

SIZE = (4, 6, 6)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A film, a volume of 10 z - 500 Hounsfield units, a folder of six slices with 40 z grey levels from the head."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (30, 24), dtype=np.uint8)).save(folder / "film.png")
    voxels = np.broadcast_to(np.arange(8, dtype=np.int16) * 10 - 500, (12, 12, 8)).copy()
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 2.0, 1.0])), folder / "volume.nii.gz")
    (folder / "scan").mkdir()
    for i in range(6):
        Image.fromarray(np.full((6, 6), 40 * i, dtype=np.uint8)).save(folder / "scan" / f"{i:04d}.png")
    return folder


def run(chain, path, **fields):
    return Compose(chain)({"image": str(path), **fields})["image"]


def test_names_stand_for_functions(files):
    assert {
        "xray": xray_transforms,
        "ct": ct_transforms,
        "slices": slice_volume_transforms,
        "cube": luna_cube_transforms,
        "film": film_transforms,
        "organs": segmentation_transforms,
    } == CHAINS
    cases = [
        ({"xray": {"size": 16}}, xray_transforms(16), "film.png", {}),
        ({"ct": {"spatial_size": SIZE, "window": [-600, 0]}}, ct_transforms(SIZE, (-600, 0)), "volume.nii.gz", {}),
        ({"slices": {"spatial_size": SIZE}}, slice_volume_transforms(SIZE), "scan", {}),
        ({"film": {"size": 16}}, film_transforms(16), "film.png", {}),
        (
            {"organs": {"spatial_size": SIZE, "label_map": False}},
            segmentation_transforms(SIZE, label_map=False),
            "volume.nii.gz",
            {},
        ),
        ({"cube": {"size": SIZE}}, luna_cube_transforms(SIZE), "volume.nii.gz", {"center": [-5.0, -5.0, 8.0]}),
    ]
    for preprocessing, expected, name, fields in cases:
        found = run(task_transforms(preprocessing), files / name, **fields)
        assert torch.equal(found, run(expected, files / name, **fields)), preprocessing
        assert found.shape == ((1, 16, 16) if name == "film.png" else (1, *SIZE))


def test_options_reach_the_chain(files):
    plain, random = (task_transforms({"xray": {"size": 16}}, random_crop=crop) for crop in (False, True))
    assert [type(t).__name__ for t in plain] != [type(t).__name__ for t in random]
    assert "RandSpatialCropd" in [type(t).__name__ for t in random]


def test_slices_and_volumes_by_what_lies_there(files):
    both = {
        "slices": {"spatial_size": SIZE, "grey_window": [-1350, 150], "window": [-1000, 1000]},
        "ct": {"spatial_size": SIZE, "window": [-1000, 1000]},
    }
    chain = task_transforms(both)
    volume = run(chain, files / "volume.nii.gz")
    # two slices are averaged: 5, 25, 45 and 65 above -500, over 1000
    expected = torch.tensor([-0.495, -0.475, -0.455, -0.435])
    assert torch.allclose(volume.mean((0, 2, 3)), expected, atol=1e-6)
    slices = run(chain, files / "scan")
    assert torch.equal(slices, run(slice_volume_transforms(**both["slices"]), files / "scan"))
    # four of six slices, and the first file is the head's: HU = grey / 255 * 1500 - 1350
    grey = 255 * ((slices.mean((0, 2, 3)) * 1000 + 1350) / 1500)
    shown = torch.tensor([200.0, 160.0, 120.0, 80.0, 40.0])
    assert all(min(abs(float(value - level)) for level in shown) < 1e-2 for value in grey if value > 60)
    assert (grey[:-1] > grey[1:]).all()


def test_a_cache_tells_their_parameters_apart():
    def of(window):
        return fingerprint(task_transforms({"slices": {"spatial_size": SIZE}, "ct": {"window": window}}))

    assert of([-1000, 1000]) == of([-1000, 1000])
    assert of([-1000, 1000]) != of([-1000, 400])
    assert fingerprint(task_transforms({"slices": {"spatial_size": SIZE}, "ct": {}})) != fingerprint(
        task_transforms({"slices": {"spatial_size": SIZE, "first_slice": "foot"}, "ct": {}})
    )


@pytest.mark.parametrize("names", [[], ["xrays"], ["xray", "ct"], ["slices", "cube"], ["slices", "ct", "xray"]])
def test_other_names_are_refused(names):
    with pytest.raises(ConfigError, match=r"must be one of xray, ct, slices, cube, film, organs, or slices"):
        task_transforms({name: {} for name in names})
