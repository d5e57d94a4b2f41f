# SPDX-License-Identifier: Apache-2.0
"""A team's own csv files to a datalist.

Columns ``image`` and ``report``, optional ``patient``, ``split``, ``label``, ``id``. An image is a 2D file (jpg, png,
dcm, ...) or a CT volume (nii, nii.gz, mhd, nrrd, or the folder of a DICOM series); its path is absolute or relative to
the csv's folder. Several csv files make one datalist, for example X-rays in one and CTs in the other.
"""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimedi_components.data.datalist import DatalistBuilder, Dataset
from unimedi_components.data.sources import check_choice, nearest_hint, progress_map, read_source
from unimedi_components.data.splits import split_patients, strata_by_dim
from unimedi_components.data.text import clean_report, report_language
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.images.checks import CTLimits, check_ct, short_reason
from unimedi_components.images.find import VOLUME_ENDINGS, image_at
from unimedi_components.images.identify import PICTURES, VOLUMES, content_fault, identify
from unimedi_components.images.xray_checks import IMAGE_CHECKS, xray_fault

logger = logging.getLogger(__name__)

SPLIT_NAMES = {
    **dict.fromkeys(("training", "train", "tr"), "training"),
    **dict.fromkeys(("validation", "validate", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "ts"), "test"),
}
TASKS = ("multilabel", "multiclass", "binary")
_Cell = tuple[str, Path, dict[str, Any]]
REMEDY = "Rename it, or name yours with image_column / report_column."


@dataclass
class _Row:
    """One row: where it stands, the image's place, and what the other cells say."""

    place: str
    image: Path
    report: str | None
    patient: str
    split: str
    label: str
    row_id: str


def _find_image(
    path: Path, check: str, limits: CTLimits, assume_hu: bool
) -> tuple[dict[str, Any], tuple[str, str] | None]:
    """The fields of an item that say what an image is, and its fault."""
    if check == "none" or not path.exists() or (check == "exists" and not path.is_dir()):
        dim = 3 if path.name.lower().endswith(VOLUME_ENDINGS) or path.is_dir() else 2
        return {"dim": dim}, None if check == "none" or path.exists() else ("missing image", f"{path}: no such file")
    told: dict[str, Any] = {"assume_hu": True} if assume_hu else {}
    try:
        content = identify(path) if path.is_file() else "folder"
    except OSError as error:
        return {"dim": 2}, ("unreadable image", f"{path}: cannot be opened ({error.strerror or error})")
    if content in PICTURES:
        return {"dim": 2}, xray_fault(path, check)
    if content in VOLUMES and not content_fault(path.name, content):
        return {"dim": 3, **told}, check_ct(path, limits, assume_hu=assume_hu)
    try:
        image = image_at(path, assume_hu)
    except DataError as error:
        return {"dim": 2}, (short_reason(str(error)), str(error))
    if image.dim == 2:
        # a folder of one film stands for the film
        return {"dim": 2, "image": image.path}, xray_fault(image.path, check)
    files = list(image.files) if image.is_folder else []
    fields: dict[str, Any] = {"dim": 3, **told, **({"files": files} if files else {})}
    return fields, check_ct(image.path, limits, files=files, assume_hu=assume_hu)


