# SPDX-License-Identifier: Apache-2.0
"""Table 7 and Fig. 2(b) on phantoms: pre-train each variant with one budget and measure it on the same new phantoms.

Run from the repository's root: `python -m benchmarks.ablation --epochs 3 --out results/table7`. Writes `OUT.csv` and
`OUT.md`; each variant's run stays below `results/ablation/`, and a finished one is not repeated.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import fire

from unimedi_components.evaluation.evaluate import evaluate

CONFIG = "bundles/pretrain/configs/train.json"
NORM = ("--network_def#image_projection#norm", "batch", "--network_def#text_projection#norm", "batch")
VARIANTS: dict[str, tuple[str, ...]] = {
    "VL": ("--network_def#self_distillation", "False", "--network_def#selector", "random"),
    "VL + SD": ("--network_def#selector", "random"),
    "VL + SD + Attn (default)": (),
    "joint, no pseudo-pairs": ("--network_def#pseudo_pairs", "False"),
    "2D only": ("--dims", "[2]"),
    "3D only": ("--dims", "[3]"),
    "joint batch statistics": NORM,
}
COLUMNS = ("probe_auroc_2d", "probe_auroc_3d", "slice_precision", "slice_precision_chance", "report_recall_at_5")


def ablation(
    epochs: int = 3, patients: int = 200, seed: int = 1000, out: str = "results/table7", variants: str | None = None
) -> None:
    """Train and evaluate the variants.

    Args:
        epochs: of each variant.
        patients: new phantoms per dimension.
        seed: of the new phantoms.
        out: path of the table without its ending.
        variants: names of `VARIANTS`, separated by a semicolon; None runs all.
    """
    chosen = list(VARIANTS) if variants is None else [name.strip() for name in variants.split(";")]
    unknown = [name for name in chosen if name not in VARIANTS]
    if unknown:
        raise SystemExit(f"unknown variant {unknown[0]!r}; choose from: {'; '.join(VARIANTS)}")
    rows = [{"variant": name, **_measure(name, epochs, patients, seed)} for name in chosen]
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ("variant", *COLUMNS))
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| variant | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    lines += ["| " + " | ".join([str(row["variant"]), *(_cell(row[c]) for c in COLUMNS)]) + " |" for row in rows]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "-"


def _measure(name: str, epochs: int, patients: int, seed: int) -> dict[str, float | None]:
    slug = "".join(c if c.isalnum() else "_" for c in name)
    folder = Path("results/ablation") / f"{slug}_{epochs}_epochs"
    result = folder / f"evaluation_{patients}_{seed}.json"
    if not result.is_file():
        places = ["--ckpt_dir", str(folder / "models"), "--output_dir", str(folder / "eval"), "--epochs", str(epochs)]
        command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", CONFIG, *places, *VARIANTS[name]]
        subprocess.run(command, check=True)
        evaluate(str(folder / "models/model.pt"), patients=patients, seed=seed, json=str(result))
    values = json.loads(result.read_text(encoding="utf-8"))
    return {column: values[column] for column in COLUMNS}


if __name__ == "__main__":
    fire.Fire(ablation)
