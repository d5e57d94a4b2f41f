# SPDX-License-Identifier: Apache-2.0
"""The README's Python examples run as they stand, in a folder with weights and images where they expect them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from unimedi_components.retrieval import Hit, load_prompts

README = Path(__file__).resolve().parents[2] / "README.md"


def blocks(heading: str) -> list[str]:
    section = README.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


@pytest.fixture
def workplace(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained.models, tmp_path / "bundles" / "pretrain" / "models")
    (tmp_path / "scans").mkdir()
    for seed in range(2):
        voxels = np.random.default_rng(seed).normal(-600, 300, (30, 28, 17)).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, np.diag([2, 2, 4, 1])), tmp_path / "scans" / f"scan{seed}.nii.gz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_embedding_search_and_zero_shot(workplace: Path, capsys: Any) -> None:
    search, zero_shot = blocks("Embed your own files")
    names: dict[str, Any] = {"Hit": Hit}
    exec(search, names)
    (hits,) = eval(capsys.readouterr().out, names)
    scores = names["images"].embed @ names["sentence"][3][0]
    assert [hit.entry["id"] for hit in hits] == [names["images"].ids[i] for i in np.argsort(-scores)]
    np.testing.assert_allclose([hit.score for hit in hits], -np.sort(-scores), atol=1e-6)
    assert len(zero_shot.strip().splitlines()) <= 5
    names = {}
    exec(zero_shot, names)
    assert len(names["ids"]) == 2 and names["probabilities"].shape == (2, len(load_prompts("chest_ct").findings))
    assert names["probabilities"].min() > 0 and names["probabilities"].max() < 1


def test_the_encoder(workplace: Path, capsys: Any) -> None:
    (example,) = blocks("Use the encoder")
    exec(example, {})
    ct, attention, xray = re.findall(r"torch\.Size\(\[([\d, ]+)\]\)", capsys.readouterr().out)
    assert ct == xray and attention.split(", ")[0] == "1"