def collect(
    root: str | Path | Sequence[str | Path],
    *,
    strict: bool = False,
    seed: int = 42,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    min_sentences: int = 1,
    min_tokens: int = 3,
    keep_punct: bool = False,
    language: str = "en",
    check_images: str = "full",
    min_slices: int = 20,
    min_megabytes: float = 0.0,
    hounsfield: bool = True,
    assume_hu: bool = False,
    image_column: str = "image",
    report_column: str = "report",
    label_column: str = "label",
    task: str | None = None,
    label_names: str | Sequence[str] | None = None,
    num_workers: int = 2,
    progress: bool = True,
) -> DatalistBuilder:
    """Read one or several tables.

    Args:
        root: a csv file, several separated by commas, or a sequence of them.
        validation_fraction: share of the patients for validation, where there is no ``split`` column; X-ray
            and CT patients are split apart, so that both reach every split.
        test_fraction: share of the patients for test, likewise.
        min_sentences: fewest sentences after cleaning; 1, since captions are short (the paper's data sets use 3).
        language: ``"en"`` drops reports that are recognisably Spanish, ``"any"`` keeps all.
        check_images: for 2D images ``"full"`` (decode, as every other command does), ``"quick"`` (first and last
            bytes, for a great many), ``"exists"`` or ``"none"``.
        min_slices: fewest voxels along every axis of a volume.
        min_megabytes: fewest megabytes of voxels; 0, since crops are welcome.
        hounsfield: whether volumes must be in Hounsfield units; False also admits other modalities.
        assume_hu: take CT values for Hounsfield units that do not say how they are rescaled.
        image_column: name of the image column.
        report_column: name of the report column; a table without it is read for its labels alone.
        label_column: name of the label column.
        task: ``"multilabel"``, ``"multiclass"`` or ``"binary"`` as the classification bundles need it; None keeps
            ``[int]`` labels, or 0/1 vectors where labels are names.
        label_names: with ``task``, the classes or findings in the order that the model shall have (separated by
            commas); all names of the table in alphabetical order otherwise.

    Returns:
        The builder; its root is the folder common to the csv files and their images. ``label`` is ``[int]``
        when all labels are whole numbers, otherwise the 0/1 vector over the names that ``|`` separates,
        listed in ``meta.label_names``; a label that is the path of a file becomes ``mask``. Drop reasons:
        ``empty report``, ``report not English``, ``fewer than N sentences``, ``fewer than N tokens``, ``no
        image``, ``duplicate image``, ``no split``, ``no label``, and those of :func:`check_ct` and :func:`xray_fault`.
    """
    check_choice("language", language, ("en", "any"))
    tables = _table_paths(root)
    rows = [row for table in tables for row in _read_rows(table, image_column, report_column, label_column)]
    folders = {str(path.parent) for path in tables} | {str(row.image.parent) for row in rows if row.image.name}
    base = Path(os.path.commonpath(sorted(folders)))
    builder = DatalistBuilder("table", base, strict)
    builder.meta["keep_punct"] = keep_punct
    for table in tables:
        builder.add_source(table)
    limits = CTLimits(min_slices=min_slices, min_megabytes=min_megabytes, hounsfield=hounsfield)
    check_choice("check_images", check_images, IMAGE_CHECKS)

    def look(path: Path) -> tuple[dict[str, Any], tuple[str, str] | None]:
        return _find_image(path, check_images, limits, assume_hu)

    rows = _drop_repeated(builder, rows)
    seen = progress_map(look, [row.image for row in rows], "images", num_workers, progress)
    kept: list[tuple[_Row, dict[str, Any]]] = []
    for row, (fields, fault) in zip(rows, seen, strict=True):
        reason, detail = fault if fault is not None else ("", row.place)
        item: dict[str, Any] = {"id": row.row_id, "patient": row.patient, "image": row.image, **fields}
        item["image"] = _relative(item["image"], base)
        if "files" in item:
            item["files"] = [_relative(file, base) for file in item["files"]]
        if reason:
            detail = f"{detail} ({row.place})"
        elif task is not None and not row.label:
            reason = "no label"
        elif row.report is not None:
            report = clean_report(row.report, keep_punct)
            item["report"] = report.text
            if not row.report.strip():
                reason = "empty report"
            elif language == "en" and report_language(row.report) == "es":
                reason = "report not English"
            else:
                reason = report.lack(min_sentences, min_tokens)
        if reason:
            builder.drop(reason, row.row_id, detail)
        else:
            kept.append((row, item))
    cells = [(row.label, Path(row.place.rpartition(", row ")[0]).parent, item) for row, item in kept]
    _add_labels(builder, cells, base, task, label_names)
    _add_to_splits(builder, kept, (validation_fraction, test_fraction), seed)
    if "report not English" in builder.dropped:
        builder.remedies.append("Translate the reports that are not English, or keep all with language='any'.")
    return builder


