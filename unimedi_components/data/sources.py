# SPDX-License-Identifier: Apache-2.0
"""Reading the tables and folders that data sets ship: csv and tsv, plain or gzipped."""

import codecs
import difflib
import gzip
import hashlib
import io
import json
import re
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from unimedi_components.errors import ConfigError, DataError


def nearest_hint(name: str, known: Iterable[str]) -> str:
    """Say which known name an unknown one resembles most: "did you mean 'report'? ", or nothing."""

    def likeness(candidate: str) -> float:
        # "mimc" is meant for the first part of "mimic_cxr", which as a whole is further away than "bimcv".
        parts = (candidate, *candidate.split("_"))
        return max(difflib.SequenceMatcher(None, name.lower(), part.lower()).ratio() for part in parts)

    best = max(known, key=likeness, default="")
    return f"did you mean {best!r}? " if best and likeness(best) >= 0.6 else ""


def check_choice(option: str, value: Any, known: Iterable[str], hint: bool = False) -> None:
    """Raise a ConfigError that names the options' values unless ``value`` is one; with ``hint``, the nearest too."""
    if value not in known:
        near = nearest_hint(str(value), known) if hint else ""
        raise ConfigError(f"{option}={value!r} is unknown. {near}Use one of {', '.join(known)}.")


def existing_root(root: str | Path, dataset: str) -> Path:
    """Return ``root`` as a path. Raises DataError: the folder does not exist or is a file."""
    path = Path(root).expanduser()
    if not path.is_dir():
        fault = "is a file" if path.exists() else "no such folder"
        give = f"Give the folder that holds the {dataset} data as ROOT; a run looks below UNIMEDI_DATA."
        raise DataError(f"{path}: {fault}. {give}")
    return path


def find_source(root: Path, patterns: Sequence[str], what: str) -> Path:
    """`first_source` of a table that must be there. Raises DataError, which calls it ``what``: nothing matches."""
    if (path := first_source(root, patterns)) is not None:
        return path
    looked = ", ".join(f"{pattern}[.gz]" for pattern in patterns)
    raise DataError(f"{root}: no {what}. Looked for {looked}. Download it from the data set, or correct ROOT.")


def first_source(root: Path, patterns: Sequence[str]) -> Path | None:
    """Find a table below ``root`` by the first glob pattern (without ``.gz``) that matches, plain or gzipped."""
    for pattern in patterns:
        for ending in ("", ".gz"):
            for path in sorted(root.glob(pattern + ending)):
                if path.is_file() and _is_data(path, root):
                    return path
    return None


def _is_data(path: Path, root: Path) -> bool:
    # macOS leaves __MACOSX beside the files of an archive
    return not any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(root).parts)


def folders_below(root: Path, depth: int, closed: Callable[[Path], bool]) -> list[Path]:
    """Return ``root`` and the folders below it, the nearer first: archives unpack into folders of their own.

    Args:
        depth: how many levels to go down.
        closed: folders of which it is true are returned, but not looked into.
    """
    found, waiting = [], deque([(root, 0)])
    while waiting:
        folder, level = waiting.popleft()
        found.append(folder)
        if level < depth and (folder == root or not closed(folder)):
            below = sorted(path for path in folder.iterdir() if path.is_dir() and _is_data(path, root))
            waiting.extend((path, level + 1) for path in below)
    return found


def undoubled(folder: Path) -> Path:
    """Return the folder within a folder of the same name, as unpacking into a folder of the archive's name makes."""
    inner = folder / folder.name
    return inner if inner.is_dir() else folder


def read_text(path: Path, utf_16: bool = False) -> str:
    """A text file, gzipped or not, without its byte-order mark; raises what gzip, zlib and the decoder raise.

    ``utf_16``: follow a mark of UTF-16; otherwise the text must be UTF-8.
    """
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    if data.startswith(b"PK\x03\x04"):
        raise DataError(f"{path}: is an Excel workbook or a zip archive, not text. Save it as CSV in UTF-8.")
    wide = utf_16 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if wide else "utf-8-sig")


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `object_pairs_hook`. Raises ValueError: a name stands in it twice."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one place")
    return dict(pairs)


