# SPDX-License-Identifier: Apache-2.0
"""Overlays of a bundle in any order: the same config, or an error that says which to leave out."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser

from unimedi_components import check_config
from unimedi_components.errors import ConfigError

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
# no overlays: what is run by itself, and what describes
ALONE = {"metadata", "inference", "train"}
TWO_SETS = {
    "abdomen_ct_segmentation": [("amos", "bcv")],
    "chest_ct_classification": [
        ("cc_ccii", "luna16"),
        ("cc_ccii", "luna16_candidates"),
        ("luna16", "luna16_candidates"),
    ],
    "chest_xray_classification": [("chexpert", "covidx"), ("chexpert", "rsna"), ("covidx", "rsna")],
    "pretrain": [("mimic_cxr_bimcv", "phantom_224")],
    "report_retrieval": [("chexpert", "mimic_cxr_bimcv")],
}


def bases() -> list[tuple[str, str, list[str]]]:
    """Bundle, its first config and all overlays of that."""
    found = []
    for folder in sorted(BUNDLES.iterdir()):
        names = sorted(path.stem for path in (folder / "configs").glob("*.json"))
        base = "train" if "train" in names else "evaluate"
        found.append((folder.name, base, [name for name in names if name not in ALONE | {base}]))
    return found


PAIRS = [(bundle, base, *pair) for bundle, base, names in bases() for pair in combinations(names, 2)]


def files(bundle: str, *names: str) -> list[Path]:
    return [BUNDLES / bundle / "configs" / f"{name}.json" for name in names]


def test_all_bundles_are_looked_at() -> None:
    assert len(bases()) == 7 and len(PAIRS) >= 40
    assert sum(map(len, TWO_SETS.values())) == 9


@pytest.mark.parametrize(("bundle", "base", "one", "two"), PAIRS)
def test_pairs_commute_or_are_refused(bundle: str, base: str, one: str, two: str) -> None:
    orders = [files(bundle, base, *pair) for pair in ((one, two), (two, one))]
    if (one, two) in TWO_SETS.get(bundle, []):
        for order in orders:
            names = f"{order[1].name} and {order[2].name}"
            with pytest.raises(ConfigError, match=f"{names} are of two data sets .*; give one of them"):
                check_config(order)
        return
    first, second = (check_config(order) for order in orders)
    assert first == second


def epochs(*names: str, bundle: str = "chest_ct_classification", **changes: Any) -> tuple[int, float | None]:
    parser = ConfigParser(check_config(files(bundle, *names), changes))
    return parser.get_parsed_content("epochs"), parser.get_parsed_content("train#run#max_grad_norm")


def test_epochs_and_clip_of_probes_and_fine_tuning() -> None:
    for bundle, real in (("chest_ct_classification", "cc_ccii"), ("chest_xray_classification", "rsna")):
        assert epochs("train", bundle=bundle) == (50, None)
        assert epochs("train", "fine_tune", bundle=bundle) == (12, 3.0)
        assert epochs("train", real, bundle=bundle) == (50, None)
        assert epochs("train", real, "fine_tune", bundle=bundle) == (50, 3.0)
        assert epochs("train", "fine_tune", real, bundle=bundle) == (50, 3.0)
    for order in (("luna16",), ("luna16", "fine_tune"), ("fine_tune", "luna16")):
        assert epochs("train", *order) == (100, None)
    assert epochs("train", "fine_tune", epochs=3) == (3, 3.0)


def test_own_overlays_may_name_other_data(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text('{"dataset_dir": "/data/scans", "datalist_file": "/data/own.json", "epochs": 3}')
    merged = check_config([*files("chest_ct_classification", "train", "cc_ccii"), own])
    assert (merged["dataset_dir"], merged["epochs"]) == ("/data/scans", 3)
