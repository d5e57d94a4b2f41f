# SPDX-License-Identifier: Apache-2.0
"""MIMIC-CXR-JPG 2.x to a datalist (S4.1.1: frontal views, reports of at least three sentences)."""

import warnings
from pathlib import Path

import pandas as pd

from unimedi_components.data.datalist import DatalistBuilder, Dataset
from unimedi_components.data.sources import existing_root, find_source, first_source, progress_map, read_source
from unimedi_components.data.text import clean_report, split_sections
from unimedi_components.errors import DataError

SPLIT_NAMES = {"train": "training", "validate": "validation", "test": "test"}
FRONTAL_VIEWS = ("PA", "AP")
#: Label of a finding that the report does not mention; the others are the file's own 1, 0 and -1 (uncertain).
LABEL_MISSING = -2
REPORT_FOLDERS = (
    *("files", "mimic-cxr-reports/files", "mimic-cxr-reports", "reports/files", "reports"),
    *("mimic-cxr-reports/mimic-cxr-reports/files", "mimic-cxr-reports/mimic-cxr-reports"),
)
#: Where the tables, and with them the images, may lie below ROOT.
TABLE_FOLDERS = ("", "*/", "*/*/", "mimic-cxr-jpg/*/", "files/mimic-cxr-jpg/*/", "physionet.org/files/mimic-cxr-jpg/*/")
#: Where MIMIC-CXR's own download may lie beside them.
_TEXT_FOLDERS = ("mimic-cxr*/", "mimic-cxr/*/", "files/mimic-cxr/*/", "physionet.org/files/mimic-cxr/*/")

_Report = tuple[str, str]


def collect(
    root: str | Path,
    *,
    strict: bool = False,
    min_sentences: int = 3,
    min_tokens: int = 3,
    keep_punct: bool = False,
    fallback_sections: bool = False,
    check_images: str = "quick",
    labels: bool = True,
    reports_root: str | Path | None = None,
    sectioned_csv: str | Path | None = None,
    num_workers: int = 8,
    progress: bool = True,
) -> DatalistBuilder:
    """Read MIMIC-CXR-JPG.

    Args:
        root: folder with the csv files and ``files/``.
        fallback_sections: where a report has neither impression nor findings take its last paragraph or,
            without one, its comparison; otherwise such studies are dropped.
        labels: add the 14 CheXpert labels if ``-chexpert.csv`` is there: 1, 0, -1 uncertain, -2 not mentioned.
        reports_root: folder with ``p10/p10000032/s50414267.txt`` (or with ``files/`` over it) if it is elsewhere.
        sectioned_csv: MIT-LCP's ``mimic_cxr_sectioned.csv``, used instead of the report files.

    Returns:
        The builder. Drop reasons: ``not a frontal view``, ``no view position``, ``duplicate id``, ``no official
        split``, ``missing report``, ``unreadable report``, ``no findings or impression``, ``fewer than N sentences``,
        ``fewer than N tokens``, ``missing image``, ``unreadable image``, ``patient in another split``.
    """
    base = existing_root(root, "MIMIC-CXR-JPG")
    builder = DatalistBuilder("mimic_cxr", root, strict)
    builder.meta["keep_punct"] = keep_punct
    frame = _frontal_images(builder, base)
    studies = frame[["subject_id", "study_id"]].drop_duplicates()
    raw = (
        _sections_from_csv(builder, Path(sectioned_csv))
        if sectioned_csv
        else _sections_from_files(base, studies, reports_root, num_workers, progress)
    )

    def clean(study: str) -> _Report:
        found = raw.get(study)
        if not isinstance(found, dict):
            return found or ("missing report", "")
        text = (found["impression"] + " " + found["findings"]).strip()
        if not text and fallback_sections:
            text = found["last_paragraph"] or found["comparison"]
        if not text:
            return "no findings or impression", ""
        report = clean_report(text, keep_punct)
        lack = report.lack(min_sentences, min_tokens)
        return lack, "" if lack else report.text

    reports = {study: clean(study) for study in studies["study_id"]}
    for row in frame.itertuples(index=False):
        if reports[row.study_id][0]:
            builder.drop(reports[row.study_id][0], row.dicom_id, reports[row.study_id][1])
    files = _image_folder(base, _required(base, "metadata").parent, frame)
    frame = frame[frame["study_id"].map({study: not found[0] for study, found in reports.items()}).astype(bool)]
    folder = files + "/" + frame["subject_id"].str[:3] + "/" + frame["subject_id"] + "/" + frame["study_id"]
    frame["image"] = folder + "/" + frame["dicom_id"] + ".jpg"
    label_of = _chexpert_labels(builder, base) if labels else {}
    rows = []
    for row in frame.itertuples(index=False):
        item = {"id": row.dicom_id, "patient": row.subject_id, "image": row.image, "dim": 2}
        label = {"label": label_of[row.study_id]} if row.study_id in label_of else {}
        rows.append((row.split, {**item, "report": reports[row.study_id][1], **label}))
    builder.add_films(rows, check_images, num_workers, progress)
    builder.keep_apart()
    return builder


