# SPDX-License-Identifier: Apache-2.0
"""Tables of the page, as HTML: the paper's beside ours, the ablation, and what the method's parts are to move."""

import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from unimedi_components.engines.target_information import COLLAPSED
from unimedi_components.report.sources import Experiment

Rows = list[dict[str, str]]

#: Measure without its share of the labels -> data set, metric, and the variant that its dimension alone trains.
COLUMNS = {
    "chexpert_macro_auroc": ("CheXpert", "AUROC", "2d_only"),
    "rsna_macro_auroc": ("RSNA", "AUROC", "2d_only"),
    "cc_ccii_accuracy": ("CC-CCII", "accuracy", "3d_only"),
    "probe_auroc_2d": ("phantom X-rays", "macro AUROC", "2d_only"),
    "probe_auroc_3d": ("phantom CT", "macro AUROC", "3d_only"),
}
SHARES = {"1pct": "1%", "10pct": "10%", "100pct": "100%"}
_ENCODERS = {"random": "random initialisation"}
_ABLATION = {
    **{"chexpert_macro_auroc": "CheXpert AUROC", "rsna_macro_auroc": "RSNA AUROC", "cc_ccii_accuracy": "CC-CCII"},
    **{"probe_auroc_2d": "phantom X-rays, AUROC", "probe_auroc_3d": "phantom CT, AUROC"},
}
_NAMES = {
    "pixels": "pixels and voxels",
    "untrained": "untrained network",
    "2d_only": "X-rays only",
    "3d_only": "CT only",
    "joint": "joint, no pseudo-pairs",
    "vl": "VL, random slices",
    "vl_sd": "+ self-distillation, random slices",
    "ours": "+ attentive slices (ours)",
    "literal": "the paper's literal reading",
}
# what a network that saw one dimension alone is not asked
_BOTH = ("centroid", "modality", "xray_to_ct", "ct_to_xray", "drr", "report_recall_at")
_HIDDEN = {"2d_only": ("3d", "slice", *_BOTH), "3d_only": ("2d", "xray_attention", *_BOTH)}
_MEASURES: dict[str, dict[str, str]] = {
    "Linear probe of frozen features, macro AUROC": {
        "probe_auroc_2d": "X-rays",
        "probe_auroc_2d_pixels": "X-ray pixels",
        "probe_minus_pixels_2d": "above pixels",
        "probe_auroc_3d": "CT",
        "probe_auroc_3d_voxels": "CT voxels",
        "probe_minus_pixels_3d": "above voxels",
    },
    "Slices selected that show a lesion": {
        "slice_precision": "selection",
        "slice_precision_chance": "chance",
        "slice_precision_permuted": "another study's",
        "slice_precision_fixed": "best fixed slabs",
        "slice_precision_oracle": "oracle",
        "slice_distance_mm": "mm to the lesion",
    },
    "Attention on X-rays: mass inside the true boxes over their share": {
        "xray_attention_ratio": "own boxes",
        "xray_attention_ratio_permuted": "another film's attention",
    },
    "Report retrieval, recall at 5": {
        "report_recall_2d_at_5": "X-rays",
        "report_recall_2d_at_5_chance": "chance",
        "report_recall_3d_at_5": "CT",
        "report_recall_3d_at_5_chance": "chance",
        "report_recall_at_5": "both pooled",
        "report_recall_at_5_chance": "chance",
    },
    "Search across dimensions, exact findings, precision at 10": {
        "xray_to_ct_precision_at_10": "X-ray to CT",
        "xray_to_ct_precision_at_10_chance": "chance",
        "ct_to_xray_precision_at_10": "CT to X-ray",
        "ct_to_xray_precision_at_10_chance": "chance",
        "xray_to_ct_cls_precision_at_10": "X-ray to CT, CLS",
        "ct_to_xray_cls_precision_at_10": "CT to X-ray, CLS",
        "drr_to_ct_recall_at_10": "own CT by its film, recall at 10",
        "drr_to_ct_recall_at_10_chance": "chance",
    },
    "Common space": {
        "centroid_distance_cls": "2D-3D centroids over spread, CLS",
        "centroid_distance_embed": "the same, projected",
        "centroid_distance_chance": "chance",
        "modality_accuracy_cls": "modality from CLS, accuracy",
        "modality_accuracy_embed": "the same, projected",
    },
    "Self-distillation: information of image and target, nats": {
        "sd_cls_information_2d": "CLS, X-rays",
        "sd_cls_information_3d": "CLS, CT",
        "sd_patch_information_2d": "patches, X-rays",
        "sd_patch_information_3d": "patches, CT",
    },
    "Attention of the CLS and temperature": {
        "cls_attention_3d": "on volume tokens",
        "cls_attention_slices": "on slice tokens",
        "temperature": "temperature of L_vl",
    },
}


