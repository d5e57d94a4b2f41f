# SPDX-License-Identifier: Apache-2.0
"""Cubes and nodules of hand-written MetaImage files in every orientation, against hand-worked indices and MONAI."""

from __future__ import annotations

import itk
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd

from unimedi_components.data.cubes import LoadCubed, luna_cube_transforms
from unimedi_components.data.transforms import RAS_LABELS, ByDimension, ct_transforms
from unimedi_components.errors import DataError
from unimedi_components.images.itk_volumes import read_block, read_geometry, voxel_to_world, world_to_voxel

# the first three numbers are the direction of the file's x axis
IDENTITY, REVERSED = "1 0 0 0 1 0 0 0 1", "-1 0 0 0 -1 0 0 0 1"
TURNED, PERMUTED = "0.6 0.8 0 -0.8 0.6 0 0 0 1", "0 1 0 0 0 -1 1 0 0"
OFFSET, SPACING, SHAPE = (-10.0, -20.0, 30.0), (0.5, 0.75, 2.0), (8, 6, 4)
# value of voxel (i, j, k): i + 10 j + 100 k
COUNT = (np.arange(4)[:, None, None] * 100 + np.arange(6)[:, None] * 10 + np.arange(8)).astype(np.int16)


def write_mhd(folder, matrix=IDENTITY, voxels=COUNT, cut=0):
    element = {"int16": "MET_SHORT", "float32": "MET_FLOAT"}[str(voxels.dtype)]
    (folder / "scan.raw").write_bytes(voxels.tobytes()[: voxels.nbytes - cut])
    path = folder / "scan.mhd"
    path.write_text(
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        f"CompressedData = False\nTransformMatrix = {matrix}\nOffset = {' '.join(map(str, OFFSET))}\n"
        f"ElementSpacing = {' '.join(map(str, SPACING))}\nDimSize = {' '.join(map(str, voxels.shape[::-1]))}\n"
        f"ElementType = {element}\nElementDataFile = scan.raw\n"
    )
    return str(path)


def world_of(matrix, index):
    """The definition in the file format: offset + sum of index * spacing * axis."""
    axes = np.array(matrix.split(), float).reshape(3, 3)
    return (OFFSET + (np.array(index, float) * SPACING) @ axes).tolist()


def cube_of(path, center, size, **options):
    return LoadCubed("image", size=size, **options)({"image": path, "center": center})["image"]


def test_world_to_voxel_by_hand(tmp_path):
    geometry = read_geometry(write_mhd(tmp_path))
    assert geometry.shape == SHAPE and geometry.voxel_bytes == 2
    # RAS: x and y change sign
    assert geometry.affine.tolist() == [[-0.5, 0, 0, 10], [0, -0.75, 0, 20], [0, 0, 2, 30], [0, 0, 0, 1]]
    worlds = [[-9, -18.5, 34], [-10, -20, 30]]
    assert world_to_voxel(worlds, geometry.affine).tolist() == [[2, 2, 2], [0, 0, 0]]
    assert voxel_to_world([[2, 2, 2], [0, 0, 0]], geometry.affine).tolist() == worlds
    turned = read_geometry(write_mhd(tmp_path, TURNED)).affine
    # 2 * 0.5 * (0.6, 0.8, 0) + 4 * 0.75 * (-0.8, 0.6, 0) + 1 * 2 * (0, 0, 1) = (-1.8, 2.6, 2)
    assert world_to_voxel([-11.8, -17.4, 32], turned)[0] == pytest.approx([2, 4, 1])


def test_cube_by_hand(tmp_path):
    plain = cube_of(write_mhd(tmp_path), [-8.6, -18.6, 32.3], (2, 4, 4))
    # the place is voxel (2.8, 1.867, 1.15): (3, 2, 1) is nearest and goes to index (1, 2, 2)
    assert plain.shape == (1, 2, 4, 4) and plain.dtype == torch.float32
    assert plain[0, 0].tolist() == [[10 * j + i for i in (1, 2, 3, 4)] for j in (0, 1, 2, 3)]
    assert plain[0, 1].tolist() == [[100 + 10 * j + i for i in (1, 2, 3, 4)] for j in (0, 1, 2, 3)]
    reversed_ = cube_of(write_mhd(tmp_path, REVERSED), world_of(REVERSED, (3.2, 2.1, 0.9)), (2, 4, 4))
    # x and y run the other way in this file, so the indices fall where the cube's rise
    assert reversed_[0, 1].tolist() == [[100 + 10 * j + i for i in (5, 4, 3, 2)] for j in (4, 3, 2, 1)]


