# SPDX-License-Identifier: Apache-2.0
"""COVIDx CXR to a three-class datalist (S4.2.1: normal, pneumonia, COVID-19; the paper's lists are V9A).

Releases differ in where an image lies: it is looked for in ``train/``, ``test/`` and ``val/`` alike. A line of a list
is ``patient file class source`` without a header. File names may hold blanks; lists up to V5 and a part of V7A have no
source.
"""

import os
import re
import zlib
from pathlib import Path

import pandas as pd

from unimedi_components.data.datalist import DatalistBuilder, Dataset
from unimedi_components.data.sources import check_choice, existing_root, read_text
from unimedi_components.data.splits import split_patients, strata_by_label
from unimedi_components.errors import DataError

#: Class names of both tasks in the order of their labels.
CLASSES = {"three": ("normal", "pneumonia", "COVID-19"), "two": ("negative", "positive")}
_LABELS = {
    "three": {"normal": 0, "pneumonia": 1, "covid-19": 2},
    "two": {"negative": 0, "positive": 1, "normal": 0, "pneumonia": 0, "covid-19": 1},
}
LIST_FOLDERS = ("", "labels/", "*/", "*/labels/")
#: Folders of images; CXR-3 and later moved some to ``val``.
IMAGE_FOLDERS = ("train", "test", "val", "competition_test")
PAPER_LISTS = "train_COVIDx9A.txt and test_COVIDx9A.txt (labels/ of https://github.com/lindawangg/COVID-Net)"

_LIST_NAME = re.compile(r"(train|test)(?:_COVIDx(\d+[A-Z]?))?\.txt(?:\.gz)?", re.IGNORECASE)
_CLASS = "normal|pneumonia|covid-19|negative|positive"
_LINE = rf"^(?P<patient>\S+)\s+(?P<file>.+?)\s+(?P<name>(?i:{_CLASS}))(?:\s+\S+)?$"
# "COVID 1 COVID(1).png": in V7A and V8A it is the patient that holds a blank (V9A writes COVID_1)
_BLANK_IN_PATIENT = r"^(?P<patient>(\S+) (\d+))\s+(?P<file>\2\(\3\)\.\w+)\s"


def collect(
    root: str | Path,
    *,
    strict: bool = False,
    seed: int = 42,
    classes: str = "three",
    list_version: str | None = None,
    validation_fraction: float = 0.1,
    check_images: str = "quick",
    num_workers: int = 8,
    progress: bool = True,
) -> DatalistBuilder:
    """Read COVIDx.

    The official test list is the test set; validation is a share of the training list's patients, of each class
    alike. An image that is listed but not there is left out and counted: the Kaggle archive lacks some.

    Args:
        root: folder with ``train/``, ``test/`` and the lists.
        classes: ``"three"`` (normal 0, pneumonia 1, COVID-19 2) or ``"two"`` (negative 0, positive 1; the classes of
            an A list become COVID-19 against the others).
        list_version: version of the lists, for example ``"9A"``; None takes the newest A list or, without one, the
            newest other list.
        validation_fraction: share of the training patients for validation (the paper's tenth).

    Returns:
        The builder. Drop reasons: ``malformed line``, ``unknown class``, ``duplicate id``, ``patient in another
        split``, ``missing image``, ``unreadable image``.
    """
    check_choice("classes", classes, CLASSES, hint=True)
    base = existing_root(root, "COVIDx")
    builder = DatalistBuilder("covidx", root, strict)
    version, paths = _find_lists(base, None if list_version is None else str(list_version))
    # The test list first: where a row repeats, the one in the test list stays
    frame = pd.concat([_read_list(builder, paths[kind], kind, classes) for kind in ("test", "train")])
    frame = builder.without(frame, frame["id"].duplicated(), "duplicate id")
    in_test = frame["kind"] == "test"
    shared = ~in_test & frame["patient"].isin(frame.loc[in_test, "patient"])
    frame = builder.without(frame, shared, "patient in another split")
    train = frame.loc[frame["kind"] == "train", ["patient", "label"]].to_dict("records")
    split_of = split_patients(strata_by_label(train), validation_fraction, 0.0, seed)
    frame["split"] = frame["patient"].map(split_of).fillna("test")
    frame["image"] = _on_disk(builder, base, frame, check_images)
    rows = (
        (row.split, {"id": row.id, "patient": row.patient, "image": row.image, "dim": 2, "label": row.label})
        for row in frame.itertuples(index=False)
    )
    builder.add_films(rows, check_images, num_workers, progress)
    builder.meta |= {
        "task": "multiclass" if classes == "three" else "binary",
        "label_names": list(CLASSES[classes]),
        "classes": classes,
        "list_version": version,
        "split": "test: official list; validation: patients of the training list",
    }
    return builder


