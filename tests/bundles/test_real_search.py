# SPDX-License-Identifier: Apache-2.0
"""Real X-rays with texts and real CTs, from files on disk through index, search and zero_shot.

Set UNIMEDI_REAL_DATA to a folder with `xray_text/xray_text.csv` and `ct3d/ct3d.csv`, each with columns image, report
and patient. The network is a tiny one: what is checked is that real files go through, not what it knows.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unimedi_components.__main__ import main
from unimedi_components.data.datalist import SPLITS, write_json
from unimedi_components.retrieval import Embeddings, load_prompts

XRAYS, VOLUMES = 12, 5

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weights(trained: Any) -> list[str]:
    return ["--checkpoint", str(trained.models / "model.pt"), "--device", "cpu"]


@pytest.fixture(scope="module")
def items(real_datalist: Path) -> list[dict[str, Any]]:
    """The first X-rays and volumes of the prepared tables."""
    content = json.loads(real_datalist.read_text())
    found = [item for split in SPLITS for item in content[split]]
    return [item for dim, n in ((2, XRAYS), (3, VOLUMES)) for item in [i for i in found if i["dim"] == dim][:n]]


@pytest.fixture(scope="module")
def index(
    items: list[dict[str, Any]], weights: list[str], real_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("index")
    write_json({"training": items, "validation": [], "test": []}, folder / "some.json")
    main(["index", str(folder / "i.npz"), "--datalist", str(folder / "some.json"), "--root", str(real_root), *weights])
    return folder / "i.npz"


def hits(words: list[str], folder: Path) -> list[dict[str, Any]]:
    main(["search", *words, "--json", str(folder / "hits.json")])
    return [row["hits"] for row in json.loads((folder / "hits.json").read_text())]


def test_every_file_and_text_is_in_the_index(index: Path, items: list[dict[str, Any]]) -> None:
    found = Embeddings.load(index)
    assert [(e["kind"], e["dim"]) for e in found.entries] == [
        (kind, dim) for kind in ("image", "report") for dim, n in ((2, XRAYS), (3, VOLUMES)) for _ in range(n)
    ]
    assert {e["id"] for e in found.entries} == {item["id"] for item in items} and found.skipped == []
    np.testing.assert_allclose(np.linalg.norm(found.embed, axis=1), 1, atol=1e-5)
    # pictures that differ are told apart
    assert len(np.unique(found.embed[: XRAYS + VOLUMES].round(4), axis=0)) == XRAYS + VOLUMES


def test_texts_films_and_scans_find_themselves_and_each_other(
    index: Path, items: list[dict[str, Any]], weights: list[str], real_root: Path, tmp_path: Path
) -> None:
    film, scan = items[0], items[-1]
    queries = [str(real_root / item["image"]) for item in (film, scan)]
    of_text, of_film, of_scan = hits([str(index), film["report"], *queries, *weights], tmp_path)
    assert of_text[0]["text"] == film["report"] and of_text[0]["kind"] == "report"
    assert (of_film[0]["id"], of_scan[0]["id"]) == (film["id"], scan["id"])
    for own in (of_text, of_film, of_scan):
        assert own[0]["similarity"] == pytest.approx(1, abs=1e-4)
    stored = Embeddings.load(index)
    for query, dim, row in ((queries[0], 3, 0), (queries[1], 2, XRAYS + VOLUMES - 1)):
        (across,) = hits([str(index), query, f"--dim={dim}", "--kind=image", "--k=3", *weights], tmp_path)
        own = [i for i, e in enumerate(stored.entries) if e["kind"] == "image" and e["dim"] == dim]
        similarity = stored.embed[own] @ stored.embed[row]
        assert [hit["id"] for hit in across] == [stored.ids[own[i]] for i in np.argsort(-similarity)[:3]]
        np.testing.assert_allclose([hit["similarity"] for hit in across], -np.sort(-similarity)[:3], atol=1e-4)


def test_zero_shot_of_real_files(
    items: list[dict[str, Any]], weights: list[str], real_root: Path, tmp_path: Path
) -> None:
    chosen = [items[0], items[1], items[-1]]
    main(["zero_shot", *(str(real_root / i["image"]) for i in chosen), "--out", str(tmp_path / "o.csv"), *weights])
    with open(tmp_path / "o.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert sorted(row["dim"] for row in rows) == ["2", "2", "3"]
    for row in rows:
        names = load_prompts("chest_ct" if row["dim"] == "3" else "chest_xray").findings
        values = [float(row[name]) for name in names]
        assert min(values) > 0 and max(values) < 1 and np.ptp(values) > 1e-3
