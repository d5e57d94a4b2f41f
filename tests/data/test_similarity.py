# SPDX-License-Identifier: Apache-2.0
"""Drawn matrices of the random scale and rotation, of the class and of each bundle's configs."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from unimedi_components.data import RandSimilarityd

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"


def drawn(transform: RandSimilarityd, shape: tuple[int, ...], count: int = 300) -> np.ndarray:
    """The linear parts of `count` drawn matrices, (count, d, d); ones where no transform was drawn are left out."""
    transform.set_random_state(5)
    matrices = []
    for _ in range(count):
        before = transform.rand_affine.rand_affine_grid.affine
        transform({key: torch.zeros(1, *shape) for key in transform.keys})
        matrix = transform.rand_affine.rand_affine_grid.affine
        if matrix is not before:
            matrices.append(matrix[: len(shape), : len(shape)].numpy())
    return np.stack(matrices)


def factors(matrices: np.ndarray) -> np.ndarray:
    """One scale factor per matrix; fails unless each matrix is that factor times a rotation."""
    scale = np.linalg.det(matrices) ** (1 / matrices.shape[-1])
    product = matrices @ matrices.transpose(0, 2, 1)
    np.testing.assert_allclose(product, scale[:, None, None] ** 2 * np.eye(matrices.shape[-1]), atol=1e-6)
    return scale


def from_config(bundle: str, *overlays: str) -> RandSimilarityd:
    parser = ConfigParser()
    parser.read_config([str(BUNDLES / bundle / "configs" / f"{name}.json") for name in ("train", *overlays)])
    parser["train#random_transforms"] = [
        step
        for step in parser["train#random_transforms"]
        if "Affine" in step["_target_"] or "Simil" in step["_target_"]
    ]
    (found,) = parser.get_parsed_content("train#random_transforms")
    return found


@pytest.mark.parametrize("overlays", [(), ("bcv",), ("amos",)])
def test_abdomen_scales_all_axes_alike(overlays):
    """Magnified by 0.7 to 1.4, which is 1 / 1.4 to 1 / 0.7 on the sampling grid, and turned about the body's axis."""
    matrices = drawn(from_config("abdomen_ct_segmentation", *overlays), (4, 6, 6), 1500)
    assert 0.25 < len(matrices) / 1500 < 0.35
    scale = factors(matrices)
    assert 1 - 0.286 < scale.min() < 0.75 and 1.38 < scale.max() < 1 + 0.429
    turned = matrices / scale[:, None, None]
    np.testing.assert_allclose(turned[:, 0], np.tile([1.0, 0.0, 0.0], (len(turned), 1)), atol=1e-6)
    angles = np.degrees(np.arctan2(turned[:, 2, 1], turned[:, 1, 1]))
    assert -30 < angles.min() < -28 and 28 < angles.max() < 30
    assert abs(np.corrcoef(scale, angles)[0, 1]) < 0.15


@pytest.mark.parametrize("overlays", [(), ("rsna",)])
def test_films_scale_both_axes_alike(overlays):
    matrices = drawn(from_config("chest_xray_segmentation", *overlays), (8, 8), 600)
    assert 0.42 < len(matrices) / 600 < 0.58
    scale = factors(matrices)
    assert 0.9 < scale.min() < 0.91 and 1.09 < scale.max() < 1.1
    angles = np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    assert -10 < angles.min() < -9.5 and 9.5 < angles.max() < 10


def test_detection_zooms_both_axes_alike():
    parser = ConfigParser()
    parser.read_config(str(BUNDLES / "chest_xray_detection" / "configs" / "train.json"))
    (config,) = (step for step in parser["train#random_transforms"] if "RandZoomBoxd" in step["_target_"])
    parser["train#random_transforms"] = [config]
    (zoom,) = parser.get_parsed_content("train#random_transforms")
    zoom.set_random_state(1)
    found = []
    for _ in range(100):
        zoom({"image": torch.zeros(1, 160, 160), "boxes": torch.tensor([[4.0, 4, 8, 8]])})
        found.append(tuple(zoom.rand_zoom._zoom))
    assert all(row == column for row, column in found) and len({row for row, _ in found}) > 20
    assert min(found)[0] >= 0.9 and max(found)[0] <= 1.1


def test_content_shrinks_by_the_factor_and_the_mask_follows():
    """A cuboid of 12 x 24 x 24 voxels at 1 / 1.5 of its size has 8 x 16 x 16, in the image and in the mask."""
    image = torch.zeros(1, 24, 48, 48)
    image[0, 6:18, 12:36, 12:36] = 1
    keys = {"keys": ("image", "mask"), "mode": ("bilinear", "nearest"), "prob": 1.0}
    moved = RandSimilarityd(**keys, scale_range=(0.5, 0.5), rotate_range=0.0)({"image": image, "mask": image})
    for key in ("image", "mask"):
        spans = [(where.min(), where.max()) for where in torch.nonzero(moved[key][0] > 0.5, as_tuple=True)]
        assert [int(high - low) + 1 for low, high in spans] == [8, 16, 16]
    turned = RandSimilarityd(**keys, scale_range=(0, 0), rotate_range=[(math.pi / 2, math.pi / 2), 0, 0])
    image[0, :, :, 24:] = 0
    expected = torch.rot90(image, -1, (2, 3))
    assert torch.allclose(turned({"image": image, "mask": image})["mask"].as_tensor(), expected)


@pytest.mark.parametrize("pair", [(0.1,), (0.2, 0.1), (-1.0, 0.1), (-0.2, 0.1, 0.0)])
def test_what_is_no_range_is_refused(pair):
    with pytest.raises(ValueError, match="scale_range must be"):
        RandSimilarityd("image", scale_range=pair, rotate_range=0.0, prob=1.0)
