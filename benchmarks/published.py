# SPDX-License-Identifier: Apache-2.0
"""Quotes of published numbers in README and cards: written from `results/published`, never by hand.

A number is quoted as `0.832<!-- published: experiment_small.json#variants/ours/probe_auroc_2d/mean -->`: the comment is
the path in the file, and the number keeps its decimals (behind `%` it is a percentage). A table stands between

    <!-- published table: experiment_small.json vl,vl_sd,ours probe_auroc_2d=X-rays,probe_auroc_3d=CT -->
    <!-- published end -->

with a row per variant and a column per measure. `python -m benchmarks.published` writes all of them anew.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PUBLISHED = Path("results/published")
_NUMBER = re.compile(
    r"(?P<value>[-+]?\d+(?:\.(?P<digits>\d+))?)(?P<unit>%?)(?P<note><!-- published: (?P<path>\S+) -->)"
)
_TABLE = re.compile(
    r"(?P<start><!-- published table: (?P<file>\S+) (?P<variants>\S+) (?P<columns>.+?) -->\n)"
    r".*?(?P<end><!-- published end -->)",
    re.DOTALL,
)


def documents() -> list[Path]:
    """README and model cards."""
    return [Path("README.md"), *sorted(Path("bundles").glob("*/docs/README.md"))]


def refreshed(text: str, folder: Path = PUBLISHED) -> str:
    """The text with every quote as the published files have it.

    Raises:
        SystemExit: a quote names what no published file holds.
    """

    def number(match: re.Match[str]) -> str:
        name, _, place = match["path"].partition("#")
        value = float(_content(folder / name, place)) * (100 if match["unit"] else 1)
        return f"{value:.{len(match['digits'] or '')}f}{match['unit']}{match['note']}"

    def table(match: re.Match[str]) -> str:
        columns = [column.partition("=") for column in match["columns"].split(",")]
        variants = match["variants"].split(",")
        lines = ["| variant | " + " | ".join(title or key for key, _, title in columns) + " |"]
        lines.append("|---" * (1 + len(columns)) + "|")
        for variant in variants:
            own = _content(folder / match["file"], f"variants/{variant}")
            cells = [_shown(own.get(key)) for key, _, _ in columns]
            lines.append("| " + " | ".join([own["title"], *cells]) + " |")
        return match["start"] + "\n".join(lines) + "\n" + match["end"]

    return _TABLE.sub(table, _NUMBER.sub(number, text))


def _shown(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{found['mean']:.3f}" + ("" if found["sd"] is None else f" ± {found['sd']:.3f}")


def _content(path: Path, place: str) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for key in place.split("/"):
            content = content[int(key) if isinstance(content, list) else key]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"{path}#{place}: not published ({error!r}); run 'make publish'") from error
    return content


if __name__ == "__main__":
    for document in documents():
        before = document.read_text(encoding="utf-8")
        after = refreshed(before)
        if after != before:
            document.write_text(after, encoding="utf-8")
            print(f"{document}: quotes written anew")
