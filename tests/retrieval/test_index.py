# SPDX-License-Identifier: Apache-2.0
"""Embeddings on disk and search among them, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from unimedi_components.errors import ConfigError, DataError
from unimedi_components.retrieval import EmbeddingIndex, Embeddings

COUNT, WIDTH = 40, 8


def vectors(count, seed):
    rows = np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def entry(number):
    kind, dim = ("image", "report")[number % 2], 2 + number // 2 % 2
    return {"id": f"s{number // 2}", "kind": kind, "dim": dim, "source": f"{number}.png", "text": f"report {number}"}


@pytest.fixture
def embeddings():
    return Embeddings(vectors(COUNT, 0), [entry(number) for number in range(COUNT)], "m1", card={"a": 1})


def by_numpy(embeddings, query, k, keep):
    rows = [row for row in range(COUNT) if keep(embeddings.entries[row])]
    scores = embeddings.embed[rows] @ query
    order = np.argsort(-scores, kind="stable")[:k]
    return [rows[place] for place in order], scores[order]


@pytest.mark.parametrize(
    ("options", "keep"),
    [
        ({}, lambda entry: True),
        ({"kind": "image"}, lambda entry: entry["kind"] == "image"),
        ({"dim": 3}, lambda entry: entry["dim"] == 3),
        ({"kind": "report", "dim": 2}, lambda entry: (entry["kind"], entry["dim"]) == ("report", 2)),
        ({"k": 100}, lambda entry: True),
    ],
)
def test_neighbours_equal_numpys(embeddings, options, keep):
    index, queries = EmbeddingIndex(embeddings), vectors(5, 1)
    for query, hits in zip(queries, index.query(queries, "m1", **options), strict=True):
        rows, scores = by_numpy(embeddings, query, options.get("k", 10), keep)
        assert [hit.entry for hit in hits] == [embeddings.entries[row] for row in rows]
        np.testing.assert_allclose([hit.score for hit in hits], scores, atol=1e-6)


def test_a_sentence_has_a_vector_for_each_dimension(embeddings):
    index, two, three = EmbeddingIndex(embeddings), vectors(1, 2), vectors(1, 3)
    (hits,) = index.query({2: two, 3: three}, "m1", k=COUNT)
    for hit in hits:
        row = embeddings.entries.index(hit.entry)
        expected = embeddings.embed[row] @ (two if hit.entry["dim"] == 2 else three)[0]
        assert hit.score == pytest.approx(float(expected), abs=1e-6)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True) and len(hits) == COUNT


def test_files_come_back_and_refuse_other_models(embeddings, tmp_path):
    embeddings.cls = vectors(COUNT, 5)
    path = EmbeddingIndex(embeddings).save(tmp_path / "index.npz")
    index = EmbeddingIndex.load(path)
    assert np.array_equal(index.embeddings.embed, embeddings.embed) and index.entries == embeddings.entries
    assert np.array_equal(index.embeddings.cls, embeddings.cls) and index.embeddings.card["a"] == 1
    assert index.embeddings.scores is None
    with np.load(path) as content:
        assert content["id"].tolist() == embeddings.ids and content["dim"].tolist() == embeddings.dims.tolist()
    with pytest.raises(ConfigError, match="the index was made with model m1, the query with m2"):
        index.query(vectors(1, 0), "m2")
    with pytest.raises(DataError, match="different models"):
        Embeddings.join([embeddings, Embeddings(vectors(1, 0), [entry(0)], "m2")])


def test_faults(embeddings, tmp_path):
    index = EmbeddingIndex(embeddings)
    for options in ({"k": 0}, {"k": True}, {"kind": "images"}, {"dim": 4}):
        with pytest.raises(ConfigError):
            index.query(vectors(1, 0), "m1", **options)
    for query in (np.ones((1, WIDTH + 1)), np.full((1, WIDTH), np.nan)):
        with pytest.raises(DataError, match="not finite rows of 8 values"):
            index.query(query, "m1")
    with pytest.raises(DataError, match="no embedding to search"):
        EmbeddingIndex(Embeddings(np.zeros((0, WIDTH), np.float32), [], "m1"))
    with pytest.raises(DataError, match="no such file"):
        Embeddings.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match="holds no embeddings"):
        Embeddings.load(tmp_path / "text.npz")
    with pytest.raises(DataError, match="1 entries do not fit"):
        Embeddings(vectors(2, 0), [entry(0)], "m1")
