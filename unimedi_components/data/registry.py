# SPDX-License-Identifier: Apache-2.0
"""What is known of each data set: the command ``datasets`` prints it, ``prepare`` calls its converter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from unimedi_components.data.datalist import DatalistBuilder

__all__ = ["Dataset"]


@dataclass(frozen=True)
class Dataset:
    """A data set that can be prepared.

    Args:
        name: as on the command line.
        title: its full name and version.
        task: what it is used for here, with the paper's section.
        source: where to get it.
        licence: its own licence or terms.
        tree: the layout that the converter reads, one path or group of paths per line.
        collect: called as (root, \\*, strict, ...); returns the kept and the dropped items.
        notes: what to know before using it: official figures, traps, options.
    """

    name: str
    title: str
    task: str
    source: str
    licence: str
    tree: str
    collect: Callable[..., DatalistBuilder]
    notes: str = ""
