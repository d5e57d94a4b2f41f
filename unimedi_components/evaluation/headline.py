# SPDX-License-Identifier: Apache-2.0
"""What `evaluate` prints: each value with its interval, beside what it is to be held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["HEADLINE", "summary"]

Line = tuple[str, str, tuple[str, ...]]


def _line(title: str, key: str, *ends: str) -> Line:
    """A title, a key, and what ends the keys of its baselines."""
    return title, key, ends


_SEARCH = ("chance", "untrained")
_LINES: tuple[Line, ...] = (
    _line("probe AUROC, X-ray CLS", "probe_auroc_2d", "pixels", "untrained"),
    _line("  minus pixels", "probe_minus_pixels_2d"),
    _line("probe AUROC, CT CLS", "probe_auroc_3d", "voxels", "untrained"),
    _line("  minus voxels", "probe_minus_pixels_3d"),
    _line("slice precision", "slice_precision", "chance", "permuted", "fixed", "oracle", "untrained"),
    _line("slice to lesion, mm", "slice_distance_mm", "chance", "permuted", "fixed", "oracle", "untrained"),
    _line("X-ray attention in boxes", "xray_attention_ratio", "permuted", "untrained"),
    _line("report R@5, pooled", "report_recall_at_5", *_SEARCH),
    _line("report R@5, X-rays", "report_recall_2d_at_5", *_SEARCH),
    _line("report R@5, CT", "report_recall_3d_at_5", *_SEARCH),
    _line("X-ray to CT P@10", "xray_to_ct_precision_at_10", *_SEARCH),
    _line("CT to X-ray P@10", "ct_to_xray_precision_at_10", *_SEARCH),
    _line("X-ray to CT P@10, CLS", "xray_to_ct_cls_precision_at_10", *_SEARCH),
    _line("CT to X-ray P@10, CLS", "ct_to_xray_cls_precision_at_10", *_SEARCH),
    _line("own CT of an X-ray R@10", "drr_to_ct_recall_at_10", *_SEARCH),
    _line("own CT of an X-ray R@10, CLS", "drr_to_ct_cls_recall_at_10", *_SEARCH),
    _line("modalities told apart, CLS", "modality_accuracy_cls", "chance", "untrained"),
    _line("modalities told apart", "modality_accuracy_embed", "chance", "untrained"),
    _line("2D-3D centroid distance, CLS", "centroid_distance_cls", "chance", "untrained"),
    _line("2D-3D centroid distance", "centroid_distance_embed", "chance", "untrained"),
    _line("CLS attention on volumes", "cls_attention_3d", "uniform", "untrained"),
    _line("CLS attention on slices", "cls_attention_slices", "uniform", "untrained"),
    _line("temperature of L_vl", "temperature"),
    _line("CLS code information, X-rays", "sd_cls_information_2d"),
    _line("CLS code information, CT", "sd_cls_information_3d"),
    _line("patch code information, X-rays", "sd_patch_information_2d"),
    _line("patch code information, CT", "sd_patch_information_3d"),
)


def _baseline(key: str, end: str) -> str:
    """The key of a baseline; chance is the same at the CLS and after projection."""
    if end == "chance" and key.startswith(("modality_accuracy", "centroid_distance")):
        return f"{key.rpartition('_')[0]}_chance"
    return f"{key}_{end}"


#: The keys that every evaluation has; a value is null where there was nothing to measure it on.
HEADLINE = tuple(
    dict.fromkeys(name for _, key, ends in _LINES for name in (key, *(_baseline(key, end) for end in ends)))
)


def summary(result: Mapping[str, Any]) -> str:
    """A line for each headline value: the value, its interval, its baselines."""

    def shown(key: str) -> str:
        return "n/a" if result.get(key) is None else f"{result[key]:.3f}"

    lines = [
        f"{result['patients']} held-out phantoms per dimension, seed {result['seed']}; 95% intervals over patients"
    ]
    for title, key, ends in _LINES:
        interval = result.get("intervals", {}).get(key)
        between = "" if interval is None else "[{:.3f}, {:.3f}]".format(*interval)
        beside = ", ".join(f"{end} {shown(_baseline(key, end))}" for end in ends)
        lines.append(f"{title:<31}{shown(key):>7} {between:<17} {beside}".rstrip())
    return "\n".join(lines)
