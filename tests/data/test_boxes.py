# SPDX-License-Identifier: Apache-2.0
"""Boxes from the file's pixels to masks and to the network's input, and back, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    Flipd,
    RandAffined,
    RandSpatialCropd,
    Resized,
    Rotate90d,
    SpatialPadd,
)

from unimedi_components.data.boxes import BoxesToImaged, BoxesToMaskd, boxes_to_file, boxes_to_image
from unimedi_components.errors import DataError

LONGEST = Resized("image", spatial_size=64, size_mode="longest", mode="area")
PAD = SpatialPadd("image", spatial_size=(64, 64))
CROP = CenterSpatialCropd("image", roi_size=(56, 56))


def item(boxes, shape=(100, 200), **more):
    return {"id": "a", "image": MetaTensor(torch.zeros(1, *shape)), "boxes": boxes, **more}


def moved(boxes, *steps, **options):
    return Compose([*steps, BoxesToImaged(**options)])(item(boxes))


def rectangles(mask):
    """The box around the mask's non-zero pixels and how many there are."""
    rows, columns = torch.nonzero(mask[0], as_tuple=True)
    box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
    return box, len(rows)


def test_resize_pad_crop_flip_by_hand():
    # 200 x 100 pixels to 64 x 32: 3.125 pixels of the file to one
    box = [[50.0, 25.0, 100.0, 75.0]]
    expected = [
        ([], [50, 25, 100, 75]),
        ([LONGEST], [16, 8, 32, 24]),
        ([LONGEST, PAD], [16, 24, 32, 40]),
        ([LONGEST, PAD, CROP], [12, 20, 28, 36]),
        # 56 - 28 and 56 - 12
        ([LONGEST, PAD, CROP, Flipd("image", spatial_axis=1)], [28, 20, 44, 36]),
        ([LONGEST, PAD, CROP, Flipd("image", spatial_axis=0)], [12, 20, 28, 36]),
    ]
    for steps, corners in expected:
        found = moved(box, *steps)
        assert found["boxes"].dtype == torch.float32 and found["boxes"].shape == (1, 4)
        np.testing.assert_allclose(found["boxes"].numpy(), [corners], atol=1e-5)
        mask = Compose([*steps, BoxesToMaskd()])(item(box))["mask"]
        assert rectangles(mask) == (corners, (corners[2] - corners[0]) * (corners[3] - corners[1]))
        assert mask.dtype == torch.float32 and set(mask.unique().tolist()) == {0, 1}


def test_mask_on_the_files_own_grid():
    # centres 0.5, 1.5, ...: 1.5 lies in [1.5, 3.5), 3.5 does not; rows 2 and 3 have their centres in [1.6, 4)
    mask = BoxesToMaskd()(item([[1.5, 1.6, 3.5, 4.0], [6, 0, 7, 1]], (5, 8)))["mask"]
    assert isinstance(mask, MetaTensor) and mask.shape == (1, 5, 8)
    assert torch.nonzero(mask[0]).tolist() == [[0, 6], [2, 1], [2, 2], [3, 1], [3, 2]]
    assert torch.equal(mask.affine, torch.eye(4, dtype=torch.float64))
    assert not BoxesToMaskd()(item([], (5, 8)))["mask"].any()
    # a centre on the edge after a resize: 512 of 1024 pixels is 146.5 of 293, whose pixel 146 lies in [512, ...)
    half = item([[512, 0, 1024, 1024]], (1024, 1024))
    mask = BoxesToMaskd()(Resized("image", spatial_size=(293, 293), mode="area")(half))["mask"]
    assert rectangles(mask) == ([146, 0, 293, 293], 147 * 293)


def test_boxes_beyond_the_crop():
    # 0..200 becomes 0..64, minus 4: clipped to 0..56; 0..100 becomes 16..48, minus 4
    found = moved([[0, 0, 200, 100]], LONGEST, PAD, CROP)
    np.testing.assert_allclose(found["boxes"].numpy(), [[0, 12, 56, 44]], atol=1e-5)
    # 15.625 is 5 wide, of which 1 is left: a fifth; 14 is 4.48 wide, of which 0.48 are left: 10.7%
    edge = [[0, 25, 15.625, 75], [0, 25, 14, 75], [0, 25, 12, 75], [190, 25, 200, 75], [90, 25, 100, 75]]
    found = moved(edge, LONGEST, PAD, CROP)
    np.testing.assert_allclose(found["boxes"].numpy(), [[0, 20, 1, 36], [24.8, 20, 28, 36]], atol=1e-5)
    assert len(moved(edge, LONGEST, PAD, CROP, min_visible=0.1)["boxes"]) == 3
    assert len(moved(edge, LONGEST, PAD, CROP, min_visible=1)["boxes"]) == 1
    # 12 becomes 3.84, minus 4: nothing is left, however little is asked for
    assert len(moved(edge, LONGEST, PAD, CROP, min_visible=0)["boxes"]) == 3
    assert moved([], LONGEST)["boxes"].shape == (0, 4)