def _frontal_images(builder: DatalistBuilder, root: Path) -> pd.DataFrame:
    """Return one row per frontal image with its official split: dicom_id, subject_id, study_id, split."""
    metadata, splits = _required(root, "metadata"), _required(root, "split")
    frame = read_source(metadata, ("dicom_id", "subject_id", "study_id", "ViewPosition"))
    official = read_source(splits, ("dicom_id", "split"))
    for path, table in ((metadata, frame), (splits, official)):
        builder.add_source(path)
        table["dicom_id"] = table["dicom_id"].str.strip()
    split = frame["dicom_id"].map(official.drop_duplicates("dicom_id").set_index("dicom_id")["split"])
    frame["split"] = split.str.strip().str.lower().map(SPLIT_NAMES)
    frame["view"] = frame["ViewPosition"].str.strip().str.upper()
    frame = builder.without(frame, frame["dicom_id"].duplicated(), "duplicate id", "dicom_id")
    frame = builder.without(frame, frame["view"].isin(("", "NAN", "NA")), "no view position", "dicom_id")
    frame = builder.without(frame, ~frame["view"].isin(FRONTAL_VIEWS), "not a frontal view", "dicom_id")
    frame = builder.without(frame, frame["split"].isna(), "no official split", "dicom_id")
    frame["subject_id"] = "p" + frame["subject_id"].str.strip().str.removeprefix("p")
    frame["study_id"] = "s" + frame["study_id"].str.strip().str.removeprefix("s")
    return frame[["dicom_id", "subject_id", "study_id", "split"]].reset_index(drop=True)


def _required(root: Path, kind: str) -> Path:
    patterns = [f"{folder}mimic-cxr-2.*-{kind}.csv" for folder in TABLE_FOLDERS]
    return find_source(root, patterns, f"{kind} table of MIMIC-CXR-JPG")


