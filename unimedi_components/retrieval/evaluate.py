# SPDX-License-Identifier: Apache-2.0
"""The command `evaluate`: a checkpoint on held-out phantoms, beside the same network untrained."""

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unimedi_components.data import bimcv, mimic_cxr
from unimedi_components.data.datalist import SPLITS, write_json
from unimedi_components.data.phantom import write_phantom
from unimedi_components.data.phantom.truth import load_truth
from unimedi_components.errors import CheckpointError, ConfigError, DataError
from unimedi_components.networks.pretrained import load_pretrained, untrained
from unimedi_components.retrieval.features import extract_features
from unimedi_components.retrieval.measuring import all_metrics

#: A title, a key, and what ends the keys of its baselines.
Line = tuple[str, str, tuple[str, ...]]


_SEARCH = ("chance", "untrained")
_LINES: tuple[Line, ...] = (
    ("probe AUROC, X-ray CLS", "probe_auroc_2d", ("pixels", "untrained")),
    ("  minus pixels", "probe_minus_pixels_2d", ()),
    ("probe AUROC, CT CLS", "probe_auroc_3d", ("voxels", "untrained")),
    ("  minus voxels", "probe_minus_pixels_3d", ()),
    ("slice precision", "slice_precision", ("chance", "permuted", "fixed", "oracle", "untrained")),
    ("slice to lesion, mm", "slice_distance_mm", ("chance", "permuted", "fixed", "oracle", "untrained")),
    ("X-ray attention in boxes", "xray_attention_ratio", ("permuted", "untrained")),
    ("report R@5, pooled", "report_recall_at_5", _SEARCH),
    ("report R@5, X-rays", "report_recall_2d_at_5", _SEARCH),
    ("report R@5, CT", "report_recall_3d_at_5", _SEARCH),
    ("X-ray to CT P@10", "xray_to_ct_precision_at_10", _SEARCH),
    ("CT to X-ray P@10", "ct_to_xray_precision_at_10", _SEARCH),
    ("X-ray to CT P@10, CLS", "xray_to_ct_cls_precision_at_10", _SEARCH),
    ("CT to X-ray P@10, CLS", "ct_to_xray_cls_precision_at_10", _SEARCH),
    ("own CT of an X-ray R@10", "drr_to_ct_recall_at_10", _SEARCH),
    ("own CT of an X-ray R@10, CLS", "drr_to_ct_cls_recall_at_10", _SEARCH),
    ("modalities told apart, CLS", "modality_accuracy_cls", ("chance", "untrained")),
    ("modalities told apart", "modality_accuracy_embed", ("chance", "untrained")),
    ("2D-3D centroid distance, CLS", "centroid_distance_cls", ("chance", "untrained")),
    ("2D-3D centroid distance", "centroid_distance_embed", ("chance", "untrained")),
    ("CLS attention on volumes", "cls_attention_3d", ("uniform", "untrained")),
    ("CLS attention on slices", "cls_attention_slices", ("uniform", "untrained")),
    ("temperature of L_vl", "temperature", ()),
    ("CLS code information, X-rays", "sd_cls_information_2d", ()),
    ("CLS code information, CT", "sd_cls_information_3d", ()),
    ("patch code information, X-rays", "sd_patch_information_2d", ()),
    ("patch code information, CT", "sd_patch_information_3d", ()),
)


def _baseline(key: str, end: str) -> str:
    """The key of a baseline; chance is the same at the CLS and after projection."""
    if end == "chance" and key.startswith(("modality_accuracy", "centroid_distance")):
        return f"{key.rpartition('_')[0]}_chance"
    return f"{key}_{end}"


#: The keys that every evaluation has; a value is null where there was nothing to measure it on.
HEADLINE = tuple(dict.fromkeys(k for _, key, ends in _LINES for k in (key, *(_baseline(key, end) for end in ends))))

_LAYOUTS = {2: mimic_cxr.DATASET, 3: bimcv.DATASET}
#: Measured on the untrained network too, under KEY_untrained.
_ALSO_UNTRAINED = ("slice_recall", *(key for _, key, ends in _LINES if "untrained" in ends))


