# SPDX-License-Identifier: Apache-2.0
"""LUNA16 to a datalist: whole volumes, nodule or none (the paper), or candidate cubes (Models Genesis).

Subsets and tables may lie in ROOT or in folders up to two levels below, together or in parts. Coordinates are ITK's,
LPS in mm; voxel indices follow from the file's ``Offset``, ``ElementSpacing`` and ``TransformMatrix``, which turns x
and y around in some scans.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from unimedi_components.data.datalist import SPLITS, DatalistBuilder, Dataset
from unimedi_components.data.sources import check_choice, existing_root, find_source, progress_map, read_source
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.images.checks import Fault, check_metaimage
from unimedi_components.images.itk_volumes import VolumeGeometry, world_to_voxel
from unimedi_components.images.xray_checks import IMAGE_CHECKS

#: Class names by mode, in label order.
LABEL_NAMES = {"volume": ["normal", "nodule"], "candidates": ["no nodule", "nodule"]}
TOPS = ("", "LUNA16/", "luna16/", "*/", "*/*/")
FOLDERS = ("", "CSVFILES/", "{stem}/", "{name}/")
TABLES = {"volume": ("annotations.csv",), "candidates": ("candidates_V2.csv", "candidates.csv")}
COORDINATES = ["coordX", "coordY", "coordZ"]


class _Scan(NamedTuple):
    image: str
    subset: int
    geometry: VolumeGeometry | None = None


def collect(
    root: str | Path,
    *,
    strict: bool = False,
    mode: str = "volume",
    min_diameter: float = 0.0,
    train_subsets: str = "0,1,2,3,4",
    validation_subsets: str = "5,6",
    test_subsets: str = "7,8,9",
    check_images: str = "quick",
    assume_hu: bool = False,
    num_workers: int = 8,
    progress: bool = True,
) -> DatalistBuilder:
    """Read LUNA16.

    Volume items hold ``"nodules"``: [{``"world"``: [x, y, z] LPS mm, ``"voxel"``: [i, j, k] continuous index along
    the file's axes, ``"diameter_mm"``}]; candidate items ``"center"`` (LPS mm) and ``"voxel"``. The scan stands for
    the patient, whom the data set does not name.

    Args:
        root: folder with ``subset0`` to ``subset9`` and the csv files.
        mode: ``"volume"``: a scan is 1 if annotations.csv names it, else 0 (the paper); ``"candidates"``: an item
            per row of the candidates, its class the label (Models Genesis' false positive reduction).
        min_diameter: volume mode: a scan is 1 from a nodule of this many mm on.
        train_subsets: numbers of the training subsets (Models Genesis' folds).
        validation_subsets: numbers of the validation subsets.
        test_subsets: numbers of the test subsets.
        check_images: ``"quick"`` or ``"exists"`` (header, and size of the ``.raw``), ``"full"`` (also Hounsfield units
            of some slices), or ``"none"``, which only lists the folders and so leaves out the voxel indices.

    Returns:
        The builder. Drop reasons: ``duplicate row``, ``row without numbers``, ``unknown class``, ``duplicate id``
        (a scan in two folders), ``subset in no split``, ``missing image`` (a scan that the table names),
        ``unreadable image`` and the others of :func:`~unimedi_components.images.checks.check_ct`, ``candidate
        without image``, ``nodule outside the volume``, ``candidate outside the volume``.
    """
    base = existing_root(root, "LUNA16")
    check_choice("mode", mode, LABEL_NAMES)
    check_choice("check_images", check_images, IMAGE_CHECKS)
    split_of = _folds((train_subsets, validation_subsets, test_subsets))
    builder = DatalistBuilder("luna16", root, strict)
    builder.meta |= {"task": "binary", "label_names": LABEL_NAMES[mode], "mode": mode}
    frame = _rows(builder, base, mode)
    scans = _scans(builder, base)
    named = frame["seriesuid"].cat.categories
    for uid in named[~named.isin(list(scans))]:
        builder.drop("missing image", uid, f"{base}: no subset0 to subset9 holds {uid}.mhd")
    wanted = scans if mode == "volume" else {uid: scans[uid] for uid in named if uid in scans}

    # ITK changes the working folder while it reads a MetaImage: in threads, relative paths would not be found
    place = base.absolute()

    def look(scan: _Scan) -> tuple[Fault | None, VolumeGeometry | None]:
        if check_images == "none":
            return None, None
        return check_metaimage(place / scan.image, check_images, not assume_hu)

    found = progress_map(look, list(wanted.values()), "CT volumes", num_workers, progress)
    scans = {}
    for (uid, scan), (fault, geometry) in zip(wanted.items(), found, strict=True):
        if fault is not None:
            builder.drop(fault.reason, uid, fault.detail)
        else:
            scans[uid] = scan._replace(geometry=geometry)
    if mode == "volume":
        builder.meta["min_diameter"] = min_diameter
        _add_volumes(builder, frame, scans, split_of, min_diameter)
    else:
        _add_candidates(builder, frame, scans, split_of)
    return builder


def _folds(given: Sequence[Any]) -> dict[int, str]:
    """Return subset -> split; the command line may hand over a number or a tuple instead of text."""
    found: dict[int, str] = {}
    for split, subsets in zip(SPLITS, given, strict=True):
        numbers = [number.strip() for number in str(subsets).strip("()[] ").split(",") if number.strip()]
        for number in numbers:
            if number not in map(str, range(10)):
                raise ConfigError(f"{split} subsets {subsets!r}: {number!r} is not 0 to 9. Give for example 0,1,2.")
            if int(number) in found:
                raise ConfigError(f"subset {number} is in {found[int(number)]} and in {split}. Name it once.")
            found[int(number)] = split
    return found


def _scans(builder: DatalistBuilder, root: Path) -> dict[str, _Scan]:
    """Return every scan below ``root`` by its series, in the order of the subsets."""
    found: dict[str, _Scan] = {}
    # the glob of "*/" also meets LUNA16/ and subset0/subset0
    files = (root.glob(f"{folder}subset[0-9]/{inner}*.mhd") for folder in TOPS for inner in ("", "subset[0-9]/"))
    for path in dict.fromkeys(path for group in files for path in sorted(group)):
        # macOS leaves "._" files beside the real ones, and a folder of such.
        if path.name.startswith(".") or "__MACOSX" in path.parts:
            continue
        if path.stem in found:
            builder.drop("duplicate id", path.stem, f"{path}: also at {found[path.stem].image}")
        else:
            found[path.stem] = _Scan(path.relative_to(root).as_posix(), int(path.parent.name[-1]))
    if not found:
        raise DataError(
            f"{root}: no volumes. Looked for subset0/SERIESUID.mhd to subset9/ there and in folders below. "
            "Unpack the data set's subset files there, or correct ROOT."
        )
    return found


def _rows(builder: DatalistBuilder, root: Path, mode: str) -> pd.DataFrame:
    """Return the table: id, seriesuid (categories), coordinates and diameter_mm or class as numbers."""
    below = [f.format(stem=name.removesuffix(".csv"), name=name) + name for name in TABLES[mode] for f in FOLDERS]
    path = find_source(root, [top + place for top in TOPS for place in below], f"table for --mode {mode}")
    value = "diameter_mm" if mode == "volume" else "class"
    columns = ["seriesuid", *COORDINATES, value]
    frame = read_source(path, columns)[columns]
    builder.add_source(path)
    numbers = [*COORDINATES, value]
    frame[numbers] = frame[numbers].apply(pd.to_numeric, errors="coerce").astype(float)
    frame["seriesuid"] = frame["seriesuid"].str.strip().astype("category")
    frame["row"] = np.arange(len(frame))
    # rows count from 0 below the header
    frame["id"] = [f"{uid}_{row:06d}" for uid, row in zip(frame["seriesuid"], frame["row"], strict=True)]
    frame = builder.without(frame, ~np.isfinite(frame[numbers]).all(axis=1), "row without numbers")
    if mode == "candidates":
        frame = builder.without(frame, ~frame["class"].isin((0, 1)), "unknown class")
        # Where a place is listed with both classes, it is a nodule.
        frame = frame.sort_values("class", ascending=False, kind="stable")
    repeated = frame.duplicated(["seriesuid", *COORDINATES])
    builder.drop_many("duplicate row", frame[repeated].sort_values("row")["id"])
    frame = frame[~repeated].sort_values("row", ignore_index=True)
    frame["seriesuid"] = frame["seriesuid"].cat.remove_unused_categories()
    return frame


def _voxels(frame: pd.DataFrame, scans: dict[str, _Scan]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows' voxel indices (N, 3), and whether each is in its volume; NaN, True without a geometry."""
    world = frame[COORDINATES].to_numpy()
    voxels, inside = np.full(world.shape, np.nan), np.ones(len(frame), bool)
    for uid, rows in frame.groupby("seriesuid", observed=True, sort=False).indices.items():
        geometry = scans[str(uid)].geometry
        if geometry is not None:
            voxels[rows] = world_to_voxel(world[rows], geometry.affine)
            nearest = np.floor(voxels[rows] + 0.5)
            inside[rows] = ((nearest >= 0) & (nearest < geometry.shape)).all(axis=1)
    return voxels.round(4), inside


def _places(frame: pd.DataFrame, voxels: np.ndarray, name: str) -> Iterable[dict[str, list[float]]]:
    """Return ``{name: world, "voxel": index}`` of each row, without the index where it is not known."""
    known = np.isfinite(voxels).all(axis=1)
    for world, voxel, has in zip(frame[COORDINATES].to_numpy(), voxels, known, strict=True):
        yield {name: world.tolist(), "voxel": voxel.tolist()} if has else {name: world.tolist()}


def _add_volumes(
    builder: DatalistBuilder, frame: pd.DataFrame, scans: dict[str, _Scan], split_of: dict[int, str], smallest: float
) -> None:
    frame = frame[frame["seriesuid"].isin(list(scans))]
    positive = set(frame.loc[frame["diameter_mm"] >= smallest, "seriesuid"])
    voxels, inside = _voxels(frame, scans)
    frame, voxels = builder.without(frame, ~inside, "nodule outside the volume"), voxels[inside]
    nodules: dict[str, list[dict[str, Any]]] = {uid: [] for uid in scans}
    places = _places(frame, voxels, "world")
    for uid, place, diameter in zip(frame["seriesuid"], places, frame["diameter_mm"], strict=True):
        nodules[uid].append({**place, "diameter_mm": diameter})
    for uid, scan in scans.items():
        if scan.subset not in split_of:
            builder.drop("subset in no split", uid)
            continue
        item = {"id": uid, "patient": uid, "image": scan.image, "dim": 3, "label": int(uid in positive)}
        builder.add(split_of[scan.subset], {**item, "nodules": nodules[uid]})


def _add_candidates(
    builder: DatalistBuilder, frame: pd.DataFrame, scans: dict[str, _Scan], split_of: dict[int, str]
) -> None:
    frame = builder.without(frame, ~frame["seriesuid"].isin(list(scans)), "candidate without image")
    used = frame["seriesuid"].isin([uid for uid, scan in scans.items() if scan.subset in split_of])
    frame = builder.without(frame, ~used, "subset in no split")
    voxels, inside = _voxels(frame, scans)
    frame, voxels = builder.without(frame, ~inside, "candidate outside the volume"), voxels[inside]
    labels = frame["class"].astype(int).tolist()
    places = _places(frame, voxels, "center")
    for name, uid, label, place in zip(frame["id"], frame["seriesuid"], labels, places, strict=True):
        scan = scans[uid]
        item = {"id": name, "patient": uid, "image": scan.image, "dim": 3, "label": label, **place}
        builder.add(split_of[scan.subset], item)


DATASET = Dataset(
    name="luna16",
    title="LUNA16, 888 chest CT scans with lung nodules",
    task="binary classification: nodule or normal (S4.2.1); with --mode candidates nodule or other candidate",
    source="https://luna16.grand-challenge.org/ (Zenodo 3723295 and 4121926)",
    licence="CC BY 4.0; the scans are LIDC-IDRI's (CC BY 3.0)",
    tree="""\
subset0/1.3.6.1.4.1.14519.5.2.1.6279.6001.100225287222365663678666836860.mhd  (and .raw; to subset9/)
annotations.csv[.gz]  candidates_V2.csv[.gz]       (or in CSVFILES/)
LUNA16/subset0/subset0/SERIESUID.mhd               (or nested as the archives unpack)""",
    collect=collect,
    training={"": 445, "candidates": 377_000},
    notes="888 scans, 1,186 nodules of at least 3 mm, 754,975 candidates (1,557 of them nodules) in candidates_V2.csv. "
    "The paper classifies volumes; its peer number for this data set (94.2) is that of candidate cubes of 32 x 64 x 64 "
    "voxels, folds 0-4, 5-6 and 7-9: --mode candidates. Values of -3024 outside the field of view are padding.",
)
