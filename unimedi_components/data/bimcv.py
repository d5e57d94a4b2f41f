# SPDX-License-Identifier: Apache-2.0
"""BIMCV-COVID19+ CT studies, with or without BIMCV-R's English reports, to a datalist (S4.1.1).

Sessions lie in one folder or are spread over those that the part archives unpack into, with DICOM tags in a ``.json``
of the same stem. Iteration 1 has the table ``labels_covid19_posi.tsv``, iterations 1 to 3 ``labels_covid_posi.tsv``. A
report belongs to a session by ``ReportID`` and ``PatientID``.
"""

import ast
import json
import re
import warnings
from collections import Counter
from pathlib import Path

from unimedi_components.data.datalist import DatalistBuilder, Dataset
from unimedi_components.data.sources import (
    existing_root,
    first_source,
    folders_below,
    no_column,
    progress_map,
    read_source,
)
from unimedi_components.data.splits import split_patients
from unimedi_components.data.text import clean_report, report_language
from unimedi_components.errors import DataError
from unimedi_components.images.checks import CTLimits, Fault, check_ct
from unimedi_components.images.volume import read_volume_header

LABEL_TABLES = ("derivatives/labels/labels_covid19_posi.tsv", "derivatives/labels/labels_covid_posi.tsv")
TEXT_COLUMNS = ("English", "Report_en", "report_en", "Report", "report", "text", "Text")
PATH_COLUMNS = ("path", "Path", "file", "filename", "file_name", "image", "image_path", "ImagePath", "nii_path")
LABEL_COLUMN = "Labels"
NOT_ENGLISH = "report not English"
#: How deep the part archives' folders may lie below ROOT, and what is not looked into.
_DEPTH = 3
_FILE_IDS = re.compile(r"(sub-S\d+)\D.*?(ses-E\d+)")

_Session = tuple[str, str]


def collect(
    root: str | Path,
    *,
    strict: bool = False,
    seed: int = 42,
    validation_fraction: float = 0.05,
    test_fraction: float = 0.05,
    min_sentences: int = 3,
    min_tokens: int = 3,
    keep_punct: bool = False,
    min_slices: int = 20,
    assume_hu: bool = False,
    min_megabytes: float = 1.0,
    report_csv: str | Path | None = None,
    text_column: str | None = None,
    num_workers: int = 2,
    progress: bool = True,
) -> DatalistBuilder:
    """Read BIMCV-COVID19+ (and BIMCV-R).

    Of the CT series of a session one is kept: scouts and series with a fault are left out, the one with the
    most slices wins (the shortest name among equals, so that repeated acquisitions come last).

    Args:
        root: ``covid19_posi`` or the folder that holds it; item paths are relative to it.
        validation_fraction: share of the patients for validation.
        test_fraction: share of the patients for test.
        min_slices: fewest slices of a series.
        min_megabytes: fewest megabytes of voxels of a series.
        report_csv: table of English reports, if it is not ``BIMCV-R.csv`` below ``root``.
        text_column: column of the report text, if its name is unusual.

    Returns:
        The builder; items have a label, 1 or 0 for each of ``meta.label_names``, where a table has the column Labels.
        Drop reasons: ``session without CT``, ``no report``, ``report of another patient``,
        ``report not English``, ``fewer than N sentences``, ``fewer than N tokens``, ``scout``, ``other series
        of the session``, and those of :func:`~unimedi_components.images.checks.check_ct`.
    """
    base = existing_root(root, "BIMCV-COVID19+")
    builder = DatalistBuilder("bimcv", root, strict)
    folders = folders_below(base, _DEPTH, lambda path: path.name.startswith(("sub-", "derivatives")))
    sessions = _sessions(base, folders)
    tops = [path for path in folders if not path.name.startswith(("sub-", "derivatives"))]
    table = _report_table(base, tops, report_csv)
    reports = _Reports(table, text_column)
    builder.add_source(table)
    label_of = _add_labels(builder, tops, table)
    builder.meta["keep_punct"] = keep_punct
    limits = CTLimits(min_slices=min_slices, min_megabytes=min_megabytes, hounsfield=not assume_hu)
    wanted: list[tuple[_Session, list[Path]]] = []
    texts: dict[_Session, str] = {}
    for session, files in sessions:
        reason, text = reports.of(session) if files else ("session without CT", "")
        report = clean_report(text, keep_punct)
        if reason := reason or report.lack(min_sentences, min_tokens):
            builder.drop(reason, "_".join(session), text if reason == "report of another patient" else "")
        else:
            texts[session] = report.text
            wanted.append((session, files))
    chosen = progress_map(lambda entry: _choose_series(entry[1], limits), wanted, "CT volumes", num_workers, progress)
    items = []
    for (session, _), (path, dropped) in zip(wanted, chosen, strict=True):
        for fault, other in dropped:
            builder.drop(fault.reason, _stem(other), fault.detail)
        if path is not None:
            image = path.relative_to(base).as_posix()
            own = {"label": label_of[session]} if session in label_of else {}
            item = {"id": _stem(path), "patient": session[0], "image": image, "dim": 3, "report": texts[session]}
            items.append({**item, **own})
    split_of = split_patients({item["patient"]: "3" for item in items}, validation_fraction, test_fraction, seed)
    for item in items:
        builder.add(split_of[item["patient"]], item)
    if count := len(builder.dropped.get(NOT_ENGLISH, [])):
        remedy = (
            f"{count} reports are not English and were dropped (BIMCV-COVID19+ is Spanish). "
            "Put BIMCV-R.csv, or a table of translated reports, into ROOT or name it with report_csv."
        )
        builder.remedies.append(remedy)
        warnings.warn(f"{builder.root}: {remedy}", stacklevel=2)
    return builder


