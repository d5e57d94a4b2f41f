# SPDX-License-Identifier: Apache-2.0
"""Do X-rays and CT volumes of the same findings meet, at the CLS and after projection?

Letters: N X-rays, M volumes, F findings.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unimedi_components.arrays import Array
from unimedi_components.data.phantom.paired import write_paired_xray
from unimedi_components.data.phantom.truth import labels_of
from unimedi_components.metrics.bootstrap import Measures
from unimedi_components.metrics.common_space import centred, centroid_distance, unit_rows
from unimedi_components.networks.pretrained import Pretrained
from unimedi_components.retrieval.class_search import queries_by_finding, same_findings
from unimedi_components.retrieval.features import Features, extract_features
from unimedi_components.retrieval.probe import linear_probe
from unimedi_components.retrieval.recall import first_correct_rank, precision_at_k, recall_chance

Studies = Mapping[str, Mapping[str, Any]]

_SPACES = ("cls", "embed")


def _rows(part: Features, space: str) -> Array:
    return (part.cls if space == "cls" else part.image_embed).double().numpy()


def separation_metrics(
    kept: Measures, features: Mapping[int, Features], studies: Studies, names: Sequence[str]
) -> None:
    """How far X-rays and volumes lie apart, for SPACE "cls" and "embed" (after projection), L2-normalised.

    Keeps: "modality_accuracy_SPACE": balanced accuracy of telling X-rays from volumes by `linear_probe`, and
        "modality_accuracy_chance". "centroid_distance_SPACE": mean over the findings of `centroid_distance`, with
        "_per_finding", and "centroid_distance_chance", what two samples of one distribution would have. Empty where a
        dimension is missing.
    """
    if not {2, 3} <= features.keys():
        return
    parts = [features[2], features[3]]
    patients = [patient for part in parts for patient in part.patients]
    modality = np.repeat([0, 1], [len(part.items) for part in parts])
    labels = [labels_of(part.items, studies) for part in parts]
    draws = kept.resamples
    weights = [] if draws is None else [draws.weights(part.patients) for part in parts]
    for space in _SPACES:
        rows = [_rows(part, space) for part in parts]
        unit = np.concatenate([unit_rows(part) for part in rows])
        # one weak penalty: where every C separates them, the strongest would still misplace the threshold
        probe = linear_probe(unit, modality[:, None], ["modality"], patients, strengths=(1.0,))
        folds = probe.folds.get("modality", [])
        if folds:
            held = np.concatenate([fold.rows for fold in folds])
            right = np.concatenate([(fold.scores > 0) == fold.truth for fold in folds])
            _balanced_accuracy(kept, f"modality_accuracy_{space}", right, modality[held], [patients[i] for i in held])
        distance = centroid_distance(*rows, *labels)[0]
        defined = np.isfinite(distance)
        if defined.any():
            resampled = centroid_distance(*rows, *labels, *weights)[:, defined].mean(1) if weights else None
            kept.add(f"centroid_distance_{space}", float(distance[defined].mean()), resampled)
            by_finding = {name: float(d) for name, d, known in zip(names, distance, defined, strict=True) if known}
            kept.add(f"centroid_distance_{space}_per_finding", by_finding)
    counts = np.stack([(part == 1).sum(0) for part in labels])
    enough = (counts > 1).all(0)
    if enough.any():
        kept.add("centroid_distance_chance", float(np.sqrt((1 / counts[:, enough]).sum(0)).mean()))
    kept.add("modality_accuracy_chance", 0.5)


def _balanced_accuracy(kept: Measures, key: str, right: Array, truth: Array, patients: Sequence[str]) -> None:
    sides = [(right[truth == v], [p for p, t in zip(patients, truth, strict=True) if t == v]) for v in (0, 1)]
    draws = kept.resamples
    resampled = None if draws is None else np.mean([draws.mean(rows, people) for rows, people in sides], axis=0)
    kept.add(key, float(np.mean([rows.mean() for rows, _ in sides])), resampled)


def cross_search_metrics(
    kept: Measures, features: Mapping[int, Features], studies: Studies, ks: Sequence[int] = (5, 10)
) -> None:
    """X-ray to CT search and back by images alone, after projection and on the CLS, centred per modality there.

    Keeps: for QUERY "xray_to_ct", "ct_to_xray", "xray_to_ct_cls" and "ct_to_xray_cls", each also with "_chance":
        "QUERY_precision_at_K", where a candidate is correct that has exactly the query's findings, over the queries for
        which there is one; and "QUERY_class_precision_at_K", the mean over the findings of how many of the K have a
        finding that the query has. Chance is the share of correct candidates. Empty where a dimension is missing.
    """
    if not {2, 3} <= features.keys():
        return
    labels = {dim: labels_of(features[dim].items, studies) for dim in (2, 3)}
    for space, end in (("embed", ""), ("cls", "_cls")):
        found = {dim: _rows(features[dim], space) for dim in (2, 3)}
        rows = {dim: torch.from_numpy(centred(part) if space == "cls" else part) for dim, part in found.items()}
        for name, query, other in (("xray_to_ct", 2, 3), ("ct_to_xray", 3, 2)):
            people, both = features[query].patients, (labels[query], labels[other])
            for k in (k for k in ks if k <= len(rows[other])):
                _search(kept, name + end, rows[query], rows[other], k, people, both)


def _search(
    kept: Measures, name: str, query: Tensor, candidates: Tensor, k: int, people: Sequence[str], labels: Sequence[Array]
) -> None:
    """P@K of N queries among M candidates, labels (N, F) and (M, F): by all findings, and by class."""

    def precisions(asked: Tensor, among: Tensor, correct: Tensor) -> tuple[Array, Array, list[str]]:
        rows, chance = precision_at_k(query[asked], among, correct, k)
        return rows.numpy(), chance.numpy(), [people[i] for i in asked.tolist()]

    same = same_findings(*labels)
    having_one = same.any(1).nonzero().flatten()
    if len(having_one):
        *both, who = precisions(having_one, candidates, same[having_one])
        for end, values in zip(("", "_chance"), both, strict=True):
            kept.mean(f"{name}_precision_at_{k}{end}", values, who)
    parts = [
        precisions(asked, candidates[known], having.expand(len(asked), -1))
        for _, asked, known, having in queries_by_finding(*labels)
    ]
    if parts:
        draws, key = kept.resamples, f"{name}_class_precision_at_{k}"
        resampled = None if draws is None else np.mean([draws.mean(rows, who) for rows, _, who in parts], axis=0)
        kept.add(key, float(np.mean([rows.mean() for rows, _, _ in parts])), resampled)
        kept.add(f"{key}_chance", float(np.mean([chance.mean() for _, chance, _ in parts])))


def paired_search_metrics(
    kept: Measures,
    pretrained: Pretrained,
    volumes: Features,
    studies: Studies,
    folder: Path,
    ks: Sequence[int] = (1, 5, 10),
    **options: Any,
) -> None:
    """Does the X-ray of a phantom patient find that patient's own CT among all? Ray-summed for this, never trained on.

    Args:
        studies: truth by item id, with "phantom" where it is known how to make the patient again.
        folder: for the X-rays, reused if they are there.

    Keeps: "drr_to_ct_recall_at_K" after projection and "drr_to_ct_cls_recall_at_K" on the CLS, X-rays and volumes each
        centred, both with "_chance"; empty where no patient can be made again.
    """
    rows = [i for i, item in enumerate(volumes.items) if "phantom" in studies.get(item["id"], {})]
    items = []
    for i in rows:
        item = volumes.items[i]
        file = write_paired_xray(folder.resolve() / f"{item['id']}.jpg", *studies[item["id"]]["phantom"])
        items.append({"id": item["id"], "patient": item["patient"], "image": str(file), "dim": 2})
    films = extract_features(pretrained, items, folder, **options).get(2)
    if films is None or len(films.items) != len(rows):
        return
    for space, end in (("embed", ""), ("cls", "_cls")):
        query, candidates = _rows(films, space), _rows(volumes, space)[rows]
        if space == "cls":
            query, candidates = centred(query), centred(candidates)
        rank = first_correct_rank(torch.from_numpy(query), torch.from_numpy(candidates))
        for k in ks:
            kept.mean(f"drr_to_ct{end}_recall_at_{k}", (rank <= k).numpy(), films.patients)
        for k, chance in recall_chance(len(rows), ks).items():
            kept.add(f"drr_to_ct{end}_recall_at_{k}_chance", chance)
