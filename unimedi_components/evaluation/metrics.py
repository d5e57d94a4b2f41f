# SPDX-License-Identifier: Apache-2.0
"""From features to numbers: report retrieval, X-ray to CT search, slice selection, collapse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from monai.metrics import EmbeddingCollapseMetric
from torch import Tensor

from unimedi_components.evaluation.features import Features, labels_of
from unimedi_components.evaluation.retrieval import precision_at_k, recall_at_k, recall_chance
from unimedi_components.evaluation.slices import slice_metrics
from unimedi_components.networks.pretrained import Pretrained

__all__ = [
    "PairedEmbeds",
    "all_metrics",
    "collapse_metrics",
    "cross_modal_metrics",
    "retrieval_metrics",
    "selection_metrics",
]

KS = (1, 5, 10)
Values = dict[str, Any]


def all_metrics(
    pretrained: Pretrained,
    features: Mapping[int, Features],
    studies: Mapping[str, Mapping[str, Any]] | None = None,
) -> Values:
    """All that can be measured on these features.

    Args:
        pretrained: the network that made them.
        features: by dimension.
        studies: truth by item id, or None: then without slice selection and X-ray to CT search.
    """
    result: Values = {f"studies_{dim}d": len(features[dim].items) if dim in features else 0 for dim in (2, 3)}
    result.update(retrieval_metrics(features))
    result.update(collapse_metrics(features))
    if studies is not None:
        result.update(selection_metrics(pretrained, features, studies))
        result.update(cross_modal_metrics(features, studies))
    return result


class PairedEmbeds(Protocol):
    """Embeddings of N images and of their reports, (N, E), and the reports' texts, empty where there is none."""

    @property
    def image_embed(self) -> Tensor: ...

    @property
    def text_embed(self) -> Tensor: ...

    @property
    def reports(self) -> list[str]: ...


def retrieval_metrics(features: Mapping[int, PairedEmbeds]) -> Values:
    """Report retrieval with the reports of both dimensions as candidates, and within each dimension.

    A report that is word for word the right one counts as right; "_strict" keys count the image's own report
    alone.

    Args:
        features: by dimension, `Features` or anything that holds the same pairs.

    Returns:
        "report_recall_at_K" (image to report, both dimensions pooled), "image_recall_at_K" (report to image),
        each also with "_strict"; "report_recall_at_K_chance" and "report_recall_at_K_strict_chance", which hold
        for both ways; the same within one dimension as "report_recall_2d_at_K" and so on; "reports", the number
        of candidates, and "distinct_reports".
    """
    pools = {"": list(features.values())}
    if len(features) > 1:
        pools.update({f"_{dim}d": [part] for dim, part in features.items()})
    result: Values = {}
    for suffix, parts in pools.items():
        kept = [torch.tensor([bool(text) for text in part.reports]) for part in parts]
        reports = [text for part in parts for text in part.reports if text]
        if not reports:
            continue
        image = torch.cat([part.image_embed[keep] for part, keep in zip(parts, kept, strict=True)])
        text = torch.cat([part.text_embed[keep] for part, keep in zip(parts, kept, strict=True)])
        for kind, groups in (("", reports), ("_strict", None)):
            found, chance = recall_at_k(image, text, KS, groups), recall_chance(len(reports), KS, groups)
            for k in KS:
                result[f"report_recall{suffix}_at_{k}{kind}"] = found[f"image_to_report_at_{k}"]
                result[f"image_recall{suffix}_at_{k}{kind}"] = found[f"report_to_image_at_{k}"]
                result[f"report_recall{suffix}_at_{k}{kind}_chance"] = chance[k]
        result[f"reports{suffix}"], result[f"distinct_reports{suffix}"] = len(reports), len(set(reports))
    return result


def collapse_metrics(features: Mapping[int, Features]) -> Values:
    """Signs of collapsed embeddings by MONAI's metric: 0 is a full, even spectrum, 1 a single direction.

    Returns:
        "collapse_image_2d", "collapse_text_2d", "collapse_cls_2d" and the same for 3D (effective rank), and
        "collapse_modality": 1 if X-ray and CT images have one common centre, 0.5 if their centres are
        orthogonal.
    """
    rank = EmbeddingCollapseMetric(include_indicators=["effective_rank"], reduction="none")
    result: Values = {}
    for dim, part in features.items():
        if len(part.items) > 1:
            for name, rows in (("image", part.image_embed), ("text", part.text_embed), ("cls", part.cls)):
                result[f"collapse_{name}_{dim}d"] = _value(rank(rows)["effective_rank_score"])
    if len(features) == 2 and all(len(part.items) > 1 for part in features.values()):
        rows = torch.cat([torch.nn.functional.normalize(part.image_embed, dim=1) for part in features.values()])
        dims = torch.cat([torch.full((len(part.items),), dim) for dim, part in features.items()])
        centre = EmbeddingCollapseMetric(include_indicators=["centroid_similarity"], reduction="none")
        result["collapse_modality"] = _value(centre(rows, dims)["centroid_similarity"])
    return result


def _value(score: Tensor | None) -> float | None:
    return None if score is None else float(score)


def selection_metrics(
    pretrained: Pretrained, features: Mapping[int, Features], studies: Mapping[str, Mapping[str, Any]]
) -> Values:
    """Slice selection against the true lesion slices of the focal CT studies, see `slices.slice_metrics`."""
    part, network = features.get(3), pretrained.network
    if part is None or part.selected is None or part.scores is None:
        return {}
    truths = [study if (study := studies.get(item["id"])) and "n_slices" in study else None for item in part.items]
    patch_depth = network.encoder.patch_depth
    depth = part.scores.shape[1] * patch_depth
    return dict(slice_metrics(part.selected.tolist(), truths, depth, patch_depth, network.expand))


def cross_modal_metrics(features: Mapping[int, Features], studies: Mapping[str, Mapping[str, Any]]) -> Values:
    """X-ray to CT search and back by image embeddings alone.

    A candidate with exactly the query's findings is correct; queries without a correct candidate are left
    out.

    Returns:
        "xray_to_ct_precision_at_5", "ct_to_xray_precision_at_5", each with "_chance".
    """
    if not {2, 3} <= features.keys():
        return {}
    xray, ct = features[2], features[3]
    labels = [torch.from_numpy(labels_of(part.items, studies)) for part in (xray, ct)]
    same = (labels[0][:, None] == labels[1][None]).all(-1)
    result: Values = {}
    directions = {"xray_to_ct": (xray, ct, same), "ct_to_xray": (ct, xray, same.T)}
    for name, (query, candidates, correct) in directions.items():
        asked = correct.any(1)
        if asked.any():
            precision = precision_at_k(query.image_embed[asked], candidates.image_embed, correct[asked])
            result[f"{name}_precision_at_5"] = precision
            result[f"{name}_precision_at_5_chance"] = correct[asked].float().mean().item()
    return result