def test_cube_is_padded_with_air_beyond_the_border(tmp_path):
    cube = cube_of(write_mhd(tmp_path), world_of(IDENTITY, (0, 5, 3)), (3, 3, 3))[0]
    air = -1000.0
    assert cube[2].eq(air).all() and cube[:, 2].eq(air).all() and cube[:, :, 0].eq(air).all()
    assert cube[:2, :2, 1:].tolist() == [[[240, 241], [250, 251]], [[340, 341], [350, 351]]]


@pytest.mark.parametrize("matrix", [IDENTITY, REVERSED, TURNED, PERMUTED])
@pytest.mark.parametrize("size", [(3, 5, 7), (6, 4, 2), (16, 16, 16)])
def test_cube_equals_the_crop_of_monais_oriented_volume(tmp_path, matrix, size):
    path = write_mhd(tmp_path, matrix)
    chain = [
        LoadImaged("image", image_only=True),
        EnsureChannelFirstd("image"),
        Orientationd("image", axcodes="SPL", labels=RAS_LABELS),
    ]
    whole = Compose(chain)({"image": path})["image"]
    center = world_of(matrix, (2.3, 3.8, 1.6))
    index = world_to_voxel(center, whole.affine)[0].round().astype(int)
    # voxel (2, 4, 2), wherever it went
    assert whole[(0, *index)] == 242
    padded = np.pad(np.asarray(whole[0]), 16, constant_values=-1000)
    low = index + 16 - np.array(size) // 2
    expected = padded[tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))]
    cube = cube_of(path, center, size)
    np.testing.assert_array_equal(cube[0], expected)
    # the cube's own affine leads back to the same voxel
    assert world_to_voxel(world_of(matrix, (2, 4, 2)), cube.affine)[0] == pytest.approx(np.array(size) // 2)


@pytest.mark.parametrize("matrix", [IDENTITY, REVERSED, TURNED, PERMUTED])
def test_resampled_cube_holds_the_values_of_its_places(tmp_path, matrix):
    # 3 x + 5 y + 7 z of the place in LPS mm, which linear interpolation gives exactly
    k, j, i = np.meshgrid(*(np.arange(n) for n in (16, 20, 24)), indexing="ij")
    places = np.array([world_of(matrix, index) for index in zip(i.ravel(), j.ravel(), k.ravel(), strict=True)])
    path = write_mhd(tmp_path, matrix, (places @ (3, 5, 7)).reshape(k.shape).astype(np.float32))
    center = world_of(matrix, (11.3, 9.6, 7.7))
    size, spacing = (5, 6, 7), (1.5, 0.5, 0.8)
    cube = cube_of(path, center, size, spacing=spacing)
    assert cube.shape == (1, *size)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"), axis=-1).reshape(-1, 3)
    np.testing.assert_allclose(cube[0].reshape(-1), voxel_to_world(index, cube.affine) @ (3, 5, 7), atol=0.01)
    assert float(cube[0, 2, 3, 3]) == pytest.approx(np.dot(center, (3, 5, 7)), abs=0.01)
    affine = np.asarray(cube.affine)[:3, :3]
    np.testing.assert_allclose(np.linalg.norm(affine, axis=0), spacing)
    # Superior, Posterior, Left in RAS: +z, -y, -x dominate
    assert affine[2, 0] > 0.7 * 1.5 and affine[1, 1] < -0.55 * 0.5 and affine[0, 2] < -0.55 * 0.8


def test_only_the_cube_is_read(tmp_path):
    cube = [[[12, 13], [22, 23]], [[112, 113], [122, 123]]]
    assert cube_of(write_mhd(tmp_path), world_of(IDENTITY, (3, 2, 1)), (2, 2, 2))[0].tolist() == cube
    # the last slice is not even on disk
    path = write_mhd(tmp_path, cut=2 * 8 * 6)
    assert read_block(path, (2, 1, 0), (2, 2, 2)).transpose(2, 1, 0).tolist() == cube
    assert read_block(path, (7, 5, 2), (2, 1, 1)).ravel().tolist() == [257, -1000]


def test_compressed_file_gives_the_same_cube(tmp_path):
    path = write_mhd(tmp_path, REVERSED)
    packed = tmp_path / "packed.mhd"
    itk.imwrite(itk.imread(path), str(packed), compression=True)
    assert "CompressedData = True" in packed.read_text()
    center = world_of(REVERSED, (5, 4, 3))
    np.testing.assert_array_equal(cube_of(str(packed), center, (4, 4, 4)), cube_of(path, center, (4, 4, 4)))


def test_chain_scales_the_window_and_returns_plain_tensors(tmp_path):
    voxels = np.full(COUNT.shape, -3024, np.int16)
    voxels[1, 2, 1:4] = (-500, 0, 3000)
    path = write_mhd(tmp_path, voxels=voxels)
    item = {"id": "a", "dim": 3, "image": path, "center": world_of(IDENTITY, (2, 2, 1))}
    image = ByDimension(three_d=luna_cube_transforms((2, 2, 4)))(item)["image"]
    assert image.shape == (1, 2, 2, 4) and not isinstance(image, MetaTensor)
    # index (1, 1, 2) is the place
    assert image[0, 1, 1].tolist() == [-1, -0.5, 0, 1] and image[0, 0].eq(-1).all()
    prints = {ByDimension(three_d=luna_cube_transforms(size)).fingerprints[3] for size in ((2, 2, 4), (4, 2, 2))}
    assert len(prints) == 2


def test_missing_and_outside_places(tmp_path):
    path = write_mhd(tmp_path)
    with pytest.raises(DataError, match="has no 'center'; prepare the data with --mode candidates"):
        LoadCubed("image")({"image": path})
    with pytest.raises(DataError, match=r"the place \(10, -20, 30\) mm lies outside the volume"):
        cube_of(path, [10, -20, 30], (2, 2, 2))
    with pytest.raises(DataError, match="no such file"):
        cube_of(str(tmp_path / "none.mhd"), [0, 0, 0], (2, 2, 2))


@pytest.mark.parametrize(
    ("matrix", "native"), [(IDENTITY, (3, 1, 2)), (REVERSED, (3, 4, 5)), (TURNED, (3, 2, 6)), (PERMUTED, (4, 2, 3))]
)
def test_nodules_by_hand_in_the_transformed_volume(tmp_path, matrix, native):
    # TURNED: file x runs nearest to posterior, file y to the right; PERMUTED: x to posterior, y down, z to the left
    voxels = np.full(COUNT.shape, -1000, np.int16)
    voxels[3, 1, 2] = 1000
    path = write_mhd(tmp_path, matrix, voxels)
    world = world_of(matrix, (2, 1, 3))
    shape = {TURNED: (4, 8, 6), PERMUTED: (6, 8, 4)}.get(matrix, (4, 6, 8))
    native = {TURNED: (3, 2, 4), PERMUTED: (4, 2, 3)}.get(matrix, native)
    image = Compose(ct_transforms(shape)[:-1])({"image": path})["image"]
    assert world_to_voxel(world, image.affine.numpy())[0] == pytest.approx(native, abs=1e-4)
    assert np.argwhere(image[0].numpy() > 0.9).tolist() == [list(native)]
    steps = {TURNED: (2, 0.5, 0.75), PERMUTED: (0.75, 0.5, 2)}.get(matrix, (2, 0.75, 0.5))
    assert np.linalg.norm(image.affine[:3, :3], axis=0) == pytest.approx(steps)
    twice = Compose(ct_transforms(tuple(2 * n for n in shape))[:-1])({"image": path})["image"]
    # voxel centres: index 2 of n voxels lies at 4.5 of 2 n
    assert world_to_voxel(world, twice.affine.numpy())[0] == pytest.approx([2 * n + 0.5 for n in native], abs=1e-4)