def _table_paths(root: str | Path | Sequence[str | Path]) -> list[Path]:
    given = [root] if isinstance(root, Path) else root.split(",") if isinstance(root, str) else list(root)
    paths = [Path(str(name).strip()).expanduser() for name in given if str(name).strip()]
    for path in paths:
        if path.is_dir():
            raise DataError(f"{path}: is a folder. Give the csv file, or several separated by commas.")
    if not paths:
        raise DataError("no table was given. Give the csv file, or several separated by commas.")
    return [Path(os.path.abspath(path)) for path in paths]


def _read_rows(table: Path, image_column: str, report_column: str, label_column: str) -> list[_Row]:
    sep = "\t" if ".tsv" in table.suffixes else ","
    frame = read_source(table, sep=sep)
    # Labels alone are enough for classification.
    lower = {column.lower() for column in frame.columns}
    alone = label_column.lower() in lower and report_column.lower() not in lower
    frame = read_source(table, (image_column,) if alone else (image_column, report_column), sep, REMEDY)
    # Only these spellings count, so that a column like "Patient Age" is never taken for the patient.
    known = {column.lower(): column for column in frame.columns}

    def cell(record: dict[str, str], name: str) -> str:
        return record[known[name]].strip() if name in known else ""

    if "patient" not in known:
        hint = nearest_hint("patient", frame.columns)
        print(f"{table}: no column 'patient' ({hint}every image counts as a patient of its own)")
    rows = []
    for number, record in enumerate(frame.to_dict("records"), start=2):
        name = record[image_column].strip()
        if "\\" in name and not (table.parent / name).exists():
            # written on Windows
            name = name.replace("\\", "/")
        image = Path(os.path.normpath(table.parent / name)) if name else Path()
        patient = cell(record, "patient") or f"{table.stem}:{name}"
        more = (cell(record, column) for column in ("split", label_column.lower(), "id"))
        rows.append(_Row(f"{table}, row {number}", image, record.get(report_column), patient, *more))
    return rows


