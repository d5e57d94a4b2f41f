# SPDX-License-Identifier: Apache-2.0
"""The ablation: every variant of the method with every seed, trained, evaluated and probed with few labels.

Run from the repository's root: `python -m benchmarks.experiment run --size small` (`make experiment`). Each variant and
seed is a cell in a folder of its own below `results/experiment/SIZE`. A finished cell is not run again while config,
seed, measurement and phantoms are the same, and one that was interrupted goes on from its last epoch.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fire
import torch

from benchmarks.cells import RESULT, finished, held_out, read_json, training_datalist
from unimedi_components.data.datalist import write_json
from unimedi_components.provenance import provenance
from unimedi_components.report.statistics import summarise

SEEDS = (0, 1, 2)
SUMMARY = "experiment.json"
PUBLISHED = Path("results/published")
Json = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One row of the ablation.

    Args:
        title: for tables and figures.
        overrides: of the pre-training config.
        overlays: config files of the pretrain bundle over `train.json`.
        kind: "train", "untrained" (the network as its seed makes it) or "pixels" (the images themselves).
    """

    title: str
    overrides: Json = field(default_factory=dict)
    overlays: tuple[str, ...] = ()
    kind: str = "train"


RANDOM = {"network_def#selector": "random"}
VARIANTS: dict[str, Variant] = {
    "ours": Variant("+ attentive slices (ours)"),
    "vl": Variant("VL, random slices", {"network_def#self_distillation": False, **RANDOM}),
    "vl_sd": Variant("+ self-distillation, random slices", RANDOM),
    "joint": Variant("joint, no pseudo-pairs", {"network_def#pseudo_pairs": False}),
    "literal": Variant("the paper's literal reading", overlays=("literal",)),
    "2d_only": Variant("X-rays only", {"dims": [2]}),
    "3d_only": Variant("CT only", {"dims": [3]}),
    "untrained": Variant("untrained network", kind="untrained"),
    "pixels": Variant("pixels and voxels", kind="pixels"),
}
#: Epochs, and whether Table 7's own data sets are probed, by size.
SIZES: dict[str, Json] = {"small": {"epochs": 3, "data_sets": False}, "full": {"epochs": None, "data_sets": True}}
PROGRAM = (sys.executable, "-m", "benchmarks.cells")
# seconds of one epoch and of measuring, on one thread: only a first guess of the end, scaled by what is measured
_EPOCH_S, _MEASURE_S, _DATA_SETS_S = 60, 90, 600
_SHOW_EVERY_S = 60
_EPOCH = re.compile(r"epoch (\d+)/(\d+)")


def run(
    size: str = "small",
    epochs: int | None = None,
    seeds: Sequence[int] | int = SEEDS,
    variants: str | Sequence[str] | None = None,
    patients: int = 200,
    pool: int = 1000,
    eval_seed: int = 1000,
    pool_seed: int = 2000,
    workers: int | None = None,
    out: str = "results/experiment",
    page: bool = True,
    table: str | None = None,
    **overrides: Any,
) -> None:
    """Run all cells that are not finished, summarise them, and draw the page.

    Args:
        size: "small" or "full"; full takes the config's epochs and probes Table 7's data sets too.
        epochs: of each training, instead of the size's.
        seeds: of training.
        variants: names of `VARIANTS`; None for all.
        patients: held-out phantoms per dimension.
        pool: further phantoms per dimension, whose labels the probes with few labels are trained on.
        eval_seed: of the held-out phantoms.
        pool_seed: of the further ones.
        workers: cells at a time; by default one per core, and one on a GPU.
        out: folder; the experiment goes to OUT/SIZE.
        page: draw the page at the end.
        table: path without its ending, for the chosen variants alone as `.csv` and `.md`.
        overrides: further overrides of every training, such as `--train#sampler#batch_2d 16`.
    """
    folder = Path(out) / _known(size, SIZES, "size")
    count = workers or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    chosen = list(VARIANTS) if variants is None else _names(variants)
    settings = {**SIZES[size], "patients": patients, "pool": pool, "eval_seed": eval_seed, "pool_seed": pool_seed}
    settings["epochs"] = epochs or settings["epochs"] or _default_epochs()
    settings |= {"seeds": list(_sequence(seeds)), "overrides": overrides, "phantoms": str(folder / "phantoms")}
    cells = [_cell(name, seed, folder, settings) for seed in settings["seeds"] for name in chosen]
    pending = [cell for cell in cells if not finished(cell)]
    print(f"{len(cells)} cells, {len(cells) - len(pending)} finished, {count} at a time", flush=True)
    if pending:
        _prepare(pending, settings)
    failed = Pool(pending, count).run()
    # also of variants that this call did not ask for
    every = [_cell(name, seed, folder, settings) for seed in settings["seeds"] for name in VARIANTS]
    summary = summarised(every, size, settings)
    write_json(summary, folder / SUMMARY)
    write_table(summary, folder / "experiment.csv")
    print(shown(summary))
    if table:
        own = {name: measures for name, measures in summary["variants"].items() if name in chosen}
        Path(table).parent.mkdir(parents=True, exist_ok=True)
        write_table({"variants": own}, Path(table).with_suffix(".csv"))
        Path(table).with_suffix(".md").write_text(shown({"variants": own}) + "\n", encoding="utf-8")
    if page:
        from unimedi_components.report.page import report

        report([str(folder)], str(folder / "page"), tables="results")
    if failed:
        raise SystemExit(f"{len(failed)} cells failed: {', '.join(failed)}; see log.txt in their folders")


