# SPDX-License-Identifier: Apache-2.0
"""Phantom CT scans as PNG slices in the layout of Clean-CC-CCII, with its lists of slices.

Three classes in turn. As in the real set a scan's first slice is the one nearest to the head, and the list of a
scan undoes what is odd about its folder: some scans are stored upside down, some hold every slice twice.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .findings import Disease, draw_disease
from .lesions import Lesion
from .studies import CTStudy, labels_of, lesion_record, make_ct, make_patient
from .writer import Layout, PatientRecord, register

#: Hounsfield units that become grey level 0 and 255: a lung window, 1,500 wide around -600.
WINDOW = (-1350.0, 150.0)
_CLASSES: tuple[tuple[str, Disease], ...] = (("CP", "pneumonia"), ("NCP", "covid"), ("Normal", "normal"))
_SECOND_NOISE = 15.0


def grey_levels(hu: np.ndarray) -> np.ndarray:
    """Hounsfield units as uint8 grey levels of `WINDOW`."""
    low, high = WINDOW
    return np.rint((np.clip(hu, low, high) - low) * (255 / (high - low))).astype(np.uint8)


def _write_patient(root: Path, index: int, seed: np.random.SeedSequence) -> PatientRecord:
    label, disease = _CLASSES[index % 3]
    patient, streams = make_patient(seed, lambda rng: draw_disease(disease, rng))
    device = streams[3]
    study = make_ct(patient, streams)
    number, name = 1000 + index, str(index + 1)
    scans = {str(number * 2): _headfirst(study, 0, 1)}
    if index % 4 == 1:
        # A second visit with thicker slices: every other one, and a noise of its own.
        scans[str(number * 2 + 1)] = _headfirst(study, int(device.integers(0, 2)), 2)
        volume, _ = scans[str(number * 2 + 1)]
        volume += (np.rint(device.normal(0.0, _SECOND_NOISE, volume.shape)) * (volume > -990)).astype(np.int16)
    studies, listed = {}, {}
    for scan, (hu, lesions) in scans.items():
        folder = root / "dataset_cleaned" / label / name / scan
        listed[scan] = _save_slices(folder, grey_levels(hu), index)
        studies[f"{label}_{name}_{scan}"] = {
            "image": folder.relative_to(root).as_posix(),
            "label": [own for own, _ in _CLASSES].index(label),
            "labels": labels_of(patient.findings),
            # slices count from the head along the scan's list, rows and columns as in the files
            "findings": [lesion_record(lesion, lesion.boxes, slices=True) for lesion in lesions],
            "lesion_slices": sorted({i for lesion in lesions for i in lesion.slices}),
            "n_slices": hu.shape[0],
            "first_slice": "head",
        }
    return {"studies": studies, "class": label, "patient": name, "scans": listed}


def _headfirst(study: CTStudy, start: int, step: int) -> tuple[np.ndarray, list[Lesion]]:
    """Every ``step``-th slice from the head on, and the lesions in indices of what is kept."""
    kept = range(study.hu.shape[0] - 1 - start, -1, -step)
    place = {z: i for i, z in enumerate(kept)}
    lesions = []
    for lesion in study.lesions:
        boxes = []
        for (low, high), rows, columns in lesion.boxes:
            seen = sorted(place[z] for z in range(low, high + 1) if z in place)
            boxes += [[[seen[0], seen[-1]], rows, columns]] if seen else []
        lesions.append(replace(lesion, slices=sorted(place[z] for z in lesion.slices if z in place), boxes=boxes))
    return study.hu[np.array(kept)], lesions


def _save_slices(folder: Path, grey: np.ndarray, index: int) -> list[str]:
    """Write a scan, head first in ``grey``; return the names of its slices in that order."""
    folder.mkdir(parents=True)
    count = len(grey)
    upside_down, twice, colour = index % 8 == 3, index % 8 == 6, index % 7 == 2
    names = []
    for place, pixels in enumerate(grey):
        number = count - 1 - place if upside_down else place
        image = Image.fromarray(np.repeat(pixels[..., None], 3, axis=2) if colour else pixels)
        for copy in range(1 + twice):
            path = folder / f"{number * (1 + twice) + copy:04d}.png"
            image.save(path, compress_level=1)
        names.append(path.name)
    return names


def _write_tables(root: Path, records: list[PatientRecord], seed: np.random.SeedSequence) -> None:
    lists: dict[str, dict[str, Any]] = {
        name: {label: {} for label, _ in _CLASSES} for name in ("ct_train", "ct_val_part", "ct_test")
    }
    for index, record in enumerate(records):
        # A fifth is for test; another fifth is the validation list, which the training list holds as well.
        for name in (("ct_train",), ("ct_train", "ct_val_part"), ("ct_test",))[max(0, index % 5 - 2)]:
            lists[name][record["class"]][record["patient"]] = record["scans"]
    for name, content in lists.items():
        (root / f"{name}.json").write_text(json.dumps(content, indent=4), encoding="utf-8")


CC_CCII = register(Layout("cc_ccii", 6, _write_patient, _write_tables))
