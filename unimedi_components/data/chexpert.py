# SPDX-License-Identifier: Apache-2.0
"""CheXpert v1.0 to a multi-label datalist (S4.2.1: five findings of frontal views).

The first folder of the column ``Path`` is replaced by the one that the csv lies in; of the original release the
patients of ``train/`` lie straight in its batches 2 to 4. The 202 frontal images of ``valid.csv`` are the test set;
validation comes out of ``train.csv``.
"""

import os
from pathlib import Path

import numpy as np
import pandas as pd

from unimedi_components.data.datalist import DatalistBuilder, Dataset
from unimedi_components.data.sources import check_choice, existing_root, find_source, folders_below, read_source
from unimedi_components.data.splits import hold_out
from unimedi_components.errors import ConfigError, DataError

#: The 14 findings in the order of the csv's columns.
FINDINGS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other"),
    *("Fracture", "Support Devices"),
)
#: The five findings of the CheXpert competition, the paper's task.
COMPETITION = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
#: Findings whose uncertain labels the paper, as MGCA before it, counts as positive.
UNCERTAIN_ONES = ("Atelectasis", "Edema", "Pleural Effusion")
TASKS = {"competition": COMPETITION, "all": FINDINGS}
#: Where train.csv may lie, in order of preference.
TABLE_FOLDERS = ("", "CheXpert-v1.0*/", "CheXpert*/", "*/CheXpert*/", "*/", "*/*/")
BATCHES = "CheXpert-v1.0 batch *"
POLICIES = ("paper", "ones", "zeros", "ignore")
UNCERTAIN = -1
VIEW = "Frontal/Lateral"

# The first folder of Path, unless the path starts within the data set
_FIRST_FOLDER = r"^(?!(?:train|valid)/)[^/]+/"
_PATIENT_PATH = r"^\w+/((patient\d+)/[^/]+/[^/]+)\.\w+$"


def collect(
    root: str | Path,
    *,
    strict: bool = False,
    seed: int = 42,
    findings: str = "competition",
    uncertain: str = "paper",
    validation_images: int = 5000,
    check_images: str = "quick",
    num_workers: int = 8,
    progress: bool = True,
) -> DatalistBuilder:
    """Read CheXpert.

    Args:
        root: ``CheXpert-v1.0[-small]`` or the folder above it; item paths are relative to it.
        findings: ``"competition"`` (five, in the order of :data:`COMPETITION`) or ``"all"`` (14, as in the csv).
        uncertain: what an uncertain label (-1) becomes: ``"paper"`` (1 for :data:`UNCERTAIN_ONES`, otherwise
            0), ``"ones"``, ``"zeros"``, or ``"ignore"`` (-1 stays, for a loss that masks it). A finding that is
            not mentioned is 0 in all of them.
        validation_images: how many frontal training images to hold out, by whole patients; a tenth of the
            images where there are no more than this. (The paper draws 5,000 images; taking whole patients
            keeps a patient's images out of both splits.)

    Returns:
        The builder. Drop reasons: ``no patient in the path``, ``duplicate id``, ``not a frontal view``, ``unknown
        label``, ``patient in another split``, ``missing image``, ``unreadable image``.
    """
    check_choice("findings", findings, TASKS, hint=True)
    check_choice("uncertain", uncertain, POLICIES, hint=True)
    if validation_images < 0:
        raise ConfigError(f"validation_images={validation_images} is negative. Use 5000, or 0 for no validation.")
    columns = TASKS[findings]
    base = existing_root(root, "CheXpert")
    builder = DatalistBuilder("chexpert", root, strict)
    table = find_source(base, [f"{folder}train.csv" for folder in TABLE_FOLDERS], "table of CheXpert")
    valid = find_source(table.parent, ["valid.csv"], "table of CheXpert's validation set, the test set here")
    test = _frontal_rows(builder, valid, columns, uncertain)
    train = _frontal_rows(builder, table, columns, uncertain)
    for part in (test, train):
        part["image"] = _on_disk(base, table.parent, part["image"], check_images)
    train = builder.without(train, train["patient"].isin(test["patient"]), "patient in another split")
    # of a set that is no larger, a tenth
    count = int(len(train) / 10 + 0.5) if len(train) <= validation_images else validation_images
    held = hold_out(train["patient"].value_counts().to_dict(), count, seed)
    train["split"] = np.where(train["patient"].isin(held), "validation", "training")
    test["split"] = "test"
    rows = (
        (row.split, {"id": row.id, "patient": row.patient, "image": row.image, "dim": 2, "label": row.label})
        for row in pd.concat([test, train]).itertuples(index=False)
    )
    builder.add_films(rows, check_images, num_workers, progress)
    builder.meta |= {
        "task": "multilabel",
        "label_names": list(columns),
        "label_values": {"1": "positive", "0": "negative"} | ({"-1": "uncertain"} if uncertain == "ignore" else {}),
        "findings": findings,
        "uncertain": uncertain,
        "split": "test: valid.csv; validation: patients of train.csv",
    }
    return builder


