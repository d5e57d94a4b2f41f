# SPDX-License-Identifier: Apache-2.0
"""What is known of each data set: the command ``datasets`` prints it, ``prepare`` calls its converter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from unimedi_components.data.datalist import DatalistBuilder

#: Options that converters share; a docstring describes the others, and those that mean something else there.
OPTIONS = {
    "strict": "raise at the first broken or missing file.",
    "seed": "seed of the splits that the data set does not define.",
    "min_tokens": "fewest word tokens after cleaning.",
    "keep_punct": "keep the punctuation of reports, see clean_report.",
    "check_images": '"quick" (first and last bytes), "full" (decode), "exists" or "none".',
    "num_workers": "threads that read files.",
    "progress": "show progress bars.",
}


@dataclass(frozen=True)
class Dataset:
    """A data set that can be prepared.

    Args:
        task: what it is used for here, with the paper's section.
        tree: the layout that the converter reads, one path or group of paths per line.
        collect: called as (root, \\*, strict, ...); returns the kept and the dropped items.
        notes: what to know before using it: official figures, traps, options.
        training: images in the training split that `collect` makes of the whole set, under ""; with other options,
            under the value of one. Exact where the lists are official, else the share that the split takes.
    """

    name: str
    title: str
    task: str
    source: str
    licence: str
    tree: str
    collect: Callable[..., DatalistBuilder]
    notes: str = ""
    training: Mapping[str, int] = field(default_factory=dict)

    def convert(self, root: Any, **options: Any) -> dict[str, Any]:
        """Return the datalist of ``collect``."""
        return self.collect(root, **options).build()