def _relative(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix()


def _drop_repeated(builder: DatalistBuilder, rows: list[_Row]) -> list[_Row]:
    """Drop rows without an image and repeated images; give each other row an id of its own."""
    kept: list[_Row] = []
    images: set[Path] = set()
    ids: set[str] = set()
    for row in rows:
        if not row.image.name:
            builder.drop("no image", row.place)
        elif row.image in images:
            builder.drop("duplicate image", _relative(row.image, builder.root), row.place)
        else:
            images.add(row.image)
            full = _relative(row.image, builder.root)
            stem = full.removesuffix(".gz")
            stem = stem.removesuffix(Path(stem).suffix)
            row.row_id = next(name for name in (row.row_id, stem, full) if name and name not in ids)
            ids.add(row.row_id)
            kept.append(row)
    return kept


def _add_to_splits(
    builder: DatalistBuilder, kept: list[tuple[_Row, dict[str, Any]]], shares: tuple[float, float], seed: int
) -> None:
    """Use the ``split`` cells, or split by patient where no row has one."""
    if not any(row.split for row, _ in kept):
        split_of = split_patients(strata_by_dim(item for _, item in kept), *shares, seed)
        for _, item in kept:
            builder.add(split_of[item["patient"]], item)
        return
    placed: dict[str, tuple[str, str]] = {}
    for row, item in kept:
        if not row.split:
            builder.drop("no split", row.row_id, row.place)
            continue
        split = SPLIT_NAMES.get(row.split.lower())
        if split is None:
            hint = nearest_hint(row.split, SPLIT_NAMES)
            raise DataError(f"{row.place}: split {row.split!r} is unknown. {hint}Use training, validation or test.")
        other, place = placed.setdefault(row.patient, (split, row.place))
        if other != split:
            raise DataError(
                f"{row.place}: patient {row.patient!r} is in two splits, {other} ({place}) and {split}. "
                "Put all rows of a patient into one split, or leave the split column out to have it made."
            )
        builder.add(split, item)


def _add_labels(
    builder: DatalistBuilder, cells: Sequence[_Cell], base: Path, task: str | None, label_names: Any
) -> None:
    """Turn label cells into class numbers, 0/1 vectors or mask paths."""
    if task is not None:
        check_choice("task", task, TASKS)
    if label_names is not None and task is None:
        raise ConfigError(f"label_names needs task, one of {', '.join(TASKS)}.")
    named: list[tuple[str, dict[str, Any]]] = []
    for label, folder, item in cells:
        if label and (folder / label).is_file():
            item["mask"] = os.path.relpath(os.path.abspath(folder / label), base).replace(os.sep, "/")
        elif label:
            named.append((label, item))
    if not named:
        return
    numbers = all(label.lstrip("-").isdigit() for label, _ in named)
    if task is None and numbers:
        for label, item in named:
            item["label"] = [int(label)]
        return
    own = [[part.strip() for part in label.split("|") if part.strip()] for label, _ in named]
    names = _names(own, label_names, numbers)
    builder.meta["label_names"] = names
    if task is not None:
        builder.meta["task"] = task
    if task == "multilabel" and (others := Counter(part for parts in own for part in parts if part not in names)):
        words = ", ".join(f"{word!r} ({count})" for word, count in others.most_common())
        logger.warning("labels that are none of label_names count as no finding: %s", words)
    for parts, (label, item) in zip(own, named, strict=True):
        item["label"] = _label(parts, names, task, f"{item['id']}: label {label!r}")


def _names(own: Sequence[Sequence[str]], given: str | Sequence[str] | None, numbers: bool) -> list[str]:
    if given is not None:
        # a command line may hand over the text of a tuple
        parts = given.strip("()[] ").split(",") if isinstance(given, str) else given
        return [part.strip(" '\"") for part in parts]
    found = {part for parts in own for part in parts}
    return sorted(found, key=int) if numbers else sorted(found)


def _label(parts: Sequence[str], names: Sequence[str], task: str | None, place: str) -> int | list[int]:
    if task in (None, "multilabel"):
        return [int(name in parts) for name in names]
    if task == "binary" and len(names) != 2:
        raise DataError(f"a binary task has two classes, the labels have {len(names)}: {', '.join(names)}")
    only = parts[0] if len(parts) == 1 else ""
    if only in names:
        return list(names).index(only)
    if only.isdigit() and int(only) < len(names):
        return int(only)
    raise DataError(f"{place} is none of the classes {', '.join(names)}. Correct it, or name it in label_names.")


def read_reports(path: str | Path, dim: int | None = None, keep_punct: bool = True) -> list[dict[str, Any]]:
    """Items of a csv (tsv by its ending) with the columns id and report, and dim unless it is given.

    ``dim``: what all reports are about, 2 for X-rays or 3 for volumes; a column dim comes first. Raises DataError: the
    table lacks a column, a row has no usable dim or an id that another one has, or there is no report.

    Returns:
        {"id", "dim", "report"} of each row that has a report, cleaned as `prepare` cleans them.
    """
    sep = "\t" if Path(path).name.removesuffix(".gz").lower().endswith(".tsv") else ","
    remedy = "An index of reports needs the columns id and report, and dim (2 or 3) unless --dim gives it."
    frame = read_source(Path(path), ["id", "report"] if dim else ["id", "report", "dim"], sep, remedy)
    items: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(frame.to_dict("records"), 2):
        own = row.get("dim") or str(dim)
        if own not in ("2", "3"):
            raise DataError(f"{path}, line {number}: dim is {own!r}; use 2 for X-rays or 3 for volumes")
        # a report of single words is nothing to clean
        text = clean_report(row["report"], keep_punct).text or row["report"].strip()
        if text:
            if row["id"] in items:
                raise DataError(f"{path}, line {number}: the id {row['id']!r} comes twice; give every report its own")
            items[row["id"]] = {"id": row["id"], "dim": int(own), "report": text}
    if not items:
        raise DataError(f"{path}: no row has a report; fill the column report")
    return list(items.values())


DATASET = Dataset(
    name="table",
    title="images of your own, listed in a csv",
    task="any: X-rays and CT volumes with reports or labels",
    source="your own",
    licence="your own",
    tree="""\
cases.csv                                          columns image, report [, patient, split, label]
images/1.jpg  images/2.dcm  ct/3.nii.gz  ct/4/     (paths relative to the csv)""",
    collect=collect,
)
