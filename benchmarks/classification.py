# SPDX-License-Identifier: Apache-2.0
"""The paper's classification tables (1, 2, 3 and 9): random initialisation against the pre-trained encoder.

Run from the repository's root: `python -m benchmarks.classification --table 1 --out results/table1`. Writes `OUT.csv`,
a row per run, and `OUT.md`, the mean and standard deviation over seeds. A data set is read from `$UNIMEDI_DATA/<name>`
with the paper's protocol where that folder is there, and made as phantoms for the small default otherwise.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import fire
import monai
from monai.bundle import ConfigParser, ConfigWorkflow

BUNDLES = {
    "chexpert": "chest_xray_classification",
    "rsna": "chest_xray_classification",
    "covidx": "chest_xray_classification",
    "cc_ccii": "chest_ct_classification",
    "luna16": "chest_ct_classification",
}
# table -> data set, metrics, fine-tuned or not
TABLES: dict[int, list[tuple[str, tuple[str, ...], bool]]] = {
    1: [("chexpert", ("macro_auroc",), False), ("rsna", ("macro_auroc",), False), ("covidx", ("accuracy",), False)],
    2: [("cc_ccii", ("accuracy",), False)],
    3: [("cc_ccii", ("accuracy",), False), ("cc_ccii", ("accuracy",), True), ("luna16", ("macro_auroc",), True)],
    9: [("covidx", ("accuracy", "macro_auroc"), False)],
}
FULL_DATA_ONLY = (3,)
# what an overlay says of its data set, and not of the paper's sizes and schedule
DATA_KEYS = ("data_set", "data_options", "task", "label_names", "preprocessing")
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


def classification(
    table: int,
    out: str | None = None,
    seeds: Any = (0, 1, 2),
    fractions: Any = (0.01, 0.1, 1.0),
    phantoms: int | None = None,
    epochs: int | None = None,
    encoder_weights: str | None = None,
) -> None:
    """Train and test every cell of a table.

    Args:
        table: 1, 2, 3 or 9.
        out: path of the table without its ending, `results/table<N>` by default.
        seeds: of head, shuffles and random initialisation.
        fractions: of the labels; Table 3 uses all of them.
        phantoms: patients of each phantom set; None keeps the bundle's default.
        epochs: at most; None keeps the bundle's default.
        encoder_weights: pre-trained weights, instead of the pretrain bundle's.
    """
    if table not in TABLES:
        raise SystemExit(f"table {table} is none of {', '.join(map(str, TABLES))}")
    logging.disable(logging.INFO)
    chosen = {"phantoms": phantoms, "epochs": epochs}
    rows: list[Row] = []
    for data_set, metrics, fine_tune in TABLES[table]:
        for fraction in (1.0,) if table in FULL_DATA_ONLY else _sequence(fractions):
            for name, weights in (("random", "none"), ("UniMedI", encoder_weights)):
                for seed in _sequence(seeds):
                    over = {**chosen, "encoder_weights": weights, "label_fraction": fraction, "seed": seed}
                    data, measured = _run(data_set, fine_tune, {k: v for k, v in over.items() if v is not None})
                    cell = {"table": table, "data_set": data_set, "data": data, "encoder": name, "seed": seed}
                    cell |= {"label_fraction": fraction, "training": "fine-tuning" if fine_tune else "probe"}
                    rows += [{**cell, **_value(measured, metric)} for metric in metrics]
    _write(rows, Path(out or f"results/table{table}"))


def _sequence(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _value(measured: Row, metric: str) -> Row:
    low, high = measured["intervals"][metric] or (None, None)
    return {"metric": metric, "value": measured[metric], "low": low, "high": high}


def _run(data_set: str, fine_tune: bool, overrides: Row) -> tuple[str, Row]:
    """Train once in a folder of its own; returns the kind of data and the content of metrics.json."""
    configs = Path("bundles") / BUNDLES[data_set] / "configs"
    files = [configs / "train.json", *([configs / "fine_tune.json"] if fine_tune else [])]
    real = bool(os.environ.get("UNIMEDI_DATA")) and Path(os.environ["UNIMEDI_DATA"], data_set).is_dir()
    if real:
        files.append(configs / f"{data_set}.json")
        overrides = {key: value for key, value in overrides.items() if key != "phantoms"}
    else:
        overlay = ConfigParser.load_config_file(str(configs / f"{data_set}.json"))
        default = ConfigParser.load_config_file(str(configs / "train.json"))
        if overlay["data_set"] != default["data_set"]:
            overrides = {**{key: overlay[key] for key in DATA_KEYS if key in overlay}, **overrides}
    with tempfile.TemporaryDirectory() as folder:
        places = {"ckpt_dir": f"{folder}/models", "output_dir": f"{folder}/eval"}
        run = ConfigWorkflow(
            [str(file) for file in files], workflow_type="train", logging_file=False, **{**overrides, **places}
        )
        run.initialize()
        run.run()
        run.finalize()
        monai.utils.set_determinism(None)
        return "real" if real else "phantom", json.loads(Path(folder, "eval", "metrics.json").read_text())


def _write(rows: list[Row], path: Path) -> None:
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
    print("\n".join(lines))


def _line(row: Row) -> tuple[str, str, str, str]:
    return f"{row['data_set']} ({row['data']})", row["training"], row["metric"], row["encoder"]


def _cell(rows: list[Row]) -> str:
    values = [row["value"] for row in rows if row["value"] is not None]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


if __name__ == "__main__":
    fire.Fire(classification)
