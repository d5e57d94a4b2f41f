# SPDX-License-Identifier: Apache-2.0
"""Phantom abdominal CT in the layout of AMOS22: 15 organs, lung bases to pelvic floor, some MRI between them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .abdomen import AbdomenStudy, make_abdomen
from .abdomen_files import axis_order, case_record, organ_truth, save_volume, second_seed
from .geometry import noise
from .writer import Layout, PatientRecord, register

LABELS = (
    *("spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "aorta"),
    *("postcava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus"),
)
"""Names of the labels 1 to 15; dataset.json of the real set spells the aorta arota."""
MOST_PATIENTS = 450
"""CT cases have numbers up to 500, and those from 451 on are kept for cases without labels."""
_FIRST_TEST, _TEST_EVERY = 451, 15
_FIRST_MRI, _MRI_EVERY, _MRI_REST = 507, 10, 6
_FOLDERS = {"training": "Tr", "validation": "Va"}
# Without the portal vein, number 10 of the painted organs, the later ones move up.
_NUMBERS = np.array((*range(10), 0, *range(10, 16)), np.uint8)
_BRIGHTNESS = ((-1000, -200, -100, 0, 60, 200, 600), (0, 10, 900, 250, 380, 520, 60))


def _write_patient(root: Path, index: int, seed: np.random.SeedSequence) -> PatientRecord:
    """One CT case; beside every tenth patient an MRI case, beside every fifteenth one for testing without labels."""
    order = axis_order(index, seed)
    study = make_abdomen(seed, pelvis=True)
    labels = _NUMBERS[study.organs]
    split, name = ("validation" if index % 3 == 2 else "training"), f"amos_{index + 1:04d}"
    entry, organs = _save_pair(root, split, name, study, study.hu, labels, order)
    paths = [entry[key].removeprefix("./") for key in ("image", "label")]
    lists: dict[str, list[Any]] = {"training": [], "validation": [], "test": []}
    lists[split].append(entry)
    turn, rest = divmod(index, _MRI_EVERY)
    if rest == _MRI_REST:
        split = "validation" if turn % 2 else "training"
        image = _as_mri(study, np.random.default_rng(second_seed(seed, 3)))
        lists[split].append(_save_pair(root, split, f"amos_{_FIRST_MRI + turn:04d}", study, image, labels, order)[0])
    turn, rest = divmod(index, _TEST_EVERY)
    if rest == _TEST_EVERY - 1:
        other = make_abdomen(second_seed(seed, 2), pelvis=True)
        path = f"imagesTs/amos_{_FIRST_TEST + turn:04d}.nii.gz"
        save_volume(root / path, other.hu, other.grid, order)
        lists["test"].append({"image": f"./{path}"})
    return {"studies": {name: case_record(study, organs, *paths)}, "lists": lists}


def _save_pair(
    root: Path, split: str, name: str, study: AbdomenStudy, image: np.ndarray, labels: np.ndarray, order: str
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Write an image and its label map; return their entry in dataset.json and what the label map holds."""
    paths = [f"{kind}{_FOLDERS[split]}/{name}.nii.gz" for kind in ("images", "labels")]
    save_volume(root / paths[0], image, study.grid, order)
    stored, affine = save_volume(root / paths[1], labels, study.grid, order)
    return {"image": f"./{paths[0]}", "label": f"./{paths[1]}"}, organ_truth(stored, affine, LABELS)


def _as_mri(study: AbdomenStudy, rng: np.random.Generator) -> npt.NDArray[np.int16]:
    """The patient in arbitrary units, none below 0: fat bright, bone and air dark."""
    table = np.interp(np.arange(-1024, 3072), *_BRIGHTNESS)
    bright = table[study.hu.astype(np.int32) + 1024] + 8.0 * noise(rng, study.hu.shape)
    return np.clip(bright, 0.0, None).astype(np.int16)


def _write_tables(root: Path, records: list[PatientRecord], seed: np.random.SeedSequence) -> None:
    names = [name.replace("aorta", "arota") for name in LABELS]
    lists = {
        split: sorted((entry for record in records for entry in record["lists"][split]), key=lambda e: str(e["image"]))
        for split in ("training", "validation", "test")
    }
    content = {
        "name": "AMOS",
        "description": "Phantom in the layout of AMOS22, abdominal multi-organ segmentation",
        "author": "none, computed",
        "reference": "https://doi.org/10.48550/arXiv.2206.08023",
        "licence": "Apache-2.0",
        "release": "1.0",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {str(number): name for number, name in enumerate(("background", *names))},
        "numTraining": len(lists["training"]),
        "numValidation": len(lists["validation"]),
        "numTest": len(lists["test"]),
        **lists,
    }
    (root / "dataset.json").write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


AMOS = register(Layout("amos", 9, _write_patient, _write_tables, most=MOST_PATIENTS))
