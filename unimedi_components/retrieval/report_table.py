# SPDX-License-Identifier: Apache-2.0
"""Reports without images, from a table, for an index of texts."""

from pathlib import Path
from typing import Any

from unimedi_components.data.sources import read_source
from unimedi_components.data.text import clean_report
from unimedi_components.errors import DataError

_DIMS = {"2": 2, "3": 3}


def read_reports(path: str | Path, dim: int | None = None, keep_punct: bool = True) -> list[dict[str, Any]]:
    """Items of a csv (tsv by its ending) with the columns id and report, and dim unless it is given.

    Args:
        dim: what all reports are about, 2 for X-rays or 3 for volumes; a column dim comes first.

    Returns:
        {"id", "dim", "report"} of each row that has a report, cleaned as `prepare` cleans them.

    Raises:
        DataError: the table lacks a column, a row has no usable dim or an id that another one has, or there is no
            report.
    """
    sep = "\t" if Path(path).name.removesuffix(".gz").lower().endswith(".tsv") else ","
    remedy = "An index of reports needs the columns id and report, and dim (2 or 3) unless --dim gives it."
    frame = read_source(Path(path), ["id", "report"] if dim else ["id", "report", "dim"], sep, remedy)
    items: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(frame.to_dict("records"), 2):
        own = row.get("dim") or str(dim)
        if own not in _DIMS:
            raise DataError(f"{path}, line {number}: dim is {own!r}; use 2 for X-rays or 3 for volumes")
        # a report of single words is nothing to clean
        text = clean_report(row["report"], keep_punct).text or row["report"].strip()
        if text:
            if row["id"] in items:
                raise DataError(f"{path}, line {number}: the id {row['id']!r} comes twice; give every report its own")
            items[row["id"]] = {"id": row["id"], "dim": _DIMS[own], "report": text}
    if not items:
        raise DataError(f"{path}: no row has a report; fill the column report")
    return list(items.values())
