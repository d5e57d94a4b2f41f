# SPDX-License-Identifier: Apache-2.0
"""The embed command and `Embedder` over files on disk, against the network called directly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from unimedi_components.__main__ import main
from unimedi_components.data import ct_transforms, xray_transforms
from unimedi_components.data.transforms import ByDimension
from unimedi_components.retrieval import Embedder, EmbeddingIndex, Embeddings


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        Image.fromarray(rng.integers(0, 255, (90, 70), dtype=np.uint8)).save(folder / f"film{number}.png")
    volume = nib.Nifti1Image(rng.normal(-600, 300, (30, 28, 17)).astype(np.float32), np.diag([2, 2, 4, 1]))
    nib.save(volume, folder / "scan.nii.gz")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def test_embed_writes_what_the_network_gives(trained: Any, files: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.npz"
    main(["embed", str(files), "--checkpoint", str(trained.models / "model.pt"), "--out", str(out), "--device", "cpu"])
    shown = capsys.readouterr().out
    assert "2 X-rays and 1 volumes, 1 left out" in shown and "broken.png" in shown
    found = Embeddings.load(out)
    assert (found.ids, found.dims.tolist()) == (["images_film0", "images_film1", "images_scan"], [2, 2, 3]) or (
        [Path(entry["source"]).name for entry in found.entries] == ["film0.png", "film1.png", "scan.nii.gz"]
    )
    assert [Path(record["file"]).name for record in found.skipped] == ["broken.png"]
    embedder = Embedder(trained.models / "model.pt", "cpu")
    assert found.model == embedder.model and found.card == json.loads((trained.models / "model.json").read_text())
    preparation = found.card["preprocessing"]
    chain = ByDimension(xray_transforms(**preparation["xray"]), ct_transforms(**preparation["ct"]))
    for row, entry in enumerate(found.entries):
        image = chain({"id": "a", "dim": entry["dim"], "image": entry["source"]})["image"][None]
        with torch.no_grad():
            direct = embedder.network.encode_image(image)
        np.testing.assert_allclose(found.embed[row], functional.normalize(direct.embed, dim=-1)[0], atol=1e-5)
        np.testing.assert_allclose(found.cls[row], direct.cls[0], atol=1e-5)
        if entry["dim"] == 3:
            np.testing.assert_allclose(found.scores[row], direct.scores[0], atol=1e-6)
            assert found.selected[row].tolist() == direct.selected[0].tolist()
        else:
            assert np.isnan(found.scores[row]).all() and (found.selected[row] == -1).all()


def test_a_film_a_scan_and_a_sentence_find_each_other(trained: Any, files: Path) -> None:
    embedder = Embedder(trained.models / "model.pt", "cpu")
    images = embedder.images(files, progress=False)
    items = [
        {"id": entry["id"], "dim": entry["dim"], "report": f"there is a nodule number {i}."}
        for i, entry in enumerate(images.entries)
    ]
    index = EmbeddingIndex(Embeddings.join([images, embedder.reports(items)]))
    assert len(index) == 6
    for row, entry in enumerate(images.entries):
        (hits,) = index.query(images.embed[row : row + 1], images.model, k=1, kind="image")
        assert hits[0].entry["id"] == entry["id"] and hits[0].score == pytest.approx(1, abs=1e-5)
    sentence = {dim: embedder.sentences(["There is a  nodule number 1."], dim).numpy() for dim in (2, 3)}
    (hits,) = index.query(sentence, embedder.model, k=1, kind="report")
    assert hits[0].entry["text"] == "there is a nodule number 1." and hits[0].score == pytest.approx(1, abs=1e-5)
    assert [hit.entry["dim"] for hit in index.query(images.embed[:1], images.model, kind="image", dim=3)[0]] == [3]
