# SPDX-License-Identifier: Apache-2.0
"""What the page shows of a study: pictures, slabs, neighbours, thumbnails, against the network and the index."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from torch.nn import functional

from unimedi_components.data.transforms import ByDimension, ct_transforms, xray_transforms
from unimedi_components.errors import ConfigError
from unimedi_components.retrieval import Embedder, EmbeddingIndex, Embeddings, PromptSet
from unimedi_components.serve import Analyser, create_app
from unimedi_components.serve.views import overlay_png, volume_view, xray_view


def pixels(url: str) -> np.ndarray:
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_views_hold_the_networks_input_and_the_same_field_in_more_pixels(files: Any, embedder: Embedder) -> None:
    options = embedder.card["preprocessing"]
    chain = ByDimension(xray_transforms(**options["xray"]), ct_transforms(**options["ct"]))
    film, scan = files.picture("film.png", files.film(296, 296)), files.nifti("scan.nii", files.voxels((96, 96, 32)))
    flat, deep = xray_view(film, options["xray"], 128), volume_view(scan, options["ct"], shown=96)
    assert torch.equal(flat.image, chain({"id": "a", "dim": 2, "image": str(film)})["image"])
    assert torch.equal(deep.image, chain({"id": "a", "dim": 3, "image": str(scan)})["image"])
    assert flat.shown.shape == (128, 128) and deep.shown.shape == (16, 96, 96) and deep.slices == 32
    # averaged again, the finer picture is what the network got
    again = functional.avg_pool2d(torch.as_tensor(deep.shown)[None], 4)[0]
    assert torch.allclose(again, deep.image[0], atol=1e-5)
    again = functional.avg_pool2d(torch.as_tensor(flat.shown)[None], 4)[0]
    assert float((again - flat.image[0]).abs().mean()) < 0.03


def test_overlay_is_strongest_where_attention_is_and_clear_where_it_is_even() -> None:
    attention = np.full((4, 4), 0.05)
    attention[1, 2] = 0.25
    layer = np.asarray(Image.open(io.BytesIO(overlay_png(attention, attention, (64, 64)))))
    assert layer.shape == (64, 64, 4)
    row, column = np.unravel_index(layer[..., 3].argmax(), (64, 64))
    assert (row // 16, column // 16) == (1, 2) and layer[row, column, 3] == pytest.approx(0.8 * 255, abs=10)
    assert layer[48:, :16, 3].max() == 0


def test_pictures_of_a_film(files: Any, upload: Any) -> None:
    film = np.zeros((64, 64), np.uint8)
    film[8:24, 40:56] = 255
    (picture,) = upload(files.picture("film.png", film))[1]["pictures"]
    grey, layer = pixels(picture["image"]), pixels(picture["overlay"])
    assert grey.shape == layer.shape[:2] == (512, 512) and layer.shape[2] == 4
    # the centre 224 of 256 is kept: a cell of the film is 512 / 56 pixels of the picture
    rows, columns = np.nonzero(grey > 128)
    assert [rows.min(), rows.max(), columns.min(), columns.max()] == pytest.approx([37, 182, 329, 475], abs=14)
    assert picture["slice"] is None and picture["text"] == "The X-ray with the network's attention"


def test_slices_and_slabs_of_a_volume(files: Any, upload: Any, embedder: Embedder) -> None:
    path = files.nifti("scan.nii")
    answer = upload(path)[1]
    found = embedder.images(path, progress=False)
    assert found.selected is not None and found.scores is not None
    selected, scores = sorted(found.selected[0].tolist()), found.scores[0]
    assert [picture["slice"] for picture in answer["pictures"]] == selected and len(selected) == 2
    relative = scores / scores.mean()
    assert [slab["score"] for slab in answer["slabs"]] == pytest.approx(relative.tolist(), abs=1e-5)
    # 16 slices in 4 slabs
    assert [slab["selected"] for slab in answer["slabs"]] == [i in {s // 4 for s in selected} for i in range(4)]
    view = volume_view(path, embedder.card["preprocessing"]["ct"])
    low, high = np.percentile(view.shown, (0.5, 99.5))
    for picture, index in zip(answer["pictures"], selected, strict=True):
        grey = np.rint(255 * np.clip((view.shown[index] - low) / (high - low), 0, 1))
        assert np.array_equal(pixels(picture["image"]), grey)
        assert picture["score"] == pytest.approx(relative[index // 4], abs=1e-5)
        # 26 slices in the file for 16 of the input
        assert picture["file_slice"] == int((index + 0.5) * 26 / 16) + 1


def test_neighbours(upload: Any, index: EmbeddingIndex, embedder: Embedder) -> None:
    for row in (1, 3):
        entry = index.entries[row]
        neighbours = upload(Path(entry["source"]))[1]["neighbours"]
        studies, reports = neighbours["studies"], neighbours["reports"]
        assert studies[0]["id"] == entry["id"] and studies[0]["similarity"] == pytest.approx(1, abs=1e-3)
        embed = index.embeddings.embed
        wanted = {index.entries[i]["id"]: float(embed[i] @ embed[row]) for i in range(5)}
        assert {hit["id"]: hit["similarity"] for hit in studies} == pytest.approx(wanted, abs=1e-3)
        assert {hit["id"]: hit["dim"] for hit in studies} == {"x0": 2, "x1": 2, "x2": 2, "v0": 3, "v1": 3}
        # x0 and x2 share a report, which is shown once; texts come as they are
        assert sorted(hit["text"] for hit in reports) == [
            "clear lungs.",
            "edema <b>number 0</b>.",
            "edema <b>number 1</b>.",
            "large pleural effusion.",
        ]
        assert all(hit["kind"] == "report" and hit["thumbnail"] == "" for hit in reports)
        texts = {hit["id"]: hit["text"] for hit in studies}
        assert texts["x2"] == "clear lungs." and texts["v1"] == "edema <b>number 1</b>."
        for hits in (studies, reports):
            values = [hit["similarity"] for hit in hits]
            assert values == sorted(values, reverse=True)


def test_search_by_sentence(client: TestClient, index: EmbeddingIndex, embedder: Embedder) -> None:
    found = client.post("/api/search", json={"text": "Large  pleural effusion."}).json()
    assert found["reports"][0]["id"] == "x1" and found["reports"][0]["similarity"] == pytest.approx(1, abs=1e-3)
    for hit in found["studies"]:
        vector = embedder.sentences(["large pleural effusion."], hit["dim"]).numpy()[0]
        row = index.embeddings.ids.index(hit["id"])
        assert hit["similarity"] == pytest.approx(float(index.embeddings.embed[row] @ vector), abs=1e-3)
    for text, words in (("  12 ?", "the text holds no word"), ("a" * 6000, "has 6000 characters, more than 5000")):
        answer = client.post("/api/search", json={"text": text})
        assert answer.status_code == 400 and words in answer.json()["error"]


def test_thumbnails_are_of_the_index_alone(
    client: TestClient, upload: Any, files: Any, embedder: Embedder, tmp_path: Path
) -> None:
    studies = upload(files.picture("a.png"))[1]["neighbours"]["studies"]
    assert len(studies) == 5
    for hit in studies:
        answer = client.get(hit["thumbnail"])
        assert answer.headers["content-type"] == "image/png"
        shown = np.asarray(Image.open(io.BytesIO(answer.content)))
        assert shown.shape in ((160, 160), (168, 168)) and shown.std() > 10
    for row in ("5", "-1", "99", "1e3", "..%2f..%2fetc%2fpasswd"):
        answer = client.get(f"/api/thumbnail/{row}")
        assert answer.status_code in (400, 404) and answer.json()["error"]
    # a study whose file is gone has no address, and a file that is no image gives none
    rows = np.eye(2, 16, dtype=np.float32)
    sources = [str(tmp_path / "gone.png"), str(files.raw("notes.png", b"text"))]
    entries = [{"id": s, "kind": "image", "dim": 2, "source": s, "text": ""} for s in sources]
    other = Analyser(embedder, {}, EmbeddingIndex(Embeddings(rows, entries, embedder.model)))
    hits = {hit.id: hit.thumbnail for hit in other.sentence("effusion").studies}
    assert hits == {sources[0]: "", sources[1]: "/api/thumbnail/1"} and other.thumbnail(1) is None


def test_without_index_and_prompts(embedder: Embedder, files: Any, prompts: dict[int, PromptSet]) -> None:
    with TestClient(create_app(Analyser(embedder, {2: prompts[2]})), base_url="http://localhost") as client:
        about = client.get("/api/about").json()
        assert about["index"] == {} and about["prompts"] == {"2": "chest_xray"} and not about["phantoms"]
        assert about["model"] == embedder.model and about["max_upload_bytes"] == 512 * 2**20
        path = files.nifti("scan.nii")
        answer = client.post("/api/analyse", files=[("files", (path.name, path.read_bytes()))]).json()
        assert answer["findings"] == [] and answer["prompts"] == "" and answer["neighbours"] is None
        assert len(answer["pictures"]) == 2
        refused = client.post("/api/search", json={"text": "edema"})
        assert refused.status_code == 400 and "Start the server with --index" in refused.json()["error"]


def test_an_index_of_another_model_is_refused(embedder: Embedder, prompts: dict[int, PromptSet]) -> None:
    entry = {"id": "a", "kind": "report", "dim": 2, "source": "", "text": "clear."}
    other = EmbeddingIndex(Embeddings(np.eye(1, 16, dtype=np.float32), [entry], "f" * 64))
    with pytest.raises(
        ConfigError, match=f"the index was made with model ffffffffffff, the query with {embedder.model[:12]}"
    ):
        Analyser(embedder, prompts, other)