def _on_disk(base: Path, home: Path, images: pd.Series, check: str) -> pd.Series:
    """Return paths below ``base`` of images ``train/patient00001/...``, which lie beside the tables or in batches."""
    prefix = os.path.relpath(home, base).replace(os.sep, "/")
    plain = images if prefix == "." else prefix + "/" + images
    split = images.str.split("/").str[0]
    elsewhere = ~split.isin([name for name in split.unique() if (home / name).is_dir()])
    if check == "none" or not elsewhere.any():
        return plain

    def closed(path: Path) -> bool:
        return path.name.startswith("patient") or path in (home / "train", home / "valid")

    batches = [path for path in home.parent.glob(BATCHES) if path.is_dir() and path != home]
    tops = [home, *sorted(batches if home.match(BATCHES) and home != base else [])]
    folders = [path for top in tops for path in folders_below(top, 2, closed)]
    place = {path.name: path.relative_to(base).as_posix() for path in folders if path.name.startswith("patient")}
    if not place:
        above = " Give the folder that holds all batches as ROOT." if home.match(BATCHES) and home == base else ""
        looked = ", ".join(f"{home / name}" for name in sorted(split[elsewhere].unique()))
        raise DataError(
            f"{base}: no images. Looked for {looked}, and patient00001 in {home.parent / BATCHES}. "
            f"Unpack the data set's archives there, or correct ROOT.{above}"
        )
    parts = images.str.split("/", n=2, expand=True)
    below = parts[1].map(place) + "/" + parts[2]
    return below.where(elsewhere).fillna(plain)


def _frontal_rows(builder: DatalistBuilder, path: Path, columns: tuple[str, ...], policy: str) -> pd.DataFrame:
    """Return one row per usable frontal image of a table: id, patient, image (``train/patient...``), label."""
    frame = read_source(path, ("Path", VIEW, *columns))
    builder.add_source(path)
    own = frame["Path"].str.strip().str.replace(_FIRST_FOLDER, "", n=1, regex=True)
    named = own.str.extract(_PATIENT_PATH)
    frame = frame.assign(id=named[0].str.replace("/", "_"), patient=named[1], image=own)
    frame = builder.without(frame, frame["id"].isna(), "no patient in the path", "Path")
    frame = builder.without(frame, frame["id"].duplicated(), "duplicate id")
    frame = builder.without(frame, frame[VIEW].str.strip().str.lower() != "frontal", "not a frontal view")
    values = frame[list(columns)].apply(lambda cells: cells.map({text: _label(text) for text in cells.unique()}))
    usable = values.notna().all(axis=1)
    for item_id, row in frame.loc[~usable].set_index("id")[list(columns)].iterrows():
        wrong = next(f"{name} is {text!r}" for name, text in row.items() if _label(text) is None)
        builder.drop("unknown label", str(item_id), f"{path}: {item_id}: {wrong}, it must be 1, 0, -1 or empty")
    frame = frame.loc[usable, ["id", "patient", "image"]]
    by_policy = {
        "paper": [int(name in UNCERTAIN_ONES) for name in columns],
        "ones": [1] * len(columns),
        "zeros": [0] * len(columns),
        "ignore": [UNCERTAIN] * len(columns),
    }
    labels = values[usable].to_numpy(dtype=np.int8)
    frame["label"] = np.where(labels == UNCERTAIN, by_policy[policy], labels).tolist()
    return frame


def _label(text: str) -> int | None:
    """Return a cell as 1, 0 or -1; None for any other value."""
    text = text.strip().lower()
    if text in ("", "nan"):
        return 0
    try:
        value = float(text)
    except ValueError:
        return None
    return int(value) if value in (1, 0, UNCERTAIN) else None


DATASET = Dataset(
    name="chexpert",
    title="CheXpert v1.0, the original or the small release",
    task="2D classification, several findings (S4.2.1)",
    source="https://stanfordmlgroup.github.io/competitions/chexpert/ (registration)",
    licence="Stanford University Dataset Research Use Agreement: research only, no redistribution",
    tree="""\
CheXpert-v1.0-small/train.csv[.gz]  CheXpert-v1.0-small/valid.csv[.gz]
CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg
CheXpert-v1.0-small/valid/patient64541/study1/view1_frontal.jpg    (or ROOT is CheXpert-v1.0-small itself)
CheXpert-v1.0 batch 1 (validate & csv)/{train.csv,valid.csv,valid/...}   (the original release, with its batches:)
CheXpert-v1.0 batch 2 (train 1)/patient00001/study1/view1_frontal.jpg    (batch 3 (train 2), batch 4 (train 3))""",
    collect=collect,
    training={"": 186_027},
    notes="Of 223,414 training rows 191,027 are frontal; 5,000 of them, by whole patients, are validation, and the "
    "202 frontal images of valid.csv are the test set. Options: --findings competition | all, --uncertain paper | "
    "ones | zeros | ignore, --validation_images.",
)
