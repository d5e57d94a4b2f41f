# SPDX-License-Identifier: Apache-2.0
"""The paper's tables of downstream tasks (1 to 6, 8 and 9): random initialisation against the pre-trained encoder.

Run from the repository's root: `python -m benchmarks.tables --table 1 --out results/table1`. Writes `OUT.csv`, a row
per run, `OUT.md`, the mean and standard deviation over seeds, and `OUT.json`, the same with the command. A data set is
read from `$UNIMEDI_DATA/<name>` with the paper's protocol where that folder is there, and made as phantoms for the
small default otherwise. Where images are classified, a logistic regression on their pixels stands beside the encoders,
see `benchmarks.pixels`. Table 6 ends with MONAI's UNETR as a peer of the same training time on phantoms, see
`benchmarks.peer_dice`.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fire
import monai
from monai.bundle import ConfigParser, ConfigWorkflow

from benchmarks.peer_dice import peer_dice
from benchmarks.pixels import pixel_probe
from unimedi_components.data.datalist import write_json
from unimedi_components.provenance import provenance

ONE_TO_ALL, FIFTH_TO_ALL = (0.01, 0.1, 1.0), (0.2, 0.4, 1.0)
PIXELS = "pixels"
XRAY, CT = "chest_xray_classification", "chest_ct_classification"
ORGANS = "abdomen_ct_segmentation"


@dataclass(frozen=True)
class Cell:
    """One data set of a table.

    Args:
        bundle: folder below `bundles`.
        data_set: the overlay's name, and that of the data.
        metrics: headline values of `metrics.json`.
        training: what is trained, for the table.
        overlays: config files of the bundle between its default and the data set's.
        fractions: of the labels.
        peer_minutes: of training for each network of `benchmarks.peer_dice` at the table's end; 0 leaves it out.
    """

    bundle: str
    data_set: str
    metrics: tuple[str, ...]
    training: str = "probe"
    overlays: tuple[str, ...] = ()
    fractions: tuple[float, ...] = ONE_TO_ALL
    peer_minutes: float = 0


FINE_TUNING: dict[str, Any] = {"training": "fine-tuning", "overlays": ("fine_tune",), "fractions": (1.0,)}
UNETR: dict[str, Any] = {"training": "UNETR", "fractions": FIFTH_TO_ALL}
DETECTION = ("map_mgca", "map_coco", "ap_40")
TABLES: dict[int, tuple[Cell, ...]] = {
    1: (
        Cell(XRAY, "chexpert", ("macro_auroc",)),
        Cell(XRAY, "rsna", ("macro_auroc",)),
        Cell(XRAY, "covidx", ("accuracy",)),
    ),
    2: (Cell(CT, "cc_ccii", ("accuracy",)),),
    3: (
        Cell(CT, "cc_ccii", ("accuracy",), fractions=(1.0,)),
        Cell(CT, "cc_ccii", ("accuracy",), **FINE_TUNING),
        Cell(CT, "luna16", ("macro_auroc",), **FINE_TUNING),
    ),
    4: (Cell("chest_xray_segmentation", "rsna", ("dice", "dice_positive"), "SETR-PUP, frozen encoder"),),
    5: (Cell("chest_xray_detection", "rsna", DETECTION, "ViTDet, frozen encoder"),),
    6: (Cell(ORGANS, "bcv", ("mean_dice",), **UNETR, peer_minutes=4),),
    8: (Cell(ORGANS, "amos", ("mean_dice",), **UNETR),),
    9: (Cell(XRAY, "covidx", ("accuracy", "macro_auroc")),),
}
# what an overlay says of its data set, and not of the paper's sizes and schedule
DATA_KEYS = ("task", "label_names", "preprocessing")
DATA, PHANTOMS = "data#datalist#", "data#datalist#phantoms"
COLUMNS = (
    "table",
    "data_set",
    "data",
    "training",
    "encoder",
    "label_fraction",
    "seed",
    "metric",
    "value",
    "low",
    "high",
)
Row = dict[str, Any]


def table(
    table: int,
    out: str | None = None,
    seeds: Any = (0, 1, 2),
    fractions: Any = None,
    phantoms: int | None = None,
    epochs: int | None = None,
    encoder_weights: str | None = None,
    peer_minutes: float | None = None,
) -> None:
    """Train and test every cell of a table.

    Args:
        table: 1 to 6, 8 or 9.
        out: path of the table without its ending, `results/table<N>` by default.
        seeds: of head, shuffles and random initialisation.
        fractions: of the labels; None takes the paper's.
        phantoms: patients of each phantom set; None keeps the bundle's default.
        epochs: at most; None keeps the bundle's default.
        encoder_weights: pre-trained weights, instead of the pretrain bundle's.
        peer_minutes: of training for each network in Table 6's comparison with MONAI's; 0 leaves it out.
    """
    if table not in TABLES:
        raise SystemExit(f"table {table} is none of {', '.join(map(str, TABLES))}")
    logging.disable(logging.INFO)
    chosen = {PHANTOMS: phantoms, "epochs": epochs}
    path = Path(out or f"results/table{table}")
    rows: list[Row] = []
    probed = set()
    for cell in TABLES[table]:
        encoders: dict[str, Any] = {"random": "none", "UniMedI": encoder_weights}
        if cell.bundle in (XRAY, CT) and cell.data_set not in probed:
            encoders[PIXELS] = "none"
            probed.add(cell.data_set)
        for fraction in cell.fractions if fractions is None else _sequence(fractions):
            for name, weights in encoders.items():
                for seed in _sequence(seeds):
                    over = {**chosen, "encoder_weights": weights, "label_fraction": fraction, "seed": seed}
                    over = {key: value for key, value in over.items() if value is not None}
                    data, measured = run_bundle(cell, over, pixels=name == PIXELS)
                    row = {"table": table, "data_set": cell.data_set, "data": data, "encoder": name, "seed": seed}
                    row |= {"label_fraction": fraction, "training": "probe" if name == PIXELS else cell.training}
                    rows += [{**row, **_value(measured, metric)} for metric in cell.metrics]
                    _write(rows, path)
        minutes = cell.peer_minutes if peer_minutes is None else peer_minutes
        for seed in _sequence(seeds) if minutes else ():
            rows += [{"table": table, "data_set": cell.data_set, "seed": seed, **row} for row in _peers(minutes, seed)]
    print(_write(rows, path))


def _peers(minutes: float, seed: int) -> list[Row]:
    """Mean Dice on the networks' own grid after the same time of training, all labels, phantoms."""
    names = {"random": "random", "unimedi": "UniMedI", "monai": "MONAI UNETR"}
    measured = peer_dice(minutes=minutes, seed=seed, networks=",".join(names))["rows"]
    last = {row["network"]: row["mean_dice"] for row in measured}
    common = {
        "data": "phantom",
        "training": f"UNETR, {minutes:g} minutes",
        "label_fraction": 1.0,
        "metric": "grid_dice",
    }
    return [{**common, "label_fraction": 1.0, "encoder": title, "value": last[name]} for name, title in names.items()]


