# SPDX-License-Identifier: Apache-2.0
"""LUNA16 conversion of a hand-written raw tree, against values worked out by hand and against ITK."""

from __future__ import annotations

import gzip

import itk
import numpy as np
import pytest

from unimedi_components.data.luna16 import DATASET, collect
from unimedi_components.errors import ConfigError, DataError

UID = "1.3.6.1.4.1.14519.5.2.1.6279.6001."
PLAIN, FLIPPED, OBLIQUE, NORMAL, SHORT, LOST, ABSENT = (UID + str(n) for n in range(101, 108))
# the first three numbers are the direction of the file's x axis
IDENTITY, REVERSED = "1 0 0 0 1 0 0 0 1", "-1 0 0 0 -1 0 0 0 1"
TURNED = "0.6 0.8 0 -0.8 0.6 0 0 0 1"


def write_scan(root, folder, uid, matrix=IDENTITY, offset="0 0 0", spacing="1 1 1", voxels=None, cut=0, line="\n"):
    """A scan of 8 x 6 x 4 voxels (x, y, z): half air, half tissue."""
    if voxels is None:
        voxels = np.full((4, 6, 8), -1000, "<i2")
        voxels[:, 3:] = 40
    (root / folder).mkdir(parents=True, exist_ok=True)
    content = voxels.tobytes()
    (root / folder / f"{uid}.raw").write_bytes(content[: len(content) - cut])
    header = (
        ("ObjectType", "Image"),
        ("NDims", "3"),
        ("BinaryData", "True"),
        ("BinaryDataByteOrderMSB", "False"),
        ("CompressedData", "False"),
        ("TransformMatrix", matrix),
        ("Offset", offset),
        ("CenterOfRotation", "0 0 0"),
        ("AnatomicalOrientation", "RAI"),
        ("ElementSpacing", spacing),
        ("DimSize", " ".join(map(str, voxels.shape[::-1]))),
        ("ElementType", "MET_SHORT"),
        ("ElementDataFile", f"{uid}.raw"),
    )
    path = root / folder / f"{uid}.mhd"
    path.write_text("".join(f"{name} = {value}{line}" for name, value in header), newline="")
    return path


ANNOTATIONS = [
    f"{PLAIN},-9,-18.5,34,5.5",
    f"{PLAIN},-9.0,-18.50,34.0,5.5",
    f"{PLAIN},-7.75,-17.75,31,12.25",
    f"{PLAIN},0,0,0,7",
    f"{FLIPPED}, 9,18.5,-1,3",
    f" {OBLIQUE} ,0.2,3.6,5,30",
    f"{SHORT},1,1,1,4",
    f"{LOST},1,1,1,4",
    f"{ABSENT},1,1,1,4",
    f"{ABSENT},2,1,1,4",
    f"{OBLIQUE},x,1,1,4",
]
CANDIDATES = [
    f"{PLAIN},-9,-18.5,34,1",
    f"{PLAIN},-10,-20,30,0",
    f"{PLAIN},-10.0,-20.0,30.0,0",
    f"{FLIPPED},9,18.5,-1,0",
    f"{FLIPPED},9,18.5,-1,1",
    f"{OBLIQUE},0.2,3.6,5,0",
    f"{OBLIQUE},100,3.6,5,0",
    f"{NORMAL},3,2,1,0",
    f"{ABSENT},1,1,1,0",
    f"{ABSENT},2,1,1,1",
    f"{SHORT},2,1,1,1",
    f"{NORMAL},3,2,2,2",
    f"{NORMAL},3,,2,0",
]


