# SPDX-License-Identifier: Apache-2.0
"""The linear probe on real labelled X-rays, from their table to metrics with intervals.

Set UNIMEDI_REAL_DATA to a folder with `xray_nih/nih.csv`, columns image, labels and patient.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.common import REPOSITORY, SPLITS, read, rows, run_bundle
from unimedi_components.__main__ import main

CONFIG = REPOSITORY / "bundles" / "chest_xray_classification" / "configs" / "train.json"
REAL = os.environ.get("UNIMEDI_REAL_DATA", "")
TABLE = Path(REAL, "xray_nih", "nih.csv")
FINDINGS = ["Atelectasis", "Cardiomegaly", "Consolidation", "Effusion", "Nodule"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REAL or not TABLE.is_file(), reason="UNIMEDI_REAL_DATA does not name xray_nih/nih.csv"),
]


@pytest.mark.usefixtures("in_process")
def test_probe_on_real_xrays(tmp_path: Path) -> None:
    options = ["--label_column", "labels", "--task", "multilabel", "--label_names", ",".join(FINDINGS)]
    main(["prepare", "table", str(TABLE), str(tmp_path / "nih.json"), *options, "--test_fraction", "0.3"])
    datalist = read(tmp_path / "nih.json")
    labelled = {row["image"]: row["labels"].split("|") for row in rows(TABLE)}
    items = [item for split in SPLITS for item in datalist[split]]
    assert {item["image"]: item["label"] for item in items} == {
        image: [int(name in labels) for name in FINDINGS] for image, labels in labelled.items()
    }
    folders = {"cache_dir": "cache", "ckpt_dir": "models", "output_dir": "eval", "datalist_file": "nih.json"}
    changes: dict[str, Any] = {key: str(tmp_path / name) for key, name in folders.items()}
    changes |= {"dataset_dir": str(TABLE.parent), "label_names": FINDINGS, "encoder_weights": "none", "epochs": 3}
    run_bundle(CONFIG, "train", device="cpu", **changes, **{"evaluation#bootstrap": 200})
    metrics = read(tmp_path / "eval" / "metrics.json")
    assert metrics["split"] == "test" and metrics["skipped_files"] == 0
    assert metrics["cases"] == len(datalist["test"]) == round(0.3 * len(labelled))
    positives = {name: sum(item["label"][i] for item in datalist["test"]) for i, name in enumerate(FINDINGS)}
    assert metrics["positives"] == positives
    low, high = metrics["intervals"]["macro_auroc"]
    assert 0 <= low <= metrics["macro_auroc"] <= high <= 1
    for name in ("cases.csv", "roc.png", "confusion.png", "loss_curves.png"):
        assert (tmp_path / "eval" / name).stat().st_size > 0
