# SPDX-License-Identifier: Apache-2.0
"""What tests of several folders share."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.common import REPOSITORY, process_kept, torch_switches

TORCH_AT_START = torch_switches()
REAL_TABLES = ("xray_text/xray_text.csv", "ct3d/ct3d.csv")


@pytest.fixture(scope="session")
def real_root() -> Path:
    """UNIMEDI_REAL_DATA, where it holds real X-rays and CTs with tables of their texts."""
    root = os.environ.get("UNIMEDI_REAL_DATA", "")
    if not root or not all((Path(root) / table).is_file() for table in REAL_TABLES):
        pytest.skip(f"UNIMEDI_REAL_DATA does not name a folder with {' and '.join(REAL_TABLES)}")
    return Path(root)


@pytest.fixture(autouse=True)
def torch_as_at_start() -> Iterator[None]:
    """Puts torch's switches back after every test: fixtures of a module run workflows before `in_process` looks."""
    yield
    for switch in TORCH_AT_START:
        switch()


@pytest.fixture
def in_process() -> Iterator[None]:
    """For runs within the test's own process."""
    with process_kept():
        yield


@pytest.fixture(scope="session")
def real_datalist(real_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`prepare table` on both tables."""
    from unimedi_components.__main__ import main

    out = tmp_path_factory.mktemp("real") / "own.json"
    main(["prepare", "table", ",".join(str(real_root / table) for table in REAL_TABLES), str(out)])
    return out


@pytest.fixture(scope="session")
def untrained_bundle() -> Callable[..., Path]:
    """Copy a classification bundle into a folder and give it random weights of the sizes that its train.json names."""
    from monai.bundle import ConfigParser

    from unimedi_components.data import write_json
    from unimedi_components.networks import ImageClassifier, UnifiedViT, network_card

    def make(name: str, folder: Path, seed: int = 0) -> Path:
        source, bundle = REPOSITORY / "bundles" / name, folder / name
        shutil.copytree(source / "configs", bundle / "configs")
        train: dict[str, Any] = json.loads((source / "configs" / "train.json").read_text())
        films = train["preprocessing"].get("xray")
        dim, size = (2, films["size"]) if films else (3, train["vol_size"])
        sizes = {"patch_size_3d": (4, 12, 12), "vol_size": size} if dim == 3 else {"vol_size": (8, 32, 32)}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            sizes |= {"embed_dim": 32, "depth": 2, "num_heads": 2}
            encoder = UnifiedViT(64 if dim == 3 else size, **sizes)
            network = ImageClassifier(encoder, len(train["label_names"]), dim, feature_norm=True)
            nn.init.normal_(network.head.weight, std=2.0)
        preprocessing = ConfigParser(train).get_parsed_content("preprocessing")
        write_json({**train, "size": sizes}, bundle / "configs" / "train.json")
        (bundle / "models").mkdir()
        torch.save(network.state_dict(), bundle / "models" / "model.pt")
        card = network_card(network, train["task"], train["label_names"], preprocessing)
        write_json(card, bundle / "models" / "model.json")
        return bundle

    return make
