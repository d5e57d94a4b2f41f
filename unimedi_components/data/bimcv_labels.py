# SPDX-License-Identifier: Apache-2.0
"""The findings of BIMCV-COVID19+ sessions: the column Labels of its report tables."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Sequence
from pathlib import Path

from unimedi_components.data.sources import read_source

__all__ = ["read_labels", "session_key"]

_Session = tuple[str, str]
COLUMN = "Labels"


def session_key(patient: str, report: str) -> _Session:
    """(sub-..., ses-...) of a row, whose ids may lack these prefixes."""
    return _prefixed(patient, "sub-"), _prefixed(report, "ses-")


def _prefixed(name: str, prefix: str) -> str:
    name = name.strip()
    return name if name.startswith(prefix) else prefix + name


def read_labels(tables: Sequence[Path]) -> tuple[list[str], dict[_Session, list[int]], Path | None]:
    """Read the findings of all sessions from the first table that has them.

    A cell that is no list of names leaves its session without labels; one warning counts them.

    Args:
        tables: csv or tsv files; their column Labels holds Python lists such as ``['pneumonia', 'pleural effusion']``.

    Returns:
        the names in alphabetical order, for each labelled session (its first row) 1 or 0 for each name, and the
        table; nothing, and None, where no table has the column.
    """
    for path in tables:
        frame = read_source(path, ("PatientID", "ReportID"), "\t" if ".tsv" in path.name else ",")
        if COLUMN not in frame.columns:
            continue
        found: dict[_Session, set[str]] = {}
        broken: list[str] = []
        for patient, report, cell in zip(frame["PatientID"], frame["ReportID"], frame[COLUMN], strict=True):
            session = session_key(patient, report)
            if session in found or not cell.strip():
                continue
            names = _names(cell)
            if names is None:
                broken.append(f"{' '.join(session)}: {cell[:60]!r}")
            else:
                found[session] = names
        if broken:
            warnings.warn(
                f"{path}: {len(broken)} cells under {COLUMN} are no list of names such as ['pneumonia'], so their "
                f"sessions go without labels (first {broken[0]}). Correct or empty the cells.",
                stacklevel=3,
            )
        columns = sorted(set().union(*found.values()))
        return columns, {session: [int(name in own) for name in columns] for session, own in found.items()}, path
    return [], {}, None


def _names(cell: str) -> set[str] | None:
    try:
        names = ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return {" ".join(name.split()).lower() for name in names if name.strip()}