def _sequence(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _value(measured: Row, metric: str) -> Row:
    low, high = measured["intervals"][metric] or (None, None)
    return {"metric": metric, "value": measured[metric], "low": low, "high": high}


def run_bundle(cell: Cell, overrides: Row, pixels: bool = False) -> tuple[str, Row]:
    """Train once in a folder of its own; returns the kind of data and the content of metrics.json.

    With `pixels` no network is trained, but a probe of the bundle's images themselves.
    """
    configs = Path("bundles") / cell.bundle / "configs"
    files = [configs / f"{name}.json" for name in ("train", *cell.overlays)]
    real = bool(os.environ.get("UNIMEDI_DATA")) and Path(os.environ["UNIMEDI_DATA"], cell.data_set).is_dir()
    if real:
        files.append(configs / f"{cell.data_set}.json")
        overrides = {key: value for key, value in overrides.items() if key != PHANTOMS}
    else:
        overlay = ConfigParser.load_config_file(str(configs / f"{cell.data_set}.json"))
        default = ConfigParser.load_config_file(str(configs / "train.json"))
        if overlay[f"{DATA}dataset"] != default["data"]["datalist"]["dataset"]:
            data = {key: overlay[key] for key in overlay if key in DATA_KEYS or key.startswith(DATA)}
            del data[PHANTOMS]
            overrides = {**data, **overrides}
    with tempfile.TemporaryDirectory() as folder:
        places = {"ckpt_dir": f"{folder}/models", "output_dir": f"{folder}/eval"}
        run = ConfigWorkflow(
            [str(file) for file in files], workflow_type="train", logging_file=False, **{**overrides, **places}
        )
        run.initialize()
        measured = pixel_probe(run.parser, overrides["seed"]) if pixels else None
        if measured is None:
            run.run()
            measured = json.loads(Path(folder, "eval", "metrics.json").read_text())
        run.finalize()
        monai.utils.set_determinism(None)
        return "real" if real else "phantom", measured


def _write(rows: list[Row], path: Path) -> str:
    """Write what has been measured so far, so that a table that is interrupted leaves the runs that were finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    fractions = sorted({row["label_fraction"] for row in rows})
    lines = [
        "| data | training | metric | encoder | "
        + " | ".join(f"{fraction:.0%} of the labels" for fraction in fractions)
        + " |",
        "|---" * (4 + len(fractions)) + "|",
    ]
    for key in dict.fromkeys(_line(row) for row in rows):
        cells = [_cell([row for row in rows if _line(row) == key and row["label_fraction"] == f]) for f in fractions]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json({**provenance(), "values": _means(rows)}, path.with_suffix(".json"))
    return "\n".join(lines)


def _means(rows: list[Row]) -> Row:
    """Mean and deviation over seeds, by data set, training, metric, encoder and share of the labels."""
    values: Row = {}
    for row in rows:
        place = values
        for key in ("data_set", "training", "metric", "encoder"):
            place = place.setdefault(row[key], {})
        found = [other["value"] for other in rows if _line(other) == _line(row) and _share(other) == _share(row)]
        if None not in found:
            sd = statistics.stdev(found) if len(found) > 1 else None
            place[_share(row)] = {"mean": statistics.fmean(found), "sd": sd, "seeds": len(found)}
    return values


def _share(row: Row) -> str:
    return f"{row['label_fraction']:.0%}"


def _line(row: Row) -> tuple[str, str, str, str]:
    return f"{row['data_set']} ({row['data']})", row["training"], row["metric"], row["encoder"]


def _cell(rows: list[Row]) -> str:
    values = [row["value"] for row in rows if row["value"] is not None]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


if __name__ == "__main__":
    fire.Fire(table)