def evaluate(
    checkpoint: str | Path,
    patients: int = 200,
    seed: int = 1000,
    json: str | Path | None = None,
    device: str = "auto",
    keep: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a checkpoint on phantoms that it was not trained on.

    X-rays and CT volumes are written in the layouts of MIMIC-CXR-JPG and BIMCV and read back by the
    converters that read the real sets; all splits are used together. Linear probes are cross-validated over
    them, on the CLS features with the selected slices beside the volume. Intervals are 95% percentiles of 1,000
    resamples of the patients, the same for all values; networks, fitted probes and the candidates of a search stay.

    Args:
        checkpoint: `models/model.pt` or another weight file of a training run's folder.
        seed: of the phantoms; not the one that the checkpoint was trained on.
        device: "cpu", "cuda", or "auto" for a GPU where there is one.
        keep: folder for the phantoms, reused if it holds them; by default a temporary one.
        workers: processes that write phantoms; None for one per CPU.
        progress: show progress bars.

    Returns:
        what is written: `HEADLINE`, the same values by finding, at other K, for each dimension and untrained, and
        their "intervals", see `measuring.all_metrics`.

    Raises:
        CheckpointError: the checkpoint does not load, or diverged in training.
        ConfigError: the network was trained on phantoms of this seed, or too few patients for cross-validation.
        DataError: `keep` holds something else.
    """
    if patients < 2:
        raise ConfigError(f"patients is {patients}; at least 2 are needed, and 200 for steady numbers")
    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    trained = load_pretrained(checkpoint, target)
    used = trained.card.get("phantom_seed")
    if seed in (used if isinstance(used, list | tuple) else [used]):
        raise ConfigError(
            f"{trained.path}: was trained on the phantoms of seed {seed}, so they are not held out; "
            f"choose another --seed, for example {seed + 1000}"
        )
    random = untrained(trained)
    with tempfile.TemporaryDirectory(prefix="unimedi-evaluate-") as scratch:
        folder = Path(keep) if keep is not None else Path(scratch)
        punct = trained.keep_punct
        sets = {dim: heldout_items(dim, folder, patients, seed, workers, progress, punct) for dim in _LAYOUTS}
        truth = {"findings": sets[2][2]["findings"], "studies": {**sets[2][2]["studies"], **sets[3][2]["studies"]}}
        options: dict[str, Any] = {"cache_dir": Path(scratch) / "cache", "progress": progress}
        found = {}
        for name, network in (("trained", trained), ("untrained", random)):
            parts = [extract_features(network, items, root, **options) for items, root, _ in sets.values()]
            found[name] = {dim: part for features in parts for dim, part in features.items()}
        if not all(part.cls.isfinite().all() for part in found["trained"].values()):
            raise CheckpointError(
                f"{checkpoint}: gives features that are not finite; its training diverged, train again"
            )
        common = (truth, folder / "paired_xrays")
        values = all_metrics(trained, found["trained"], *common, **options)
        baseline = all_metrics(random, found["untrained"], *common, untrained=True, **options)
    intervals = {**values.pop("intervals"), **_untrained(baseline.pop("intervals"))}
    result = {**dict.fromkeys(HEADLINE), **values, **_untrained(baseline), "intervals": intervals}
    result.update({"checkpoint": str(checkpoint), "patients": patients, "seed": seed})
    result["training_phantom_seed"] = trained.card.get("phantom_seed")
    if json is not None:
        write_json(result, json)
    print(summary(result))
    return result


def _untrained(baseline: Mapping[str, Any]) -> dict[str, Any]:
    ends = ("", "_per_finding")
    return {f"{k}_untrained{end}": baseline[k + end] for k in _ALSO_UNTRAINED for end in ends if k + end in baseline}


def heldout_items(
    dim: int,
    folder: Path,
    patients: int,
    seed: int,
    workers: int | None = None,
    progress: bool = True,
    keep_punct: bool = True,
) -> tuple[list[dict[str, Any]], Path, Mapping[str, Any]]:
    """Write phantoms of one dimension, convert them, take the first `patients` usable studies of all splits.

    ``keep_punct``: of the reports, as the network's training had it. Returns the items, the root of their image paths,
    and the truth. Raises DataError: the folder holds something else, or too few studies are usable.
    """
    layout = _LAYOUTS[dim]
    root = folder / layout.name
    # Some patients have no usable study, as in the real sets.
    count = math.ceil(patients * 1.05) + 2
    write_phantom(layout.name, root, patients=count, seed=seed, workers=workers, progress=progress)
    datalist, truth = layout.convert(root, keep_punct=keep_punct, progress=progress), load_truth(root)
    assert truth is not None
    by_id = {item["id"]: item for split in SPLITS for item in datalist[split]}
    items = [by_id[name] for name in truth["studies"] if name in by_id][:patients]
    if len(items) < patients:
        raise DataError(f"{root}: {len(items)} of {patients} studies are usable ({datalist['meta']['dropped']})")
    return items, root, truth


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
