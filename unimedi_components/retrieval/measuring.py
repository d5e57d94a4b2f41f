# SPDX-License-Identifier: Apache-2.0
"""From features to numbers: report retrieval, probes, slice selection, collapse, and all measures together.

A measure adds to the `Measures` that it is given first, with intervals over patients where that has resamples.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.metrics import EmbeddingCollapseMetric
from torch import Tensor

from unimedi_components.data.phantom.truth import labels_of
from unimedi_components.images.volume import read_volume_header
from unimedi_components.metrics.bootstrap import Measures, PatientResamples
from unimedi_components.networks.pretrained import Pretrained
from unimedi_components.retrieval.common_space import cross_search_metrics, paired_search_metrics, separation_metrics
from unimedi_components.retrieval.features import Features, Paired
from unimedi_components.retrieval.probe import linear_probe
from unimedi_components.retrieval.recall import first_correct_rank, recall_chance
from unimedi_components.retrieval.self_distillation import self_distillation_metrics
from unimedi_components.retrieval.slices import slice_metrics
from unimedi_components.retrieval.xray_attention import xray_attention_metrics

KS = (1, 5, 10)
Values = dict[str, Any]


def all_metrics(
    pretrained: Pretrained,
    features: Mapping[int, Features],
    truth: Mapping[str, Any] | None = None,
    films: str | Path | None = None,
    untrained: bool = False,
    **options: Any,
) -> Values:
    """All that can be measured on these features, with 95% intervals over patients under "intervals".

    Args:
        truth: of `load_truth`, or None: then without what needs labels, boxes or lesions.
        films: folder for the X-rays of the volumes' patients, reused if they are there; None for a temporary one.
        untrained: the network has random weights: its run's self-distillation and the input's own probe are left out.
    """
    kept = Measures(PatientResamples(patient for part in features.values() for patient in part.patients))
    for dim in (2, 3):
        kept.add(f"studies_{dim}d", len(features[dim].items) if dim in features else 0)
    retrieval_metrics(kept, features)
    kept.values.update(collapse_metrics(features))
    network_metrics(kept, pretrained, features)
    if not untrained and features:
        items = [
            {**item, "image": str(file.resolve())}
            for p in features.values()
            for item, file in zip(p.items, p.files, strict=True)
        ]
        root = next(iter(features.values())).root
        kept.values.update(self_distillation_metrics(pretrained, items, root, options.get("cache_dir")))
    if truth is not None:
        studies = truth["studies"]
        probe_metrics(kept, features, truth, pixels=not untrained)
        selection_metrics(kept, pretrained, features, studies)
        cross_search_metrics(kept, features, studies)
        separation_metrics(kept, features, studies, truth["findings"])
        if 2 in features:
            xray_attention_metrics(kept, pretrained, features[2], studies)
        if 3 in features:
            with tempfile.TemporaryDirectory(prefix="unimedi-films-") as scratch:
                folder = Path(films or scratch)
                paired_search_metrics(kept, pretrained, features[3], studies, folder, **options)
    return kept.content()


def retrieval_metrics(kept: Measures, features: Mapping[int, Paired]) -> None:
    """Report retrieval with the reports of both dimensions as candidates, and within each dimension.

    A report that is word for word the right one counts as right; "_strict" keys count the image's own report alone.

    Keeps: "report_recall_at_K" (image to report, both dimensions pooled), "image_recall_at_K" (report to image), each
        also with "_strict"; "report_recall_at_K_chance" and "report_recall_at_K_strict_chance", which hold for both
        ways; the same within one dimension as "report_recall_2d_at_K" and so on; "reports", the number of candidates,
        and "distinct_reports".
    """
    pools = {"": list(features.values())}
    if len(features) > 1:
        pools.update({f"_{dim}d": [part] for dim, part in features.items()})
    for suffix, parts in pools.items():
        known = [torch.tensor([bool(text) for text in part.reports]) for part in parts]
        reports = [text for part in parts for text in part.reports if text]
        if not reports:
            continue
        image = torch.cat([part.image_embed[keep] for part, keep in zip(parts, known, strict=True)])
        text = torch.cat([part.text_embed[keep] for part, keep in zip(parts, known, strict=True)])
        people = [p for part in parts for p, text in zip(part.patients, part.reports, strict=True) if text]
        for kind, groups in (("", reports), ("_strict", None)):
            chance = recall_chance(len(reports), KS, groups)
            for name, query, candidates in (("report", image, text), ("image", text, image)):
                rank = first_correct_rank(query, candidates, groups).numpy()
                for k in KS:
                    kept.mean(f"{name}_recall{suffix}_at_{k}{kind}", rank <= k, people)
            kept.values.update({f"report_recall{suffix}_at_{k}{kind}_chance": chance[k] for k in KS})
        kept.add(f"reports{suffix}", len(reports))
        kept.add(f"distinct_reports{suffix}", len(set(reports)))


def collapse_metrics(features: Mapping[int, Features]) -> Values:
    """Signs of collapsed embeddings by MONAI's metric: 0 is a full, even spectrum, 1 a single direction.

    Returns "collapse_image_2d", "collapse_text_2d", "collapse_cls_2d" and the same for 3D (effective rank), and
    "collapse_modality": 1 if X-ray and CT images have one common centre, 0.5 if their centres are orthogonal.
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