def write_csv(path, columns, rows):
    """BOM, CRLF, gzip where the name says so."""
    path.parent.mkdir(exist_ok=True)
    content = ("\ufeff" + "\r\n".join([columns, *rows]) + "\r\n").encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def root(tmp_path):
    write_scan(tmp_path, "subset0", PLAIN, IDENTITY, "-10 -20 30", "0.5 0.75 2")
    write_scan(tmp_path, "subset5/subset5", FLIPPED, REVERSED, "10 20 -5", "0.5 0.75 2", line="\r\n")
    write_scan(tmp_path, "subset7", OBLIQUE, TURNED, "0 0 0", "1 2 2.5")
    write_scan(tmp_path, "subset9", NORMAL)
    write_scan(tmp_path, "subset1", SHORT, cut=2)
    write_scan(tmp_path, "subset2", LOST)
    (tmp_path / "subset2" / f"{LOST}.raw").unlink()
    (tmp_path / "subset0" / f"._{PLAIN}.mhd").write_bytes(b"\0\5\x16\7")
    write_csv(tmp_path / "CSVFILES" / "annotations.csv.gz", "seriesuid,coordX,coordY,coordZ,diameter_mm", ANNOTATIONS)
    write_csv(tmp_path / "candidates_V2.csv", "seriesuid,coordX,coordY,coordZ,class", CANDIDATES)
    return tmp_path


def volume(uid, subset, label, nodules=()):
    keys = ("world", "voxel", "diameter_mm")
    return {
        "id": uid,
        "patient": uid,
        "image": f"{subset}/{uid}.mhd",
        "dim": 3,
        "label": label,
        "nodules": [dict(zip(keys, nodule, strict=True)) for nodule in nodules],
    }


def test_volumes_by_hand(root):
    datalist = DATASET.convert(root)
    # (-9 + 10) / 0.5, (-18.5 + 20) / 0.75, (34 - 30) / 2; and (-7.75 + 10) / 0.5, (-17.75 + 20) / 0.75, 1 / 2
    nodules = [([-9.0, -18.5, 34.0], [2.0, 2.0, 2.0], 5.5), ([-7.75, -17.75, 31.0], [4.5, 3.0, 0.5], 12.25)]
    assert datalist["training"] == [volume(PLAIN, "subset0", 1, nodules)]
    # (9 - 10) / -0.5, (18.5 - 20) / -0.75, (-1 + 5) / 2
    nodules = [([9.0, 18.5, -1.0], [2.0, 2.0, 2.0], 3.0)]
    assert datalist["validation"] == [volume(FLIPPED, "subset5/subset5", 1, nodules)]
    # 3 * 1 * (0.6, 0.8, 0) + 1 * 2 * (-0.8, 0.6, 0) + 2 * 2.5 * (0, 0, 1) = (0.2, 3.6, 5)
    nodules = [([0.2, 3.6, 5.0], [3.0, 1.0, 2.0], 30.0)]
    assert datalist["test"] == [volume(OBLIQUE, "subset7", 1, nodules), volume(NORMAL, "subset9", 0)]
    assert datalist["meta"]["dropped_items"] == {
        "duplicate row": [f"{PLAIN}_000001"],
        "row without numbers": [f"{OBLIQUE}_000010"],
        "missing image": [ABSENT],
        "unreadable image": [SHORT, LOST],
        "nodule outside the volume": [f"{PLAIN}_000003"],
    }
    meta = {key: datalist["meta"][key] for key in ("task", "label_names", "mode", "min_diameter")}
    assert meta == {"task": "binary", "label_names": ["normal", "nodule"], "mode": "volume", "min_diameter": 0.0}
    assert list(datalist["meta"]["sources"]) == ["CSVFILES/annotations.csv.gz"]


def test_details_name_file_and_remedy(root):
    dropped = collect(root).dropped
    short, lost = dropped["unreadable image"]
    # 8 * 6 * 4 voxels of two bytes, one voxel short
    assert f"{SHORT}.mhd: is cut off: its header says 384 bytes of voxels, there are 382" in short["detail"]
    assert f"its voxels {LOST}.raw are missing. Unpack" in lost["detail"]
    assert dropped["missing image"][0]["detail"].endswith(f"no subset0 to subset9 holds {ABSENT}.mhd")


def test_smallest_diameter_decides_about_the_label(root):
    labels = {}
    for diameter in (4.0, 12.25, 12.5):
        datalist = DATASET.convert(root, min_diameter=diameter)
        items = [item for split in ("training", "validation", "test") for item in datalist[split]]
        labels[diameter] = {item["id"][-3:]: (item["label"], len(item["nodules"])) for item in items}
    assert labels[4.0] == {"101": (1, 2), "102": (0, 1), "103": (1, 1), "104": (0, 0)}
    assert labels[12.25]["101"] == (1, 2) and labels[12.5]["101"] == (0, 2) and labels[12.5]["103"] == (1, 1)


