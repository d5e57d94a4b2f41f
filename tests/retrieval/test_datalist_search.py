# SPDX-License-Identifier: Apache-2.0
"""`evaluate_search` over studies whose embeddings are known: who finds whom can be said by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from unimedi_components.errors import ConfigError, DataError
from unimedi_components.retrieval import EmbeddingIndex, Embeddings, evaluate_search, load_prompts
from unimedi_components.retrieval.embeddings import entry_of

EFFUSION, EDEMA, NEITHER = np.eye(6, dtype=np.float32)[:3]


class Known:
    """An embedder that reads a study's vector off its id, and a sentence's off its words."""

    model = "known"
    network = SimpleNamespace(logit_scale=torch.tensor(10.0))
    pretrained = SimpleNamespace(keep_punct=True)

    def items(self, items: Any, root: Any, **options: Any) -> Embeddings:
        entries = [entry_of(item["id"], "image", item["dim"], item["image"]) for item in items]
        return Embeddings(np.stack([self.vector(item["id"]) for item in items]), entries, self.model)

    def reports(self, items: Any) -> Embeddings:
        kept = [item for item in items if item.get("report")]
        entries = [entry_of(item["id"], "report", item["dim"], text=item["report"]) for item in kept]
        return Embeddings(np.stack([self.vector(item["report"]) for item in kept]), entries, self.model)

    def sentences(self, texts: Any, dim: int) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.vector(text) for text in texts]))

    def vector(self, text: str) -> np.ndarray:
        said = "no " not in text
        base = EFFUSION if said and "effusion" in text else EDEMA if said and "edema" in text else NEITHER
        tail = np.zeros(6, np.float32)
        # what tells two studies of one kind apart
        tail[3:] = np.random.default_rng(list(text.encode())).normal(size=3) * 0.1
        return (base + tail) / np.linalg.norm(base + tail)


def study(name: str, dim: int, label: list[int], report: str = "") -> dict[str, Any]:
    source = "films" if dim == 2 else "scans"
    return {
        "id": f"{source}-{name}",
        "patient": f"{source}-{name}",
        "dim": dim,
        "image": f"{name}.png",
        "label": label,
        **({"report": report} if report else {}),
    }


@pytest.fixture
def datalist(tmp_path: Path) -> Path:
    films = [study(f"effusion{i}", 2, [1, 0, -2], f"an effusion of kind {i}.") for i in range(4)]
    films += [study(f"edema{i}", 2, [0, 1, -2], f"edema of kind {i}.") for i in range(4)]
    # the network takes the fourth film of edema for none
    films[-1]["id"] = "films-quiet"
    scans = [study(f"effusion{i}", 3, [0, 1], f"an effusion of type {i}.") for i in range(3)]
    scans += [study(f"edema{i}", 3, [1, 0]) for i in range(3)]
    (tmp_path / "effusion0.png").touch()
    names = {"films": ["Pleural Effusion", "Edema", "Fracture"], "scans": ["pulmonary edema", "effusion"]}
    content = {"training": films, "validation": [], "test": scans, "meta": {"label_names": names}}
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps(content))
    return path


def test_search_and_zero_shot_of_known_vectors(datalist: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    values = evaluate_search(Known(), datalist, tmp_path, out, "all", bootstrap=20)  # type: ignore[arg-type]
    assert (values["studies_2d"], values["studies_3d"], values["reports"]) == (8, 6, 11)
    # scans call the same findings by other names; only the quiet film finds others than its own kind
    search = values["class_search"]["xray_to_ct"]["by_finding"]
    assert search["Pleural Effusion"]["queries"] == 4 and search["Pleural Effusion"]["candidates"] == 3
    assert search["Pleural Effusion"]["precision_at_5"] == pytest.approx(3 / 5)
    assert search["Pleural Effusion"]["precision_at_5_chance"] == pytest.approx(0.5)
    assert "precision_at_10" not in search["Edema"]
    within = values["class_search"]["xray_to_xray"]["by_finding"]["Pleural Effusion"]
    # of its own kind three are left, and five are asked for
    assert within["precision_at_5"] == pytest.approx(3 / 5)
    # scans of edema have no report
    assert set(values["class_search"]["ct_report_to_xray"]["by_finding"]) == {"effusion"}
    two, three = values["zero_shot"]["2d"], values["zero_shot"]["3d"]
    assert two["auroc"]["Pleural Effusion"] == three["auroc"]["effusion"] == three["auroc"]["pulmonary edema"] == 1.0
    # three of four films of edema stand above the four of effusion; the quiet one looks like none
    assert 0.75 <= two["auroc"]["Edema"] <= 1.0
    assert values["zero_shot_auroc_2d"] == two["macro_auroc"]
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(values))
    index = EmbeddingIndex.load(out / "index.npz")
    assert len(index) == 8 + 6 + 11 and index.model == "known"
    with open(out / "zero_shot.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 14 and rows[0]["label_Pleural Effusion"].startswith("1")
    assert {path.name for path in out.glob("*.png")} == {"roc_2d.png", "roc_3d.png"}


def test_report_recall_counts_each_image_with_a_report(datalist: Path, tmp_path: Path) -> None:
    values = evaluate_search(Known(), datalist, tmp_path, split="test", bootstrap=0)  # type: ignore[arg-type]
    embedder = Known()
    items = [item for item in json.loads(datalist.read_text())["test"] if "report" in item]
    hits = 0
    for item in items:
        cosines = [float(embedder.vector(item["id"]) @ embedder.vector(other["report"])) for other in items]
        hits += int(np.argmax(cosines)) == items.index(item)
    assert values["report_recall_at_1"] == pytest.approx(hits / 3)
    assert values["report_recall_at_1_chance"] == pytest.approx(1 / 3)
    assert values["xray_to_ct_precision_at_10"] is None and values["studies_2d"] == 0


def test_a_protocol_alone_embeds_its_own_images(tmp_path: Path) -> None:
    films = [study(f"effusion{i}", 2, [1, 0, 0]) for i in range(9)] + [
        study(f"edema{i}", 2, [0, 1, 0]) for i in range(7)
    ]
    (tmp_path / "effusion0.png").touch()
    names = ["Pleural Effusion", "Edema", "Consolidation"]
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"training": films, "meta": {"label_names": names}}))
    options: dict[str, Any] = {"split": "training", "protocols": ("5x200",), "protocol_queries": 2, "bootstrap": 0}
    values = evaluate_search(Known(), path, tmp_path, **options)  # type: ignore[arg-type]
    found = values["protocols"]["5x200"]
    assert found["classes"] == ["Edema", "Pleural Effusion"] and found["per_class"] == 5
    assert found["candidates"] == 10 and values["studies_2d"] == 14
    assert found["image_to_image"]["precision_at_5"] == 1.0 and found["image_to_image"]["precision_at_5_chance"] == 0.5
    # a phrasing without either word has no side of its own
    edema = load_prompts("chest_xray").select(["Edema"]).findings["Edema"]["positive"]
    named = sum("edema" in text for text in edema) / len(edema)
    assert named <= found["text_to_image"]["by_finding"]["Edema"]["precision_at_5"] <= 1.0 and named > 0.3
    assert found["zero_shot"] == {"accuracy": 1.0, "macro_f1": 1.0, "chance": 0.5}
    assert "image_to_report" not in found
    with pytest.raises(DataError, match="5x200 cannot be drawn from 16 images"):
        evaluate_search(Known(), path, tmp_path, exact=True, **options)  # type: ignore[arg-type]


def test_faults(datalist: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'tests' is unknown; use one of training, validation, test, or all"):
        evaluate_search(Known(), datalist, tmp_path, split="tests")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the validation split is empty"):
        evaluate_search(Known(), datalist, tmp_path, split="validation")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="are both for 2D"):
        evaluate_search(Known(), datalist, tmp_path, prompts=("chest_xray", "chest_xray"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="protocols need a prompt set for X-rays"):
        evaluate_search(Known(), datalist, tmp_path, prompts=("chest_ct",), protocols=("5x200",))  # type: ignore[arg-type]
