# SPDX-License-Identifier: Apache-2.0
"""All data sets that can be prepared, and their description as text."""

import textwrap

from unimedi_components.data import amos, bcv, bimcv, cc_ccii, chexpert, covidx, luna16, mimic_cxr, rsna, table
from unimedi_components.data.datalist import Dataset
from unimedi_components.data.sources import nearest_hint
from unimedi_components.errors import ConfigError

_MODULES = (mimic_cxr, bimcv, chexpert, rsna, covidx, cc_ccii, luna16, bcv, amos, table)

#: Data set name -> what is known of it; a new data set is one more module.
DATASETS: dict[str, Dataset] = {module.DATASET.name: module.DATASET for module in _MODULES}


def find_dataset(name: str) -> Dataset:
    """Return a data set by name. Raises ConfigError: no data set has this name; the nearest one is given."""
    if name not in DATASETS:
        hint = nearest_hint(str(name), DATASETS)
        raise ConfigError(f"unknown data set {name!r}. {hint}Data sets: {', '.join(DATASETS)}.")
    return DATASETS[name]


def describe(name: str | None = None) -> str:
    """Task, source, licence, layout and commands of one data set, or all. Raises ConfigError: none has this name."""
    chosen = list(DATASETS.values()) if name is None else [find_dataset(name)]
    return "\n\n".join(map(_card, chosen))


def _card(dataset: Dataset) -> str:
    from unimedi_components.data.phantom import LAYOUTS

    root = f"$UNIMEDI_DATA/{dataset.name}" if dataset.name in LAYOUTS else "cases.csv"
    lines = [
        f"{dataset.name}: {dataset.title}",
        f"  task      {dataset.task}",
        f"  get it    {dataset.source}",
        f"  licence   {dataset.licence}",
        *textwrap.indent(dataset.tree, " " * 12).replace(" " * 12, "  layout    ", 1).splitlines(),
        f"  command   python -m unimedi_components prepare {dataset.name} {root} {dataset.name}.json",
    ]
    if dataset.name in LAYOUTS:
        lines.append(f"  phantom   python -m unimedi_components phantom {dataset.name} OUT --patients 200")
    if dataset.notes:
        notes = textwrap.wrap(dataset.notes, 106)
        lines += [f"  {'notes' if not index else '':<9} {line}" for index, line in enumerate(notes)]
    return "\n".join(lines)
