# SPDX-License-Identifier: Apache-2.0
"""X-ray segmentation on real films: the lungs of one learned by heart, and masks of real files in their own pixels.

Set UNIMEDI_REAL_DATA to a folder with `xray_text/xray_text.csv`, columns image and lung_mask.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.common import REPOSITORY, rows, run_bundle

CONFIGS = REPOSITORY / "bundles" / "chest_xray_segmentation" / "configs"
REAL = os.environ.get("UNIMEDI_REAL_DATA", "")
TABLE = Path(REAL, "xray_text", "xray_text.csv")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("in_process"),
    pytest.mark.skipif(not REAL or not TABLE.is_file(), reason="UNIMEDI_REAL_DATA does not name xray_text"),
]


def test_lungs_of_one_film_and_masks_of_others(tmp_path: Path) -> None:
    films = rows(TABLE)
    row = next(row for row in films if row["lung_mask"])
    item = {"id": "film", "dim": 2, "image": row["image"], "mask": row["lung_mask"]}
    lists: dict[str, Any] = {"validation": [{**item, "patient": "b"}], "test": [{**item, "patient": "c"}]}
    lists["training"] = [{**item, "id": f"film{i}", "patient": "a"} for i in range(4)]
    for split in ("validation", "test"):
        lists[split][0]["id"] = split
    lists["meta"] = {"task": "segmentation", "label_names": ["background", "lungs"]}
    (tmp_path / "films.json").write_text(json.dumps(lists))
    folders = {"cache_dir": "cache", "ckpt_dir": "models", "output_dir": "eval", "datalist_file": "films.json"}
    changes: dict[str, Any] = {key: str(tmp_path / name) for key, name in folders.items()}
    changes |= {"dataset_dir": str(TABLE.parent), "label_names": ["background", "lungs"], "encoder_weights": "none"}
    run_bundle(
        CONFIGS / "train.json",
        "train",
        epochs=150,
        device="cpu",
        **changes,
        **{"preprocessing#film#size": 80, "network_def#widths": [64, 32, 16, 8], "optimizer#lr": 2e-3},
        **{"train#run#patience": "$None", "train#dataloader#batch_size": 4, "train#augment#prob": 0.0},
        **{"evaluation#bootstrap": 0},
    )
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text())["dice"] > 0.9
    others = [str(TABLE.parent / other["image"]) for other in films[:4]]
    run_bundle(
        CONFIGS / "inference.json",
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
