# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, and names of them that any stream can show."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: How text with names of files is encoded: bytes of a name that are no UTF-8 as an escape, which JSON reads back.
ANY_NAME = "backslashreplace"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a name beside ``path``, of the same ending, to write to; at the end that file takes the place of ``path``.

    The folder is made. No reader sees half a file, and where the writing fails nothing is left and nothing replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def show_any_name() -> None:
    """Let standard output show a name that its encoding has no letters for, as standard error does."""
    # a program that captures output may have put something else there
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors=ANY_NAME)
