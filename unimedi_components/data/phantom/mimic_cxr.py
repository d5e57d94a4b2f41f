# SPDX-License-Identifier: Apache-2.0
"""Phantom X-rays in the layout of MIMIC-CXR-JPG 2.0.0 with the reports of MIMIC-CXR."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .anatomy import Patient
from .reports import Report, write_report
from .studies import labels_of, make_patient, make_xray
from .writer import Layout, PatientRecord, register, write_rows

METADATA_COLUMNS = (
    *("dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows"),
    *("Columns", "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning"),
    *("ViewCodeSequence_CodeMeaning", "PatientOrientationCodeSequence_CodeMeaning"),
)
CHEXPERT_LABELS = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture"),
    *("Lung Lesion", "Lung Opacity", "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia"),
    *("Pneumothorax", "Support Devices"),
)
CHEXPERT_OF = {
    "nodule": "Lung Lesion",
    "consolidation": "Consolidation",
    "ground_glass": "Lung Opacity",
    "effusion": "Pleural Effusion",
    "pneumothorax": "Pneumothorax",
    "cardiomegaly": "Cardiomegaly",
    "atelectasis": "Atelectasis",
    "edema": "Edema",
}
_LATERAL_SHARE = 0.05
_SUBJECTS = 10_000_000


def format_report(report: Report, portable: bool) -> str:
    """The text file of a study, with the indents, section heads and line ends of the real ones."""
    examination = "CHEST (PORTABLE AP)" if portable else "CHEST (PA AND LAT)"

    def section(name: str, sentences: tuple[str, ...]) -> str:
        lines = textwrap.wrap("  ".join(sentences), 78, fix_sentence_endings=False)
        return f" {name}: \n \n" + "".join(f" {line}\n" for line in lines)

    return (
        f"{'':33}FINAL REPORT\n EXAMINATION:  {examination}\n \n INDICATION:  {report.indication}.\n \n"
        f" TECHNIQUE:  Chest {'AP' if portable else 'PA'}\n \n COMPARISON:  None.\n \n"
        f"{section('FINDINGS', report.findings)} \n{section('IMPRESSION', report.impression)}"
    )


def _hex_id(rng: np.random.Generator) -> str:
    return "-".join(f"{int(v):08x}" for v in rng.integers(0, 2**32, 5, dtype=np.uint64))


def _write_patient(root: Path, index: int, seed: np.random.SeedSequence) -> PatientRecord:
    patient, streams = make_patient(seed)
    text = streams[3]
    # 9 does not divide 9_999_991 (a prime), so the subjects are distinct and look unordered.
    subject = _SUBJECTS + 31 + (index * 7_368_787) % 9_999_991
    study = 50_000_000 + (subject * 3 + int(text.integers(0, 9_999_991)) * 1000) % 9_999_991
    image = make_xray(patient, streams, lateral=bool(text.random() < _LATERAL_SHARE))
    name = _hex_id(text)
    folder = root / "files" / f"p{str(subject)[:2]}" / f"p{subject}" / f"s{study}"
    folder.mkdir(parents=True)
    report = write_report(patient, "xray", np.random.default_rng(seed.spawn(1)[0]))
    folder.with_suffix(".txt").write_text(format_report(report, image.portable), encoding="utf-8", newline="\n")
    rows = [_save(folder, name, image.film, "AP" if image.portable else "PA", subject, study, text)]
    if image.lateral is not None:
        rows.append(_save(folder, _hex_id(text), image.lateral, "LATERAL", subject, study, text))
    path = (folder / f"{name}.jpg").relative_to(root).as_posix()
    return {
        "studies": {name: {"image": path, "labels": labels_of(patient.findings), "findings": image.records()}},
        "metadata": rows,
        "chexpert": _chexpert_row(patient, subject, study),
        "subject": subject,
    }


def _save(
    folder: Path, name: str, film: np.ndarray, view: str, subject: int, study: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Write one film; returns its row of the metadata table."""
    Image.fromarray(film).save(folder / f"{name}.jpg", quality=90)
    meaning = {"AP": "antero-posterior", "PA": "postero-anterior", "LATERAL": "lateral"}[view]
    procedure = "CHEST (PORTABLE AP)" if view == "AP" else "CHEST (PA AND LAT)"
    date = f"{2110 + int(rng.integers(0, 90))}{int(rng.integers(1, 13)):02d}{int(rng.integers(1, 29)):02d}"
    time = f"{int(rng.integers(0, 24)):02d}{int(rng.integers(0, 60)):02d}{int(rng.integers(0, 60)):02d}.000"
    values = (name, subject, study, procedure, view, *film.shape, date, time, procedure, meaning, "Erect")
    return dict(zip(METADATA_COLUMNS, values, strict=True))


def _chexpert_row(patient: Patient, subject: int, study: int) -> dict[str, Any]:
    present = {CHEXPERT_OF[f.name] for f in patient.findings}
    row: dict[str, Any] = {"subject_id": subject, "study_id": study}
    for label in CHEXPERT_LABELS:
        row[label] = "1.0" if label in present else "0.0" if label in CHEXPERT_OF.values() else ""
    row["No Finding"] = "" if present else "1.0"
    return row


def _write_tables(root: Path, records: list[PatientRecord], seed: np.random.SeedSequence) -> None:
    rows = [row for record in records for row in record["metadata"]]
    write_rows(root / "mimic-cxr-2.0.0-metadata.csv", METADATA_COLUMNS, rows)
    chexpert = [record["chexpert"] for record in records]
    write_rows(root / "mimic-cxr-2.0.0-chexpert.csv", ("subject_id", "study_id", *CHEXPERT_LABELS), chexpert)
    order = np.random.default_rng(seed).permutation(len(records))
    held = max(1, round(0.05 * len(records))) if len(records) >= 3 else 0
    split_of = {records[i]["subject"]: "validate" if k < held else "test" for k, i in enumerate(order[: 2 * held])}
    keys = ("dicom_id", "study_id", "subject_id")
    splits = [{**{k: r[k] for k in keys}, "split": split_of.get(r["subject_id"], "train")} for r in rows]
    write_rows(root / "mimic-cxr-2.0.0-split.csv", (*keys, "split"), splits)


MIMIC_CXR = register(Layout("mimic_cxr", 1, _write_patient, _write_tables, version=2))
