# SPDX-License-Identifier: Apache-2.0
"""FAISS as the backend of an index, against exact search."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from unimedi_components.errors import ConfigError
from unimedi_components.retrieval import EmbeddingIndex, Embeddings
from unimedi_components.retrieval.index import Approximate, Exact, make_neighbours

WIDTH, CENTRES, NOISE = 32, 200, 0.5


def clustered(count, seed):
    """Unit vectors around common centres, as embeddings of studies with like findings are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(CENTRES, WIDTH))
    rows = centres[rng.integers(CENTRES, size=count)] + NOISE * rng.normal(size=(count, WIDTH))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def recall(found, expected):
    return np.mean([len(set(row) & set(truth)) / len(truth) for row, truth in zip(found, expected, strict=True)])


def test_exact_equals_numpy():
    rows, queries = clustered(500, 1), clustered(7, 2)
    scores, places = Exact(rows).nearest(queries, 9)
    similarity = queries @ rows.T
    np.testing.assert_array_equal(places, np.argsort(-similarity, axis=1)[:, :9])
    np.testing.assert_allclose(scores, -np.sort(-similarity, axis=1)[:, :9], atol=1e-6)


def test_faiss_finds_almost_all_neighbours_in_clusters():
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    rows, queries = clustered(12_000, 1), clustered(100, 2)
    expected_scores, expected = Exact(rows).nearest(queries, 10)
    default = Approximate(rows)
    # the square root of 12,000, and at least eight of the clusters
    assert (default.index.nlist, default.index.nprobe) == (109, 8)
    scores, places = default.nearest(queries, 10)
    assert recall(places, expected) >= 0.95
    np.testing.assert_allclose(scores, np.sum(queries[:, None] * rows[places], axis=2), atol=1e-5)
    assert recall(Approximate(rows, probes=1).nearest(queries, 10)[1], expected) < recall(places, expected)
    scores, places = Approximate(rows, lists=20, probes=20).nearest(queries, 10)
    assert recall(places, expected) == 1
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)


def test_an_index_on_faiss_gives_the_hits_of_the_exact_one(tmp_path):
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    entries = [
        {"id": f"s{i // 2}", "kind": ("image", "report")[i % 2], "dim": 2, "source": "", "text": ""} for i in range(400)
    ]
    embeddings, queries = Embeddings(clustered(400, 1), entries, "m1"), clustered(5, 2)
    path = EmbeddingIndex(embeddings, backend="faiss").save(tmp_path / "index.npz")
    exact = EmbeddingIndex.load(path)
    approximate = EmbeddingIndex.load(path, backend="faiss", lists=4, probes=4)
    for options in ({}, {"kind": "image", "k": 500}):
        for found, expected in zip(
            approximate.query(queries, "m1", **options), exact.query(queries, "m1", **options), strict=True
        ):
            assert [hit.entry for hit in found] == [hit.entry for hit in expected]
            np.testing.assert_allclose([hit.score for hit in found], [hit.score for hit in expected], atol=1e-6)
    with pytest.raises(ConfigError, match="index was made with model m1, the query with m2"):
        approximate.query(queries, "m2")


def test_fewer_neighbours_come_where_the_lists_hold_fewer():
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    rows = clustered(10_000, 1)
    entries = [{"id": f"s{i}", "kind": "image", "dim": 3, "source": "", "text": ""} for i in range(len(rows))]
    index = EmbeddingIndex(Embeddings(rows, entries, "m1"), backend="faiss", lists=100, probes=1)
    (hits,) = index.query(rows[:1], "m1", k=5000)
    assert hits[0].entry["id"] == "s0" and 1 <= len(hits) < 5000


def test_faults(monkeypatch):
    rows = clustered(20, 1)
    with pytest.raises(ConfigError, match="the backend 'annoy' is unknown; use exact or faiss"):
        make_neighbours(rows, "annoy")
    with pytest.raises(ConfigError, match="lists and probes are options of the backend 'faiss'"):
        make_neighbours(rows, "exact", probes=3)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"needs FAISS; install it with pip install 'unimedi-components\[faiss\]'"):
        make_neighbours(rows, "faiss")


@pytest.mark.parametrize("options", [{"lists": 0}, {"probes": -1}, {"probes": True}, {"lists": 2.5}])
def test_options_of_faiss_are_whole_numbers(options):
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    with pytest.raises(ConfigError, match="must be a whole number of at least 1"):
        make_neighbours(clustered(20, 1), "faiss", **options)