def _on_disk(builder: DatalistBuilder, base: Path, frame: pd.DataFrame, check: str) -> list[str]:
    """Return the images' paths below ``base``: in the folder of their list, or in the one that holds the name."""
    plain = (frame["kind"] + "/" + frame["id"]).tolist()
    if check == "none":
        return plain
    places = [base, *sorted(base.glob("*")), *sorted(base.glob("*/*"))]
    home = next((path for path in places if (path / "train").is_dir()), None)
    if home is None:
        raise DataError(
            f"{base}: no images. Looked for train/, test/ and val/ there and in folders below. Unpack the archive of "
            "images there, or correct ROOT."
        )
    present = {name: set(os.listdir(home / name)) for name in IMAGE_FOLDERS if (home / name).is_dir()}
    prefix = "" if home == base else home.relative_to(base).as_posix() + "/"
    images, moved = [], 0
    for kind, name in zip(frame["kind"], frame["id"], strict=True):
        holding = kind if name in present.get(kind, ()) else next((f for f in present if name in present[f]), kind)
        moved += holding != kind
        images.append(f"{prefix}{holding}/{name}")
    if moved:
        builder.remedies.append(f"{moved} images lie in another folder than their list's, as in later releases.")
    return images


def _find_lists(root: Path, wanted: str | None) -> tuple[str, dict[str, Path]]:
    """Return the version and the paths by kind (train, test) of the lists to read."""
    found: dict[str, dict[str, Path]] = {}
    for folder in LIST_FOLDERS:
        for path in sorted(root.glob(f"{folder}*.txt*")):
            if match := _LIST_NAME.fullmatch(path.name):
                # The Kaggle archive's own train.txt and test.txt say no version
                found.setdefault((match[2] or "unversioned").upper(), {}).setdefault(match[1].lower(), path)
    complete = [version for version, paths in found.items() if len(paths) == 2]
    if wanted is not None:
        complete = [version for version in complete if version == wanted.upper()]
    if not complete:
        name = wanted.upper() if wanted else "*A"
        listed = ", ".join(sorted(path.name for paths in found.values() for path in paths.values())) or "none"
        raise DataError(
            f"{root}: no pair of lists train_COVIDx{name}.txt and test_COVIDx{name}.txt (lists there: {listed}). "
            f"Put {PAPER_LISTS} there, or correct ROOT or list_version."
        )
    best = max(complete, key=_rank)
    return best, found[best]


def _rank(version: str) -> tuple[bool, int, str]:
    """Order versions: A lists last, then by number; lists without a version come first."""
    digits = re.sub(r"\D", "", version)
    return version.endswith("A"), int(digits or 0), version


def _read_list(builder: DatalistBuilder, path: Path, kind: str, classes: str) -> pd.DataFrame:
    """Return one row per usable line: id (the file's name), patient, label, kind."""
    builder.add_source(path)
    try:
        text = read_text(path)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as a list ({error}). Download it again.") from error
    lines = pd.Series(text.split("\n"), dtype=str).str.strip()
    lines.index += 1
    lines = lines[lines != ""]
    frame = lines.str.extract(_LINE)
    odd = lines.str.extract(_BLANK_IN_PATIENT)
    frame = frame.assign(patient=odd["patient"].fillna(frame["patient"]), file=odd["file"].fillna(frame["file"]))
    frame["name"] = frame["name"].str.lower()
    names = set(frame["name"].dropna())
    if not names:
        raise DataError(f"{path}: no line reads 'patient file class source'. Put {PAPER_LISTS} there.")
    if not names & set(_LABELS[classes]):
        raise DataError(
            f"{path}: a binary list (negative, positive), but three classes are asked for. "
            f"Put {PAPER_LISTS} there, or give --classes two."
        )
    label = frame["name"].map(_LABELS[classes])
    for number, line in lines[label.isna()].items():
        reason = "malformed line" if len(line.split()) < 4 else "unknown class"
        builder.drop(reason, f"{path.name}:{number}", f"{path}, line {number}: {line!r}")
    usable = frame[label.notna()]
    label = label.dropna().astype(int).astype(object)
    return pd.DataFrame({"id": usable["file"], "patient": usable["patient"], "label": label, "kind": kind})


DATASET = Dataset(
    name="covidx",
    title="COVIDx CXR, lists V9A",
    task="2D classification, three classes (S4.2.1)",
    source="https://www.kaggle.com/datasets/andyczhao/covidx-cxr2, lists: https://github.com/lindawangg/COVID-Net",
    licence="the terms on the Kaggle page, and those of each source (RSNA, RICORD, BIMCV and others)",
    tree="""\
train_COVIDx9A.txt  test_COVIDx9A.txt                (or in labels/)
train/IMAGE.png  test/IMAGE.png  [val/IMAGE.png]     (png, jpg, jpeg; grey or colour; or in a folder below)""",
    collect=collect,
    training={"": 27_117},
    notes="V9A lists 30,130 training images (8,085 normal, 5,555 pneumonia, 16,490 COVID-19) and 400 test images "
    "(100, 100, 200). The lists within the Kaggle archive, the B lists and version 6 are binary: the A lists are "
    "in the COVID-Net repository. Options: --classes three | two, --list_version, --validation_fraction.",
)
