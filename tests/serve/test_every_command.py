# SPDX-License-Identifier: Apache-2.0
"""Files of every kind through every command: one verdict in the same words, and the values that they hold."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from starlette.testclient import TestClient

from tests.bundles.test_abdomen_inference import make_bundle
from tests.common import run_bundle
from tests.images.kinds import KINDS, make_all
from tests.test_bad_input import prepare, train
from unimedi_components.__main__ import main
from unimedi_components.data.table import collect
from unimedi_components.data.volume_loading import LoadVolumed
from unimedi_components.images.find import find_images
from unimedi_components.images.xray import read_xray
from unimedi_components.retrieval import Embeddings
from unimedi_components.serve import Analyser, Limits, create_app

REPORT = "The heart is enlarged and the lungs are clear."
XRAY, CT = "chest_xray_classification", "abdomen_ct_segmentation"
REFUSED = [name for name, kind in KINDS.items() if not kind.is_a]
READ = [name for name, kind in KINDS.items() if kind.is_a]


class Verdicts:
    """What one command made of each kind: the kinds of its images, and all that it said of files left out."""

    def __init__(self) -> None:
        self.images: dict[str, list[str]] = {name: [] for name in KINDS}
        self.said: dict[str, str] = dict.fromkeys(KINDS, "")

    def add(self, images: Iterable[tuple[str, str]], left_out: Iterable[tuple[str, str]]) -> Verdicts:
        """From (path, "xray" or "volume") and (path, reason)."""
        for path, is_a in images:
            self.images[kind_of(path)].append(is_a)
        for path, reason in left_out:
            self.said[kind_of(path)] += f"{reason}\n"
        return self


def kind_of(path: str | Path) -> str:
    """By the folder that `make_all` gives each kind."""
    return next(part[4:] for part in Path(path).parts if part[4:] in KINDS)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_all(tmp_path_factory.mktemp("kinds") / "own")


@pytest.fixture(scope="module")
def verdicts(paths: dict[str, Path], checkpoint: Path, untrained_bundle: Any, tmp_path_factory: Any) -> dict[str, Any]:
    """Every command over all kinds at once."""
    folder = tmp_path_factory.mktemp("commands")
    named = [str(path) for path in paths.values()]

    def inspect() -> Verdicts:
        main(["inspect", *named, "--json", str(folder / "a.json"), "--png", str(folder / "png")])
        content = json.loads((folder / "a.json").read_text())
        images = [(item["files"][0], item["kind"]) for item in content["items"]]
        left_out = [(one["file"], one["reason"]) for one in content["left_out"]]
        warnings = [(item["files"][0], text) for item in content["items"] for text in item["warnings"]]
        return Verdicts().add(images, left_out + warnings)

    def embed() -> Verdicts:
        out = str(folder / "a.npz")
        main(["embed", *named, "--checkpoint", str(checkpoint), "--out", out, "--device", "cpu"])
        found = Embeddings.load(Path(out))
        images = [(entry["source"], "xray" if entry["dim"] == 2 else "volume") for entry in found.entries]
        return Verdicts().add(images, [(record["file"], record["reason"]) for record in found.skipped])

    def infer(bundle: Path, is_a: str) -> Verdicts:
        words = {"bundle_root": str(bundle), "output_dir": str(folder / is_a), "device": "cpu", "figures": False}
        run_bundle(bundle / "configs" / "inference.json", "inference", inputs=named, **words)
        content = json.loads((folder / is_a / "predictions.json").read_text())
        skipped = [(one["file"], one["reason"]) for one in content["skipped"]]
        return Verdicts().add([(row["source"], is_a) for row in content["predictions"]], skipped)

    found = {"inspect": inspect(), "embed": embed()}
    found["2D inference"] = infer(untrained_bundle(XRAY, folder), "xray")
    found["3D inference"] = infer(make_bundle(folder), "volume")
    return {**found, "folder": folder}


@pytest.fixture(scope="module")
def answer(analyser: Analyser, paths: dict[str, Path]) -> Iterator[Callable[[str], tuple[int, dict[str, Any]]]]:
    """What the page answers to all files of a kind."""

    def post(name: str) -> tuple[int, dict[str, Any]]:
        path = paths[name]
        lone = path.is_file() and path.name != "DICOMDIR" and path.suffix not in (".mhd", ".nhdr")
        root = path if path.is_dir() else path.parent
        given = [path] if lone else [file for file in sorted(root.rglob("*")) if file.is_file()]
        # a browser sends names as UTF-8, those of a dropped folder with their places in it
        names = [str(file.relative_to(root.parent)).encode("utf-8", "replace").decode() for file in given]
        files = [("files", (name, io.BytesIO(file.read_bytes()))) for name, file in zip(names, given, strict=True)]
        reply = client.post("/api/analyse", files=files)
        return reply.status_code, reply.json()

    with TestClient(create_app(analyser, Limits()), "http://127.0.0.1", raise_server_exceptions=False) as client:
        yield post


@pytest.mark.parametrize("name", READ)
def test_what_is_read_is_read_by_all(name: str, verdicts: Any, answer: Any) -> None:
    kind = KINDS[name]
    for command in ("inspect", "embed", "2D inference" if kind.is_a == "xray" else "3D inference"):
        assert verdicts[command].images[name] == [kind.is_a] * kind.count, (command, verdicts[command].said[name])
    assert kind.words in verdicts["inspect"].said[name]
    status, content = answer(name)
    assert status == (200 if kind.count == 1 else 422), content
    if kind.count == 1:
        assert content["dim"] == (2 if kind.is_a == "xray" else 3)
        assert kind.words in " ".join(content["warnings"])


@pytest.mark.parametrize("name", [name for name in READ if KINDS[name].truth])
def test_values_and_geometry_are_the_files_own(name: str, verdicts: Any, paths: dict[str, Path]) -> None:
    kind, truth = KINDS[name], KINDS[name].truth
    assert truth is not None
    (item,) = find_images(str(paths[name]), paths[name].parent)
    if kind.is_a == "xray":
        greys, _ = read_xray(item["image"])
        # what lies above is a mark
        assert greys.shape == truth.values.shape and np.abs(greys - truth.values)[6:].max() <= truth.near
        return
    volume = LoadVolumed("image")(item)["image"]
    assert np.array_equal(volume[0].numpy(), truth.values) and np.allclose(volume.affine, truth.affine, atol=0.01)
    content = json.loads((verdicts["folder"] / "volume" / "predictions.json").read_text())
    (row,) = (row for row in content["predictions"] if kind_of(row["source"]) == name)
    written = nib.load(verdicts["folder"] / "volume" / row["labels"])
    assert written.shape == truth.values.shape and np.allclose(written.affine, truth.affine, atol=0.01)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_by_all_in_the_same_words(
    name: str, verdicts: Any, answer: Any, paths: dict[str, Path], checkpoint: Path, capsys: Any
) -> None:
    words = KINDS[name].words
    for command in ("inspect", "embed", "2D inference", "3D inference"):
        assert verdicts[command].images[name] == []
    assert words in verdicts["inspect"].said[name]
    status, content = answer(name)
    assert status in (415, 422) and words in content["error"], content
    for command in (["inspect"], ["embed", "--checkpoint", str(checkpoint), "--device", "cpu"]):
        with pytest.raises(SystemExit) as caught:
            main([*command, str(paths[name])])
        said = capsys.readouterr()
        assert caught.value.code == 2 and words in said.out + said.err and "Traceback" not in said.err


@pytest.mark.usefixtures("in_process")
def test_what_prepare_keeps_is_what_an_epoch_reads(paths: dict[str, Path]) -> None:
    root = paths["a_photograph"].parents[1]
    rng = np.random.default_rng(0)
    rows = [(path.relative_to(root), f"Finding {n} is seen.", "train") for n, path in enumerate(paths.values())]
    for number in range(8):
        values = rng.normal(-500, 400, (20, 20, 20)).astype(np.int16)
        nib.save(nib.Nifti1Image(values, np.eye(4)), root / f"v{number}.nii")
        rows.append((Path(f"v{number}.nii"), f"Number {number} is new.", ("val", "test")[number % 2]))
    with open(root / "own.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([("image", "report", "split"), *rows])
    datalist = prepare(root, min_slices=2, check_images="full")
    kept = [kind_of(item["image"]) for item in datalist["training"]]
    assert sorted(kept) == sorted(name for name in READ if KINDS[name].count == 1)
    builder = collect(root / "own.csv", min_slices=2, check_images="full", progress=False)
    dropped = {kind_of(one["detail"]): one["detail"] for drops in builder.dropped.values() for one in drops}
    assert all(KINDS[name].words in dropped[name] for name in REFUSED), dropped
    history = train(root).parser.get_parsed_content("train#run").history.rows
    assert history and all(np.isfinite(row["loss"]) for row in history)
    assert not (root.parent / "run" / "eval" / "skipped.json").exists()
