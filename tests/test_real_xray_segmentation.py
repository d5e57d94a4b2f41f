# SPDX-License-Identifier: Apache-2.0
"""X-ray segmentation on real films: the lungs of one learned by heart, and masks of real files in their own pixels.

Set UNIMEDI_REAL_DATA to a folder with `xray_text/xray_text.csv`, columns image and lung_mask.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import monai
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image, ImageOps

CONFIGS = Path(__file__).resolve().parents[1] / "bundles" / "chest_xray_segmentation" / "configs"
REAL = os.environ.get("UNIMEDI_REAL_DATA", "")
TABLE = Path(REAL, "xray_text", "xray_text.csv")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REAL or not TABLE.is_file(), reason="UNIMEDI_REAL_DATA does not name xray_text"),
]


def run(config: str, kind: str, **overrides: Any) -> None:
    flash = torch.backends.cuda.flash_sdp_enabled()
    made = ConfigWorkflow(str(CONFIGS / f"{config}.json"), workflow_type=kind, logging_file=False, **overrides)
    made.initialize()
    made.run()
    made.finalize()
    monai.utils.set_determinism(None)
    torch.backends.cuda.enable_flash_sdp(flash)


def test_lungs_of_one_film_and_masks_of_others(tmp_path: Path) -> None:
    with open(TABLE, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    row = next(row for row in rows if row["lung_mask"])
    item = {"id": "film", "dim": 2, "image": row["image"], "mask": row["lung_mask"]}
    lists: dict[str, Any] = {"validation": [{**item, "patient": "b"}], "test": [{**item, "patient": "c"}]}
    lists["training"] = [{**item, "id": f"film{i}", "patient": "a"} for i in range(4)]
    for split in ("validation", "test"):
        lists[split][0]["id"] = split
    lists["meta"] = {"task": "segmentation", "label_names": ["background", "lungs"]}
    (tmp_path / "films.json").write_text(json.dumps(lists))
    run(
        "train",
        "train",
        datalist_file=str(tmp_path / "films.json"),
        dataset_dir=str(TABLE.parent),
        label_names=["background", "lungs"],
        encoder_weights="none",
        cache_dir=str(tmp_path / "cache"),
        ckpt_dir=str(tmp_path / "models"),
        output_dir=str(tmp_path / "eval"),
        epochs=150,
        device="cpu",
        **{"preprocessing#film#size": 80, "network_def#widths": [64, 32, 16, 8], "optimizer#lr": 2e-3},
        **{"train#run#patience": "$None", "train#dataloader#batch_size": 4, "train#augment#prob": 0.0},
        **{"evaluation#bootstrap": 0},
    )
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text())["dice"] > 0.9
    others = [str(TABLE.parent / other["image"]) for other in rows[:4]]
    run(
        "inference",
        "inference",
        inputs=[str(TABLE.parent / row["image"]), *others],
        checkpoint=str(tmp_path / "models" / "model.pt"),
        output_dir=str(tmp_path / "out"),
        device="cpu",
    )
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert not found["skipped"]
    for entry in found["predictions"]:
        with Image.open(entry["source"]) as image, Image.open(entry["mask"]) as mask:
            assert mask.size == ImageOps.exif_transpose(image).size
    own = next(entry for entry in found["predictions"] if entry["source"].endswith(row["image"]))
    mask, truth = (np.asarray(Image.open(path)) > 0 for path in (own["mask"], TABLE.parent / row["lung_mask"]))
    # in the file's pixels, 512 to a side where the network has 80
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.9
