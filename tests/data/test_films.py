# SPDX-License-Identifier: Apache-2.0
"""Films with masks and boxes, from files written by hand, against numbers worked out by hand."""

from __future__ import annotations

import itk
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from PIL import Image

from unimedi_components.data.boxes import boxes_to_file
from unimedi_components.data.films import film_transforms
from unimedi_components.data.restore import Restored
from unimedi_components.data.transforms import ByDimension, xray_transforms
from unimedi_components.errors import ConfigError, DataError

HEIGHT, WIDTH = 150, 230
BOX = [60, 30, 120, 90]


@pytest.fixture
def film(tmp_path):
    rng = np.random.default_rng(3)
    path = tmp_path / "a.png"
    Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)).save(path)
    return path


def item(path, **more):
    return {"id": "a", "dim": 2, "image": str(path), "label": 1, **more}


def drawn():
    """A mask with one corner cut out, so that no flip or turn of it is itself."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[30:90, 60:120] = 255
    mask[30:50, 60:90] = 0
    return mask


def test_image_is_that_of_the_plain_chain(film):
    plain = ByDimension(xray_transforms(64))(item(film))["image"]
    for options in ({}, {"target": "mask"}, {"target": "boxes"}, {"target": "mask", "keep_meta": True}):
        found = ByDimension(film_transforms(64, long_side=73, **options))(item(film, boxes=[BOX]))
        assert torch.equal(torch.as_tensor(found["image"]), plain), options
        assert isinstance(found["image"], MetaTensor) == bool(options.get("keep_meta"))
        assert found["label"] == 1 and ("boxes" in found) == (options.get("target") == "boxes")
    assert film_transforms(64)[2].padder.spatial_size == (64, 64)


def test_boxes_by_hand(film):
    found = ByDimension(film_transforms(64, long_side=73, target="boxes"))(item(film, boxes=[BOX]))
    # long side 73: 230 to 73 columns and 150 to 48 rows, 12 rows of padding above, 4 cut off on each side
    x, y = 73 / 230, 48 / 150
    expected = [[60 * x - 4, 30 * y + 12 - 4, 120 * x - 4, 90 * y + 12 - 4]]
    np.testing.assert_allclose(found["boxes"].numpy(), expected, atol=1e-4)
    assert boxes_to_file(found["boxes"], found["affine"]).numpy() == pytest.approx(np.array([BOX]), abs=1e-4)
    # a centre crop of half the side leaves less than a fifth of a box in the corner
    corner = item(film, boxes=[[0, 0, 60, 40], BOX])
    half = ByDimension(film_transforms(36, long_side=73, target="boxes"))(corner)
    assert half["boxes"].shape == (1, 4)
    everything = ByDimension(film_transforms(36, long_side=73, target="boxes", min_visible=0.01))(corner)
    assert everything["boxes"].shape == (2, 4)


@pytest.mark.parametrize("ending", ["png", "tif", "nii.gz", "nrrd"])
def test_mask_file_equals_its_pixels(film, tmp_path, ending):
    path = tmp_path / f"mask.{ending}"
    if ending in ("png", "tif"):
        Image.fromarray(drawn()).save(path)
    else:
        itk.imwrite(itk.image_from_array(drawn()[None]), str(path))
    (found,) = [ByDimension(film_transforms(WIDTH, target="mask"))(item(film, mask=str(path)))["mask"]]
    # padded to a square: 40 rows above
    assert np.array_equal(found[0, 40 : 40 + HEIGHT].numpy(), drawn() / 255)
    assert float(found.sum()) == (drawn() > 0).sum() and found.dtype == torch.float32


def test_a_turned_picture_turns_its_mask_too(tmp_path):
    """The EXIF rotation of film and mask alike: both are upright afterwards."""
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient = np.tile(np.arange(WIDTH, dtype=np.uint8), (HEIGHT, 1))
    for name, pixels in (("film.png", gradient), ("mask.png", drawn())):
        Image.fromarray(np.rot90(pixels)).save(tmp_path / name, exif=exif)
    chain = ByDimension(film_transforms(WIDTH, target="mask"))
    found = chain(item(tmp_path / "film.png", mask=str(tmp_path / "mask.png")))
    assert np.array_equal(found["mask"][0, 40 : 40 + HEIGHT].numpy(), drawn() / 255)


def test_prediction_goes_back_to_the_file(film):
    chain = Compose(film_transforms(WIDTH, target="mask", keep_meta=True))
    found = chain(item(film, boxes=[BOX]))
    assert isinstance(found["mask"], MetaTensor)
    back = Restored(chain)({**found, "pred": found["mask"].clone()})["pred"]
    expected = np.zeros((HEIGHT, WIDTH))
    expected[30:90, 60:120] = 1
    assert np.array_equal(back[0].numpy(), expected)


def test_faults(film, tmp_path):
    chain = Compose(film_transforms(64, target="mask"))

    def fault(**more):
        with pytest.raises(RuntimeError) as caught:
            chain(item(film, **more))
        return str(caught.value.__cause__)

    assert "'a' has neither a mask nor boxes" in fault()
    Image.fromarray(drawn()[:-1]).save(tmp_path / "short.png")
    assert "the mask has 230 x 149 pixels, its film 230 x 150" in fault(mask=str(tmp_path / "short.png"))
    itk.imwrite(itk.image_from_array(np.zeros((2, HEIGHT, WIDTH), np.uint8)), str(tmp_path / "two.nii"))
    assert "2 slices where the mask of one film" in fault(mask=str(tmp_path / "two.nii"))
    assert "no such file" in fault(mask=str(tmp_path / "none.nii"))
    with pytest.raises(ConfigError, match="target 'masks' of a film is unknown"):
        film_transforms(64, target="masks")
    with pytest.raises(DataError, match="size 64 is larger than long_side 60"):
        film_transforms(64, long_side=60)