def is_asked(variant: str, key: str) -> bool:
    """Whether a variant's training makes a measure a question: not one of a dimension that it never saw."""
    return not any(word in key for word in _HIDDEN.get(variant, ()))


def anchor(experiment: Experiment, variant: str) -> str:
    return f"cell-{experiment.content.get('size', 'experiment')}-{variant}"


def paper_tables() -> dict[str, Any]:
    """The paper's own numbers: "source", and "tables" by number with "title", "groups" of columns and "rows"."""
    return json.loads(Path(__file__).with_name("paper_tables.json").read_text(encoding="utf-8"))


def boxed_table(head: Sequence[str], body: Sequence[str], style: str = "numbers") -> str:
    """A table that scrolls inside its box: the cells of each row of the head, the rows of the body, a CSS class."""
    rows = "".join(f"<tr>{row}</tr>" for row in head)
    table = f'<table class="{style}"><thead>{rows}</thead><tbody>{"".join(body)}</tbody></table>'
    return f'<div class="wide" tabindex="0">{table}</div>'


def _head(groups: Mapping[str, Sequence[str]], first: str) -> list[str]:
    names = "".join(f'<th colspan="{len(cells)}">{escape(name)}</th>' for name, cells in groups.items())
    cells = "".join(f"<th>{escape(cell)}</th>" for cells in groups.values() for cell in cells)
    return [f'<th rowspan="2">{escape(first)}</th>{names}', cells]


def paper_table(number: str, table: Mapping[str, Any], folder: Path | None) -> str:
    """One of the paper's tables with our rows below it, or a row that says how to run what was not run.

    ``folder``: where `make tableN` wrote `tableN.csv`; None leaves our rows out.
    """
    groups = {group["name"]: [f"{share:.0%}" for share in group["fractions"]] for group in table["groups"]}
    body = []
    for name, *values in table["rows"]:
        printed = (f"<td>{'-' if value is None else f'{value:.1f}'}</td>" for value in values)
        body.append(f'<tr class="theirs"><th>{escape(name)}</th>{"".join(printed)}</tr>')
    if folder is None:
        return boxed_table(_head(groups, "Method"), body)
    rows = _read_rows(folder / f"table{number}.csv")
    encoders = list(dict.fromkeys(row["encoder"] for row in rows))
    used: list[dict[str, str]] = []
    for encoder in encoders:
        own = [row for row in rows if row["encoder"] == encoder]
        cells = []
        for group in table["groups"]:
            for share in group["fractions"]:
                wanted = (group["data_set"], group["metric"], group["training"], float(share))
                found = [row for row in own if _place(row) == wanted]
                used += found
                cells.append(_seeds(found))
        if any("<b>" in cell for cell in cells):
            data = ", ".join(sorted({f"{row['data']} data" for row in own}))
            name = escape(_ENCODERS.get(encoder, encoder))
            body.append(f'<tr class="ours"><th>{name} (ours, {data})</th>{"".join(cells)}</tr>')
    if not used:
        columns = sum(map(len, groups.values()))
        line = f"<td colspan='{columns}'>not run; <code>make table{number}</code> measures it</td>"
        body.append(f'<tr class="ours"><th>UniMedI (ours, phantoms)</th>{line}</tr>')
    rest = [row for row in rows if row not in used and row["value"]]
    return boxed_table(_head(groups, "Method"), body) + _further(rest) + _table_origin(folder / f"table{number}.json")


def _place(row: Mapping[str, str]) -> tuple[str, str, str, float]:
    return row["data_set"], row["metric"], row["training"], float(row["label_fraction"])


def _further(rows: Rows) -> str:
    """What `make tableN` measured beside the paper's columns."""
    if not rows:
        return ""
    keys = dict.fromkeys((*_place(row), row["encoder"]) for row in rows)
    body = []
    for key in keys:
        cell = _seeds([row for row in rows if (*_place(row), row["encoder"]) == key])
        words = [key[0], key[2], key[1], f"{key[3]:.0%}", _ENCODERS.get(key[4], key[4])]
        body.append(f'<tr class="ours">{"".join(f"<td>{escape(word)}</td>" for word in words)}{cell}</tr>')
    head = "".join(f"<th>{name}</th>" for name in ("data set", "training", "measure", "labels", "encoder", "ours"))
    return f"<details><summary>measured beside it</summary>{boxed_table([head], body)}</details>"