def network_metrics(kept: Measures, pretrained: Pretrained, features: Mapping[int, Features]) -> None:
    """The temperature of L_vl, and how the CLS attends to a volume and to its slices when both are encoded together.

    Keeps: "temperature"; "cls_attention_3d" and "cls_attention_slices", mean shares of Eq. 1's **v** on the tokens of
        the volume and of its slices, each with "_uniform", their share of the tokens, where slices join volumes.
    """
    kept.add("temperature", 1 / pretrained.network.logit_scale.item())
    if 3 in features and (share := features[3].slice_attention) is not None:
        for column, end in enumerate(("", "_uniform")):
            slices = share[:, column].double().numpy()
            kept.mean(f"cls_attention_3d{end}", 1 - slices, features[3].patients)
            kept.mean(f"cls_attention_slices{end}", slices, features[3].patients)


def selection_metrics(
    kept: Measures, pretrained: Pretrained, features: Mapping[int, Features], studies: Mapping[str, Mapping[str, Any]]
) -> None:
    """Slice selection against the true lesion slices of the focal CT studies, see `slices.slice_metrics`."""
    part, network = features.get(3), pretrained.network
    if part is None or part.selected is None or part.scores is None:
        return
    truths = [study if (study := studies.get(item["id"])) and "n_slices" in study else None for item in part.items]
    patch_depth = network.encoder.patch_depth
    depth = part.scores.shape[1] * patch_depth
    spacing = [
        read_volume_header(file).slice_spacing if truth else 0.0 for file, truth in zip(part.files, truths, strict=True)
    ]
    slice_metrics(kept, part.selected.tolist(), truths, depth, patch_depth, network.expand, part.patients, spacing)


def probe_metrics(
    kept: Measures, features: Mapping[int, Features], truth: Mapping[str, Any], pixels: bool = True
) -> None:
    """Linear probes of the CLS, and of the input itself beside them, cross-validated on the same splits.

    ``pixels``: probe the averaged input too, `Features.pooled`.

    Keeps: "probe_auroc_2d" and "probe_auroc_3d", each with "_per_finding" and, where findings could not be probed,
        "_skipped"; with `pixels` also "probe_auroc_2d_pixels", "probe_auroc_3d_voxels", and what the features have more
        than these, "probe_minus_pixels_2d" and "..._3d".
    """
    names = truth["findings"]
    for dim, part in features.items():
        labels = labels_of(part.items, truth["studies"])
        inputs = {f"probe_auroc_{dim}d": part.cls}
        if pixels and part.pooled is not None:
            inputs[f"probe_auroc_{dim}d_{'pixels' if dim == 2 else 'voxels'}"] = part.pooled
        weights = None if kept.resamples is None else kept.resamples.weights(part.patients)
        macros, resampled = [], []
        for key, rows in inputs.items():
            probe = linear_probe(rows.numpy(), labels, names, part.patients)
            macros.append(probe.macro)
            resampled.append(None if weights is None else probe.resampled(weights))
            kept.add(key, probe.macro, resampled[-1])
            kept.add(f"{key}_per_finding", probe.per_finding)
            if probe.skipped:
                kept.add(f"{key}_skipped", probe.skipped)
        if len(macros) == 2 and macros[0] is not None and macros[1] is not None:
            paired = None if resampled[0] is None or resampled[1] is None else resampled[0] - resampled[1]
            kept.add(f"probe_minus_pixels_{dim}d", macros[0] - macros[1], paired)
