# SPDX-License-Identifier: Apache-2.0
"""The datalists that bundles read: phantoms where asked for, the converters of their data sets, and a tokenizer."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimedi_components.data.datalist import load_datalist, select, write_datalist
from unimedi_components.data.phantom import write_phantom
from unimedi_components.data.prepare import merge_datalists, prepare
from unimedi_components.data.splits import nested_fraction
from unimedi_components.distributed import first_rank_first
from unimedi_components.errors import DataError
from unimedi_components.workflow import only_a_network_is_wanted

SOURCES = ("mimic_cxr", "bimcv")


def pretraining_datalist(
    dataset_dir: str | Path,
    phantoms: Mapping[str, int] | None = None,
    phantom_seed: int = 0,
    sources: Sequence[str] = SOURCES,
    **options: Any,
) -> str:
    """Datalist over `<dataset_dir>/<source>` for each source, made at the first run and reused after.

    Raises DataError: a source is missing, nothing in it can be used, or phantoms would be written for an export.

    Args:
        dataset_dir: folder with one folder per source in the data set's own layout; image paths are relative to it.
        phantoms: number of phantom patients to write for each source first, where they are not there yet; None or
            empty expects real data.

    Returns:
        path of `<dataset_dir>/pretrain.json`.
    """
    root = Path(dataset_dir)
    out = root / "pretrain.json"
    if phantoms and not out.is_file() and only_a_network_is_wanted():
        raise DataError(
            f"{out}: not there, and this call does not train, so that no phantoms are written; "
            "give the network of configs/inference.json"
        )
    recipe = {"sources": list(sources), "options": options}

    def make() -> str:
        fresh = [
            write_phantom(source, root / source, patients=patients, seed=phantom_seed).fresh
            for source, patients in (phantoms or {}).items()
        ]
        if any(fresh) or not out.is_file() or load_datalist(out)["meta"].get("recipe") != recipe:
            parts = {source: str(root / f"{source}.json") for source in sources}
            for source, part in parts.items():
                prepare(source, root / source, part, **options)
            joined = merge_datalists(parts, out, root)
            joined["meta"] |= {"recipe": recipe, "phantom_seed": phantom_seed if phantoms else None}
            write_datalist(joined, out)
        return str(out)

    return first_rank_first(make)


def report_tokenizer(items: Sequence[Mapping[str, Any]], folder: str | Path, vocab_size: int = 2000) -> Any:
    """A WordPiece tokenizer built from the reports of the training items, in `folder` (see `build_wordpiece`)."""
    # transformers, which tasks do not need
    from unimedi_components.data.vocabulary import build_wordpiece
    from unimedi_components.networks.report_encoder import load_tokenizer

    reports = [item["report"] for item in items]
    return load_tokenizer(first_rank_first(lambda: build_wordpiece(reports, folder, vocab_size)))


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

    A datalist that this did not make (the command `prepare`, or a person, did) is taken as it is. Raises DataError: the
    data set is missing, or nothing in it can be used.

    Args:
        dataset_dir: folder with the data set in its own layout; image paths are relative to it.
        phantoms: number of phantom patients to write there first, if they are not there yet; None expects real data.
        out: the datalist; by default beside the folder, `<dataset_dir>.json`.
    """
    root = Path(dataset_dir)
    path = Path(out) if out is not None else root.with_name(f"{root.name}.json")
    # as JSON gives it back: a tuple from the command line would differ from its list
    asked = {"dataset": dataset, "options": options, "phantoms": phantoms, "phantom_seed": phantom_seed}
    recipe = json.loads(json.dumps(asked))

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

    ``label_fraction``: share of the patients whose training items are kept, nested over fractions and stratified by
    label. Raises DataError: unreadable, without items of this dimension, or labelled for another task.
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
