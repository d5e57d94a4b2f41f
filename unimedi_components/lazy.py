# SPDX-License-Identifier: Apache-2.0
"""Names of a package that are imported when they are first used, and imports of thousands of modules."""

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any


def import_lazily(namespace: dict[str, Any], homes: Mapping[str, str], name: str) -> Any:
    """What a package's ``__getattr__`` returns. ``homes``: module below it -> its names; under "" submodules."""
    package = namespace["__name__"]
    home = next((module for module, names in homes.items() if name in names.split()), None)
    if home is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{package}.{home}"), name) if home else None
    namespace[name] = importlib.import_module(f"{package}.{name}") if value is None else value
    return namespace[name]


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import without Python's collector: it finds nothing in modules, and takes a fifth of the time to look."""
    known = len(sys.modules)
    gc.disable()
    try:
        yield
        if len(sys.modules) > known:
            # nor does it look through them later
            gc.freeze()
    finally:
        gc.enable()