def _image_folder(root: Path, home: Path, frame: pd.DataFrame) -> str:
    """Return the folder with ``p10`` to ``p19`` relative to ``root``: the first that holds one of some patients."""
    patients = frame["subject_id"].drop_duplicates().iloc[:: max(1, frame["subject_id"].nunique() // 100)]
    candidates = [home / "files", home / "files" / "files", root / "files", *sorted(root.glob("*/files")), home]
    holding = (folder for folder in candidates if any((folder / name[:3] / name).is_dir() for name in patients))
    return next(holding, candidates[0]).relative_to(root).as_posix()


def _sections_from_csv(builder: DatalistBuilder, path: Path) -> dict[str, dict[str, str] | _Report]:
    names = ("impression", "findings", "last_paragraph", "comparison")
    frame = read_source(path, ("study", *names))
    builder.add_source(path)
    study = "s" + frame["study"].str.removesuffix(".txt").str.removeprefix("s")
    return dict(zip(study, frame[list(names)].to_dict("records"), strict=True))


def _sections_from_files(
    root: Path, studies: pd.DataFrame, reports_root: str | Path | None, num_workers: int, progress: bool
) -> dict[str, dict[str, str] | _Report]:
    names = [f"{subject[:3]}/{subject}/{study}.txt" for subject, study in studies.itertuples(index=False)]
    folder = _report_folder(root, names, reports_root)

    def read(name: str) -> dict[str, str] | _Report:
        path = folder / name
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return "missing report", f"{path}: no such file"
        except OSError as error:
            return "unreadable report", f"{path}: {error}"
        return split_sections(text)

    return dict(zip(studies["study_id"], progress_map(read, names, "reports", num_workers, progress), strict=True))


def _report_folder(root: Path, names: list[str], reports_root: str | Path | None) -> Path:
    """Return the folder that holds the first report found among evenly spread studies."""
    if reports_root is not None:
        given = existing_root(reports_root, "MIMIC-CXR report")
        candidates = [given, given / "files", given / "mimic-cxr-reports" / "files"]
    else:
        home = _required(root, "metadata").parent
        # physionet.org/files holds mimic-cxr-jpg/2.1.0 beside mimic-cxr/2.1.0
        tops = [root, home, *(home.parents[1:2] if home.parent.name == "mimic-cxr-jpg" else [])]
        texts = [*tops, *(place for top in tops for pattern in _TEXT_FOLDERS for place in sorted(top.glob(pattern)))]
        candidates = list(dict.fromkeys(place / folder for place in texts for folder in REPORT_FOLDERS))
        candidates = [folder for folder in candidates if folder.is_dir()] or [root / name for name in REPORT_FOLDERS]
    probes = names[:: max(1, len(names) // 100)]
    for folder in candidates:
        if any((folder / name).is_file() for name in probes):
            return folder
    if probes:
        raise DataError(
            f"{root}: no report texts. Looked for {probes[0]} below {', '.join(map(str, candidates[:8]))}. "
            "Unpack mimic-cxr-reports.zip of MIMIC-CXR there, or give reports_root or sectioned_csv."
        )
    return candidates[0]


def _chexpert_labels(builder: DatalistBuilder, root: Path) -> dict[str, list[int]]:
    """Return study -> 14 labels in the file's column order; names and meaning go into the meta block."""
    home = _required(root, "metadata").parent
    path = first_source(home, ["mimic-cxr-2.*-chexpert.csv"])
    if path is None:
        return {}
    frame = read_source(path, ("subject_id", "study_id"))
    builder.add_source(path)
    names = [column for column in frame.columns if column not in ("subject_id", "study_id")]
    values = frame[names].apply(pd.to_numeric, errors="coerce").fillna(LABEL_MISSING).astype(int)
    if not values.isin((1, 0, -1, LABEL_MISSING)).all(axis=None):
        warnings.warn(f"{path}: labels other than 1, 0, -1 and empty; they are kept as they are.", stacklevel=2)
    builder.meta["label_names"] = names
    builder.meta["label_values"] = {"1": "positive", "0": "negative", "-1": "uncertain", str(LABEL_MISSING): "missing"}
    study = "s" + frame["study_id"].str.strip().str.removeprefix("s")
    return dict(zip(study, values.to_numpy().tolist(), strict=True))


DATASET = Dataset(
    name="mimic_cxr",
    title="MIMIC-CXR-JPG 2.x with the reports of MIMIC-CXR",
    task="pre-training: X-rays with reports (S4.1.1)",
    source="https://physionet.org/content/mimic-cxr-jpg/ and https://physionet.org/content/mimic-cxr/ (credentialed)",
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    tree="""\
mimic-cxr-2.0.0-metadata.csv[.gz]  mimic-cxr-2.0.0-split.csv[.gz]  [mimic-cxr-2.0.0-chexpert.csv[.gz]]
files/p10/p10000032/s50414267/DICOM_ID.jpg
files/p10/p10000032/s50414267.txt                 (or under mimic-cxr-reports/)
physionet.org/files/{mimic-cxr-jpg,mimic-cxr}/2.1.0/...       (or as wget leaves both)""",
    collect=collect,
)
