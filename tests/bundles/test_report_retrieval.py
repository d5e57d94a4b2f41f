# SPDX-License-Identifier: Apache-2.0
"""The retrieval bundle from its configs: evaluation of held-out studies, then search and zero-shot for files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from monai.bundle import ConfigWorkflow
from PIL import Image

from tests.common import run_bundle
from unimedi_components.config_check import check_config
from unimedi_components.data import pretraining_datalist
from unimedi_components.data.phantom import write_phantom
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.retrieval import Embedder, EmbeddingIndex, ZeroShot, load_prompts
from unimedi_components.retrieval.protocols import PROTOCOLS

pytestmark = pytest.mark.usefixtures("in_process")
CONFIGS = Path(__file__).resolve().parents[2] / "bundles" / "report_retrieval" / "configs"


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heldout")
    pretraining_datalist(folder, {"mimic_cxr": 30, "bimcv": 20}, 1000)
    return folder


@pytest.fixture
def evaluated(trained: Any, heldout: Path, tmp_path: Path) -> Path:
    """The folder that evaluate.json has written to."""
    out = tmp_path / "eval"
    overrides = {"checkpoint": str(trained.models / "model.pt"), "dataset_dir": str(heldout), "output_dir": str(out)}
    # of thirty films too few show a single finding of the protocols
    fast = {"datalist#phantoms": {"mimic_cxr": 30, "bimcv": 20}, "protocols": [], "device": "cpu"}
    fast["metrics#bootstrap"] = 20
    run([str(CONFIGS / "evaluate.json")], {**overrides, **fast})
    return out


def search(out: Path, trained: Any, **overrides: Any) -> dict[str, Any]:
    fixed = {"checkpoint": str(trained.models / "model.pt"), "output_dir": str(out), "device": "cpu"}
    workflow = run_bundle(CONFIGS / "inference.json", "infer", **fixed, **overrides)
    assert workflow.check_properties() == []
    return json.loads((out / "predictions.json").read_text())


def test_evaluation_and_search(evaluated: Path, heldout: Path, trained: Any, tmp_path: Path) -> None:
    assert (evaluated / "neighbours.png").is_file()
    values = json.loads((evaluated / "metrics.json").read_text())
    items = json.loads((heldout / "pretrain.json").read_text())
    items = [item for split in ("training", "validation", "test") for item in items[split]]
    films = [item for item in items if item["dim"] == 2]
    assert values["studies_2d"] == len(films) and values["studies_3d"] == len(items) - len(films)
    assert values["zero_shot"]["2d"]["prompts"] == "chest_xray" and values["zero_shot_auroc_3d"] is not None
    assert set(values["class_search"]) >= {"xray_to_ct", "ct_to_xray", "xray_to_xray_report", "ct_report_to_xray"}
    index = EmbeddingIndex.load(evaluated / "index.npz")
    assert len(index) == 2 * len(items)

    # a film and a scan of the set, and a file that is none
    folder = tmp_path / "inputs"
    folder.mkdir()
    film, scan = films[0], next(item for item in items if item["dim"] == 3)
    (folder / "film.jpg").write_bytes((heldout / film["image"]).read_bytes())
    (folder / "scan.nii.gz").write_bytes((heldout / scan["image"]).read_bytes())
    (folder / "broken.png").write_bytes(b"no image")
    out = tmp_path / "found"
    found = search(out, trained, inputs=str(folder), index=str(evaluated / "index.npz"), neighbours=3)
    assert [Path(record["file"]).name for record in found["skipped"]] == ["broken.png"]
    rows = {Path(row["source"]).name: row for row in found["predictions"]}
    embedder = Embedder(trained.models / "model.pt", "cpu")
    for name, own, kind, prompts in (("film.jpg", film, "xray", "chest_xray"), ("scan.nii.gz", scan, "ct", "chest_ct")):
        row = rows[name]
        # it is its own nearest neighbour
        assert row["neighbours"][kind][0]["id"] == own["id"]
        assert row["neighbours"][kind][0]["similarity"] == pytest.approx(1, abs=1e-4)
        assert set(row["neighbours"]) == {"xray", "xray_report", "ct", "ct_report"}
        assert all(len(hits) == 3 for hits in row["neighbours"].values())
        embed = embedder.images(folder / name, progress=False).embed
        for other, (of_kind, dim) in {"ct": ("image", 3), "xray_report": ("report", 2)}.items():
            expected = [hit.entry["id"] for hit in index.query(embed, embedder.model, 3, of_kind, dim)[0]]
            assert [hit["id"] for hit in row["neighbours"][other]] == expected
        zero_shot = ZeroShot(embedder, load_prompts(prompts))
        expected = dict(zip(zero_shot.names, zero_shot.probabilities(embed)[0].tolist(), strict=True))
        assert row["zero_shot"] == pytest.approx(expected, abs=1e-4)
        assert (out / f"{row['id']}.png").is_file()
    table = pd.read_csv(out / "neighbours.csv")
    assert len(table) == 2 * 4 * 3 and table["rank"].tolist()[:3] == [1, 2, 3]
    for row in found["predictions"]:
        own = table[(table["id"] == row["id"]) & (table["kind"] == "ct")]
        assert own["neighbour"].tolist() == [hit["id"] for hit in row["neighbours"]["ct"]]
    said = pd.read_csv(out / "zero_shot.csv")
    assert len(said) == len(load_prompts("chest_xray").findings) + len(load_prompts("chest_ct").findings)


def test_faults(trained: Any, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40), dtype=np.uint8)).save(tmp_path / "film.png")
    embedder = Embedder(trained.models / "model.pt", "cpu")
    images = embedder.images(tmp_path / "film.png", progress=False)
    images.model = "another"
    images.save(tmp_path / "other.npz")
    inputs = str(tmp_path / "film.png")
    with pytest.raises(Exception) as fault:
        search(tmp_path / "out", trained, inputs=inputs, index=str(tmp_path / "other.npz"))
    assert isinstance(cause(fault.value), ConfigError) and "was made with model another" in str(cause(fault.value))
    with pytest.raises(Exception) as fault:
        search(tmp_path / "out", trained, inputs=inputs, index=str(tmp_path / "none.npz"))
    assert isinstance(cause(fault.value), DataError) and "none.npz: no such file" in str(cause(fault.value))
    found = search(tmp_path / "out", trained, inputs=inputs, index=None)
    assert found["index"] is None and found["predictions"][0]["neighbours"] == {}


def cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def test_a_volume_alone_needs_no_prompts_for_films(trained: Any, tmp_path: Path) -> None:
    volume = nib.Nifti1Image(np.random.default_rng(0).normal(-600, 300, (30, 28, 17)).astype(np.float32), np.eye(4))
    nib.save(volume, tmp_path / "scan.nii.gz")
    inputs = str(tmp_path / "scan.nii.gz")
    found = search(tmp_path / "out", trained, inputs=inputs, index=None, prompts=["chest_xray"])
    assert found["predictions"][0]["zero_shot"] == {} and found["prompts"] == {"2d": "chest_xray"}
    assert not list((tmp_path / "out").glob("*.png"))


def test_the_protocols_on_chexperts_layout(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIMEDI_DATA", str(tmp_path / "data"))
    write_phantom("chexpert", tmp_path / "data" / "chexpert", patients=90, seed=4, workers=1)
    files = [str(CONFIGS / "evaluate.json"), str(CONFIGS / "chexpert.json")]
    overrides: dict[str, Any] = {
        "checkpoint": str(trained.models / "model.pt"),
        "device": "cpu",
        "metrics#bootstrap": 0,
    }
    overrides |= {"output_dir": str(tmp_path / "out"), "metrics#protocol_queries": 1, "metrics#num_workers": 0}
    with pytest.raises(Exception) as fault:
        run(files, overrides)
    assert isinstance(cause(fault.value), DataError) and "1 + 200 are needed" in str(cause(fault.value))
    run(files, {**overrides, "metrics#exact": False})
    values = json.loads((tmp_path / "out" / "metrics.json").read_text())
    datalist = json.loads((tmp_path / "data" / "chexpert_all.json").read_text())
    names = datalist["meta"]["label_names"]
    assert len(names) == 14
    # of each class as many as the rarest has beside its query's patient
    alone: dict[str, set[str]] = {}
    for item in datalist["training"]:
        found = [name for name in PROTOCOLS["5x200"] if item["label"][names.index(name)] == 1]
        if len(found) == 1 and all(item["label"][names.index(name)] != -1 for name in PROTOCOLS["5x200"]):
            alone.setdefault(found[0], set()).add(item["id"])
    five = values["protocols"]["5x200"]
    assert set(five["classes"]) == {name for name, ids in alone.items() if len(ids) >= 2}
    assert five["per_class"] <= min(len(alone[name]) for name in five["classes"]) - 1
    assert five["candidates"] == five["per_class"] * len(five["classes"])
    assert "image_to_report" not in five and values["report_recall_at_5"] is None


def test_every_overlay_is_spelled_right() -> None:
    for overlay in ("mimic_cxr_bimcv.json", "chexpert.json"):
        check_config([str(CONFIGS / "evaluate.json"), str(CONFIGS / overlay)], {})
    check_config([str(CONFIGS / "inference.json")], {"inputs": "x", "index": "$None"})
    with pytest.raises(ConfigError, match="protocols"):
        check_config([str(CONFIGS / "evaluate.json")], {"protocol": 1})


def run(files: list[str], overrides: dict[str, Any]) -> None:
    workflow = ConfigWorkflow(files, workflow_type="infer", logging_file=False, **overrides)
    workflow.initialize()
    workflow.run()
