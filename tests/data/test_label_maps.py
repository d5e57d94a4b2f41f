# SPDX-License-Identifier: Apache-2.0
"""Pairs of CT volume and label map: faults, and where a known world position lands in the network's input."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd
from nibabel.affines import apply_affine

from unimedi_components.data import amos, bcv
from unimedi_components.data.label_maps import geometry_difference, pair_fault
from unimedi_components.data.phantom import amos as phantom_amos
from unimedi_components.data.phantom import bcv as phantom_bcv
from unimedi_components.data.phantom import write_phantom
from unimedi_components.data.restore import Restored
from unimedi_components.data.segmentation import segmentation_transforms
from unimedi_components.data.transforms import ByDimension
from unimedi_components.errors import ConfigError, DataError

# 12 x 10 x 8 voxels of 2 x 3 x 4 mm: x = -10 + 2i to the right, y = -12 + 3j to the front, z = -8 + 4k up
PLAIN = np.array([[2, 0, 0, -10], [0, 3, 0, -12], [0, 0, 4, -8], [0, 0, 0, 1.0]])
WORLD = (4.0, -3.0, 12.0)
# upwards k = 5; from the front backwards 10 - 1 - j with j = 3; from the right leftwards 12 - 1 - i with i = 7
SPL = (5, 6, 4)
COSINE, SINE = np.cos(np.radians(20)), np.sin(np.radians(20))
TURN = np.array([[COSINE, -SINE, 0, 0], [SINE, COSINE, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
# a tilted gantry: 0.4 mm to the front per slice of 4 mm, so that the axes are not at right angles
TILTED = PLAIN + np.array([[0, 0, 0, 0], [0, 0, 0.4, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
# name -> affine, shape and the index of the voxel at WORLD (turned and tilted likewise)
FILES = {
    "RAS": (PLAIN, (12, 10, 8), (7, 3, 5)),
    "LPS": (np.array([[-2, 0, 0, 12], [0, -3, 0, 15], [0, 0, 4, -8], [0, 0, 0, 1.0]]), (12, 10, 8), (4, 6, 5)),
    "SRA": (np.array([[0, 2, 0, -10], [0, 0, 3, -12], [4, 0, 0, -8], [0, 0, 0, 1.0]]), (8, 12, 10), (5, 7, 3)),
    "PIR": (np.array([[0, 0, 2, -10], [-3, 0, 0, 15], [0, -4, 0, 20], [0, 0, 0, 1.0]]), (10, 8, 12), (6, 2, 7)),
    "oblique": (TURN @ PLAIN, (12, 10, 8), (7, 3, 5)),
    "tilted": (TILTED, (12, 10, 8), (7, 3, 5)),
}
TURNED = {"oblique": tuple(TURN[:3, :3] @ WORLD), "tilted": (4.0, -1.0, 12.0)}


def save(path, volume, affine=PLAIN):
    nib.save(nib.Nifti1Image(volume, affine), path)
    return path


def body(shape=(12, 10, 8)):
    """Soft tissue of 40 HU with a rim of air."""
    volume = np.full(shape, -1000, np.int16)
    volume[2:-2, 2:-2, 2:-2] = 40
    return volume


def write_pair(folder, image=None, mask=None, affine=PLAIN, mask_affine=None):
    image = body() if image is None else image
    mask = np.zeros(image.shape, np.uint8) if mask is None else mask
    save(folder / "image.nii.gz", image, affine)
    save(folder / "mask.nii.gz", mask, affine if mask_affine is None else mask_affine)
    return {"id": "a", "dim": 3, "image": str(folder / "image.nii.gz"), "mask": str(folder / "mask.nii.gz")}


def pair(name):
    """A file in one orientation, with one labelled voxel at WORLD that has 200 HU."""
    affine, shape, voxel = FILES[name]
    image, mask = np.full(shape, -100, np.int16), np.zeros(shape, np.uint8)
    image[voxel], mask[voxel] = 200, 9
    mask[0, 0, 0], mask[-1, 0, 0], mask[0, -1, 0], mask[0, 0, -1] = 1, 2, 3, 4
    return image, mask, affine


def run(item, **options):
    return Compose(segmentation_transforms(**options))(dict(item))


def cause(info):
    error = info.value
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def fault(item, check="quick"):
    return pair_fault(Path(item["image"]), Path(item["mask"]), 14, check)


# volumes of a tilted gantry go to another grid: see tests/images/test_one_volume.py
@pytest.mark.parametrize("name", [name for name in FILES if name != "tilted"])
def test_world_positions(tmp_path, name):
    image, mask, affine = pair(name)
    world = TURNED.get(name, WORLD)
    np.testing.assert_allclose(apply_affine(affine, FILES[name][2]), world, atol=1e-9)
    item = run(write_pair(tmp_path, image, mask, affine), num_classes=14)
    assert item["image"].shape == item["mask"].shape == (1, 8, 10, 12)
    assert item["image"].dtype == torch.float32 and item["mask"].dtype == torch.uint8
    assert (item["mask"] == 9).nonzero().tolist() == [[0, *SPL]]
    # (200 + 175) / 425 * 2 - 1 and (-100 + 175) / 425 * 2 - 1
    assert item["image"][(0, *SPL)].item() == pytest.approx(0.764706, abs=1e-6)
    assert item["image"].min().item() == pytest.approx(-0.647059, abs=1e-6)
    assert (item["image"] > 0).sum() == 1
    for key in ("image", "mask"):
        assert isinstance(item[key], MetaTensor)
        np.testing.assert_allclose(apply_affine(item[key].affine.numpy(), SPL), world, atol=1e-5)


def check_labels(found: np.ndarray, mask: np.ndarray, exact: bool) -> None:
    """Equal labels; or, of single voxels that went through an upright grid and back, within a voxel."""
    if exact:
        np.testing.assert_array_equal(found, mask)
    for label in np.unique(mask)[1:]:
        places = [np.argwhere(values == label).mean(0) for values in (found, mask)]
        assert np.abs(places[0] - places[1]).max() <= 1


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("spatial_size", [None, (16, 20, 24)], ids=["kept", "doubled"])
def test_predictions_return_to_the_file(tmp_path, name, spatial_size):
    image, mask, affine = pair(name)
    chain = Compose(segmentation_transforms(spatial_size=spatial_size))
    item = chain(write_pair(tmp_path, image, mask, affine))
    # a network's output has no history and no affine of its own
    item["pred"] = MetaTensor(item["mask"].as_tensor().float())
    invert = Invertd("pred", chain, orig_keys="image", nearest_interp=True)
    back = invert(item)["pred"]
    assert back.shape == (1, *image.shape)
    check_labels(back[0].numpy(), mask, exact=name != "tilted")
    np.testing.assert_allclose(back.affine.numpy(), affine, atol=1e-5)
    scores = torch.nn.functional.one_hot(item["mask"].as_tensor()[0].long(), 10).movedim(-1, 0)
    labels = Restored(chain, labels=True)({"image": item["image"], "pred": scores})["pred"]
    np.testing.assert_array_equal(labels[0].numpy(), mask)
    np.testing.assert_allclose(labels.affine.numpy(), affine, atol=1e-5)
    again = chain.inverse({key: item[key] for key in ("image", "mask")})["mask"]
    check_labels(again[0].numpy(), mask, exact=name != "tilted")
    np.testing.assert_allclose(again.affine.numpy(), affine, atol=1e-5)


def test_resize_averages_the_image_and_picks_labels(tmp_path):
    rng = np.random.default_rng(5)
    image = rng.integers(-150, 200, (12, 10, 8)).astype(np.int16)
    mask = rng.integers(0, 14, (12, 10, 8)).astype(np.uint8)
    item = run(write_pair(tmp_path, image, mask), spatial_size=(4, 5, 6))
    spl = image[::-1, ::-1].transpose(2, 1, 0).reshape(4, 2, 5, 2, 6, 2).mean((1, 3, 5))
    np.testing.assert_allclose(item["image"][0].numpy(), (spl + 175) / 212.5 - 1, atol=1e-5)
    np.testing.assert_array_equal(item["mask"][0].numpy(), mask[::-1, ::-1].transpose(2, 1, 0)[1::2, 1::2, 1::2])
    assert np.linalg.norm(item["mask"].affine.numpy()[:3, :3], axis=0).tolist() == pytest.approx([8, 6, 4])
    kept = run(write_pair(tmp_path, image, mask), spatial_size=(4, 5, 6), resize_labels=False)
    assert torch.equal(kept["image"], item["image"])
    np.testing.assert_array_equal(kept["mask"][0].numpy(), mask[::-1, ::-1].transpose(2, 1, 0))


@pytest.mark.parametrize("name", ["RAS", "LPS", "SRA", "PIR", "oblique"])
def test_spacing_keeps_image_and_labels_together(tmp_path, name):
    """A block of 200 HU and its label, 16 x 12 x 16 mm, resampled to cubes of 2 mm."""
    affine, shape, _ = FILES[name]
    grid = np.moveaxis(np.indices(shape), 0, -1)
    turn = np.linalg.inv(TURN) if name == "oblique" else np.eye(4)
    world = apply_affine(turn @ affine, grid)
    # voxel centres x -4..10, y -6..3, z 0..12: with the half voxels x -5..11, y -7.5..4.5, z -2..14
    inside = ((world >= (-4.01, -6.01, -0.01)) & (world <= (10.01, 3.01, 12.01))).all(-1)
    assert inside.sum() == 8 * 4 * 4
    item = write_pair(tmp_path, np.where(inside, 200, -100).astype(np.int16), inside.astype(np.uint8) * 13, affine)
    item = run(item, spacing=(2.0, 2.0, 2.0))
    mask, image = item["mask"][0].numpy(), item["image"][0].numpy()
    assert set(np.unique(mask)) == {0, 13} and item["image"].shape == item["mask"].shape
    np.testing.assert_allclose(np.linalg.norm(item["mask"].affine.numpy()[:3, :3], axis=0), 2, atol=1e-5)
    centre = apply_affine(turn, apply_affine(item["mask"].affine.numpy(), np.argwhere(mask == 13)).mean(0))
    np.testing.assert_allclose(centre, (3, -1.5, 6), atol=1.0)
    # 16 * 12 * 16 mm^3 in voxels of 8 mm^3, to within a layer of voxels on one side
    assert mask.astype(bool).sum() == pytest.approx(384, rel=0.15)
    bright = image > (50 + 175) / 212.5 - 1
    assert 2 * (bright & (mask == 13)).sum() / (bright.sum() + (mask == 13).sum()) > 0.9


def test_images_without_label_maps_and_by_dimension(tmp_path):
    item = write_pair(tmp_path)
    alone = run({"image": item["image"]}, label_map=False, spacing=(4, 3, 2), spatial_size=(4, 5, 6))
    assert alone["image"].shape == (1, 4, 5, 6) and list(alone) == ["image"]
    first, second = (ByDimension(three_d=segmentation_transforms(window=(-175, top))) for top in (250, 300))
    assert first(item)["mask"].shape == (1, 8, 10, 12)
    assert first.fingerprints[3] != second.fingerprints[3]
    assert [type(step).__name__ for step in first.cached_transforms(3)][-1] == "EnsureTyped"


def test_labels_of_other_types(tmp_path):
    mask = np.zeros((12, 10, 8), np.float64)
    mask[3, 4, 5] = 13
    item = write_pair(tmp_path, mask=mask[..., None])
    assert fault(item) is None and run(item, num_classes=14)["mask"].max() == 13
    stored = nib.Nifti1Image((mask * 10).astype(np.int16), PLAIN)
    stored.header.set_slope_inter(0.1, 0)
    content = bytearray(stored.to_bytes())
    content[112:120] = np.array([0.1, 0], "<f4").tobytes()
    (tmp_path / "mask.nii.gz").write_bytes(gzip.compress(bytes(content)))
    assert fault(item) is None and run(item, num_classes=14)["mask"].max() == 13


def test_geometry_difference():
    moved = PLAIN.copy()
    moved[0, 3] += 0.19  # of 2 mm: within a tenth of a voxel
    assert geometry_difference((12, 10, 8), PLAIN, (12, 10, 8), moved) == ""
    moved[0, 3] += 0.02
    text = geometry_difference((12, 10, 8), PLAIN, (12, 10, 8), moved)
    assert text.startswith("affine [[2.0, 0.0, 0.0, -9.79]") and "image has [[2.0, 0.0, 0.0, -10.0]" in text
    assert text.endswith("up to 0.105 voxels apart")
    # a flip of the first axis moves its ends by 11 voxels though the same space is covered
    flipped = np.array([[-2, 0, 0, 12], [0, 3, 0, -12], [0, 0, 4, -8], [0, 0, 0, 1.0]])
    assert geometry_difference((12, 10, 8), PLAIN, (12, 10, 8), flipped).endswith("up to 11 voxels apart")
    assert geometry_difference((12, 10, 8), PLAIN, (12, 10, 7), PLAIN) == "shape 12x10x7 where the image has 12x10x8"
    assert "nan voxels" in geometry_difference((12, 10, 8), PLAIN, (12, 10, 8), PLAIN * np.nan)


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        ({"mask": np.zeros((12, 10, 7), np.uint8)}, "mask and image differ in geometry", "shape 12x10x7 where"),
        ({"mask_affine": FILES["LPS"][0]}, "mask and image differ in geometry", "affine [[-2.0, 0.0, 0.0, 12.0]"),
        ({"mask_affine": TURN @ PLAIN}, "mask and image differ in geometry", "voxels apart"),
        ({"mask": np.full((12, 10, 8), 14, np.uint8)}, "unknown label values", "holds 14 where labels are 0 to 13"),
        ({"mask": np.full((12, 10, 8), -1, np.int16)}, "unknown label values", "holds -1 where"),
        ({"mask": np.full((12, 10, 8), 0.5, np.float32)}, "unknown label values", "holds 0.5 where"),
        ({"mask": np.full((12, 10, 8), np.nan, np.float32)}, "unknown label values", "holds nan where"),
        ({"mask": np.full((12, 10, 8), np.inf, np.float32)}, "unknown label values", "holds inf where"),
        (
            {"mask": np.arange(960, dtype=np.int32).reshape(12, 10, 8)},
            "unknown label values",
            "14, 15, 16, 17, 18, ... ",
        ),
    ],
)
def test_faults_of_pairs(tmp_path, change, reason, detail):
    item = write_pair(tmp_path, **change)
    found = fault(item)
    assert found is not None and found[0] == reason
    assert "mask.nii.gz" in found[1] and detail in found[1]
    assert fault(item, "exists") is None
    with pytest.raises(RuntimeError) as info:
        run(item, num_classes=14)
    assert isinstance(cause(info), DataError) and "mask.nii.gz" in str(cause(info)) and detail in str(cause(info))


def test_unreadable_files(tmp_path):
    item = write_pair(tmp_path, mask=np.random.default_rng(0).integers(0, 14, (12, 10, 8)).astype(np.uint8))
    path = tmp_path / "mask.nii.gz"
    whole = path.read_bytes()
    for content in (whole[:-200], b"", b"text", gzip.compress(b"text")):
        path.write_bytes(content)
        found = fault(item)
        assert found is not None and found[0] == "unreadable mask" and "mask.nii.gz: cannot be read (" in found[1]
    path.unlink()
    assert fault(item) == fault(item, "exists") == ("missing mask", f"{path}: no such file")
    assert fault(item, "none") is None
    (tmp_path / "image.nii.gz").unlink()
    assert fault(item)[0] == "missing image"
    with pytest.raises(ConfigError, match="check_images='all' is unknown"):
        fault(item, "all")


def test_a_voxel_between_the_sampled_slices(tmp_path):
    image = np.repeat(body((12, 10, 8)), 3, axis=2).astype(np.float32)
    # of 24 slices the sample takes 0, 3, 6, 9, 12, 14, 17, 20 and 23
    image[5, 5, 10] = np.nan
    item = write_pair(tmp_path, image)
    assert fault(item)[0] == fault(item, "full")[0] == "non-finite voxels"
    with pytest.raises(RuntimeError) as info:
        run(item)
    assert isinstance(cause(info), DataError) and "image.nii.gz: some voxels are NaN" in str(cause(info))
    assert fault(write_pair(tmp_path, body() + np.int16(1024)))[0] == "not Hounsfield units"


@pytest.mark.parametrize(
    ("layout", "convert", "split"),
    [(phantom_bcv.BCV, bcv.DATASET.convert, (4, 0, 1)), (phantom_amos.AMOS, amos.DATASET.convert, (4, 0, 1))],
    ids=["bcv", "amos"],
)
def test_phantom_truth_is_what_arrives(tmp_path, layout, convert, split):
    root = tmp_path / "phantom"
    write_phantom(layout.name, root, 5, 4, workers=1, progress=False)
    truth = json.loads((root / "truth.json").read_text())["studies"]
    datalist = convert(root, check_images="full", num_workers=1)
    assert tuple(datalist["meta"]["kept"].values()) == split
    names = datalist["meta"]["label_names"]
    items = {item["id"]: item for part in ("training", "validation", "test") for item in datalist[part]}
    assert items.keys() == truth.keys()
    orders = set()
    for name, item in items.items():
        record = truth[name]
        assert (item["image"], item["mask"]) == (record["image"], record["mask"])
        paths = {key: str(root / item[key]) for key in ("image", "mask")}
        mask = run(paths, num_classes=len(names))["mask"]
        codes = nib.aff2axcodes(nib.load(paths["mask"]).affine)
        orders.add("".join(codes))
        assert set(mask.unique().tolist()) == {0, *(organ["label"] for organ in record["organs"].values())}
        for organ, known in record["organs"].items():
            assert names[known["label"]] == organ
            indices = (mask[0] == known["label"]).nonzero().numpy()
            assert len(indices) == known["voxels"]
            # boxes are given along the file's axes as the file runs, here they run to S, P and L
            box = [list(ends) for ends in zip(indices.min(0).tolist(), indices.max(0).tolist(), strict=True)]
            for axis, (against, size) in enumerate(zip("IAR", mask.shape[1:], strict=True)):
                if against in codes:
                    box[axis] = [size - 1 - end for end in reversed(box[axis])]
            assert box == known["box"]
            centre = apply_affine(mask.affine.numpy(), indices.mean(0))
            np.testing.assert_allclose(centre, known["centroid_mm"], atol=2e-3)
    assert "SLP" in orders and len(orders) >= 2
