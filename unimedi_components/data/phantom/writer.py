# SPDX-License-Identifier: Apache-2.0
"""What all layouts share: seeds, processes, progress, atomic files and truth.json."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ...errors import DataError
from ...files import replacing
from .findings import FINDINGS

TRUTH = "truth.json"
VERSION = 1
_PARTIAL = ".phantom-partial.json"
PatientRecord = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How one data set is written.

    Args:
        code: part of the seed, different for each layout, so that no two layouts share a patient.
        write_patient: called as (root, index, seed); writes one patient's files and returns its record, which
            JSON can hold: ``studies`` (the entries of truth.json) and whatever ``write_tables`` needs.
        write_tables: called as (root, records, seed) in the end; writes the csv, tsv or json files.
        most: how many patients the layout has numbers for; None for any number.
        version: of what it writes; a folder with another one is refused, not reused.
    """

    name: str
    code: int
    write_patient: Callable[[Path, int, np.random.SeedSequence], PatientRecord]
    write_tables: Callable[[Path, list[PatientRecord], np.random.SeedSequence], None] = lambda *_: None
    most: int | None = None
    version: int = VERSION


LAYOUTS: dict[str, Layout] = {}


def register(layout: Layout) -> Layout:
    """Make a layout known to `write_phantom`."""
    LAYOUTS[layout.name] = layout
    return layout


@dataclass(frozen=True)
class PhantomFolder:
    """A phantom data set on disk; usable wherever a path is."""

    path: Path
    fresh: bool

    def __fspath__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name


def write_phantom(
    layout: str, out: str | Path, patients: int = 200, seed: int = 0, workers: int | None = None, progress: bool = True
) -> PhantomFolder:
    """Write a phantom data set in a real data set's own layout; the same arguments give the same bytes.

    A folder that already holds exactly this phantom set is left as it is, so a config may call this at every
    run. One that was left half-written is written anew. ``truth.json`` at the root is written last.

    Args:
        workers: processes; None for one per CPU, 0 or 1 for none beside this one.

    Raises:
        DataError: the layout is unknown, a number is out of range, or ``out`` holds something else.
    """
    if layout not in LAYOUTS:
        raise DataError(f"unknown phantom layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    if patients < 1 or seed < 0:
        raise DataError(f"phantom {layout}: patients must be at least 1 and seed at least 0, got {patients} and {seed}")
    most = LAYOUTS[layout].most
    if most is not None and patients > most:
        raise DataError(
            f"phantom {layout}: the layout has numbers for {most} patients, not for {patients}; ask for fewer"
        )
    root = Path(out)
    key = {"layout": layout, "seed": seed, "patients": patients, "version": LAYOUTS[layout].version}
    if _is_complete(root, key):
        return PhantomFolder(root, fresh=False)
    _claim(root, key)
    records = _write_patients(layout, root, patients, seed, workers, progress)
    LAYOUTS[layout].write_tables(root, records, np.random.SeedSequence([seed, LAYOUTS[layout].code, patients, 2**31]))
    studies = {name: study for record in records for name, study in record["studies"].items()}
    truth = {**key, "findings": list(FINDINGS), "studies": studies}
    with replacing(root / TRUTH) as temporary:
        temporary.write_text(json.dumps(truth, separators=(",", ":")) + "\n", encoding="utf-8")
    (root / _PARTIAL).unlink()
    return PhantomFolder(root, fresh=True)


def _is_complete(root: Path, key: dict[str, Any]) -> bool:
    """Whether the folder holds this very set; raises if it holds another phantom set or is damaged."""
    if not (root / TRUTH).is_file():
        return False
    try:
        truth = json.loads((root / TRUTH).read_text(encoding="utf-8"))
        found = {name: truth.get(name) for name in key}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{root / TRUTH}: not a phantom's truth file ({error}); choose another folder") from error
    if found != key:
        differing = ", ".join(f"{n}: has {found[n]}, asked for {key[n]}" for n in key if found[n] != key[n])
        raise DataError(
            f"{root} already holds another phantom set ({differing}); ask for that one, choose another folder "
            "(--dataset_dir or UNIMEDI_DATA of a bundle's run), or delete this one"
        )
    return True


def _claim(root: Path, key: dict[str, Any]) -> None:
    """Take an empty folder, or clear one that an interrupted run left behind."""
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is a file: choose a folder for the phantom set")
    if (root / _PARTIAL).is_file():
        for entry in root.iterdir():
            if entry.name == _PARTIAL:
                continue
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    elif root.is_dir() and any(root.iterdir()):
        raise DataError(f"{root} is not empty and holds no phantom set: choose an empty or a new folder")
    root.mkdir(parents=True, exist_ok=True)
    (root / _PARTIAL).write_text(json.dumps(key) + "\n", encoding="utf-8")


def patient_record(layout: str, root: Path, seed: int, index: int) -> PatientRecord:
    """Write one patient of a layout; see `Layout.write_patient`."""
    spec = LAYOUTS[layout]
    return spec.write_patient(root, index, np.random.SeedSequence([seed, spec.code, index]))


def _write_patients(
    layout: str, root: Path, patients: int, seed: int, workers: int | None, progress: bool
) -> list[PatientRecord]:
    count = min(os.cpu_count() or 1 if workers is None else max(workers, 1), patients)
    records: Iterator[PatientRecord]
    if count == 1:
        records = (patient_record(layout, root, seed, index) for index in range(patients))
    else:
        records = _from_workers(layout, root, patients, seed, count)
    return list(tqdm(records, total=patients, desc=f"phantom {layout}", disable=not progress, unit="patient"))


def _from_workers(layout: str, root: Path, patients: int, seed: int, count: int) -> Iterator[PatientRecord]:
    """Records in the order of the patients, made by ``count`` processes that take turns."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    command = [sys.executable, "-m", "unimedi_components.data.phantom.worker"]
    crew = [
        subprocess.Popen(
            [*command, json.dumps([layout, str(root.resolve()), seed, first, patients, count])],
            stdout=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
        )
        for first in range(count)
    ]
    try:
        for index in range(patients):
            line = crew[index % count].stdout.readline()  # type: ignore[union-attr]
            if not line.endswith("\n"):
                code = crew[index % count].wait()
                raise DataError(f"{root}: writing patient {index} failed (exit code {code}), see the message above")
            yield json.loads(line)
    finally:
        for process in crew:
            process.terminate()
            process.communicate()


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Any], delimiter: str = ",") -> None:
    """Write a table with a header line; a row is a dict by column, or a sequence."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([row[name] for name in columns] if isinstance(row, dict) else row for row in rows)
