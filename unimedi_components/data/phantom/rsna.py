# SPDX-License-Identifier: Apache-2.0
"""Phantom X-rays with boxes around opacities in the layout of RSNA Pneumonia stage 2.

The real films are a hospital's (NIH's ChestX-ray14): most of those without pneumonia are not normal but show effusion,
atelectasis, edema, a mass, a large heart or air in the pleural space, and pneumonia often comes with one of these. Here
too, so that a bright patch of the lung is not enough: a network must know which finding it is.
"""

import uuid
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .dicom import Tag, write_dicom
from .findings import FINDINGS, ZONES, Finding, draw_findings
from .studies import XrayStudy, labels_of, lesion_record, make_patient, make_xray
from .writer import Layout, PatientRecord, register, write_rows

SIDE = 256
"""Pixels per side of the square films; the real ones have 1024."""
CLASSES = ("Normal", "No Lung Opacity / Not Normal", "Lung Opacity")
OPACITIES = ("consolidation", "ground_glass")
_LABEL_COLUMNS = ("patientId", "x", "y", "width", "height", "Target")
_NORMAL_SHARE, _MIXED_SHARE = 0.35, 0.5
_MONOCHROME1_SHARE = 0.06

_Box = list[int]


def _draw(rng: np.random.Generator, positive: bool) -> tuple[Finding, ...]:
    """What a patient has: an opacity, every second time with other findings; else nothing, or other findings alone."""
    if not positive:
        return () if rng.random() < _NORMAL_SHARE else _others(rng)
    side = str(rng.choice(("left", "right", "bilateral"), p=(0.3, 0.3, 0.4)))
    name, zone, severity = (str(rng.choice(values)) for values in (OPACITIES, ZONES, ("moderate", "large")))
    opacity = Finding(name, side, zone, severity)
    if rng.random() >= _MIXED_SHARE:
        return (opacity,)
    found = {name: opacity} | {other.name: other for other in _others(rng) if _apart(other, opacity)}
    return tuple(found[name] for name in FINDINGS if name in found)


def _others(rng: np.random.Generator) -> tuple[Finding, ...]:
    """Findings of a patient of the pre-training sets, at least one, without the opacities."""
    while True:
        found = tuple(finding for finding in draw_findings(rng) if finding.name not in OPACITIES)
        if found:
            return found


def _apart(other: Finding, opacity: Finding) -> bool:
    """Whether both can be told apart on a film: another zone or side, or a finding of the heart or of both lungs."""
    diffuse = other.name in ("cardiomegaly", "edema")
    return diffuse or other.zone != opacity.zone or not set(other.sides) & set(opacity.sides)


def _square(film: np.ndarray) -> np.ndarray:
    """Pad a film (H, W) with black to a square and resize it to `SIDE`."""
    side = max(film.shape)
    top, left = _margins(film)
    square = np.zeros((side, side), np.uint8)
    square[top : top + film.shape[0], left : left + film.shape[1]] = film
    return np.asarray(Image.fromarray(square).resize((SIDE, SIDE), Image.Resampling.BOX))


def _margins(film: np.ndarray) -> tuple[int, int]:
    side = max(film.shape)
    return (side - film.shape[0]) // 2, (side - film.shape[1]) // 2