def _sessions(root: Path, folders: list[Path]) -> list[tuple[_Session, list[Path]]]:
    """Return every session, ``((patient, session), CT files)``, in name order; of a file in two parts the first."""
    found: dict[_Session, dict[str, Path]] = {}
    for patient in (path for path in folders if path.name.startswith("sub-")):
        for folder in (path for path in patient.glob("ses-*") if path.is_dir()):
            files = [path for ending in ("nii.gz", "nii") for path in folder.glob(f"mod-*/*_ct.{ending}")]
            kept = found.setdefault((patient.name, folder.name), {})
            for path in files:
                kept.setdefault(path.name, path)
    if not found:
        raise DataError(
            f"{root}: no sessions. Looked for sub-S*/ses-E*/mod-rx/*_ct.nii.gz there, in covid19_posi, and in folders "
            f"down to {_DEPTH} levels below. Unpack the data set's tgz files there, or correct ROOT."
        )
    return [(session, sorted(found[session].values())) for session in sorted(found)]


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


class _Reports:
    """The first report of every session, and the sessions paired with another patient's report."""

    def __init__(self, path: Path, text_column: str | None) -> None:
        self.text: dict[_Session, str] = {}
        self.wrong: dict[str, str] = {}
        frame = read_source(path, ("PatientID", "ReportID"), "\t" if ".tsv" in path.name else ",")
        column = text_column or next((name for name in TEXT_COLUMNS if name in frame.columns), "Report")
        if column not in frame.columns:
            raise no_column(path, column, frame, "Name the report's column with text_column.")
        path_column = next((name for name in PATH_COLUMNS if name in frame.columns), None)
        for row in frame.to_dict("records"):
            session = _session_key(row["PatientID"], row["ReportID"])
            ids = _FILE_IDS.search(row[path_column]) if path_column else None
            if ids and ids.groups() != session:
                paired = f"{path}: {row[path_column]} is paired with the report of {' '.join(session)}"
                self.wrong.setdefault(ids.group(2), paired)
            elif session not in self.text:
                self.text[session] = row[column]
                self.wrong.setdefault(session[1], f"{path}: the report of {session[1]} names patient {session[0]}")
        languages = Counter(report_language(text) for text in self.text.values())
        # Reports too short to tell follow the table: most of a Spanish table is recognisably Spanish.
        self.refused = {"es", None} if languages["es"] > languages["en"] else {"es"}

    def of(self, session: _Session) -> tuple[str, str]:
        """Return ``("", text)`` or ``(reason, detail)``."""
        text = self.text.get(session, "")
        if not text.strip():
            other = "" if session in self.text else self.wrong.get(session[1], "")
            return ("report of another patient", other) if other else ("no report", "")
        return (NOT_ENGLISH, "") if report_language(text) in self.refused else ("", text)


def _report_table(root: Path, tops: list[Path], report_csv: str | Path | None) -> Path:
    if report_csv is not None:
        return Path(report_csv).expanduser()
    names = ("BIMCV-R.csv", *LABEL_TABLES)
    # ROOT may be covid19_posi itself, with the tables beside it.
    beside = [root.resolve().parent] if root.resolve().name == "covid19_posi" else []
    for name in names:
        for top in (*tops, *beside):
            if (found := first_source(top, [name])) is not None:
                return found
    raise DataError(
        f"{root}: no report table. Looked for {', '.join(names)} there and in {len(tops) - 1} folders below. "
        "Fetch BIMCV-R.csv (English), or give report_csv."
    )