def publish(size: str = "small", out: str = "results/experiment", tables: str = "results") -> None:
    """Copy the experiment's numbers and those of the tables that are there to `results/published`.

    Args:
        size: of the experiment.
        out: folder that it ran in.
        tables: folder of `make tableN`.
    """
    source = Path(out) / _known(size, SIZES, "size")
    if not (source / SUMMARY).is_file():
        raise SystemExit(f"{source / SUMMARY} is not there; run 'make experiment EXPERIMENT={size}' first")
    PUBLISHED.mkdir(parents=True, exist_ok=True)
    copies = {source / SUMMARY: f"experiment_{size}.json", source / "experiment.csv": f"experiment_{size}.csv"}
    copies |= {
        path: path.name for path in sorted(Path(tables).glob("table[1-9].*")) if path.suffix in (".csv", ".json")
    }
    for path, name in copies.items():
        (PUBLISHED / name).write_bytes(path.read_bytes())
        print(PUBLISHED / name)


def _known(name: str, names: Iterable[str], what: str) -> str:
    if name not in names:
        raise SystemExit(f"unknown {what} {name!r}; choose from: {', '.join(names)}")
    return name


def _sequence(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _names(variants: str | Sequence[str]) -> list[str]:
    words = variants.split(",") if isinstance(variants, str) else _sequence(variants)
    return [_known(str(word).strip(), VARIANTS, "variant") for word in words]


def _default_epochs() -> int:
    return int(json.loads(Path("bundles/pretrain/configs/train.json").read_text(encoding="utf-8"))["epochs"])


def _cell(name: str, seed: int, folder: Path, settings: Json) -> Json:
    variant = VARIANTS[name]
    about = {"title": variant.title, "kind": variant.kind, "overrides": variant.overrides}
    about |= {"overlays": list(variant.overlays), "settings": settings}
    return {"variant": name, "seed": seed, "folder": str(folder / name / str(seed)), **about}


def _prepare(pending: Sequence[Json], settings: Json) -> None:
    """Write all phantoms first, with all cores, so that cells side by side find them there."""
    training_datalist(pending[0])
    for seed, patients in ((settings["eval_seed"], "patients"), (settings["pool_seed"], "pool")):
        for dim in (2, 3):
            held_out(pending[0], dim, seed, settings[patients])


class Pool:
    """Cells as processes, some at a time, with a line about each end and the expected end of all.

    Args:
        pending: cells to run, in order.
        count: processes at a time.
        program: what runs a cell, given the path of its description.
    """

    def __init__(self, pending: Sequence[Json], count: int, program: Sequence[str] = PROGRAM) -> None:
        self.program = list(program)
        self.waiting, self.count, self.total = list(pending), count, len(pending)
        self.running: list[tuple[subprocess.Popen[bytes], Json, float]] = []
        self.guessed = self.measured = 0.0
        self.failed: list[str] = []

    def run(self) -> list[str]:
        """Run all; returns the names of those that failed. An interruption ends the processes too."""
        handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
        shown_at = time.monotonic()
        try:
            while self.waiting or self.running:
                while self.waiting and len(self.running) < self.count:
                    self._start(self.waiting.pop(0))
                time.sleep(0.2)
                ended = [part for part in self.running if part[0].poll() is not None]
                for part in ended:
                    self._end(*part)
                if ended or time.monotonic() - shown_at > _SHOW_EVERY_S:
                    shown_at = time.monotonic()
                    print(self._status(), flush=True)
        finally:
            for process, _, _ in self.running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                process.wait()
            signal.signal(signal.SIGTERM, handler)
        return self.failed

    def _start(self, cell: Json) -> None:
        folder = Path(cell["folder"])
        spec = write_json(cell, folder / "cell.json")
        threads = str(max(1, (os.cpu_count() or 1) // self.count))
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        with open(folder / "log.txt", "ab") as log:
            process = subprocess.Popen(
                [*self.program, str(spec)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self.running.append((process, cell, time.monotonic()))

    def _end(self, process: subprocess.Popen[bytes], cell: Json, started: float) -> None:
        self.running = [part for part in self.running if part[0] is not process]
        result = read_json(Path(cell["folder"], RESULT))
        name = f"{cell['variant']}/{cell['seed']}"
        seconds = time.monotonic() - started
        if process.returncode or not result:
            self.failed.append(name)
            print(f"{name} failed after {seconds:.0f} s: {_last_line(cell)}", flush=True)
            return
        self.guessed, self.measured = self.guessed + _guess(cell), self.measured + seconds
        values = (f"{key} {_cell_text(result['measures'].get(key))}" for key in ("probe_auroc_2d", "probe_auroc_3d"))
        print(f"{name} finished in {seconds:.0f} s: {', '.join(values)}", flush=True)

    def _status(self) -> str:
        done = self.total - len(self.waiting) - len(self.running)
        scale = self.measured / self.guessed if self.guessed else 1.0
        now = time.monotonic()
        left = sum(_guess(cell) for cell in self.waiting) * scale
        left += sum(max(0.0, _guess(cell) * scale - (now - started)) for _, cell, started in self.running)
        left /= self.count
        end = time.strftime("%H:%M", time.localtime(time.time() + left))
        busy = ", ".join(f"{cell['variant']}/{cell['seed']}{_epoch(cell)}" for _, cell, _ in self.running)
        return f"[{done}/{self.total}] expected end {end}, in {left / 60:.0f} min; running: {busy or 'none'}"


def _guess(cell: Json) -> float:
    if cell["kind"] != "train":
        return _MEASURE_S
    settings = cell["settings"]
    return settings["epochs"] * _EPOCH_S + _MEASURE_S + settings["data_sets"] * _DATA_SETS_S


def _tail(cell: Json) -> str:
    with open(Path(cell["folder"], "log.txt"), "rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 4000))
        return stream.read().decode("utf-8", "replace")


def _epoch(cell: Json) -> str:
    seen = _EPOCH.findall(_tail(cell))
    return f" (epoch {seen[-1][0]} of {seen[-1][1]})" if seen else ""


def _last_line(cell: Json) -> str:
    lines = [line.strip() for line in _tail(cell).splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def summarised(cells: Sequence[Json], size: str, settings: Json) -> Json:
    """The experiment's numbers: each finished cell, and each variant's mean, deviation and intervals over the seeds.

    Args:
        cells: all cells; unfinished ones are left out.
        size: of the experiment.
        settings: of the measurement.

    Returns:
        what `experiment.json` holds: "size", "settings", "run", "cells" and "variants".
    """
    results = [read_json(Path(cell["folder"], RESULT)) for cell in cells if finished(cell)]
    variants: Json = {}
    for name, variant in VARIANTS.items():
        own = {result["seed"]: result["measures"] for result in results if result["variant"] == name}
        if own:
            keys = sorted({key for values in own.values() for key in values if _summarised(key, values[key])})
            variants[name] = {
                "title": variant.title,
                "seeds": list(own),
                **{key: _over_seeds(own, key) for key in keys},
            }
    kept = {key: value for key, value in settings.items() if key != "phantoms"}
    about = [{key: value for key, value in result.items() if key != "measures"} for result in results]
    return {"size": size, "settings": kept, "run": provenance(), "variants": variants, "cells": about}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _summarised(key: str, value: Any) -> bool:
    """Whether it is a measure: no setting, and not what the untrained variant measures too."""
    settings = ("patients", "seed", "training_phantom_seed")
    return _is_number(value) and key not in settings and not key.endswith("_untrained") and "_strict" not in key


def _over_seeds(own: dict[int, Json], key: str) -> Json:
    values = {seed: float(measures[key]) for seed, measures in own.items() if _is_number(measures.get(key))}
    return summarise(values, [(measures.get("intervals") or {}).get(key) for measures in own.values()])


def write_table(summary: Json, path: Path) -> None:
    """Write the summary as a table: a row per variant and measure."""
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("variant", "measure", "seeds", "mean", "sd", "low", "high", "patients_low", "patients_high"))
        for name, measures in summary["variants"].items():
            for key, found in measures.items():
                if isinstance(found, dict):
                    limits = [*(found["interval"] or (None, None)), *(found["patients"] or (None, None))]
                    writer.writerow((name, key, len(found["values"]), found["mean"], found["sd"], *limits))


def shown(summary: Json) -> str:
    """The main measures as a Markdown table, means and deviations over the seeds."""
    columns = ("probe_auroc_2d", "probe_auroc_3d", "slice_precision", "report_recall_at_5")
    lines = ["| variant | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for measures in summary["variants"].values():
        cells = [measures.get(column) for column in columns]
        texts = ["-" if cell is None else f"{cell['mean']:.3f} ± {cell['sd'] or 0:.3f}" for cell in cells]
        lines.append("| " + " | ".join([measures["title"], *texts]) + " |")
    return "\n".join(lines)


def _cell_text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "-"


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        fire.Fire({"run": run, "publish": publish})