def read_source(path: Path, required: Sequence[str] = (), sep: str = ",", remedy: str = "") -> pd.DataFrame:
    """Read a csv or tsv, gzipped or not, every cell as the text that stands in the file.

    Byte-order marks (also of UTF-16), CRLF line ends, blanks around column names and before cells, semicolons, tabs or
    bars in place of `sep`, Excel's line `sep=;`, and a separator at the end of each row are accepted; an empty cell is
    ``""``. Raises DataError: the file is missing, empty, not a table, or lacks a required column (the nearest one is
    named).

    Args:
        required: columns that must be there (matched without regard to case and renamed to this spelling).
        remedy: sentence that ends the message about a missing column.
    """
    try:
        frame = _read_cells(path, sep)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file. Correct the path.") from error
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{path}: the file is empty. It needs a header line and at least one row.") from error
    except UnicodeError as error:
        raise DataError(f"{path}: is not text in UTF-8 ({error}). Save it as CSV in UTF-8.") from error
    except (OSError, EOFError, zlib.error, pd.errors.ParserError) as error:
        raise DataError(f"{path}: cannot be read as a table ({error}). Download or export it again.") from error
    frame.columns = [str(column).strip() for column in frame.columns]
    for name in required:
        if name not in frame.columns:
            same = [column for column in frame.columns if column.lower() == name.lower()]
            if not same:
                raise no_column(path, name, frame, remedy or "Check that this is the data set's own file.")
            frame = frame.rename(columns={same[0]: name})
    if frame.empty:
        raise DataError(f"{path}: the table holds no rows. It needs at least one row below the header line.")
    return frame


def no_column(path: Path, name: str, frame: pd.DataFrame, remedy: str) -> DataError:
    """The error of a table without a column; it names the nearest one."""
    there = ", ".join(map(repr, frame.columns))
    return DataError(f"{path}: no column {name!r} ({nearest_hint(name, frame.columns)}the file has {there}). {remedy}")


def read_json(path: Path, remedy: str, what: str = "JSON", **options: Any) -> Any:
    """A JSON file, gzipped or not. ``options``: of `json.loads`. Raises DataError: it cannot be read as ``what``."""
    try:
        return json.loads(read_text(path), **options)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as {what} ({error}). {remedy}") from error


def _read_cells(path: Path, sep: str) -> pd.DataFrame:
    """Read a table as text; blanks after a separator are left out, so that a quote behind them is one."""
    text = read_text(path, utf_16=True)
    # Excel's own first line
    told = re.match(r"sep=(.)[\r\n]+", text)
    text = text[told.end() :] if told else text
    header = re.split(r"[\r\n]", text, maxsplit=1)[0]
    if told or sep not in header:
        sep = told[1] if told else next((mark for mark in ";\t|" if mark in header), sep)
    options: dict[str, Any] = {"sep": sep, "dtype": str, "keep_default_na": False, "skipinitialspace": True}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", pd.errors.ParserWarning)
        # Without index_col pandas takes the first column for an index where all rows end with a separator.
        frame = pd.read_csv(io.StringIO(text), index_col=False, **options)
    if any(issubclass(warning.category, pd.errors.ParserWarning) for warning in caught):
        rows = pd.read_csv(io.StringIO(text), header=None, skiprows=1, **options)
        if rows.iloc[:, frame.shape[1] :].ne("").any(axis=None):
            raise pd.errors.ParserError(f"the rows have {rows.shape[1]} cells, the header line {frame.shape[1]}")
    return frame


def sha256_of(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def progress_map(
    function: Callable[[Any], Any], items: Sequence[Any], desc: str, num_workers: int = 8, progress: bool = True
) -> list[Any]:
    """Apply ``function`` to every item under a progress bar, in threads, keeping the order.

    Threads hide the latency of many small reads on network disks; the result does not depend on their number.
    """
    with tqdm(total=len(items), desc=desc, unit="file", leave=False, disable=not progress) as bar:

        def work(part: Sequence[Any]) -> list[Any]:
            found = []
            for item in part:
                found.append(function(item))
                bar.update()
            return found

        if num_workers <= 1 or len(items) < 2:
            return work(items)
        # Parts instead of single items keep the queue small where there are hundreds of thousands.
        size = max(1, min(256, len(items) // (32 * num_workers)))
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        with ThreadPoolExecutor(num_workers) as pool:
            return [result for found in pool.map(work, parts) for result in found]
