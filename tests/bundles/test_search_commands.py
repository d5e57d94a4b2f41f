# SPDX-License-Identifier: Apache-2.0
"""The commands index, search and zero_shot on files, against the classes behind them called directly."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from unimedi_components.__main__ import main
from unimedi_components.retrieval import Embedder, EmbeddingIndex, Embeddings, PromptSet, ZeroShot, load_prompts

REPORTS = {
    "a": (2, "large left pleural effusion."),
    "b": (2, "the heart is normal in size, no pneumothorax."),
    "c": (3, "a nodule in the right upper lobe."),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("images")
    for number in range(2):
        Image.fromarray(rng.integers(0, 255, (80, 70), dtype=np.uint8)).save(folder / f"film{number}.png")
    volume = nib.Nifti1Image(rng.normal(-600, 300, (30, 28, 17)).astype(np.float32), np.diag([2, 2, 4, 1]))
    nib.save(volume, folder / "scan.nii.gz")
    (folder / "broken.png").write_bytes(b"no image")
    rows = [{"id": name, "report": text, "dim": dim} for name, (dim, text) in REPORTS.items()]
    rows.append({"id": "empty", "report": " ", "dim": 2})
    with open(folder / "reports.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def weights(trained: Any) -> list[str]:
    return ["--checkpoint", str(trained.models / "model.pt"), "--device", "cpu"]


@pytest.fixture(scope="module")
def embedder(trained: Any) -> Embedder:
    return Embedder(trained.models / "model.pt", "cpu")


@pytest.fixture(scope="module")
def index(files: Path, weights: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("index") / "all"
    main(["index", str(out), str(files), "--reports", str(files / "reports.csv"), *weights])
    return out.with_suffix(".npz")


def error(words: list[str], capsys: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_index_holds_images_and_reports(index: Path, files: Path, embedder: Embedder) -> None:
    found = Embeddings.load(index)
    what = [(entry["kind"], entry["dim"], Path(entry["source"]).name or entry["text"]) for entry in found.entries]
    images = [("image", 2, "film0.png"), ("image", 2, "film1.png"), ("image", 3, "scan.nii.gz")]
    assert what == [*images, *(("report", dim, text) for dim, text in REPORTS.values())]
    assert found.model == embedder.model and [Path(s["file"]).name for s in found.skipped] == ["broken.png"]
    np.testing.assert_allclose(found.embed[:3], embedder.images(files, progress=False).embed, atol=1e-6)
    for row, (dim, text) in zip(found.embed[3:], REPORTS.values(), strict=True):
        np.testing.assert_allclose(row, embedder.sentences([text], dim)[0], atol=1e-5)


def test_index_of_a_datalist(trained: Any, weights: list[str], tmp_path: Path, capsys: Any) -> None:
    root = trained.data / "phantom"
    content = json.loads((root / "pretrain.json").read_text())
    for options, splits in ((["--split", "test"], ("test",)), ([], ("training", "validation", "test"))):
        main(["index", str(tmp_path / "o.npz"), "--datalist", str(root / "pretrain.json"), *options, *weights])
        found, items = Embeddings.load(tmp_path / "o.npz"), [item for split in splits for item in content[split]]
        for kind in ("image", "report"):
            assert {e["id"] for e in found.entries if e["kind"] == kind} == {item["id"] for item in items}
        assert f"{len(items)} reports, 0 left out" in capsys.readouterr().out


def test_a_sentence_finds_its_report(index: Path, weights: list[str], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "hits.json"
    # a comma must not make two words of it
    query = "Large left pleural effusion."
    main(
        [
            "search",
            str(index),
            query,
            "the heart is normal in size, no pneumothorax.",
            "--k=2",
            "--json",
            str(out),
            *weights,
        ]
    )
    first, second = json.loads(out.read_text())
    assert [first["query"], second["query"]] == [query, REPORTS["b"][1]]
    assert (first["hits"][0]["id"], second["hits"][0]["id"]) == ("a", "b") and len(first["hits"]) == 2
    assert first["hits"][0]["similarity"] == pytest.approx(1, abs=1e-5) and first["hits"][1]["rank"] == 2
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1", "1.0000", "report", "2", "a", "large", "left", "pleural", "effusion."] in lines


def test_an_image_finds_what_the_index_class_finds(
    index: Path, files: Path, embedder: Embedder, weights: list[str], tmp_path: Path
) -> None:
    out, film = tmp_path / "hits.json", str(files / "film1.png")
    vectors = embedder.images(film, progress=False).embed
    for options, chosen in (
        ([], {}),
        (["--dim=3"], {"dim": 3}),
        (["--kind", "report", "--k=1"], {"kind": "report", "k": 1}),
    ):
        main(["search", str(index), film, "--json", str(out), *options, *weights])
        (expected,) = EmbeddingIndex.load(index).query(vectors, embedder.model, **{"k": 5, **chosen})
        (found,) = json.loads(out.read_text())
        assert [hit["id"] for hit in found["hits"]] == [hit.entry["id"] for hit in expected]
        np.testing.assert_allclose(
            [hit["similarity"] for hit in found["hits"]], [hit.score for hit in expected], atol=1e-6
        )


def test_a_folder_holds_several_queries(
    index: Path, files: Path, weights: list[str], tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "hits.json"
    main(["search", str(index), str(files), "a nodule.", "--kind=image", "--json", str(out), *weights])
    found = {Path(row["query"]).name: row["hits"] for row in json.loads(out.read_text())}
    assert list(found) == ["a nodule.", "film0.png", "film1.png", "scan.nii.gz"]
    assert all(Path(found[name][0]["source"]).name == name for name in list(found)[1:])
    assert "broken.png" in capsys.readouterr().out


def test_a_file_name_can_be_a_sentence(index: Path, weights: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nodule").mkdir()
    main(["search", str(index), "nodule", "--text", "--json", "hits.json", *weights])
    assert json.loads(Path("hits.json").read_text())[0]["query"] == "nodule"


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_zero_shot_writes_what_the_class_gives(
    files: Path, embedder: Embedder, weights: list[str], tmp_path: Path, capsys: Any
) -> None:
    main(["zero_shot", str(files), "--out", str(tmp_path / "new" / "found.csv"), *weights])
    rows, shown = table(tmp_path / "new" / "found.csv"), capsys.readouterr().out
    images = embedder.images(files, progress=False)
    assert [row["source"] for row in rows] == [entry["source"] for entry in images.entries]
    for dim, name in ((2, "chest_xray"), (3, "chest_ct")):
        classifier = ZeroShot(embedder, load_prompts(name))
        own = [row for row in rows if row["dim"] == str(dim)]
        found = [[float(row[finding]) for finding in classifier.names] for row in own]
        np.testing.assert_allclose(found, classifier.classify(images)[1], atol=1e-6)
        best = classifier.names[int(np.argmax(found[0]))]
        block = shown[shown.index(f"{own[0]['source']}\n") :].splitlines()
        assert block[1].split("   ")[0].split(maxsplit=1) == [f"{max(found[0]):.3f}", best]
    # what one set alone knows is empty for the other's images
    assert rows[0]["bronchiectasis"] == "" and rows[2]["bronchiectasis"] != ""
    assert "skipped" in shown and "broken.png" in shown


def test_zero_shot_of_chosen_and_own_findings(
    files: Path, embedder: Embedder, weights: list[str], tmp_path: Path, capsys: Any
) -> None:
    out, film = tmp_path / "found.csv", str(files / "film0.png")
    main(["zero_shot", film, "--finding", "Pleural Effusion | edema", "--out", str(out), *weights])
    assert list(table(out)[0]) == ["id", "dim", "source", "Pleural Effusion", "edema"]
    own = [
        "--finding",
        "free air",
        "--positive",
        "free air, left.|air below the diaphragm.",
        "--negative",
        "no free air.",
    ]
    main(["zero_shot", film, *own, "--out", str(out), *weights])
    sides = {"positive": ("free air, left.", "air below the diaphragm."), "negative": ("no free air.",)}
    classifier = ZeroShot(embedder, PromptSet("own", 2, {"free air": sides}))
    expected = classifier.classify(embedder.images(film, progress=False))[1][0, 0]
    assert float(table(out)[0]["free air"]) == pytest.approx(float(expected), abs=1e-6)
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"format": 1, "name": "own", "dim": 2, "findings": {"free air": sides}}))
    main(["zero_shot", str(files), "--prompts", str(file), "--out", str(out), *weights])
    rows = table(out)
    assert [row["dim"] for row in rows] == ["2", "2"]
    assert capsys.readouterr().out.count(": is one of the volumes, and the prompts are for X-rays\n") == 1
    assert float(rows[0]["free air"]) == pytest.approx(float(expected), abs=1e-6)


def test_faults_are_one_line(index: Path, files: Path, weights: list[str], tmp_path: Path, capsys: Any) -> None:
    film, other = str(files / "film0.png"), tmp_path / "other.npz"
    Embeddings(np.ones((1, 4), np.float32), Embeddings.load(index).entries[:1], "another model").save(other)
    no_dim = tmp_path / "no_dim.csv"
    no_dim.write_text("id,report\na,no effusion.\n")
    twice = tmp_path / "twice.csv"
    twice.write_text("id,report,dim\na,no effusion.,2\na,a nodule.,2\n")
    four = tmp_path / "four.csv"
    four.write_text("id,report,dim\na,no effusion.,4\n")
    out = str(tmp_path / "o.npz")
    for words, message in (
        (["index", out], "name images, or give --datalist or --reports"),
        (["index", out, "--reports", str(no_dim)], "no column 'dim'"),
        (["index", out, "--reports", str(twice)], "line 3: the id 'a' comes twice"),
        (["index", out, "--reports", str(four)], "line 2: dim is '4'; use 2 for X-rays or 3 for volumes"),
        (["index", out, "--reports", str(no_dim), "--dim=5"], "--dim must be 2 (X-rays) or 3 (volumes), got 5"),
        (["index", out, film, "--batch=3"], "unknown option '--batch' of 'index'"),
        (["search", str(index)], "give at least one sentence or image"),
        (["search", str(index), "..."], "the text '...' holds no word"),
        (["search", str(index), "lost.png"], "lost.png: no such file or folder; --text searches for it"),
        (["search", str(index), "a nodule.", "--k=0"], "--k must be a whole number of at least 1"),
        (["search", str(index), "a nodule.", "--kind=reports"], "kind 'reports'"),
        (["search", str(index), "a nodule.", "--backend=annoy"], "the backend 'annoy' is unknown; use exact or faiss"),
        (["search", str(other), "a nodule."], "the index was made with model another mode"),
        (["search", str(tmp_path / "none.npz"), "a nodule."], "no such file"),
        (["zero_shot"], "name at least one file or folder"),
        (["zero_shot", film, "--finding=efusion"], "did you mean 'pleural effusion'?"),
        (["zero_shot", film, "--finding=x", "--positive=a|b"], "prompts of your own are --finding NAME"),
        (["zero_shot", film, "--finding=x", "--positive=a", "--negative=|"], "no negative phrasing"),
        (["zero_shot", film, "--prompts=chest_ct"], "the prompts are for volumes, and none was named"),
        (["zero_shot", film, "--prompts=lost.json"], "lost.json: neither a JSON file"),
    ):
        found = error([*words, *weights], capsys)
        assert found.startswith("error: ") and found.count("\n") == 1 and message in found, (words, found)
