# SPDX-License-Identifier: Apache-2.0
"""Phantom X-rays in the layout of COVIDx with V9A lists: normal, pneumonia, COVID-19."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from .anatomy import Patient
from .findings import Disease, draw_disease
from .studies import XrayStudy, labels_of, make_patient, make_xray
from .writer import Layout, PatientRecord, register

#: The lists' name of each disease, in the order of the labels 0, 1, 2.
LIST_NAMES: dict[Disease, str] = {"normal": "normal", "pneumonia": "pneumonia", "covid": "COVID-19"}
SOURCES = ("rsna", "cohen", "fig1")
# Some patients have a second film of the same day.
_SECOND_SHARE = 0.1


def _write_patient(root: Path, index: int, seed: np.random.SeedSequence) -> PatientRecord:
    # Each class has two of every six patients, and the test patients, the last of each six, go through all.
    disease = tuple(LIST_NAMES)[(index + index // 6) % 3]
    split: Literal["train", "test"] = "test" if index % 6 == 5 else "train"
    folder = root / split
    folder.mkdir(exist_ok=True)
    patient, image, text = _study(seed, disease, film=0)
    # The source is independent of the class, so that no trace of it gives the class away.
    source = SOURCES[int(text.integers(0, len(SOURCES)))]
    number, names = _file_names(source, index, text)
    images = [image]
    if text.random() < _SECOND_SHARE:
        images.append(_study(seed, disease, film=1)[1])
    studies = {}
    for name, own in zip(names, images, strict=False):
        film = Image.fromarray(own.film)
        # Figures of articles are colour files even where they show grey images.
        options: dict[str, Any] = {} if name.endswith(".png") else {"quality": 90}
        (film.convert("RGB") if source == "cohen" else film).save(folder / name, **options)
        about = {"image": f"{split}/{name}", "label": tuple(LIST_NAMES).index(disease), "disease": disease}
        studies[name] = {**about, "labels": labels_of(patient.findings), "findings": own.records()}
    lines = [f"{number} {name} {LIST_NAMES[disease]} {source}" for name in studies]
    return {"studies": studies, "split": split, "lines": lines}


def _study(seed: np.random.SeedSequence, disease: Disease, film: int) -> tuple[Patient, XrayStudy, np.random.Generator]:
    """A film of a patient; all films of one seed show the same body, each exposed anew."""
    # A sequence spawns other children each time that it is asked, so each film starts from a copy.
    copy = np.random.SeedSequence(seed.entropy, spawn_key=seed.spawn_key)
    patient, streams = make_patient(copy, lambda rng: draw_disease(disease, rng))
    text = streams[3]
    if film:
        streams[2] = np.random.default_rng(copy.spawn(film)[-1])
    return patient, make_xray(patient, streams), text


def _file_names(source: str, index: int, rng: np.random.Generator) -> tuple[str, tuple[str, str]]:
    """A patient's id and the names of up to two files, as the source writes them."""
    if source == "rsna":
        digits = "".join(f"{int(v):08x}" for v in rng.integers(0, 2**32, 4, dtype=np.uint64))
        number = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
        return number, (f"{number}.png", f"{number}-1.png")
    if source == "cohen":
        return f"{index + 1}", (f"case {index + 1} day 0.jpg", f"case {index + 1} day 0-b.jpg")
    return f"FIG-{index + 1:05d}", (f"FIG-{index + 1:05d}.jpeg", f"FIG-{index + 1:05d}-b.jpeg")


def _write_tables(root: Path, records: list[PatientRecord], seed: np.random.SeedSequence) -> None:
    for split in ("train", "test"):
        lines = [line for record in records if record["split"] == split for line in record["lines"]]
        (root / f"{split}_COVIDx9A.txt").write_text("".join(f"{v}\n" for v in lines), encoding="utf-8", newline="\n")


COVIDX = register(Layout("covidx", 5, _write_patient, _write_tables))
