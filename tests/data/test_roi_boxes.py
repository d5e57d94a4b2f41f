# SPDX-License-Identifier: Apache-2.0
"""Regions of interest in a film's world, against ITK's own mapping of points, and boxes under MONAI's transforms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import itk
import numpy as np
import pytest
import torch
from monai.apps.detection.transforms.dictionary import RandFlipBoxd, RandZoomBoxd
from monai.data import MetaTensor
from monai.transforms import Compose
from PIL import Image

from unimedi_components.data.augment import RowsFirstBoxesd, ToInputBoxesd
from unimedi_components.data.roi_boxes import boxes_of_rois, rois_of_boxes
from unimedi_components.errors import DataError
from unimedi_components.tasks import RoisOfBoxesd

BOXES = [[10.0, 20, 50, 90], [0, 0, 1, 1]]


def film(path: Path, spacing: list[float], origin: list[float], turn: list[list[float]] | None = None) -> Path:
    image = itk.image_from_array(np.random.default_rng(0).integers(0, 4000, (120, 70)).astype(np.uint16))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    if turn is not None:
        image.SetDirection(np.asarray(turn, dtype=np.float64))
    itk.imwrite(image, str(path))
    return path


def index_of(column: float, row: float, ndim: int) -> Any:
    index = itk.ContinuousIndex[itk.D, ndim]()
    index.Fill(0)
    index[0], index[1] = column, row
    return index


@pytest.mark.parametrize("name", ["film.nrrd", "film.dcm", "film.mha"])
def test_a_region_is_where_itk_puts_its_corners(name: str, tmp_path: Path) -> None:
    path = film(tmp_path / name, [0.5, 0.7], [12.0, -30.0] if name != "film.dcm" else [0.0, 0.0])
    image = itk.imread(str(path))
    ndim = image.GetImageDimension()
    for (x0, y0, x1, y1), roi in zip(BOXES, rois_of_boxes(path, BOXES), strict=True):
        # the edge of a pixel lies half a pixel before its centre
        corners = [
            np.asarray(image.TransformContinuousIndexToPhysicalPoint(index_of(x - 0.5, y - 0.5, ndim)))[:2]
            for x, y in ((x0, y0), (x1, y1))
        ]
        centre, size = np.mean(corners, 0), np.abs(corners[1] - corners[0])
        assert roi[:2] == pytest.approx(centre.tolist())
        assert roi[3:5] == pytest.approx(size.tolist())
        assert roi[5] == pytest.approx(float(np.asarray(image.GetSpacing())[2]) if ndim > 2 else 1.0)
    assert np.allclose(boxes_of_rois(path, rois_of_boxes(path, BOXES)), BOXES)


def test_in_a_picture_millimetres_are_pixels(tmp_path: Path) -> None:
    for name in ("film.png", "film.jpg", "film.webp"):
        Image.fromarray(np.zeros((120, 70), np.uint8)).save(tmp_path / name)
        assert rois_of_boxes(tmp_path / name, BOXES)[0] == pytest.approx([29.5, 54.5, 0, 40, 70, 1])
        assert boxes_of_rois(tmp_path / name, [[29.5, 54.5, 7, 40, 70, 3]]) == [pytest.approx(BOXES[0])]


def test_a_film_that_is_turned_in_its_plane(tmp_path: Path) -> None:
    """Columns run against x, rows against y, as Slicer shows many films; a quarter turn swaps width and height."""
    path = film(tmp_path / "a.nrrd", [0.5, 1.0], [100.0, 50.0], [[-1, 0], [0, -1]])
    (roi, _) = rois_of_boxes(path, BOXES)
    assert roi == pytest.approx([100 - 0.5 * 29.5, 50 - 54.5, 0, 20, 70, 1])
    assert np.allclose(boxes_of_rois(path, [roi]), BOXES[:1])
    path = film(tmp_path / "b.nrrd", [0.5, 1.0], [0.0, 0.0], [[0, 1], [1, 0]])
    (roi, _) = rois_of_boxes(path, BOXES)
    assert roi == pytest.approx([54.5, 0.5 * 29.5, 0, 70, 20, 1])
    assert np.allclose(boxes_of_rois(path, [roi]), BOXES[:1])


def test_what_has_no_place_is_named(tmp_path: Path) -> None:
    path = film(tmp_path / "a.nrrd", [1.0, 1.0], [0.0, 0.0])
    for roi in ([1, 2, 3, 4], [1, 2, 3, 0, 5, 1], [np.nan, 2, 3, 4, 5, 1]):
        with pytest.raises(DataError, match=r"a\.nrrd.*is no box"):
            boxes_of_rois(path, [roi])
    with pytest.raises(DataError, match="no such file"):
        boxes_of_rois(tmp_path / "b.png", [])
    (tmp_path / "bad.png").write_bytes(b"no film")
    with pytest.raises(DataError, match=r"bad\.png: cannot be read"):
        boxes_of_rois(tmp_path / "bad.png", [])
    upright = itk.image_from_array(np.zeros((1, 8, 6), np.float32))
    upright.SetDirection(np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]))
    itk.imwrite(upright, str(tmp_path / "up.nrrd"))
    with pytest.raises(DataError, match=r"up\.nrrd: the film stands upright"):
        rois_of_boxes(tmp_path / "up.nrrd", BOXES)


def random_transforms(flip: float, zoom: float, low: float, high: float) -> Compose:
    keys = {"image_keys": "image", "box_keys": "boxes", "box_ref_image_keys": "image"}
    return Compose(
        [
            RowsFirstBoxesd("boxes"),
            RandFlipBoxd(**keys, prob=flip, spatial_axis=1),
            RandZoomBoxd(**keys, prob=zoom, min_zoom=low, max_zoom=high, padding_mode="constant", value=-1.0),
            ToInputBoxesd("boxes"),
        ]
    )


def bright(image: torch.Tensor) -> list[float]:
    rows, columns = torch.nonzero(image[0] > 0, as_tuple=True)
    return [float(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


@pytest.mark.parametrize("zoom", [0.75, 1.25])
def test_boxes_move_with_the_bright_rectangle(zoom: float) -> None:
    image = torch.full((1, 64, 64), -1.0)
    image[0, 24:40, 12:24] = 1
    chain = random_transforms(1.0, 1.0, zoom, zoom)
    found = chain({"image": image, "boxes": torch.tensor([[12.0, 24, 24, 40]])})
    assert found["image"].shape == (1, 64, 64)
    # flipped to columns 40 to 52, then zoomed about the centre
    expected = [32 + (v - 32) * zoom for v in (40, 24, 52, 40)]
    assert found["boxes"][0].tolist() == pytest.approx(expected, abs=0.51)
    assert bright(found["image"]) == pytest.approx(expected, abs=1.01)
    assert float(found["image"].min()) == -1


def test_boxes_are_clipped_and_those_gone_are_dropped() -> None:
    boxes = torch.tensor([[0.0, 0, 20, 20], [0, 0, 10, 10], [30, 30, 40, 44]])
    found = random_transforms(0, 1.0, 1.25, 1.25)({"image": torch.zeros(1, 64, 64), "boxes": boxes})["boxes"]
    assert np.allclose(found, [[0, 0, 17, 17], [29.5, 29.5, 42, 47]], atol=0.51)
    none = random_transforms(1.0, 1.0, 0.9, 1.1)({"image": torch.zeros(1, 64, 64), "boxes": torch.zeros(0, 4)})
    assert none["boxes"].shape == (0, 4)


def test_a_box_over_the_padding_ends_at_the_films_edge(tmp_path: Path) -> None:
    """An input of 30 x 30 of a film of 60 x 35: rows by 2, columns by 2 behind 6 of padding."""
    Image.fromarray(np.zeros((60, 35), np.uint8)).save(tmp_path / "film.png")
    affine = torch.tensor([[2.0, 0, 0, 0.5], [0, 2, 0, -11.5], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    image = MetaTensor(torch.zeros(1, 30, 30), affine=affine, meta={"spatial_shape": np.array([60, 35])})
    item = {"image": image, "image_path": tmp_path / "film.png", "box": torch.tensor([[1.0, 2, 10, 31]])}
    # columns -10 to 8 and rows 4 to 62 of the film
    assert RoisOfBoxesd()(item)["box"].tolist() == [pytest.approx([3.5, 31.5, 0, 8, 56, 1])]
