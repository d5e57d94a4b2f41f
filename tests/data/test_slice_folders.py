# SPDX-License-Identifier: Apache-2.0
"""Folders of slice images as volumes: order, sampling, grey levels, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from unimedi_components.data.slice_files import evenly_spread, in_slice_order, slice_files
from unimedi_components.data.slices import read_slices, slice_volume_transforms
from unimedi_components.data.transforms import ByDimension
from unimedi_components.errors import DataError
from unimedi_components.loading import ImageDataset


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def flat(value, dtype=np.uint8, size=(4, 6)):
    return np.full(size, value, dtype)


def read(folder, **options):
    return read_slices(slice_files(folder, **options))


def test_names_are_sorted_by_number_and_other_files_left_out():
    names = ["10.png", "9.png", "Thumbs.db", "0100.PNG", ".9.png", "im2.jpg", "im1_10.tif", "im1_9.tif", "notes.txt"]
    assert in_slice_order(names) == ["9.png", "10.png", "0100.PNG", "im1_9.tif", "im1_10.tif", "im2.jpg"]


def test_places_are_even_and_symmetric():
    # the three examples of SymmetricalResampler in the HKBU-HPML repository
    assert evenly_spread(7, 3) == [1, 3, 5]
    assert evenly_spread(7, 10) == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6]
    assert evenly_spread(7, 15) == [0, 0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 6, 6]
    # (i + 1/2) * 8 / 4 - 1/2 = 0.5, 2.5, 4.5, 6.5: halves go to the middle
    assert evenly_spread(8, 4) == [1, 3, 4, 6]
    assert evenly_spread(5, 5) == [0, 1, 2, 3, 4] and evenly_spread(1, 3) == [0, 0, 0]
    for count in range(1, 90):
        places = evenly_spread(count, 32)
        assert len(places) == 32 and places == sorted(places)
        assert places == [count - 1 - place for place in reversed(places)]
        assert set(places) == set(range(count)) or len(set(places)) == 32


def test_reader_sorts_scales_and_takes_the_first_channel(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    save(tmp_path / "8.png", pixels)
    save(tmp_path / "9.png", np.stack([flat(51), flat(200), flat(7)], axis=2))
    save(tmp_path / "10.png", flat(13107, np.uint16))
    palette = Image.fromarray(flat(1)).convert("P")
    palette.putpalette([0, 0, 0, 102, 3, 4])
    palette.save(tmp_path / "11.png")
    save(tmp_path / "12.png", np.stack([flat(153), flat(0)], axis=2))
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    volume = read(tmp_path, first_slice="foot")
    assert volume.dtype == np.float32 and volume.shape == (5, 4, 6)
    np.testing.assert_allclose(volume[0], pixels / 255, rtol=1e-6)
    # 51 / 255, 13107 / 65535, 102 / 255 and 153 / 255
    np.testing.assert_allclose(volume[1:, 2, 3], [0.2, 0.2, 0.4, 0.6], rtol=1e-6)
    np.testing.assert_array_equal(read(tmp_path), volume[::-1])


def write_ramp(folder, count, size=(4, 6)):
    """Slice k of value k, name without leading zeros."""
    for k in range(count):
        save(folder / f"{k}.png", flat(k, size=size))


def test_transforms_deliver_lowest_slice_first_and_read_no_other(tmp_path):
    write_ramp(tmp_path, 12)
    # places (i + 1/2) * 12 / 4 - 1/2 = 1, 4, 7, 10; the others need not even be images
    for k in (0, 2, 3, 5, 6, 8, 9, 11):
        (tmp_path / f"{k}.png").write_bytes(b"no image")
    for first_slice, expected in (("head", [10, 7, 4, 1]), ("foot", [1, 4, 7, 10])):
        transform = ByDimension((), slice_volume_transforms((4, 2, 3), first_slice))
        image = transform({"id": "a", "dim": 3, "image": str(tmp_path)})["image"]
        assert type(image) is torch.Tensor and image.shape == (1, 4, 2, 3) and image.dtype == torch.float32
        grey = (image[0, :, 0, 0] + 1) * 127.5
        np.testing.assert_allclose(grey, expected, atol=1e-4)


def test_listed_slices_keep_their_order(tmp_path):
    write_ramp(tmp_path, 12)
    listed = ["5.png", "3.png", "11.png"]
    # the first listed is the highest
    expected = [str(tmp_path / name) for name in ("11.png", "3.png", "5.png")]
    assert slice_files(tmp_path, listed) == expected
    assert slice_files(tmp_path, listed, "foot") == expected[::-1]
    assert len(slice_files(tmp_path)) == 12


def test_in_plane_areas_are_averaged(tmp_path):
    pixels = np.zeros((4, 4), np.uint8)
    pixels[:2, 2:] = [[0, 100], [40, 200]]
    save(tmp_path / "0.png", pixels)
    image = ByDimension((), slice_volume_transforms((2, 2, 2)))({"id": "a", "dim": 3, "image": str(tmp_path)})["image"]
    # mean of 0, 100, 40, 200 is 85, a third of 255
    np.testing.assert_allclose(image[0], [[[-1, -1 / 3], [-1, -1]]] * 2, atol=1e-6)


def test_items_of_one_folder_with_other_slices_do_not_share_a_cache(tmp_path):
    write_ramp(tmp_path / "data" / "scan", 6)
    item = {"dim": 3, "image": "scan", "report": ""}
    items = [{**item, "id": "all"}, {**item, "id": "some", "slices": ["2.png", "0.png", "2.png"]}]
    transform = ByDimension((), slice_volume_transforms((3, 2, 2)))
    for _ in range(2):
        data = ImageDataset(items, transform, tmp_path / "data", cache_dir=tmp_path / "cache", strict=True)
        for _ in range(2):
            levels = [
                ((sample["image"][0, :, 0, 0] + 1) * 127.5).round().tolist() for sample in data.__getitems__([0, 1])
            ]
            # places 0.5, 2.5, 4.5 of 6 go to 1, 3, 4, counted from the foot; slice 0 is at the head
            assert levels == [[4, 2, 1], [2, 0, 2]]


def test_what_is_refused_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone: no such folder of slices"):
        read(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no slice \(\.png"):
        read(tmp_path / "empty")
    save(tmp_path / "sizes" / "0.png", flat(1))
    save(tmp_path / "sizes" / "1.png", flat(2, size=(5, 6)))
    with pytest.raises(DataError, match=r"1\.png: 6 x 5 pixels, but 0\.png 6 x 4\. Bring"):
        read(tmp_path / "sizes")
    save(tmp_path / "black" / "0.png", flat(0))
    with pytest.raises(DataError, match=r"black: all voxels have the value 0; this is no scan"):
        read(tmp_path / "black")
    save(tmp_path / "float" / "0.tif", np.linspace(-1000, 400, 24, dtype=np.float32).reshape(4, 6))
    with pytest.raises(DataError, match=r"0\.tif: values -1000 to 400 are no 8-bit or 16-bit grey levels"):
        read(tmp_path / "float")
    with pytest.raises(DataError, match=r"first_slice 'top' is unknown\. Use one of head, foot"):
        slice_volume_transforms(first_slice="top")
    with pytest.raises(DataError, match=r"depth 0 is not a number of slices"):
        slice_volume_transforms((0, 8, 8))