def candidate(uid, row, subset, label, center, voxel):
    place = {"center": center, "voxel": voxel}
    return {"id": f"{uid}_{row:06d}", "patient": uid, "image": f"{subset}/{uid}.mhd", "dim": 3, "label": label, **place}


def test_candidates_by_hand(root):
    datalist = DATASET.convert(root, mode="candidates")
    assert datalist["training"] == [
        candidate(PLAIN, 0, "subset0", 1, [-9.0, -18.5, 34.0], [2.0, 2.0, 2.0]),
        candidate(PLAIN, 1, "subset0", 0, [-10.0, -20.0, 30.0], [0.0, 0.0, 0.0]),
    ]
    assert datalist["validation"] == [candidate(FLIPPED, 4, "subset5/subset5", 1, [9.0, 18.5, -1.0], [2.0, 2.0, 2.0])]
    assert datalist["test"] == [
        candidate(OBLIQUE, 5, "subset7", 0, [0.2, 3.6, 5.0], [3.0, 1.0, 2.0]),
        candidate(NORMAL, 7, "subset9", 0, [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]),
    ]
    assert datalist["meta"]["dropped_items"] == {
        "row without numbers": [f"{NORMAL}_000012"],
        "unknown class": [f"{NORMAL}_000011"],
        "duplicate row": [f"{PLAIN}_000002", f"{FLIPPED}_000003"],
        "missing image": [ABSENT],
        "unreadable image": [SHORT],
        "candidate without image": [f"{ABSENT}_000008", f"{ABSENT}_000009", f"{SHORT}_000010"],
        "candidate outside the volume": [f"{OBLIQUE}_000006"],
    }
    assert datalist["meta"]["label_names"] == ["no nodule", "nodule"]


def test_older_candidate_table_is_read_where_there_is_no_other(root):
    (root / "candidates_V2.csv").rename(root / "CSVFILES" / "candidates.csv")
    assert list(DATASET.convert(root, mode="candidates")["meta"]["sources"]) == ["CSVFILES/candidates.csv"]


@pytest.mark.parametrize("matrix", [IDENTITY, REVERSED, TURNED, "0 1 0 0 0 1 1 0 0"])
def test_voxels_are_those_of_itk(tmp_path, matrix):
    path = write_scan(tmp_path, "subset3", PLAIN, matrix, "-12.5 7.25 -301", "0.7 0.8 2.5")
    image = itk.imread(str(path))
    rng = np.random.default_rng(3)
    inside = rng.uniform(0, (7, 5, 3), (20, 3))
    axes = np.array(matrix.split(), float).reshape(3, 3)
    worlds = ((-12.5, 7.25, -301) + (inside * (0.7, 0.8, 2.5)) @ axes).tolist()
    rows = [f"{PLAIN},{x!r},{y!r},{z!r},0" for x, y, z in worlds]
    write_csv(tmp_path / "candidates_V2.csv", "seriesuid,coordX,coordY,coordZ,class", rows)
    items = DATASET.convert(tmp_path, mode="candidates")["training"]
    assert len(items) == 20
    for item, index in zip(items, inside, strict=True):
        expected = list(image.TransformPhysicalPointToContinuousIndex(item["center"]))
        assert item["voxel"] == pytest.approx(expected, abs=1e-4)
        assert item["voxel"] == pytest.approx(index, abs=1e-4)


def test_folds_can_be_chosen(root):
    # the command line hands over 7 as a number and 0,9 as a tuple
    datalist = DATASET.convert(root, train_subsets=(0, 9), validation_subsets="", test_subsets=7)
    assert [[item["id"] for item in datalist[split]] for split in ("training", "validation", "test")] == [
        [PLAIN, NORMAL],
        [],
        [OBLIQUE],
    ]
    assert datalist["meta"]["dropped_items"]["subset in no split"] == [FLIPPED]
    candidates = DATASET.convert(root, mode="candidates", train_subsets="0", validation_subsets="9", test_subsets="7")
    assert candidates["meta"]["dropped_items"]["subset in no split"] == [f"{FLIPPED}_000004"]
    for wrong, message in (("0-4", "'0-4' is not 0 to 9"), ("10", "'10' is not"), ("4,5", "subset 5 is in training")):
        with pytest.raises(ConfigError, match=message):
            DATASET.convert(root, train_subsets=wrong)