def test_way_back_to_the_file():
    rng = np.random.default_rng(1)
    first = rng.uniform(0, 80, (50, 2))
    boxes = torch.as_tensor(np.hstack([first, first + rng.uniform(1, 20, (50, 2))]))
    steps = [LONGEST, PAD, CROP, Flipd("image", spatial_axis=1), Rotate90d("image", k=1)]
    affine = moved([[80, 40, 90, 50]], *steps)["affine"]
    assert affine.shape == (4, 4) and affine.dtype == torch.float64
    there = boxes_to_image(boxes, affine)
    assert not torch.allclose(there, boxes)
    assert (boxes_to_file(there, affine) - boxes).abs().max() < 1e-6
    assert boxes_to_file([], affine).shape == (0, 4)
    # a prediction of the whole crop after resize, pad and crop: 3.125 * (0 + 4) and 3.125 * (0 + 4 - 16)
    affine = moved([[80, 40, 90, 50]], LONGEST, PAD, CROP)["affine"]
    expected = [[12.5, -37.5, 187.5, 137.5]]
    np.testing.assert_allclose(boxes_to_file([[0, 0, 56, 56]], affine).numpy(), expected, atol=1e-6)


def test_painting_last_equals_painting_first():
    rng = np.random.default_rng(2)
    first = rng.integers(0, 80, (4, 2))
    boxes = np.hstack([first, first + rng.integers(1, 30, (4, 2))]).tolist()
    # 120 to 40 pixels: centres 1.5, 4.5, ... fall on centres of the file's pixels
    keys = ["image", "mask"]
    rest = [
        Resized(keys, spatial_size=40, size_mode="longest", mode=("area", "nearest-exact")),
        SpatialPadd(keys, spatial_size=(40, 40)),
        CenterSpatialCropd(keys, roi_size=(36, 36)),
        Flipd(keys, spatial_axis=1),
        Rotate90d(keys),
    ]
    start = item(boxes, (96, 120))
    early = Compose([BoxesToMaskd(), *rest])(start)["mask"]
    late = BoxesToMaskd()(Compose([BoxesToMaskd(), *rest])(start))["mask"]
    assert torch.equal(early.as_tensor(), late.as_tensor()) and 0 < early.mean() < 1


def test_rotated_film_gets_the_box_around():
    turn = RandAffined(
        ["image", "mask"], prob=1, rotate_range=[(0.3, 0.3)], spatial_size=(100, 100), mode=("bilinear", "nearest")
    )
    found = Compose([BoxesToMaskd(), turn, BoxesToImaged()])(item([[40, 30, 60, 70]], (100, 100)))
    # half sides 10 and 20: 10 cos + 20 sin = 15.46 across, 10 sin + 20 cos = 22.06 down, about the centre
    np.testing.assert_allclose(found["boxes"].numpy(), [[34.536, 27.938, 65.464, 72.062]], atol=2e-3)
    box, count = rectangles(found["mask"])
    assert np.abs(np.subtract(box, found["boxes"][0].numpy())).max() < 1.5 and abs(count - 800) < 30


def test_a_box_in_every_place_of_a_crop():
    crop = RandSpatialCropd(["image", "mask"], roi_size=(40, 40), random_size=False).set_random_state(0)
    found = Compose([LONGEST, PAD, BoxesToMaskd(), crop, BoxesToImaged()])(item([[50, 25, 100, 75]]))
    assert rectangles(found["mask"])[0] == found["boxes"][0].tolist()


@pytest.mark.parametrize(
    ("boxes", "fault"),
    [([[1, 2, 3]], r"shape \(1, 3\)"), ([[5, 1, 5, 9]], "x1 beyond x0"), ([[1, 1, float("nan"), 9]], "finite")],
)
def test_bad_boxes(boxes, fault):
    with pytest.raises(DataError, match=fault):
        BoxesToMaskd()(item(boxes))
    with pytest.raises(DataError, match=fault):
        BoxesToImaged()(item(boxes))


def test_what_cannot_be_placed():
    bare = {"id": "a", "image": torch.zeros(1, 8, 8), "boxes": []}
    with pytest.raises(DataError, match="'image' of item 'a' is no MetaTensor"):
        BoxesToImaged()(bare)
    with pytest.raises(DataError, match="min_visible 20 is not in"):
        BoxesToImaged(min_visible=20)
