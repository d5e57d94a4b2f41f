# SPDX-License-Identifier: Apache-2.0
"""Search among many embeddings on one thread: `EmbeddingIndex` beside numpy, scikit-learn and FAISS.

Run from the repository's root: `python -m benchmarks.search --json results/search.json`. Unit vectors are
random, where approximate search must fail, and clustered, as embeddings of studies with like findings are. Queries come
one at a time, in turn for all searchers, so that a busy machine slows all of them. The bars: the exact
index of random vectors is built in a minute and answers in 50 ms (median), with numpy's neighbours and similarities.
"""

from __future__ import annotations

import json as json_module
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from unimedi_components.retrieval import EmbeddingIndex, Embeddings

K = 10
MAX_BUILD_SECONDS, MAX_QUERY_MS = 60.0, 50.0
_CENTRES, _NOISE = 2000, 1.0

Search = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def search(json: str | None = None, count: int = 100_000, width: int = 512, queries: int = 50, seed: int = 0) -> Any:
    """Build each searcher and time single queries.

    Args:
        json: file for the result.
        count: vectors.
        width: of a vector.
        queries: timed queries.
        seed: of the vectors.
    """
    torch.set_num_threads(1)
    rows, equal = [], {}
    with threadpool_limits(1):
        for kind in ("random", "clustered"):
            part, same = _measure(kind, _vectors(kind, count + queries, width, seed), queries)
            rows += part
            equal[kind] = same
    exact = next(row for row in rows if row["searcher"] == "exact index" and row["vectors"] == "random")
    limits = {"build_seconds": MAX_BUILD_SECONDS, "query_ms_median": MAX_QUERY_MS}
    bars: list[dict[str, Any]] = [
        {"name": f"exact index {name}", "value": exact[name], "limit": limit, "holds": exact[name] <= limit}
        for name, limit in limits.items()
    ]
    bars += [
        {"name": f"largest difference from numpy, {kind}", "value": value, "limit": 1e-5, "holds": value <= 1e-5}
        for kind, value in equal.items()
    ]
    result = {"machine": _machine(), "count": count, "width": width, "k": K, "rows": rows, "bars": bars}
    if json is not None:
        Path(json).parent.mkdir(parents=True, exist_ok=True)
        Path(json).write_text(json_module.dumps(result, indent=1), encoding="utf-8")
    print(json_module.dumps(result, indent=1))
    return result


def _vectors(kind: str, count: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, width), dtype=np.float32)
    if kind == "clustered":
        centres = rng.standard_normal((_CENTRES, width), dtype=np.float32)
        rows = centres[rng.integers(_CENTRES, size=count)] + _NOISE * rows
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _measure(kind: str, vectors: np.ndarray, queries: int) -> tuple[list[dict[str, Any]], float]:
    """A row per searcher, and by how much the exact index differs from numpy; infinite for other neighbours."""
    data, asked = vectors[:-queries], vectors[-queries:]
    searchers, build = {}, {}
    for name, make in _MAKERS.items():
        started = time.perf_counter()
        searchers[name] = make(data)
        build[name] = time.perf_counter() - started
    times: dict[str, list[float]] = {name: [] for name in searchers}
    found: dict[str, list[Any]] = {name: [] for name in searchers}
    for query in (asked[:1], *np.split(asked, queries)):
        for name, run in searchers.items():
            started = time.perf_counter()
            answer = run(query)
            times[name].append(1000 * (time.perf_counter() - started))
            found[name].append(answer)
    rows = []
    for name in searchers:
        own = times[name][1:]  # the first one warms up
        pairs = zip(found[name], found["numpy"], strict=True)
        recall = float(np.mean([np.isin(truth, places).mean() for (_, places), (_, truth) in pairs]))
        rows.append(
            {
                "searcher": name,
                "vectors": kind,
                "build_seconds": build[name],
                "query_ms_median": float(np.median(own)),
                "query_ms_least": min(own),
                "query_ms": own,
                "recall_at_10": recall,
            }
        )
    difference = 0.0
    for (score, place), (true_score, true_place) in zip(found["exact index"], found["numpy"], strict=True):
        same = np.array_equal(place, true_place)
        difference = max(difference, float(np.abs(score - true_score).max())) if same else float("inf")
    return rows, difference


def _numpy(data: np.ndarray) -> Search:
    def run(query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores = data @ query[0]
        places = np.argpartition(-scores, K)[:K]
        places = places[np.argsort(-scores[places], kind="stable")]
        return scores[places], places

    return run


def _index(backend: str) -> Callable[[np.ndarray], Search]:
    def make(data: np.ndarray) -> Search:
        entries = [{"id": str(i), "kind": "image", "dim": 2, "source": "", "text": ""} for i in range(len(data))]
        index = EmbeddingIndex(Embeddings(data, entries, "model"), backend)

        def run(query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            (hits,) = index.query(query, "model", K)
            return np.asarray([hit.score for hit in hits]), np.asarray([int(hit.entry["id"]) for hit in hits])

        return run

    return make


def _scikit_learn(data: np.ndarray) -> Search:
    # the neighbours of unit vectors are the same by distance, which it finds faster than by cosine
    neighbours = NearestNeighbors(n_neighbors=K, algorithm="brute", metric="euclidean").fit(data)

    def run(query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        distances, places = neighbours.kneighbors(query)
        return 1 - distances[0] ** 2 / 2, places[0]

    return run


def _faiss_flat(data: np.ndarray) -> Search:
    import faiss

    index = faiss.IndexFlatIP(data.shape[1])
    index.add(data)

    def run(query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores, places = index.search(query, K)
        return scores[0], places[0]

    return run


_MAKERS: dict[str, Callable[[np.ndarray], Search]] = {
    "numpy": _numpy,
    "exact index": _index("exact"),
    "scikit-learn brute force": _scikit_learn,
    "faiss flat": _faiss_flat,
    "faiss index": _index("faiss"),
}


def _machine() -> dict[str, Any]:
    import faiss
    import sklearn

    return {
        "cpu": platform.processor() or platform.machine(),
        "threads": 1,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
        "faiss": faiss.__version__,
    }


if __name__ == "__main__":
    fire.Fire(search, serialize=lambda _: None)
