# SPDX-License-Identifier: Apache-2.0
"""Phantom CT volumes in the layout of LUNA16: two of three have one to three lung nodules, the others none."""

from pathlib import Path

import numpy as np

from .anatomy import Patient
from .nodules import DIAMETERS, NoduleStudy, make_nodule_ct
from .studies import make_patient
from .writer import Layout, PatientRecord, register, write_rows

_COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ")
_SUBSETS = 10
_FLIPPED_SHARE = 0.3
_PADDED_SHARE = 0.4
_UID_ROOT = "1.3.6.1.4.1.14519.5.2.1.6279.6001."


def save_metaimage(
    path: Path, hu: np.ndarray, spacing: tuple[float, ...], offset: tuple[float, ...], flip: bool
) -> None:
    """Write HU (nz, ny, nx) as ``path`` (.mhd) and its .raw, with the header fields of the real files.

    Args:
        offset: LPS mm of the first voxel (x, y, z).
        flip: True if the file's x runs to the right and its y to the front.
    """
    raw = path.with_suffix(".raw")
    hu.astype("<i2").tofile(raw)
    sign = -1 if flip else 1
    fields = {
        "ObjectType": "Image",
        "NDims": 3,
        "BinaryData": True,
        "BinaryDataByteOrderMSB": False,
        "CompressedData": False,
        "TransformMatrix": f"{sign} 0 0 0 {sign} 0 0 0 1",
        "Offset": " ".join(f"{float(v)!r}" for v in offset),
        "CenterOfRotation": "0 0 0",
        "AnatomicalOrientation": "LPI" if flip else "RAI",
        "ElementSpacing": " ".join(f"{float(v)!r}" for v in spacing),
        "DimSize": " ".join(str(n) for n in hu.shape[::-1]),
        "ElementType": "MET_SHORT",
        "ElementDataFile": raw.name,
    }
    text = "".join(f"{name} = {value}\n" for name, value in fields.items())
    path.write_text(text, encoding="ascii", newline="\n")


def _diameters(index: int, rng: np.random.Generator) -> list[float]:
    """Diameters in mm of a patient's nodules; the subsets of every split hold both kinds of patients."""
    if (index + index // _SUBSETS) % 3 == 0:
        return []
    low, high = DIAMETERS
    more = np.exp(rng.uniform(np.log(low), np.log(high), int(rng.integers(0, 3))))
    # The first one is never so small that a whole volume of few slices cannot show it.
    return [float(v) for v in np.round([rng.uniform(3 * low, high), *more], 6)]


def _write_patient(root: Path, index: int, seed: np.random.SeedSequence) -> PatientRecord:
    patient, streams = make_patient(seed, lambda _: ())
    text = streams[3]
    uid = _UID_ROOT + str(text.integers(1, 10)) + "".join(str(digit) for digit in text.integers(0, 10, 29))
    flip, padded = bool(text.random() < _FLIPPED_SHARE), bool(text.random() < _PADDED_SHARE)
    n_others = int(text.integers(6, 13))
    study = make_nodule_ct(patient, streams, _diameters(index, text), n_others, padded)
    folder = root / f"subset{index % _SUBSETS}"
    folder.mkdir(parents=True, exist_ok=True)
    hu = study.hu[:, ::-1, ::-1] if flip else study.hu
    z, y, x = study.grid.spacing
    corner = [float(axis[-1 if flip and i else 0]) for i, axis in enumerate((study.grid.z, study.grid.y, study.grid.x))]
    path = folder / f"{uid}.mhd"
    save_metaimage(path, hu, (x, y, z), (corner[2], corner[1], corner[0]), flip)
    return _record(patient, study, uid, path.relative_to(root).as_posix(), _Frame(study, flip, corner))


class _Frame:
    """From voxels (z, y, x) of the study to the file's indices (i, j, k) and to LPS mm."""

    def __init__(self, study: NoduleStudy, flip: bool, corner: list[float]) -> None:
        self.last = np.array(study.hu.shape[:0:-1]) - 1.0
        self.flip = flip
        self.corner = np.array(corner[::-1])
        self.step = np.array(study.grid.spacing[::-1]) * ([-1.0, -1.0, 1.0] if flip else [1.0, 1.0, 1.0])

    def voxel(self, place: tuple[float, float, float]) -> np.ndarray:
        index = np.array(place[::-1])
        if self.flip:
            index[:2] = self.last - index[:2]
        return index

    def world(self, voxel: np.ndarray) -> np.ndarray:
        return self.corner + voxel * self.step

    def index(self, world: np.ndarray) -> list[float]:
        return ((world - self.corner) / self.step).tolist()


def _record(patient: Patient, study: NoduleStudy, uid: str, image: str, frame: _Frame) -> PatientRecord:
    nodules, annotations, candidates = [], [], []
    for nodule in study.nodules:
        voxel = frame.voxel(nodule.voxel)
        world = [float(f"{mm:.10g}") for mm in frame.world(voxel)]
        found = {"voxel": voxel.tolist(), "world": world, "diameter_mm": nodule.diameter, "slices": list(nodule.slices)}
        nodules.append(found)
        annotations.append([uid, *world, nodule.diameter])
        candidates.append((world, 1))
    candidates += [(frame.world(frame.voxel(place)).tolist(), 0) for place in study.others]
    # The real table gives candidates to a hundredth of a mm.
    rows = [([round(mm, 2) for mm in world], label) for world, label in sorted(candidates)]
    truth = {
        "image": image,
        "label": int(bool(nodules)),
        "nodules": nodules,
        "candidates": [
            {"voxel": frame.index(np.array(world)), "center": world, "label": label} for world, label in rows
        ],
        "lesion_slices": sorted({i for v in study.nodules for i in range(v.slices[0], v.slices[1] + 1)}),
        "n_slices": study.hu.shape[0],
        "sex": patient.sex,
    }
    return {
        "studies": {uid: truth},
        "annotations": annotations,
        "candidates": [[uid, *world, label] for world, label in rows],
    }


def _write_tables(root: Path, records: list[PatientRecord], seed: np.random.SeedSequence) -> None:
    annotations = [row for record in records for row in record["annotations"]]
    candidates = [row for record in records for row in record["candidates"]]
    write_rows(root / "annotations.csv", (*_COLUMNS, "diameter_mm"), annotations)
    write_rows(root / "candidates_V2.csv", (*_COLUMNS, "class"), candidates)


LUNA16 = register(Layout("luna16", 7, _write_patient, _write_tables))
