# SPDX-License-Identifier: Apache-2.0
"""Phantom CT volumes in the layout of BIMCV-COVID19+ with English reports."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from .abdomen_files import save_volume
from .anatomy import Patient
from .geometry import Grid
from .lesions import Lesion
from .reports import Report, write_report
from .studies import labels_of, lesion_record, make_ct, make_patient
from .writer import Layout, PatientRecord, register, write_rows

REPORT_COLUMNS = (
    *("PatientID", "ReportID", "Report", "Labels", "Localizations", "LabelsLocalizationsBySentence"),
    *("labelCUIS", "LocalizationsCUIS"),
)
_SCOUT_SHARE = 0.05
_LPS_SHARE = 0.4
_SCOUT_SLICES = 6


def _write_patient(root: Path, index: int, seed: np.random.SeedSequence) -> PatientRecord:
    patient, streams = make_patient(seed)
    text = streams[3]
    subject, session = f"sub-S{index + 1:05d}", f"ses-E{2 * index + 1 + int(text.integers(0, 2)):05d}"
    folder = root / "covid19_posi" / subject / session / "mod-rx"
    folder.mkdir(parents=True)
    study = make_ct(patient, streams)
    stem = f"{subject}_{session}_run-1_bp-chest_ct"
    lps = bool(text.random() < _LPS_SHARE)
    date = f"2020{int(text.integers(3, 12)):02d}{int(text.integers(1, 29)):02d}"
    _save_series(folder, stem, study.hu, study.grid, lps, patient, date)
    if text.random() < _SCOUT_SHARE:
        few = np.linspace(8, study.hu.shape[0] - 9, _SCOUT_SLICES).astype(int)
        z, y, x = study.grid.spacing
        gap = z * float(few[1] - few[0])
        origin = (float(study.grid.z[few[0]]), *study.grid.origin[1:])
        grid = Grid((_SCOUT_SLICES, *study.hu.shape[1:]), (gap, y, x), origin)
        _save_series(folder, stem.replace("run-1", "run-2"), study.hu[few], grid, lps, patient, date)
    report = write_report(patient, "ct", np.random.default_rng(seed.spawn(1)[0]))
    sessions = root / "covid19_posi" / subject / f"{subject}_sessions.tsv"
    write_rows(sessions, ("session_id", "study_date", "medical_evaluation"), [(session, date, "")], "\t")
    truth = {
        "image": (folder / f"{stem}.nii.gz").relative_to(root).as_posix(),
        "labels": labels_of(patient.findings),
        "findings": [lesion_record(v, _file_boxes(v, study.hu.shape, lps), slices=True) for v in study.lesions],
        "lesion_slices": sorted({i for lesion in study.lesions for i in lesion.slices}),
        "n_slices": study.hu.shape[0],
    }
    return {
        "studies": {stem: truth},
        "participant": (subject, "['CT']", "[['chest']]", f"[{patient.age}]", patient.sex),
        "report": _report_row(patient, report, subject, session),
    }


def _save_series(folder: Path, stem: str, hu: np.ndarray, grid: Grid, lps: bool, patient: Patient, date: str) -> None:
    save_volume(folder / f"{stem}.nii.gz", hu, grid, "LPS" if lps else "RAS")
    tags: dict[str, dict[str, Any]] = {
        "00080020": {"vr": "DA", "Value": [date]},
        "00080060": {"vr": "CS", "Value": ["CT"]},
        "00100040": {"vr": "CS", "Value": [patient.sex]},
        "00101010": {"vr": "AS", "Value": [f"{patient.age:03d}Y"]},
        "00180015": {"vr": "CS", "Value": ["CHEST"]},
        "00180050": {"vr": "DS", "Value": [round(grid.spacing[0], 3)]},
        "00185100": {"vr": "CS", "Value": ["HFS"]},
        "00280010": {"vr": "US", "Value": [hu.shape[1]]},
        "00280011": {"vr": "US", "Value": [hu.shape[2]]},
        "00280030": {"vr": "DS", "Value": [round(grid.spacing[1], 4), round(grid.spacing[2], 4)]},
        "00281052": {"vr": "DS", "Value": [0.0]},
        "00281053": {"vr": "DS", "Value": [1.0]},
    }
    (folder / f"{stem}.json").write_text(json.dumps(tags) + "\n", encoding="utf-8")


def _file_boxes(lesion: Lesion, shape: tuple[int, ...], lps: bool) -> list[list[list[int]]]:
    """Boxes [[z0, z1], [y0, y1], [x0, x1]] in indices of the file's third, second and first axis."""
    if lps:
        return lesion.boxes
    _, ny, nx = shape
    return [[z, [ny - 1 - y1, ny - 1 - y0], [nx - 1 - x1, nx - 1 - x0]] for z, (y0, y1), (x0, x1) in lesion.boxes]


def _report_row(patient: Patient, report: Report, subject: str, session: str) -> tuple[str, ...]:
    text = f"Findings: {' '.join(report.findings)} Impression: {' '.join(report.impression)}"
    labels = [f.name.replace("_", " ") for f in patient.findings] or ["normal"]
    places = [f"loc {f.side}" for f in patient.findings if f.side]
    return subject, session, text, str(labels), str(places), str([[v] for v in labels]), "[]", "[]"


def _write_tables(root: Path, records: list[PatientRecord], seed: np.random.SeedSequence) -> None:
    base = root / "covid19_posi"
    columns = ("participant", "modality_dicom", "body_parts", "age", "gender")
    write_rows(base / "participants.tsv", columns, [record["participant"] for record in records], "\t")
    labels = base / "derivatives" / "labels"
    labels.mkdir(parents=True)
    write_rows(labels / "labels_covid19_posi.tsv", REPORT_COLUMNS, [record["report"] for record in records], "\t")


BIMCV = register(Layout("bimcv", 2, _write_patient, _write_tables, version=2))
