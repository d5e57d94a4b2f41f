# SPDX-License-Identifier: Apache-2.0
"""The LUNA16 phantom: its layout, and its truth against what converter and transforms deliver."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from monai.transforms import Compose

from tests.common import SPLITS, items_of, phantom, rows, truth_of
from unimedi_components.data.cubes import LoadCubed, luna_cube_transforms
from unimedi_components.data.luna16 import DATASET
from unimedi_components.data.phantom.nodules import PADDING_HU, make_nodule_ct
from unimedi_components.data.phantom.studies import make_patient
from unimedi_components.data.transforms import ByDimension, ct_transforms
from unimedi_components.images.itk_volumes import read_block, read_geometry, world_to_voxel
from unimedi_components.loading import ImageDataset

PATIENTS, SEED = 12, 6
NATIVE = (72, 144, 144)


root = phantom("luna16", PATIENTS, SEED)


@pytest.fixture(scope="module")
def studies(root) -> dict:
    return truth_of(root)


def header(path: Path) -> dict[str, str]:
    return dict(line.split(" = ") for line in path.read_text().splitlines())


def test_layout_is_that_of_the_real_files(root, studies):
    assert len(studies) == PATIENTS and sorted(path.name for path in root.glob("subset*")) == [
        f"subset{n}" for n in range(10)
    ]
    seen = set()
    for uid, study in studies.items():
        assert uid.startswith("1.3.6.1.4.1.14519.5.2.1.6279.6001.") and len(uid) == 64
        fields = header(root / study["image"])
        assert " ".join(fields) == (
            "ObjectType NDims BinaryData BinaryDataByteOrderMSB CompressedData TransformMatrix Offset CenterOfRotation "
            "AnatomicalOrientation ElementSpacing DimSize ElementType ElementDataFile"
        )
        assert fields["DimSize"] == "144 144 72" and fields["ElementType"] == "MET_SHORT"
        assert (root / study["image"]).with_name(fields["ElementDataFile"]).stat().st_size == 2 * 144 * 144 * 72
        seen.add((fields["TransformMatrix"], fields["AnatomicalOrientation"]))
    assert seen == {("1 0 0 0 1 0 0 0 1", "RAI"), ("-1 0 0 0 -1 0 0 0 1", "LPI")}
    for name, last in (("annotations", "diameter_mm"), ("candidates_V2", "class")):
        assert list(rows(root / f"{name}.csv")[0]) == ["seriesuid", "coordX", "coordY", "coordZ", last]


def test_volumes_equal_the_truth(root, studies):
    datalist = DATASET.convert(root, check_images="full", progress=False)
    assert datalist["meta"]["dropped"] == {}
    # patients 10 and 11 are in subsets 0 and 1
    assert datalist["meta"]["kept"] == {"training": 7, "validation": 2, "test": 3}
    for split in SPLITS:
        assert {item["label"] for item in datalist[split]} == {0, 1}
    for item in items_of(datalist).values():
        study = studies[item["id"]]
        assert (item["image"], item["label"]) == (study["image"], study["label"])
        assert len(item["nodules"]) == len(study["nodules"]) <= 3
        for found, true in zip(item["nodules"], study["nodules"], strict=True):
            np.testing.assert_allclose(found["voxel"], true["voxel"], atol=1e-3)
            assert found["diameter_mm"] == true["diameter_mm"] and 3 <= true["diameter_mm"] <= 30


def test_threads_of_a_fresh_process_lose_no_scan(root):
    # ITK is loaded by the first thread that needs it, while the others already ask for it
    code = (
        "import sys; from unimedi_components.data.luna16 import collect; "
        "print(len(collect(sys.argv[1], num_workers=8, progress=False).dropped))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "0", run.stderr


def test_candidates_equal_the_truth(root, studies):
    items = sorted(
        items_of(DATASET.convert(root, mode="candidates")).values(), key=lambda item: int(item["id"].rsplit("_")[-1])
    )
    true = [(uid, place) for uid, study in studies.items() for place in study["candidates"]]
    assert len(items) == len(true)
    for item, (uid, place) in zip(items, true, strict=True):
        assert (item["patient"], item["label"], item["center"]) == (uid, place["label"], place["center"])
        np.testing.assert_allclose(item["voxel"], place["voxel"], atol=1e-3)
    labels = [item["label"] for item in items]
    n_nodules = sum(len(study["nodules"]) for study in studies.values())
    assert sum(labels) == n_nodules and labels.count(0) > 2 * n_nodules


def test_places_without_a_nodule_lie_in_the_lung_away_from_nodules(root, studies):
    for study in studies.values():
        spacing = np.array(header(root / study["image"])["ElementSpacing"].split(), float)
        others = np.array([place["voxel"] for place in study["candidates"] if not place["label"]])
        for nodule in study["nodules"]:
            distance = np.linalg.norm((others - nodule["voxel"]) * spacing, axis=1)
            assert distance.min() > 0.5 * nodule["diameter_mm"]
        volume = read_block(root / study["image"], (0, 0, 0), NATIVE[::-1])
        values = volume[tuple(np.rint(others).astype(int).T)]
        # parenchyma, or a vessel in it
        assert -1024 <= values.min() < -700 < values.max() < 150


def centroid(cube: np.ndarray, spacing: np.ndarray, diameter: float) -> np.ndarray:
    """Centre of what is denser than lung within the nodule's reach of the cube's centre, as an offset in mm."""
    offset = [(np.arange(n) - n // 2) * step for n, step in zip(cube.shape, spacing, strict=True)]
    grid = np.stack(np.meshgrid(*offset, indexing="ij"))
    near = np.linalg.norm(grid, axis=0) < 0.5 * diameter + 1.5
    weight = np.clip(cube + 700, 0, None) * near
    return (grid * weight).sum(axis=(1, 2, 3)) / weight.sum()


def test_nodule_is_at_the_centre_of_its_cube(root, studies):
    checked = set()
    for study in studies.values():
        path = str(root / study["image"])
        spacing = np.linalg.norm(read_geometry(path).affine[:3, :3], axis=0)[::-1]
        for nodule in study["nodules"]:
            item = {"image": path, "center": nodule["world"]}
            native = LoadCubed("image")(item)["image"]
            assert native.shape == (1, 32, 64, 64)
            diameter = nodule["diameter_mm"]
            # the nearest voxel is the centre: off by half a voxel at most
            assert (np.abs(centroid(native[0].numpy(), spacing, diameter)) < 0.5 * spacing + 0.5).all()
            fine = LoadCubed("image", size=(40, 40, 40), spacing=(1, 1, 1))(item)["image"]
            assert float(fine[0, 20, 20, 20]) > -500
            assert np.abs(centroid(fine[0].numpy(), np.ones(3), diameter)).max() < 0.8
            checked.add(header(root / study["image"])["AnatomicalOrientation"])
    assert checked == {"RAI", "LPI"}


def test_nodule_is_where_the_truth_says_in_the_oriented_volume(root, studies):
    for study in list(studies.values())[:6]:
        image = Compose(ct_transforms(NATIVE)[:-1])({"image": str(root / study["image"])})["image"]
        affine = image.affine.numpy()
        flipped = header(root / study["image"])["AnatomicalOrientation"] == "LPI"
        for true in study["nodules"]:
            (voxel,) = world_to_voxel(true["world"], affine)
            i, j, k = true["voxel"]
            expected = (k, 143 - j, 143 - i) if flipped else (k, j, i)
            np.testing.assert_allclose(voxel, expected, atol=1e-3)
            index = np.rint(expected).astype(int)
            # -500 HU
            assert image[(0, *index)] > -0.5
            first, last = true["slices"]
            centre, reach = voxel[0], 0.5 * true["diameter_mm"] / np.linalg.norm(affine[:3, 0])
            assert abs(centre - reach - first) < 1.2 and abs(centre + reach - last) < 1.2
        slices = {index for v in study["nodules"] for index in range(v["slices"][0], v["slices"][1] + 1)}
        assert study["lesion_slices"] == sorted(slices) and study["n_slices"] == 72


@pytest.mark.parametrize("key", range(4))
def test_nodule_of_three_mm_stands_out(key):
    patient, streams = make_patient(np.random.SeedSequence([8, key]), lambda _: ())
    study = make_nodule_ct(patient, streams, [3.0], 8, padded=bool(key % 2))
    (nodule,) = study.nodules
    z, y, x = np.rint(nodule.voxel).astype(int)
    around = study.hu[z, y - 6 : y + 7, x - 6 : x + 7]
    lung = around[around < -700]
    # far beyond noise and texture
    assert study.hu[z, y, x] - np.median(lung) > max(250.0, 5 * lung.std())
    assert nodule.slices[0] <= z <= nodule.slices[1]
    assert (study.hu == PADDING_HU).any() == bool(key % 2)
    assert study.hu[study.hu != PADDING_HU].min() >= -1024


def test_data_set_delivers_one_cube_per_candidate(root, tmp_path):
    items = DATASET.convert(root, mode="candidates", progress=False)["training"][:3]
    assert len({item["image"] for item in items}) == 1
    transform = ByDimension(three_d=luna_cube_transforms((8, 16, 16)))
    data = ImageDataset(items, transform, root, cache_dir=tmp_path / "cache")
    first, again = ([data[index]["image"] for index in range(3)] for _ in range(2))
    for index, item in enumerate(items):
        expected = Compose(luna_cube_transforms((8, 16, 16)))({**item, "image": str(root / item["image"])})["image"]
        # the cache keeps 256 levels from -1 to 1
        assert (first[index] - expected).abs().max() <= 1.001 / 255 and again[index].equal(first[index])
    assert not first[0].equal(first[1])