def _table_origin(path: Path) -> str:
    if not path.is_file():
        return ""
    run = json.loads(path.read_text(encoding="utf-8"))
    return f'<p class="origin">ours: <code>{escape(run["command"])}</code>, commit {escape(run["commit"])}</p>'


def _read_rows(path: Path) -> Rows:
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _seeds(rows: Rows) -> str:
    """A cell of percentages from one row per seed: mean, deviation, and the mean limits over patients."""
    values = [float(row["value"]) for row in rows if row["value"]]
    if not values:
        return '<td class="none">-</td>'
    limits = [(float(row["low"]), float(row["high"])) for row in rows if row["low"] and row["high"]]
    spread = statistics.stdev(values) if len(values) > 1 else None
    sides = [statistics.fmean(side) for side in zip(*limits, strict=True)] if limits else None
    return _value(statistics.fmean(values), spread, sides, 100, 1)


def _value(mean: float, sd: float | None, limits: Sequence[float] | None, scale: float, digits: int) -> str:
    spread = "" if sd is None else f" ± {scale * sd:.{digits}f}"
    interval = f"<small>{scale * limits[0]:.{digits}f} to {scale * limits[1]:.{digits}f}</small>" if limits else ""
    return f"<td><b>{scale * mean:.{digits}f}</b>{spread}{interval}</td>"


def _summary_cell(experiment: Experiment, variant: str, key: str, scale: float, digits: int) -> str:
    found = experiment.summary(variant, key)
    if found is None or not is_asked(variant, key):
        return '<td class="none">-</td>'
    # what no seed changes, such as chance, has no deviation to show
    spread, over_seeds = (found.get("sd") or None), found.get("sd") and found.get("interval")
    cell = _value(found["mean"], spread, over_seeds or found.get("patients"), scale, digits)
    red = key.startswith("sd_cls_information") and min(found["values"].values()) < COLLAPSED
    return cell.replace("<td>", '<td class="collapsed">') if red else cell


def _label(experiment: Experiment, variant: str) -> str:
    title = escape(experiment.variants[variant]["title"])
    return f'<th><a href="#{anchor(experiment, variant)}">{title}</a></th>'


def ablation_table(experiment: Experiment) -> str:
    """Table 7's rows as we measured them, with the baselines: mean, deviation and interval over seeds, in percent."""
    found = {key for measures in experiment.variants.values() for key in measures}
    prefixes = {p: name for p, name in _ABLATION.items() if f"{p}_100pct" in found}
    body = []
    for variant in _NAMES:
        if variant in experiment.variants:
            cells = [_summary_cell(experiment, variant, f"{p}_{share}", 100, 1) for p in prefixes for share in SHARES]
            label = _label(experiment, variant)
        else:
            label, cells = (f"<th>{_NAMES[variant]}</th>", [f'<td colspan="{3 * max(len(prefixes), 1)}">not run</td>'])
        body.append(f'<tr class="ours">{label}{"".join(cells)}</tr>')
    return boxed_table(_head({name: list(SHARES.values()) for name in prefixes.values()}, "Variant"), body)


def measure_tables(experiment: Experiment) -> str:
    """What each part of the method is to move, by variant; columns that no variant has are named below."""
    parts, missing = [], []
    for title, columns in _MEASURES.items():
        kept = {k: n for k, n in columns.items() if any(k in measures for measures in experiment.variants.values())}
        if not kept:
            missing.append(title)
            continue
        missing += [f"{title}: {name}" for key, name in columns.items() if key not in kept]
        head = "<th>Variant</th>" + "".join(f"<th>{escape(name)}</th>" for name in kept.values())
        body = [
            f'<tr class="ours">{_label(experiment, name)}'
            f"{''.join(_summary_cell(experiment, name, key, 1, 3) for key in kept)}</tr>"
            for name in _NAMES
            if any(key in experiment.variants.get(name, ()) for key in kept)
        ]
        parts.append(f"<h3>{escape(title)}</h3>{boxed_table([head], body)}")
    if missing:
        parts.append(f'<p class="origin">Not measured: {escape("; ".join(missing))}.</p>')
    return "".join(parts)
