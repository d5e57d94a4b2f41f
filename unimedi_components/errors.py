# SPDX-License-Identifier: Apache-2.0
"""The project's exceptions. Each message names the file or key, the fault and the remedy."""

import gzip
import re
import zlib
from pathlib import Path


class DataError(ValueError):
    """A data set, file or datalist is missing, unreadable or inconsistent."""


class CheckpointError(ValueError):
    """Weights are missing or do not fit the network that they are loaded into."""


class ConfigError(ValueError):
    """A bundle config or an override names something that nothing defines, or combines options that cannot work."""


def reason_of(error: BaseException, path: str | Path, name: str = "") -> str:
    """Why a file is not used, without its name: what a DataError says, or that a library could not read it.

    Libraries raise many kinds of errors for damaged files, over many lines.

    Args:
        path: the file, which is called `name` inside the reason; by default by its own name.
    """
    while error.__cause__ is not None and not isinstance(error, DataError):
        error = error.__cause__
    text = str(error).strip().removeprefix(f"{path}: ").replace(str(path), name or Path(path).name)
    if isinstance(error, DataError):
        return text.partition("\n")[0]
    if isinstance(error, FileNotFoundError):
        return "no such file. Correct the path or fetch the file"
    # Pillow's for a picture that starts as one
    if type(error).__name__ == "UnidentifiedImageError":
        return "its header is damaged, or its pixels are of a kind that is not read. Save it as 8- or 16-bit grey"
    lines = [line.strip(" -") for line in text.splitlines()]
    # behind a fault that ITK names itself it tells that of the system's last call, whatever that was
    why = next((line for line in reversed(lines) if line and not line.startswith("Reason:")), "")
    if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)) or "isal" in type(error).__module__:
        why = "the compressed data is damaged or cut off"
    elif not why or isinstance(error, (AssertionError, AttributeError, LookupError, TypeError)):
        why = f"{type(error).__name__}: {why}".rstrip(": ")
    # addresses in memory, which no two runs share
    why = re.sub(r"(ITK ERROR: )?\w+\(0x[0-9a-f]+\): | object at 0x[0-9a-f]+", "", why)
    return f"cannot be read ({why[:160]}). Download or export it again"
