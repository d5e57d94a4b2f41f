# SPDX-License-Identifier: Apache-2.0
"""The datalist of a task bundle: phantoms where asked for, then the data set's own converter."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimedi_components.data.datalist import load_datalist, select, write_datalist
from unimedi_components.data.phantom import write_phantom
from unimedi_components.data.prepare import prepare
from unimedi_components.data.splits import nested_fraction
from unimedi_components.distributed import first_rank_first
from unimedi_components.errors import DataError

logger = logging.getLogger(__name__)


def task_datalist(
    dataset: str,
    dataset_dir: str | Path,
    phantoms: int | None = None,
    phantom_seed: int = 0,
    out: str | Path | None = None,
    **options: Any,
) -> str:
    """Datalist of a data set on disk, made at the first run and made again when an option changes.

    A datalist that this did not make (the command `prepare`, or a person, did) is taken as it is.

    Args:
        dataset_dir: folder with the data set in its own layout; image paths are relative to it.
        phantoms: number of phantom patients to write there first, if they are not there yet; None expects real data.
        phantom_seed: seed of the phantoms.
        out: the datalist; by default beside the folder, `<dataset_dir>.json`.

    Raises:
        DataError: the data set is missing, or nothing in it can be used.
    """
    root = Path(dataset_dir)
    path = Path(out) if out is not None else root.with_name(f"{root.name}.json")
    # as JSON gives it back: a tuple from the command line would differ from its list
    recipe = json.loads(
        json.dumps({"dataset": dataset, "options": options, "phantoms": phantoms, "phantom_seed": phantom_seed})
    )

    def make() -> str:
        found = load_datalist(path).get("meta", {}) if path.is_file() else {"recipe": None}
        if "recipe" not in found:
            # the user's own, which needs no phantoms
            logger.warning("%s: not made by this config, so its options do not apply; taken as it is", path)
            return str(path)
        fresh = phantoms is not None and write_phantom(dataset, root, patients=phantoms, seed=phantom_seed).fresh
        if fresh or found["recipe"] != recipe:
            prepare(dataset, root, path, **options)
            datalist = load_datalist(path)
            datalist["meta"]["recipe"] = recipe
            write_datalist(datalist, path)
        return str(path)

    return first_rank_first(make)


def load_task(
    path: str | Path,
    root: str | Path,
    dim: int,
    task: str | None = None,
    label_names: Sequence[str] | None = None,
    label_fraction: float = 1.0,
    fraction_seed: int = 42,
) -> dict[str, Any]:
    """Read a datalist for a task and check that it has what the task needs.

    Args:
        label_fraction: share of the patients whose training items are kept, nested over fractions and stratified by
            label.

    Raises:
        DataError: unreadable, without items of this dimension, or labelled for another task.
    """
    datalist = load_datalist(path, root)
    for key, wanted in (("task", task), ("label_names", label_names and list(label_names))):
        found = datalist.get("meta", {}).get(key)
        if wanted is not None and found is not None and found != wanted:
            raise DataError(f"{path}: {key} is {found}, the config's is {wanted}; set --{key} to the data's")
    for split in ("training", "validation", "test"):
        datalist[split] = select(datalist, split, dim)
    if not datalist["training"]:
        raise DataError(f"{path}: no {dim}D training item; this bundle reads {dim}D images, prepare such a data set")
    datalist["training"] = nested_fraction(datalist["training"], label_fraction, fraction_seed)
    return datalist
