# SPDX-License-Identifier: Apache-2.0
"""Real images that this project did not make, from the table to the figures: the README's example of own data.

Set UNIMEDI_REAL_DATA to a folder with `xray_text/xray_text.csv` and `ct3d/ct3d.csv`, each with columns image, report
and patient.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image

from tests.common import REPOSITORY, SPLITS, process_kept, run_bundle
from unimedi_components.networks.pretrained import load_pretrained

CONFIG = REPOSITORY / "bundles" / "pretrain" / "configs" / "train.json"
EPOCHS = 2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(real_root: Path, real_datalist: Path) -> Iterator[ConfigWorkflow]:
    """Two epochs with the README's overrides."""
    folder = real_datalist.parent / "run"
    folders = {"cache_dir": folder / "cache", "ckpt_dir": folder / "models", "output_dir": folder / "eval"}
    overrides = {"datalist": real_datalist, "dataset_dir": real_root, **folders}
    words = {**{name: str(place) for name, place in overrides.items()}, "epochs": EPOCHS, "device": "cpu"}
    with process_kept():
        yield run_bundle(CONFIG, "train", **words)


def rows(table: Path) -> list[dict[str, str]]:
    with open(table, newline="", encoding="utf-8-sig") as stream:
        return list(csv.DictReader(stream))


def test_every_row_is_kept_and_no_patient_crosses_splits(real_root: Path, real_datalist: Path) -> None:
    content = json.loads(real_datalist.read_text())
    items = [(split, item) for split in SPLITS for item in content[split]]
    dropped = sum(content["meta"]["dropped"].values())
    xrays, volumes = (rows(real_root / folder / f"{folder}.csv") for folder in ("xray_text", "ct3d"))
    assert len(items) + dropped == len(xrays) + len(volumes) == 184
    assert content["meta"]["dropped"] == {}
    counts = Counter((split, item["dim"]) for split, item in items)
    assert {dim: sum(n for (_, own), n in counts.items() if own == dim) for dim in (2, 3)} == {2: 173, 3: 11}
    # a tenth of the X-ray and of the CT patients each, at least one
    assert all(counts[split, dim] >= 1 for split in ("validation", "test") for dim in (2, 3))
    assert counts["training", 2] >= 0.75 * 173 and counts["training", 3] == 9
    patient_of = {row["patient"] for row in xrays} | {row["patient"] for row in volumes}
    splits: dict[str, set[str]] = {}
    for split, item in items:
        splits.setdefault(item["patient"], set()).add(split)
        assert (real_root / item["image"]).is_file() and len(item["report"].split()) >= 3
    assert splits.keys() == patient_of and all(len(own) == 1 for own in splits.values())


def test_two_epochs_of_pre_training_learn(run: Any) -> None:
    history = run.parser.get_parsed_content("train#run").history.rows
    steps = len(run.parser.get_parsed_content("train#dataloader"))
    assert len(history) == EPOCHS * steps and history[-1]["epoch"] == EPOCHS
    assert all(np.isfinite(row[name]) for row in history for name in ("loss", "vl", "icl", "pcl"))
    for name in ("loss", "vl"):
        first, last = (np.mean([row[name] for row in history if row["epoch"] == e]) for e in (1, EPOCHS))
        assert last < first, name
    assert all(0 <= row["val_recall_at_5"] <= 1 for row in history if row["iteration"] % steps == 0)
    assert run.parser.get_parsed_content("train#dataset").skipped == []


def test_what_the_run_leaves(run: Any, real_datalist: Path) -> None:
    out, models = real_datalist.parent / "run" / "eval", real_datalist.parent / "run" / "models"
    metrics = json.loads((out / "metrics.json").read_text())
    content = json.loads(real_datalist.read_text())
    assert metrics["split"] == "test"
    tested = Counter(item["dim"] for item in content["test"])
    assert (metrics["studies_2d"], metrics["studies_3d"]) == (tested[2], tested[3])
    assert 0 <= metrics["report_recall_at_5"] <= 1 and "slice_precision" not in metrics
    for name in ("loss_curves.png", "slice_selection.png", "xray_attention.png"):
        with Image.open(out / name) as image:
            pixels = np.asarray(image.convert("L"))
        assert pixels.shape[1] == 1200 and pixels.std() > 20, name
    loaded = load_pretrained(models / "model.pt")
    assert loaded.card["preprocessing"]["ct"]["window"] == [-1000, 1000]
    item = next(i for i, own in enumerate(content["validation"]) if own["dim"] == 3)
    volume = run.parser.get_parsed_content("validate#dataset")[item]["image"]
    assert volume.shape == (1, 32, 48, 48) and float(volume.min()) >= -1 and float(volume.max()) <= 1
    with torch.no_grad():
        features = loaded.network.encode_image(volume[None])
    assert torch.isfinite(features.cls).all() and features.selected is not None and features.selected.shape == (1, 2)
