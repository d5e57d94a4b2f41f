# SPDX-License-Identifier: Apache-2.0
"""The linear probe on real labelled X-rays, from their table to metrics with intervals.

Set UNIMEDI_REAL_DATA to a folder with `xray_nih/nih.csv`, columns image, labels and patient.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import monai
import pytest
import torch
from monai.bundle import ConfigWorkflow

from unimedi_components.__main__ import main

CONFIG = Path(__file__).resolve().parents[1] / "bundles" / "chest_xray_classification" / "configs" / "train.json"
REAL = os.environ.get("UNIMEDI_REAL_DATA", "")
TABLE = Path(REAL, "xray_nih", "nih.csv")
FINDINGS = ["Atelectasis", "Cardiomegaly", "Consolidation", "Effusion", "Nodule"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REAL or not TABLE.is_file(), reason="UNIMEDI_REAL_DATA does not name xray_nih/nih.csv"),
]


def test_probe_on_real_xrays(tmp_path: Path) -> None:
    options = ["--label_column", "labels", "--task", "multilabel", "--label_names", ",".join(FINDINGS)]
    main(["prepare", "table", str(TABLE), str(tmp_path / "nih.json"), *options, "--test_fraction", "0.3"])
    datalist = json.loads((tmp_path / "nih.json").read_text())
    with open(TABLE, newline="", encoding="utf-8") as stream:
        rows = {row["image"]: row["labels"].split("|") for row in csv.DictReader(stream)}
    items = [item for split in ("training", "validation", "test") for item in datalist[split]]
    assert {item["image"]: item["label"] for item in items} == {
        image: [int(name in labels) for name in FINDINGS] for image, labels in rows.items()
    }
    flash = torch.backends.cuda.flash_sdp_enabled()
    run = ConfigWorkflow(
        str(CONFIG),
        workflow_type="train",
        logging_file=False,
        datalist_file=str(tmp_path / "nih.json"),
        dataset_dir=str(TABLE.parent),
        label_names=FINDINGS,
        encoder_weights="none",
        cache_dir=str(tmp_path / "cache"),
        ckpt_dir=str(tmp_path / "models"),
        output_dir=str(tmp_path / "eval"),
        epochs=3,
        device="cpu",
        **{"evaluation#bootstrap": 200},
    )
    run.initialize()
    run.run()
    run.finalize()
    monai.utils.set_determinism(None)
    torch.backends.cuda.enable_flash_sdp(flash)
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["split"] == "test" and metrics["skipped_files"] == 0
    assert metrics["cases"] == len(datalist["test"]) == round(0.3 * len(rows))
    positives = {name: sum(item["label"][i] for item in datalist["test"]) for i, name in enumerate(FINDINGS)}
    assert metrics["positives"] == positives
    low, high = metrics["intervals"]["macro_auroc"]
    assert 0 <= low <= metrics["macro_auroc"] <= high <= 1
    for name in ("cases.csv", "roc.png", "confusion.png", "loss_curves.png"):
        assert (tmp_path / "eval" / name).stat().st_size > 0