def test_a_relative_root_is_found_by_every_thread(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    for _ in range(3):
        found = DATASET.convert(root.name, num_workers=8, progress=False)
        assert found["training"] == DATASET.convert(root, progress=False)["training"]


def test_padding_is_accepted_and_grey_levels_are_not(tmp_path):
    padded = np.full((4, 6, 8), -3024, "<i2")
    padded[:, 1:5, 1:7] = -850
    padded[:, 2:4, 2:6] = 40
    write_scan(tmp_path, "subset0", PLAIN, voxels=padded)
    write_scan(tmp_path, "subset0", FLIPPED, voxels=np.clip(padded, 0, 255))
    write_csv(tmp_path / "annotations.csv", "seriesuid,coordX,coordY,coordZ,diameter_mm", [f"{PLAIN},1,1,1,3"])
    assert DATASET.convert(tmp_path)["meta"]["kept"]["training"] == 2
    datalist = DATASET.convert(tmp_path, check_images="full")
    assert [item["id"] for item in datalist["training"]] == [PLAIN]
    assert datalist["meta"]["dropped_items"] == {"not Hounsfield units": [FLIPPED]}


@pytest.mark.parametrize("check", ["exists", "none"])
def test_lighter_checks(root, check):
    datalist = DATASET.convert(root, check_images=check)
    kept = {item["id"] for item in datalist["training"]}
    assert kept == ({PLAIN} if check == "exists" else {PLAIN, SHORT, LOST})
    nodule = datalist["training"][0]["nodules"][0]
    assert ("voxel" in nodule) == (check == "exists") and nodule["world"] == [-9.0, -18.5, 34.0]


def test_a_scan_in_two_folders_counts_once(root):
    write_scan(root, "subset8", PLAIN)
    datalist = DATASET.convert(root)
    assert datalist["meta"]["dropped_items"]["duplicate id"] == [PLAIN]
    assert datalist["training"][0]["image"] == f"subset0/{PLAIN}.mhd"


def test_wrong_roots_tables_and_options(root, tmp_path):
    with pytest.raises(DataError, match=r"missing image: .*subset9 holds"):
        collect(root, strict=True)
    (root / "CSVFILES" / "annotations.csv.gz").unlink()
    with pytest.raises(DataError, match=r"no table for --mode volume\. Looked for annotations\.csv\[\.gz\]"):
        collect(root)
    write_csv(root / "annotations.csv", "series,coordX,coordY,coordZ,diameter_mm", ANNOTATIONS)
    with pytest.raises(DataError, match=r"no column 'seriesuid' \(did you mean 'series'"):
        collect(root)
    with pytest.raises(ConfigError, match="mode='cubes' is unknown"):
        collect(root, mode="cubes")
    with pytest.raises(ConfigError, match="check_images='all' is unknown"):
        collect(root, check_images="all")
    empty = tmp_path / "empty"
    write_csv(empty / "annotations.csv", "seriesuid,coordX,coordY,coordZ,diameter_mm", ANNOTATIONS)
    with pytest.raises(DataError, match=r"no volumes\. Looked for subset0"):
        collect(empty)


def test_tables_lie_beside_the_scans_below_a_folder_of_the_data_set(tmp_path):
    write_scan(tmp_path, "LUNA16/subset0", PLAIN, offset="-10 -20 30")
    rows = [f"{PLAIN},-9,-18,31,4"]
    write_csv(tmp_path / "LUNA16" / "annotations.csv", "seriesuid,coordX,coordY,coordZ,diameter_mm", rows)
    (item,) = DATASET.convert(tmp_path, num_workers=1)["training"]
    assert item["image"] == f"LUNA16/subset0/{PLAIN}.mhd"
    assert item["nodules"] == [{"world": [-9.0, -18.0, 31.0], "voxel": [1.0, 2.0, 1.0], "diameter_mm": 4.0}]
