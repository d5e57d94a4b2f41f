# SPDX-License-Identifier: Apache-2.0
"""A figure of searches across dimensions: X-rays and the volumes nearest to them, volumes and the nearest X-rays."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimedi_components.data.datalist import SPLITS, load_datalist
from unimedi_components.distributed import rank
from unimedi_components.figures.search import Found, draw_search
from unimedi_components.retrieval.class_search import common_findings, label_table
from unimedi_components.retrieval.embedder import Embedder, make_dataset
from unimedi_components.retrieval.index import EmbeddingIndex, Hit
from unimedi_components.retrieval.prompts import load_prompt_sets

_Row = tuple[int, dict[str, Any]]


def draw_examples(
    embedder: Embedder,
    index: str | Path,
    datalist: str | Path,
    dataset_dir: str | Path,
    path: str | Path,
    prompts: Sequence[str | Path] = ("chest_xray", "chest_ct"),
    queries: int = 3,
    neighbours: int = 5,
) -> Path | None:
    """Draw searches across dimensions with the findings that both data sets label; on rank 0 alone.

    Args:
        index: npz of images of the datalist.
        dataset_dir: folder that its image paths are relative to.
        prompts: sets whose aliases say which findings of two data sets are the same.
        queries: of each dimension, the first images whose findings differ.

    Returns:
        the path; None where the index holds images of one dimension alone, and on other ranks.

    Raises:
        ConfigError: the index is of another model.
    """
    if rank() != 0:
        return None
    searched = EmbeddingIndex.load(index)
    searched.check_model(embedder.model)
    lists = load_datalist(datalist, dataset_dir)
    items = {item["id"]: item for split in SPLITS for item in lists[split]}
    found = _findings(list(items.values()), lists.get("meta", {}), prompts)
    images = [(row, entry) for row, entry in enumerate(searched.entries) if entry["kind"] == "image"]
    if len({entry["dim"] for _, entry in images}) < 2:
        return None
    rows = []
    for dim in (2, 3):
        asking = _different([pair for pair in images if pair[1]["dim"] == dim], found)
        for row, entry in asking[:queries]:
            embed = searched.embeddings.embed[row : row + 1]
            (hits,) = searched.query(embed, embedder.model, neighbours, "image", 5 - dim)
            shown = [_shown(embedder, items[hit.entry["id"]], dataset_dir, found, hit) for hit in hits]
            rows.append((_shown(embedder, items[entry["id"]], dataset_dir, found), shown))
    return draw_search(rows, path, "X-rays with the nearest CT volumes, and CT volumes with the nearest X-rays")


def _different(images: Sequence[_Row], found: Mapping[str, list[str]]) -> list[_Row]:
    """The first image of each combination of findings, in their order; those without any last."""
    firsts: dict[tuple[str, ...], _Row] = {}
    for row, entry in images:
        firsts.setdefault(tuple(found.get(entry["id"], ())), (row, entry))
    return [image for findings, image in sorted(firsts.items(), key=lambda pair: not pair[0])]


def _findings(
    items: Sequence[dict[str, Any]], meta: Mapping[str, Any], prompts: Sequence[str | Path]
) -> dict[str, list[str]]:
    """By id the findings that X-rays and volumes are both labelled for, of the items that have labels."""
    parts = {dim: [item for item in items if item["dim"] == dim] for dim in (2, 3)}
    tables = {dim: label_table(own, meta) for dim, own in parts.items()}
    common = common_findings(tables[2][0], tables[3][0], load_prompt_sets(prompts))
    found = {}
    for dim, own in parts.items():
        columns = [(name.lower(), pair[dim - 2]) for name, *pair in common]
        for item, row in zip(own, tables[dim][1], strict=True):
            if "label" in item:
                found[item["id"]] = [name for name, column in columns if row[column] == 1]
    return found


def _shown(
    embedder: Embedder, item: dict[str, Any], root: str | Path, found: Mapping[str, list[str]], hit: Hit | None = None
) -> Found:
    image = make_dataset(embedder.pretrained, [item], root)[0]["image"][0].numpy()
    if image.ndim == 3:
        # from the front, as a film is taken
        depth, _, width = image.shape
        front = image[::-1, image.shape[1] // 2]
        image = np.repeat(front, max(1, round(width / depth)), axis=0)
    return Found(image, found.get(item["id"]), None if hit is None else hit.score)
