# SPDX-License-Identifier: Apache-2.0
"""An experiment as `make experiment` leaves it, with numbers that a test knows, and a run of a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from unimedi_components.report.page import report
from unimedi_components.report.statistics import summarise

FINDINGS = ("nodule", "consolidation", "cardiomegaly")
ORIGIN = {"command": "python -m monai.bundle run", "commit": "0123456789", "machine": "a CPU", "torch": "2"}
#: Values of seeds 0, 1, 2 at 100% of the labels, X-rays: + SD helps in every seed, attentive slices harm, joint wavers.
VALUES = {
    "ours": (0.70, 0.71, 0.72),
    "vl": (0.60, 0.61, 0.62),
    "vl_sd": (0.80, 0.81, 0.82),
    "joint": (0.50, 0.70, 0.60),
    "2d_only": (0.60, 0.61, 0.62),
    "3d_only": (0.60, 0.61, 0.62),
    "untrained": (0.55, 0.55, 0.55),
}


def fill(folder: Path, count: int = 40) -> Path:
    """Write an experiment whose features have X-rays and CT two apart in each dimension of ours, and ten in others'."""
    rng = np.random.default_rng(0)
    variants: dict[str, Any] = {}
    cells = []
    for name, values in VALUES.items():
        measures: dict[str, Any] = {"title": f"title of {name}", "seeds": [0, 1, 2]}
        for dim in (2, 3):
            for number, share in enumerate(("1pct", "10pct", "100pct")):
                lower = 0.05 * (2 - number)
                measures[f"probe_auroc_{dim}d_{share}"] = summarise({s: v - lower for s, v in enumerate(values)})
            measures[f"probe_auroc_{dim}d"] = summarise(dict(enumerate(values)))
            # of a dimension that was not trained on, nothing is known
            information = 0.1 if name == "vl_sd" or (name, dim) in (("2d_only", 3), ("3d_only", 2)) else 2.0
            measures[f"sd_cls_information_{dim}d"] = summarise({0: information, 1: information, 2: information})
        variants[name] = measures
        for seed in range(3):
            cell = {"variant": name, "seed": seed, "config": ["train.json"], "key": f"hash-{name}-{seed}"}
            cells.append({**cell, **ORIGIN, "measured_at": "0123456789"})
        own = folder / name / "0"
        own.mkdir(parents=True)
        arrays: dict[str, Any] = {"findings": np.asarray(FINDINGS)}
        for dim in (2, 3):
            shift = (2.0 if name == "ours" else 10.0) * (dim == 3)
            labels = rng.integers(0, 2, (count, len(FINDINGS)))
            arrays[f"labels_{dim}d"] = labels.astype(np.int8)
            for part in ("cls", "image_embed", "text_embed"):
                arrays[f"{part}_{dim}d"] = (rng.normal(size=(count, 8)) + shift).astype(np.float16)
        np.savez(own / "features.npz", **arrays)
        if name != "untrained":
            write_run(own / "eval")
    text = "no pleural effusion <b> & heart size is normal " * 4
    row = {"id": "a", "rank": 30, "of": 30, "report": text, "found": text}
    failures = {
        "retrieval": {"2d": [row], "3d": [row]},
        "selection": {"missed": 3, "focal": 9, "findings": {"nodule": 3}},
    }
    (folder / "ours/0/failures.json").write_text(json.dumps(failures))
    draw(folder / "ours/0/missed_lesions.png")
    content = {"size": "small", "settings": {"epochs": 5}, "run": ORIGIN, "variants": variants, "cells": cells}
    (folder / "experiment.json").write_text(json.dumps(content))
    return folder


def draw(path: Path) -> None:
    Image.fromarray(np.full((300, 1200, 3), 90, np.uint8)).save(path)


def write_run(folder: Path) -> None:
    """What a pre-training run leaves in `eval`: figures, event files, metrics."""
    folder.mkdir(parents=True)
    for name in ("slice_selection", "xray_attention", "loss_curves"):
        draw(folder / f"{name}.png")
    with SummaryWriter(str(folder)) as writer:
        for step in range(1, 61):
            for tag in ("loss", "vl", "icl", "pcl"):
                writer.add_scalar(tag, 5 - step / 20, step)
        for epoch in range(1, 6):
            writer.add_scalar("val_recall_at_5", epoch / 10, epoch)
            writer.add_scalar("sd_cls_information_2d", epoch / 2, epoch)
    (folder / "metrics.json").write_text(json.dumps({"report_recall_at_5": 0.25, "sd_cls_information_3d": 0.2}))


@pytest.fixture(scope="session")
def experiment_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("experiment"))


@pytest.fixture(scope="session")
def page_file(experiment_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the experiment, of a plain run and of one table that was measured."""
    root = tmp_path_factory.mktemp("page")
    write_run(root / "pretrain" / "eval")
    lines = ["table,data_set,data,training,encoder,label_fraction,seed,metric,value,low,high"]
    lines += [f"2,cc_ccii,phantom,probe,UniMedI,0.1,{seed},accuracy,{0.8 + seed / 10},0.7,0.9" for seed in (0, 1)]
    lines += ["2,cc_ccii,phantom,elsewhere,UniMedI,0.1,0,accuracy,0.33,,"]
    (root / "tables").mkdir()
    (root / "tables/table2.csv").write_text("\n".join(lines) + "\n")
    (root / "tables/table2.json").write_text(json.dumps({"command": "make table2", "commit": "abc"}))
    return report([experiment_folder, root / "pretrain"], root / "page", root / "tables")