def _square_box(film: np.ndarray, box: _Box) -> _Box:
    """A film's box, last pixel included, as the whole pixels of the square that it touches, also included."""
    top, left = _margins(film)
    side = max(film.shape)
    x0, y0 = (box[0] + left) * SIDE // side, (box[1] + top) * SIDE // side
    x1, y1 = -((box[2] + 1 + left) * -SIDE // side), -((box[3] + 1 + top) * -SIDE // side)
    return [max(x0, 0), max(y0, 0), min(x1, SIDE) - 1, min(y1, SIDE) - 1]


def _write_patient(root: Path, index: int, seed: np.random.SeedSequence) -> PatientRecord:
    """Every second patient is positive: of the real ones 22.5% are, which small sets could not learn from."""
    patient, streams = make_patient(seed, partial(_draw, positive=index % 2 == 0))
    text = streams[3]
    name = str(uuid.UUID(bytes=text.bytes(16), version=4))
    study = make_xray(patient, streams)
    path = root / "stage_2_train_images" / f"{name}.dcm"
    path.parent.mkdir(exist_ok=True)
    _save(path, name, study, text)
    found, boxes = [], []
    for lesion in study.lesions:
        own = [_square_box(study.film, box) for box in study.film_boxes(lesion)]
        found.append(lesion_record(lesion, own, slices=False))
        if lesion.finding.name in OPACITIES:
            boxes += [[x0, y0, x1 + 1, y1 + 1] for x0, y0, x1, y1 in own]
    kind = "Lung Opacity" if boxes else CLASSES[bool(patient.findings)]
    truth = {
        "image": path.relative_to(root).as_posix(),
        "labels": labels_of(patient.findings),
        "label": int(bool(boxes)),
        "class": kind,
        "boxes": boxes,
        "findings": found,
    }
    return {"studies": {name: truth}}


def _save(path: Path, name: str, study: XrayStudy, rng: np.random.Generator) -> None:
    """Write the film with the tags of the real files; a few have 0 for white (MONOCHROME1)."""
    view = "AP" if study.portable else "PA"
    inverted = bool(rng.random() < _MONOCHROME1_SHARE)
    uids = [f"2.25.{uuid.UUID(bytes=rng.bytes(16), version=4).int}" for _ in range(3)]
    side = max(study.film.shape) / study.film.shape[0] * study.grid.shape[0] * study.grid.spacing[0]
    tags: dict[Tag, tuple[str, str]] = {
        (0x0008, 0x0005): ("CS", "ISO_IR 100"),
        (0x0008, 0x0016): ("UI", "1.2.840.10008.5.1.4.1.1.7"),
        (0x0008, 0x0018): ("UI", uids[0]),
        (0x0008, 0x0020): ("DA", "19010101"),
        (0x0008, 0x0030): ("TM", "000000.00"),
        (0x0008, 0x0050): ("SH", ""),
        (0x0008, 0x0060): ("CS", "CR"),
        (0x0008, 0x0064): ("CS", "WSD"),
        (0x0008, 0x0090): ("PN", ""),
        (0x0008, 0x103E): ("LO", f"view: {view}"),
        (0x0010, 0x0010): ("PN", name),
        (0x0010, 0x0020): ("LO", name),
        (0x0010, 0x0030): ("DA", ""),
        (0x0010, 0x0040): ("CS", study.patient.sex),
        # the real files leave out the unit too
        (0x0010, 0x1010): ("AS", str(study.patient.age)),
        (0x0018, 0x0015): ("CS", "CHEST"),
        (0x0018, 0x5101): ("CS", view),
        (0x0020, 0x000D): ("UI", uids[1]),
        (0x0020, 0x000E): ("UI", uids[2]),
        (0x0020, 0x0010): ("SH", ""),
        (0x0020, 0x0011): ("IS", "1"),
        (0x0020, 0x0013): ("IS", "1"),
        (0x0020, 0x0020): ("CS", ""),
        (0x0028, 0x0030): ("DS", f"{side / SIDE:.6f}\\{side / SIDE:.6f}"),
    }
    film = _square(study.film)
    write_dicom(path, 255 - film if inverted else film, "MONOCHROME1" if inverted else "MONOCHROME2", tags)


def _write_tables(root: Path, records: list[PatientRecord], seed: np.random.SeedSequence) -> None:
    """One row per box in both tables, sorted by patient; a patient without a box has one row."""
    studies: dict[str, dict[str, Any]] = dict(sorted(item for r in records for item in r["studies"].items()))
    labels: list[tuple[Any, ...]] = []
    for name, study in studies.items():
        corners = [(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in study["boxes"]]
        labels += [(name, *map(float, box), 1) for box in corners] or [(name, "", "", "", "", 0)]
    write_rows(root / "stage_2_train_labels.csv", _LABEL_COLUMNS, labels)
    classes = [(row[0], studies[row[0]]["class"]) for row in labels]
    write_rows(root / "stage_2_detailed_class_info.csv", ("patientId", "class"), classes)


RSNA = register(Layout("rsna", 4, _write_patient, _write_tables, version=2))
