# SPDX-License-Identifier: Apache-2.0
"""What the common space of a network is worth on a datalist: retrieval, search by class, zero-shot, protocols.

The paper claims retrieval and prints no table: R@K and P@K by class are CLIP's, GLoRIA's and MGCA's; across dimensions
a finding's name says what belongs together.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from unimedi_components.data.datalist import SPLITS, load_datalist, write_metrics
from unimedi_components.distributed import rank
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.figures.charts import RocCurve, draw_roc
from unimedi_components.figures.panels import Found, draw_search
from unimedi_components.metrics.bootstrap import Measures
from unimedi_components.retrieval.class_search import (
    NOT_MENTIONED,
    Studies,
    class_search,
    common_findings,
    gather_studies,
    label_table,
)
from unimedi_components.retrieval.embedder import Embedder, check_punct, make_dataset
from unimedi_components.retrieval.embeddings import Embeddings
from unimedi_components.retrieval.index import EmbeddingIndex, Hit
from unimedi_components.retrieval.measuring import retrieval_metrics
from unimedi_components.retrieval.prompts import PromptSet, load_prompt_sets
from unimedi_components.retrieval.protocols import exclusive_sample, protocol_metrics
from unimedi_components.retrieval.zero_shot import ZeroShot, zero_shot_scores
from unimedi_components.tasks.writer import write_csv

Values = dict[str, Any]

#: Keys that every evaluation has; null where there was nothing to measure them on.
HEADLINE = (
    *("report_recall_at_5", "report_recall_at_5_chance", "xray_to_ct_precision_at_10"),
    *("xray_to_ct_precision_at_10_chance", "ct_to_xray_precision_at_10", "ct_to_xray_precision_at_10_chance"),
    *("zero_shot_auroc_2d", "zero_shot_auroc_3d"),
)


def headline(values: Values) -> Values:
    return {name: values[name] for name in HEADLINE}


def evaluate_search(
    embedder: Embedder,
    datalist: str | Path,
    dataset_dir: str | Path,
    output_dir: str | Path | None = None,
    split: str = "test",
    prompts: Sequence[str | Path] = ("chest_xray", "chest_ct"),
    protocols: Sequence[str] = (),
    per_class: int = 200,
    protocol_queries: int = 10,
    exact: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
    **options: Any,
) -> Values:
    """Embed the images and reports of a datalist and measure search and zero-shot classification; on rank 0 alone.

    Raises ConfigError: an unknown split, or two prompt sets for one dimension; DataError: nothing to measure on, or
    images that cannot be read.

    Args:
        datalist: file, with reports, labels or both.
        dataset_dir: folder that its image paths are relative to.
        output_dir: folder for `metrics.json`, `index.npz` (an `EmbeddingIndex` of all images and reports),
            `zero_shot.csv` (labels and probabilities by image) and `roc_2d.png`, `roc_3d.png`; None writes nothing.
        prompts: prompt sets, at most one for each dimension; see `load_prompts`.
        protocols: of `PROTOCOLS`, measured on labelled X-rays. With protocols alone to measure, as for data without
            reports, only their images are embedded.
        per_class: candidates of each class in a protocol.
        exact: whether a protocol's class with too few images is an error.
        bootstrap: resamples of the patients for intervals of the zero-shot AUROC.

    Returns:
        the content of `metrics.json`: `HEADLINE`; counts; report retrieval as of `retrieval_metrics`; "class_search",
        for each direction between X-rays, CT and their reports the values of `class_precision` (and "same_findings"
        between images); "zero_shot" by dimension, as of `zero_shot_scores`, with "without_prompts", the labels that the
        prompt set does not know; "protocols" by name. Empty on other ranks.
    """
    if rank() != 0:
        return {}
    sets = load_prompt_sets(prompts)
    lists = load_datalist(datalist, dataset_dir)
    check_punct(embedder.pretrained, lists)
    items, meta = _items(lists, split, str(datalist)), lists.get("meta", {})
    samples = []
    if protocols:
        if 2 not in sets:
            raise ConfigError("protocols need a prompt set for X-rays, such as chest_xray")
        xrays = [item for item in items if item["dim"] == 2]
        names, table = label_table(xrays, meta)
        named = [{**item, "label": row.tolist()} for item, row in zip(xrays, table, strict=True)]
        drawn: dict[str, Any] = {"per_class": per_class, "queries": protocol_queries, "seed": seed, "exact": exact}
        samples = [exclusive_sample(named, names, protocol, **drawn) for protocol in protocols]
        if not any(item.get("report") for item in items):
            wanted = {item["id"] for sample in samples for item, _ in (*sample.candidates, *sample.queries)}
            items = [item for item in items if item["id"] in wanted]
    images = embedder.items(items, dataset_dir, **options)
    reports = embedder.reports(items) if any(item.get("report") for item in items) else None
    parts = gather_studies(items, images, reports, meta)
    recall = Measures()
    retrieval_metrics(recall, parts)
    values: Values = {
        **dict.fromkeys(HEADLINE),
        "split": split,
        **{f"studies_{dim}d": len(parts[dim].items) if dim in parts else 0 for dim in (2, 3)},
        "skipped_files": len(images.skipped),
        **recall.values,
        "class_search": class_search(parts, sets),
    }
    zero_shot, table = _zero_shot(embedder, sets, parts, bootstrap, seed)
    values["zero_shot"] = zero_shot
    values["protocols"] = {sample.name: protocol_metrics(embedder, sets[2], sample, images) for sample in samples}
    values |= _headline(values)
    if output_dir is not None:
        _write(Path(output_dir), values, table, Embeddings.join([images, *([reports] if reports else [])]))
    return values


def _items(lists: Mapping[str, Any], split: str, shown: str) -> list[dict[str, Any]]:
    if split not in (*SPLITS, "all"):
        raise ConfigError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}, or all")
    items = [item for name in SPLITS if split in (name, "all") for item in lists[name]]
    if not items:
        raise DataError(f"{shown}: the {split} split is empty; give another --split, or prepare the data with one")
    return items


def _zero_shot(
    embedder: Embedder, sets: Mapping[int, PromptSet], parts: Mapping[int, Studies], bootstrap: int, seed: int
) -> tuple[Values, pd.DataFrame]:
    found: Values = {}
    tables = []
    for dim, part in parts.items():
        measurable = [i for i in range(len(part.names)) if (part.labels[:, i] == 1).any()]
        columns = [i for i in measurable if dim in sets and sets[dim].finding_of(part.names[i])]
        if not columns:
            continue
        names = [part.names[i] for i in columns]
        # CheXpert's labeller leaves a finding that a report does not mention empty: absent, as in training
        labels = np.where(part.labels[:, columns] == NOT_MENTIONED, 0, part.labels[:, columns])
        labels[(part.labels == NOT_MENTIONED).all(1)] = -1
        probability = ZeroShot(embedder, sets[dim].select(names)).probabilities(part.image_embed.numpy())
        scores = zero_shot_scores(probability, labels, names, part.patients, bootstrap, seed)
        unknown = [part.names[i] for i in measurable if i not in columns]
        found[f"{dim}d"] = {"prompts": sets[dim].name, **scores, "without_prompts": unknown}
        frame: dict[str, Any] = {"id": [item["id"] for item in part.items], "patient": part.patients, "dim": dim}
        frame |= {f"label_{name}": labels[:, i] for i, name in enumerate(names)}
        frame |= {f"probability_{name}": probability[:, i].round(6) for i, name in enumerate(names)}
        tables.append(pd.DataFrame(frame))
    return found, pd.concat(tables) if tables else pd.DataFrame()


def _headline(values: Mapping[str, Any]) -> Values:
    search, zero_shot = values["class_search"], values["zero_shot"]
    found = {f"zero_shot_auroc_{dim}": zero_shot[dim]["macro_auroc"] for dim in zero_shot}
    for direction in ("xray_to_ct", "ct_to_xray"):
        keys = search.get(direction, {}).keys() & {"precision_at_10", "precision_at_10_chance"}
        found |= {f"{direction}_{key}": search[direction][key] for key in keys}
    return found


def _write(folder: Path, values: Values, table: pd.DataFrame, index: Embeddings) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    index.save(folder / "index.npz")
    if len(table):
        write_csv(table, folder / "zero_shot.csv")
    for dim, scores in values["zero_shot"].items():
        own, intervals = table[table["dim"] == int(dim[0])], scores.get("intervals", {}).get("auroc", {})
        curves = [
            RocCurve.of(name, own[f"label_{name}"], own[f"probability_{name}"], auroc, intervals.get(name))
            for name, auroc in scores["auroc"].items()
        ]
        shown = "all splits" if values["split"] == "all" else f"{values['split']} split"
        draw_roc(curves, folder / f"roc_{dim}.png", f"Zero-shot ROC, {dim[0]}D, {shown}, {len(own)} images")
    write_metrics(values, folder)


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

    Raises ConfigError: the index is of another model.

    Args:
        index: npz of images of the datalist.
        dataset_dir: folder that its image paths are relative to.
        prompts: sets whose aliases say which findings of two data sets are the same.
        queries: of each dimension, the first images whose findings differ.

    Returns:
        the path; None where the index holds images of one dimension alone, and on other ranks.
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
