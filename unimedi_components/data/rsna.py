# SPDX-License-Identifier: Apache-2.0
"""RSNA Pneumonia Detection Challenge, stage 2, to a datalist of labels, masks or boxes (S4.2.1).

The label table has one row per box; there is one film of 1024 x 1024 pixels per patient. The official files hold 30,227
rows of 26,684 patients, 6,012 of them positive (the paper's "29,700" is an error).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from unimedi_components.data.datalist import DatalistBuilder, Dataset
from unimedi_components.data.sources import (
    check_choice,
    existing_root,
    find_source,
    first_source,
    read_source,
    undoubled,
)
from unimedi_components.errors import DataError

#: Task -> its name in the meta block, share of the patients held out for validation and test together.
TASKS = {"classification": ("binary", 0.3), "segmentation": ("segmentation", 0.4), "detection": ("detection", 0.4)}
SPLIT_SOURCES = ("paper", "lovt")
BOX_COLUMNS = ("x", "y", "width", "height")
IMAGES = "stage_2_train_images"
LOVT_FILES = {"training": "train", "validation": "validation", "test": "test"}


def collect(
    root: str | Path,
    *,
    strict: bool = False,
    task: str = "classification",
    split: str = "paper",
    split_dir: str | Path | None = None,
    check_images: str = "quick",
    num_workers: int = 8,
    progress: bool = True,
) -> DatalistBuilder:
    """Read RSNA Pneumonia stage 2.

    All tasks give one item per patient with its label, 1 for pneumonia, and drop the same ones; they differ
    in split and boxes. Masks are not files: ``BoxesToMaskd`` paints them from the boxes. A patient whose
    rows contradict each other is dropped whole, since half of an annotation is a wrong one.

    Args:
        root: folder with the tables and ``stage_2_train_images``, or the one that holds it.
        task: ``"classification"`` (boxes only where there are any), ``"segmentation"`` or ``"detection"``
            (every item has boxes; without an opacity an empty list).
        split: ``"paper"`` for :func:`paper_split`, or ``"lovt"`` for the patients that LoVT's files list.
        split_dir: folder with LoVT's ``train.csv``, ``validation.csv`` and ``test.csv`` if not ROOT; only their
            ids are used.

    Returns:
        The builder. Drop reasons: ``no patient id``, ``duplicate row`` (a box that stands twice), ``target and boxes
        disagree`` (target neither 0 nor 1, or not the same in all rows; 1 without or 0 with a box), ``unusable box``
        (missing, negative or non-numeric values, no area), ``no official split``, ``patient in another split``,
        ``listed but not in the labels`` (the last three with LoVT's lists), ``missing image``, ``unreadable image``.
    """
    check_choice("task", task, TASKS)
    check_choice("split", split, SPLIT_SOURCES)
    base = existing_root(root, "RSNA Pneumonia")
    builder = DatalistBuilder("rsna", root, strict)
    name = "stage_2_train_labels.csv"
    table = find_source(base, [name, f"*/{name}", f"*/*/{name}"], "label table of RSNA Pneumonia stage 2")
    rows = _read_rows(builder, table)
    patients = sorted(set(rows["patientId"]))
    split_of = _lovt_split(builder, base, split_dir, patients) if split == "lovt" else paper_split(patients, task)
    rows = _without_contradictions(builder, rows[rows["patientId"].isin(set(split_of))])
    boxes = _boxes_of(rows)
    classes = _classes(builder, table.parent, base)
    images = _image_folder(base, table.parent)
    if check_images != "none" and not images.is_dir():
        raise DataError(
            f"{images}: no such folder. Unpack {IMAGES}.zip of the challenge there, correct ROOT, or prepare the "
            "tables alone with --check_images none."
        )
    targets = rows.drop_duplicates("patientId")[["patientId", "target"]].astype({"target": int})
    folder, films = images.relative_to(base).as_posix(), []
    for patient, target in targets.sort_values("patientId").itertuples(index=False):
        item = {"id": patient, "patient": patient, "image": f"{folder}/{patient}.dcm", "dim": 2, "label": target}
        if patient in boxes or task != "classification":
            item["boxes"] = boxes.get(patient, [])
        if patient in classes:
            item["class"] = classes[patient]
        films.append((split_of[patient], item))
    builder.add_films(films, check_images, num_workers, progress)
    names = ["no pneumonia" if task == "classification" else "background", "pneumonia"]
    builder.meta |= {"task": TASKS[task][0], "label_names": names, "split": split}
    builder.meta["boxes"] = "x0, y0, x1, y1 in pixels of the DICOM file, x1 and y1 just beyond the box"
    if task == "segmentation":
        builder.meta["masks"] = "painted from the boxes by the transform BoxesToMaskd; there are no mask files"
    return builder


def _read_rows(builder: DatalistBuilder, path: Path) -> pd.DataFrame:
    """Return the distinct rows: patientId, target and the four box columns as numbers, has_box, unusable."""
    text = read_source(path, ("patientId", *BOX_COLUMNS, "Target"))
    builder.add_source(path)
    cells = text[list(BOX_COLUMNS)].apply(lambda column: column.str.strip())
    empty = cells.apply(lambda column: column.str.lower().isin(("", "nan")))
    rows = cells.apply(pd.to_numeric, errors="coerce").replace([np.inf, -np.inf], np.nan)
    rows.insert(0, "patientId", text["patientId"].str.strip())
    rows["target"] = pd.to_numeric(text["Target"].str.strip(), errors="coerce")
    rows["has_box"] = ~empty.all(axis=1)
    incomplete = rows[list(BOX_COLUMNS)].isna().any(axis=1)
    outside = (rows[["x", "y"]] < 0).any(axis=1) | (rows[["width", "height"]] <= 0).any(axis=1)
    rows["unusable"] = rows["has_box"] & (incomplete | outside)
    nameless = rows["patientId"] == ""
    builder.drop_many("no patient id", (f"{path.name} row {index + 2}" for index in rows.index[nameless]))
    rows = rows[~nameless]
    if rows.empty:
        raise DataError(f"{path}: no row names a patient. Check that this is the challenge's own file.")
    return builder.without(rows, rows.duplicated(), "duplicate row", "patientId").reset_index(drop=True)


def _without_contradictions(builder: DatalistBuilder, rows: pd.DataFrame) -> pd.DataFrame:
    """Drop patients with unusable boxes, or whose targets and boxes disagree; return the others' rows."""
    disagree = ~rows["target"].isin((0, 1)) | (rows["target"].eq(1) != rows["has_box"])
    disagree |= rows.groupby("patientId")["target"].transform("nunique", dropna=False) > 1
    gone: set[str] = set()
    for reason, faulty in (("unusable box", rows["unusable"]), ("target and boxes disagree", disagree)):
        found = rows[faulty & ~rows["patientId"].isin(gone)].drop_duplicates("patientId")
        for row in found.itertuples(index=False):
            place = f"{row.x:g}, {row.y:g}, {row.width:g}, {row.height:g}" if row.has_box else "none"
            builder.drop(reason, row.patientId, f"{row.patientId}: target {row.target:g}, box {place}")
        gone |= set(found["patientId"])
    return rows[~rows["patientId"].isin(gone)]


def _boxes_of(rows: pd.DataFrame) -> dict[str, list[list[float]]]:
    """Return patient -> boxes [x0, y0, x1, y1] in the order of the table."""
    found = rows[rows["has_box"]]
    x, y, width, height = (found[column].to_numpy(float) for column in BOX_COLUMNS)
    boxes: dict[str, list[list[float]]] = {}
    corners = np.stack((x, y, x + width, y + height), axis=1).tolist()
    for patient, box in zip(found["patientId"], corners, strict=True):
        boxes.setdefault(patient, []).append(box)
    return boxes


def _image_folder(base: Path, home: Path) -> Path:
    """Return the folder of films: beside the table, beside the table's own folder, or doubled by unpacking."""
    above = home.parent if home != base else home
    places = [home / IMAGES, above / IMAGES, *sorted(base.glob(f"*/{IMAGES}"))]
    return undoubled(next((path for path in places if path.is_dir()), places[0]))


def _classes(builder: DatalistBuilder, folder: Path, base: Path) -> dict[str, str]:
    """Return patient -> "Normal", "Lung Opacity" or "No Lung Opacity / Not Normal", where the table is there."""
    name = "stage_2_detailed_class_info.csv"
    path = first_source(folder, [name]) or first_source(base, [name, f"*/{name}", f"*/*/{name}"])
    if path is None:
        return {}
    frame = read_source(path, ("patientId", "class"))
    builder.add_source(path)
    return dict(zip(frame["patientId"].str.strip(), frame["class"].str.strip(), strict=True))


def paper_split(patients: Sequence[str], task: str) -> dict[str, str]:
    """Split as the MGCA repository does, whose numbers the paper reports: at random, not stratified.

    scikit-learn's ``train_test_split`` with ``random_state=0`` on the sorted patients, twice: the first part is for
    training, and of the rest the first half for test and the second for validation. 26,684 patients give 18,678 / 4,003
    / 4,003 (training / validation / test) for classification; 16,010 / 5,337 / 5,337 for segmentation and detection,
    where MGCA holds out 2 x 5,337, which is 40%. Other numbers of patients are split by the same shares.
    """
    from sklearn.model_selection import train_test_split

    if len(set(patients)) < 4:
        raise DataError(f"RSNA Pneumonia: {len(set(patients))} patients cannot be split in three; 4 are the fewest.")
    training, held_out = train_test_split(sorted(set(patients)), test_size=TASKS[task][1], random_state=0)
    test, validation = train_test_split(held_out, test_size=0.5, random_state=0)
    parts = {"training": training, "validation": validation, "test": test}
    return {patient: name for name, part in parts.items() for patient in part}


def _lovt_split(
    builder: DatalistBuilder, base: Path, split_dir: str | Path | None, patients: Sequence[str]
) -> dict[str, str]:
    """Return patient -> split by LoVT's lists; a patient of several lists stays in the last of them."""
    folder = base if split_dir is None else existing_root(split_dir, "LoVT split")
    split_of: dict[str, str] = {}
    for split, name in LOVT_FILES.items():
        # LoVT's repository spells its folder like this
        patterns = [f"{name}.csv", f"RSNA-Pneunomia-Detection/{name}.csv", f"*/RSNA-Pneunomia-Detection/{name}.csv"]
        path = find_source(folder, patterns, f"{split} list of LoVT (or give split_dir)")
        frame = read_source(path, ("ID",), remedy="Give LoVT's own lists (ID,boxes,classes) with split_dir.")
        builder.add_source(path)
        listed = list(dict.fromkeys(frame["ID"].str.strip()))
        builder.drop_many("patient in another split", (patient for patient in listed if patient in split_of))
        split_of |= dict.fromkeys(listed, split)
    known = set(patients)
    builder.drop_many("listed but not in the labels", (patient for patient in split_of if patient not in known))
    builder.drop_many("no official split", (patient for patient in patients if patient not in split_of))
    return {patient: split for patient, split in split_of.items() if patient in known}


DATASET = Dataset(
    name="rsna",
    title="RSNA Pneumonia Detection Challenge, stage 2",
    task="pneumonia: classification, segmentation (masks painted from boxes) and detection (S4.2)",
    source="https://www.kaggle.com/c/rsna-pneumonia-detection-challenge (registration)",
    licence="the challenge's rules: non-commercial and academic use; images from NIH ChestX-ray14",
    tree="""\
stage_2_train_labels.csv[.gz]  [stage_2_detailed_class_info.csv[.gz]]
stage_2_train_images/0004cfab-14fd-4e49-80ba-63a80b6bddd6.dcm
[train.csv validation.csv test.csv]               (LoVT's lists, for --split lovt)""",
    collect=collect,
    training={"": 18_678, "segmentation": 16_010, "detection": 16_010},
    notes=(
        "--task classification (default; 18,678 / 4,003 / 4,003 patients), segmentation or detection (16,010 / "
        "5,337 / 5,337), all from the same tables. The splits are MGCA's (scikit-learn, random_state=0); LoVT's are "
        "other random ones: --split lovt [--split-dir DIR]. Only stage 2 has labels for all of its training images."
    ),
)
