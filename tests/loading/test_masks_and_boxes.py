# SPDX-License-Identifier: Apache-2.0
"""Images with masks or boxes as data sets: what is cached, what random transforms see, and batches."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import RandFlipd
from PIL import Image

from unimedi_components.data import film_transforms, segmentation_transforms
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.loading import ImageDataset, ImageLoader, Skipped

SIDE = 16


def dataset_of(items, chain, root, target="mask", dim=2, **options):
    return ImageDataset(items, chain, root, target, dim=dim, **options)


@pytest.fixture
def films(tmp_path):
    """Five films that are bright where their mask is; number 3 cannot be read."""
    items = []
    for i in range(5):
        pixels = np.full((SIDE, SIDE), 40, np.uint8)
        box = [i, 2, i + 6, 8 + i]
        pixels[box[1] : box[3], box[0] : box[2]] = 255
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        items.append({"id": f"x{i}", "patient": f"p{i}", "image": f"{i}.png", "dim": 2, "label": 1, "boxes": [box]})
    (tmp_path / "3.png").write_bytes(b"no image")
    return tmp_path, items


def mask_of(item):
    mask = torch.zeros(1, SIDE, SIDE)
    for x0, y0, x1, y1 in item["boxes"]:
        mask[:, y0:y1, x0:x1] = 1
    return mask


def test_masks_painted_from_boxes_in_batches(films, tmp_path):
    root, items = films
    chain = film_transforms(SIDE, target="mask")
    for cache_dir in (None, tmp_path / "cache", tmp_path / "cache"):
        dataset = dataset_of(items, chain, root, cache_dir=cache_dir)
        batches = list(ImageLoader(dataset, 2))
        assert [batch["id"] for batch in batches] == [["x0", "x1"], ["x2"], ["x4"]]
        found = torch.cat([batch["label"] for batch in batches])
        assert torch.equal(found, torch.stack([mask_of(items[i]) for i in (0, 1, 2, 4)]))
        images = torch.cat([batch["image"] for batch in batches])
        assert torch.equal(images == 1, found == 1) and found.dtype == torch.float32
        assert [record.id for record in dataset.skipped] == ["x3"]
    # one record of 32 bytes an image that could be read
    assert [path.stat().st_size for path in (tmp_path / "cache").glob("2d-*/*.index")] == [4 * 32]


def test_cache_follows_boxes_and_mask_files(films, tmp_path):
    root, items = films
    chain, cache = film_transforms(SIDE, target="mask"), tmp_path / "cache"

    def mask(item):
        return dataset_of([item], chain, root, cache_dir=cache)[0]["mask"]

    assert torch.equal(mask(items[0]), mask_of(items[0]))
    other = {**items[0], "boxes": [[0, 0, 3, 3]]}
    assert torch.equal(mask(other), mask_of(other))
    drawn = np.zeros((SIDE, SIDE), np.uint8)
    for rows in (2, 9):
        drawn[:rows] = 1
        Image.fromarray(drawn).save(root / "mask.png")
        assert float(mask({**items[0], "mask": "mask.png"}).sum()) == rows * SIDE


def test_random_transforms_move_image_and_mask_alike(films, tmp_path):
    root, items = films
    chain = [*film_transforms(SIDE, target="mask"), RandFlipd(["image", "mask"], prob=0.5, spatial_axis=1)]
    dataset = dataset_of(items, chain, root, cache_dir=tmp_path / "cache")
    flipped = []
    for epoch in range(12):
        dataset.set_epoch(epoch)
        item = dataset[1]
        assert torch.equal(item["image"] == 1, item["mask"] == 1)
        flipped.append(torch.equal(item["mask"], mask_of(items[1]).flip(-1)))
    assert 0 < sum(flipped) < 12
    dataset.set_epoch(0)
    assert torch.equal(dataset[1]["mask"], mask_of(items[1]).flip(-1)) == flipped[0]


def test_boxes_of_all_lengths(films):
    root, items = films
    items = [items[0], {**items[1], "boxes": []}, {**items[2], "boxes": [[0, 0, 4, 4], [8, 8, 16, 12]]}]
    dataset = dataset_of(items, film_transforms(2 * SIDE, target="boxes"), root, "boxes")
    (batch,) = ImageLoader(dataset, 3)
    assert [boxes.tolist() for boxes in batch["boxes"]] == [[[0, 4, 12, 16]], [], [[0, 0, 8, 8], [16, 16, 32, 24]]]
    assert batch["boxes"][1].shape == (0, 4) and "label" not in batch
    assert torch.allclose(batch["affine"][0, :2, :2], torch.eye(2) / 2)


def test_volumes_keep_small_label_maps_and_meta_on_demand(tmp_path):
    rng = np.random.default_rng(0)
    organs = rng.integers(0, 14, (8, 9, 5)).astype(np.uint8)
    affine = np.diag([-1.5, -1.5, 3.0, 1.0])
    nib.save(nib.Nifti1Image(rng.normal(0, 50, organs.shape).astype(np.float32), affine), tmp_path / "a.nii.gz")
    nib.save(nib.Nifti1Image(organs, affine), tmp_path / "m.nii.gz")
    items = [{"image": str(tmp_path / "a.nii.gz"), "label": str(tmp_path / "m.nii.gz")}]
    # this affine is LPS+: (x, y, z) of the file to S, P, L is a reversal of the axes alone
    expected = torch.from_numpy(organs.transpose(2, 1, 0).copy())[None]
    plain = dataset_of(items, segmentation_transforms(), ".", dim=3, cache_dir=tmp_path / "cache")[0]
    assert plain["mask"].dtype == torch.uint8 and torch.equal(plain["mask"], expected)
    assert not isinstance(plain["image"], MetaTensor)
    dataset = dataset_of(items, segmentation_transforms(), ".", dim=3, keep_meta=True)
    (batch,) = ImageLoader(dataset, 1)
    assert isinstance(batch["label"], MetaTensor) and torch.equal(batch["label"][0].as_tensor(), expected)
    assert batch["image"].meta["filename_or_obj"] == [str(tmp_path / "a.nii.gz")]
    image_only = dataset_of(items, segmentation_transforms(label_map=False), ".", None, dim=3)
    assert set(image_only.collate([image_only[0]])) == {"image", "id", "patient", "dim"}


def test_faults(films):
    root, items = films
    chain = film_transforms(SIDE, target="mask")
    with pytest.raises(DataError, match="item 'x0' has no mask; prepare the data"):
        dataset_of([{key: value for key, value in items[0].items() if key != "boxes"}], chain, root)
    with pytest.raises(DataError, match="item 'x0' has no boxes"):
        dataset_of([{**items[0], "boxes": None}], chain, root, "boxes")
    with pytest.raises(DataError, match="item 'x0' has no mask"):
        dataset_of([{**items[0], "dim": 3}], chain, root, "mask", dim=3)
    with pytest.raises(ConfigError, match="target 'box' is unknown"):
        dataset_of(items, chain, root, "box")
    assert dataset_of([], chain, root).collate([Skipped("a", "f", "r")]) is None
    without = dataset_of([{"image": str(root / "0.png")}], film_transforms(SIDE), ".", None)
    assert set(without.collate([without[0]])) == {"image", "id", "patient", "dim", "film_values"}
