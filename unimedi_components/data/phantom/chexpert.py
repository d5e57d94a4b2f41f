# SPDX-License-Identifier: Apache-2.0
"""Phantom X-rays in the layout of CheXpert-v1.0-small, with uncertain labels."""

from pathlib import Path

import numpy as np
from PIL import Image

from .anatomy import Patient
from .mimic_cxr import CHEXPERT_OF as COLUMN_OF
from .studies import labels_of, make_patient, make_xray
from .writer import Layout, PatientRecord, register, write_rows

LABELS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other"),
    *("Fracture", "Support Devices"),
)
COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *LABELS)
#: Share of a training study's labels that are uncertain (-1.0), of findings that are there and that are not.
UNCERTAIN_PRESENT, UNCERTAIN_ABSENT = 0.10, 0.01
#: Share of the findings that are not there whose cell is empty instead of 0.0.
_UNMENTIONED = 0.5
_LATERAL_SHARE = 0.15
_FOLDER = "CheXpert-v1.0-small"


def _write_patient(root: Path, index: int, seed: np.random.SeedSequence) -> PatientRecord:
    patient, streams = make_patient(seed)
    text = streams[3]
    # The fourth of every eight patients belongs to valid.csv.
    split = "valid" if index % 8 == 3 else "train"
    image = make_xray(patient, streams, lateral=bool(text.random() < _LATERAL_SHARE))
    name = f"patient{index + 1:05d}"
    study = f"{_FOLDER}/{split}/{name}/study1"
    (root / study).mkdir(parents=True)
    Image.fromarray(image.film).save(root / study / "view1_frontal.jpg", quality=90)
    true = _true_labels(patient)
    cells = _cells(true, text) if split == "train" else {label: f"{value}.0" for label, value in true.items()}
    person = {"Sex": "Male" if patient.sex == "M" else "Female", "Age": patient.age}
    frontal = {"Frontal/Lateral": "Frontal", "AP/PA": "AP" if image.portable else "PA"}
    path = f"{study}/view1_frontal.jpg"
    rows = [{"Path": path, **person, **frontal, **cells}]
    if image.lateral is not None:
        Image.fromarray(image.lateral).save(root / study / "view2_lateral.jpg", quality=90)
        lateral = {"Frontal/Lateral": "Lateral", "AP/PA": ""}
        rows.append({"Path": f"{study}/view2_lateral.jpg", **person, **lateral, **cells})
    doubt = [label for label, cell in cells.items() if cell == "-1.0"]
    truth = {"image": path, "labels": labels_of(patient.findings), "chexpert": true, "uncertain": doubt}
    truth["findings"] = image.records()
    return {"studies": {f"{name}_study1_view1_frontal": truth}, "split": split, "rows": rows}


def _true_labels(patient: Patient) -> dict[str, int]:
    """0/1 for each of the 14 labels."""
    present = {COLUMN_OF[finding.name] for finding in patient.findings} or {"No Finding"}
    return {label: int(label in present) for label in LABELS}


def _cells(true: dict[str, int], rng: np.random.Generator) -> dict[str, str]:
    """The cells of a training study: 1.0, 0.0, -1.0 or empty, as a labeller of reports leaves them."""
    cells = {}
    for label, value in true.items():
        doubt, silence = rng.random(2)
        if label not in COLUMN_OF.values():
            cells[label] = "1.0" if value else ""
        elif doubt < (UNCERTAIN_PRESENT if value else UNCERTAIN_ABSENT):
            cells[label] = "-1.0"
        else:
            cells[label] = "1.0" if value else "" if silence < _UNMENTIONED else "0.0"
    return cells


def _write_tables(root: Path, records: list[PatientRecord], seed: np.random.SeedSequence) -> None:
    base = root / _FOLDER
    base.mkdir(exist_ok=True)
    for split in ("train", "valid"):
        rows = (row for record in records if record["split"] == split for row in record["rows"])
        write_rows(base / f"{split}.csv", COLUMNS, rows)


CHEXPERT = register(Layout("chexpert", 3, _write_patient, _write_tables))