def _add_labels(builder: DatalistBuilder, tops: list[Path], table: Path) -> dict[_Session, list[int]]:
    """Session -> 1 or 0 for each name of the column Labels; names and source go into the meta block."""
    more = (first_source(top, [name]) for name in LABEL_TABLES for top in tops)
    for path in [table, *(path for path in more if path is not None and path != table)]:
        frame = read_source(path, ("PatientID", "ReportID"), "\t" if ".tsv" in path.name else ",")
        if LABEL_COLUMN not in frame.columns:
            continue
        found: dict[_Session, set[str]] = {}
        broken: list[str] = []
        for patient, report, cell in zip(frame["PatientID"], frame["ReportID"], frame[LABEL_COLUMN], strict=True):
            session = _session_key(patient, report)
            if session in found or not cell.strip():
                continue
            names = _names(cell)
            if names is None:
                broken.append(f"{' '.join(session)}: {cell[:60]!r}")
            else:
                found[session] = names
        if broken:
            warnings.warn(
                f"{path}: {len(broken)} cells under {LABEL_COLUMN} are no list of names such as ['pneumonia'], "
                f"so their sessions go without labels (first {broken[0]}). Correct or empty the cells.",
                stacklevel=2,
            )
        columns = sorted(set().union(*found.values()))
        builder.meta["label_names"] = columns
        builder.add_source(path)
        return {session: [int(name in own) for name in columns] for session, own in found.items()}
    return {}


def _session_key(patient: str, report: str) -> _Session:
    """(sub-..., ses-...) of a row, whose ids may lack these prefixes."""
    return "sub-" + patient.strip().removeprefix("sub-"), "ses-" + report.strip().removeprefix("ses-")


def _names(cell: str) -> set[str] | None:
    try:
        names = ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError):
        return None
    sound = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return {" ".join(name.split()).lower() for name in names if name.strip()} if sound else None


def _is_scout(path: Path) -> bool:
    """Read ImageType (0008,0008) from the json of the same stem; a series without tags is no scout."""
    try:
        with open(path.with_name(_stem(path) + ".json"), encoding="utf-8") as stream:
            tag = json.load(stream).get("00080008", {})
    except (OSError, ValueError, AttributeError):
        return False
    values = tag.get("Value", []) if isinstance(tag, dict) else []
    return any(str(value).upper() in ("LOCALIZER", "SCOUT") for value in values)


def _choose_series(files: list[Path], limits: CTLimits) -> tuple[Path | None, list[tuple[Fault, Path]]]:
    """Return the series to keep, and each other series with the reason why it is left out."""
    dropped: list[tuple[Fault, Path]] = []
    sound: list[tuple[int, Path]] = []
    for path in files:
        if _is_scout(path):
            dropped.append((Fault("scout", ""), path))
        elif (fault := check_ct(path, limits, values=False)) is not None:
            dropped.append((fault, path))
        else:
            sound.append((read_volume_header(path).num_slices, path))
    kept: Path | None = None
    for _, path in sorted(sound, key=lambda entry: (-entry[0], len(entry[1].name), entry[1].name)):
        if kept is not None:
            dropped.append((Fault("other series of the session", ""), path))
        elif (fault := check_ct(path, limits)) is not None:
            dropped.append((fault, path))
        else:
            kept = path
    return kept, dropped


DATASET = Dataset(
    name="bimcv",
    title="BIMCV-COVID19+ CT with the English reports of BIMCV-R",
    task="pre-training: CT volumes with reports (S4.1.1)",
    source="https://bimcv.cipf.es/bimcv-projects/bimcv-covid19/ and https://huggingface.co/datasets/cyd0806/BIMCV-R",
    licence="BIMCV research use agreement, no redistribution",
    tree="""\
BIMCV-R.csv                                        (English reports; or the table below, which is Spanish)
covid19_posi/derivatives/labels/labels_covid19_posi.tsv
covid19_posi/sub-S03042/ses-E07985/mod-rx/sub-S03042_ses-E07985_run-1_bp-chest_ct.nii.gz  (and .json)
bimcv_covid19_posi_subjects_1/[covid19_posi/]sub-S03042/...            (or each part archive in its own folder)""",
    collect=collect,
)
