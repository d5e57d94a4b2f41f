# SPDX-License-Identifier: Apache-2.0
"""What a pre-training run reads: one datalist over an X-ray and a CT data set, and a tokenizer for their reports."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimedi_components.data.datalist import load_datalist, write_datalist
from unimedi_components.data.phantom import write_phantom
from unimedi_components.data.prepare import merge_datalists, prepare
from unimedi_components.data.vocabulary import build_wordpiece
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

    Args:
        dataset_dir: folder with one folder per source in the data set's own layout; image paths are relative to it.
        phantoms: number of phantom patients to write for each source first, where they are not there yet; None or
            empty expects real data.
        phantom_seed: seed of the phantoms.

    Returns:
        path of `<dataset_dir>/pretrain.json`.

    Raises:
        DataError: a source is missing, nothing in it can be used, or phantoms would be written for an export.
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
    from unimedi_components.networks.report_encoder import load_tokenizer

    reports = [item["report"] for item in items]
    return load_tokenizer(first_rank_first(lambda: build_wordpiece(reports, folder, vocab_size)))
