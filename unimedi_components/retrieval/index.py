# SPDX-License-Identifier: Apache-2.0
"""Nearest neighbours among embeddings of images, volumes and reports: exactly, or with FAISS for millions of rows.

Letters: N rows, E their width, Q queries.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from unimedi_components.arrays import Array
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.retrieval.embeddings import KINDS, Embeddings, finite_rows

BACKENDS = ("exact", "faiss")
# below this many rows, exact search takes milliseconds
_EXACT_BELOW = 10_000


class Hit(NamedTuple):
    """One neighbour: cosine similarity, and the entry of `Embeddings` that it is."""

    score: float
    entry: dict[str, Any]


class Exact:
    """One matrix product and the K largest. ``rows``: (N, E) float32."""

    def __init__(self, rows: Array) -> None:
        # in this layout the product for one query is fastest
        self.columns = torch.from_numpy(np.ascontiguousarray(rows.T, dtype=np.float32))

    def nearest(self, queries: Array, k: int) -> tuple[Array, Array]:
        """Inner products and places, (Q, k) each, the largest first, as of numpy."""
        scores, places = (torch.from_numpy(queries) @ self.columns).topk(k, dim=1)
        return scores.numpy(), places.numpy()


class Approximate:
    """FAISS's inverted lists (IndexIVFFlat): rows in clusters, of which a query looks into the nearest few.

    Raises ConfigError: FAISS is not installed, or `lists` or `probes` is not a whole number of at least 1.

    Args:
        rows: (N, E) float32 of unit norm; fewer than 10,000 are searched exactly, which is as fast.
        lists: clusters; None for the square root of N.
        probes: clusters that a query looks into, more for a higher recall; None for a sixteenth of them, at least 8.
    """

    def __init__(self, rows: Array, lists: int | None = None, probes: int | None = None) -> None:
        try:
            import faiss
        except ImportError:
            raise ConfigError(
                "the backend 'faiss' needs FAISS; install it with pip install 'unimedi-components[faiss]', or use "
                "the backend 'exact'"
            ) from None
        for name, value in (("lists", lists), ("probes", probes)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
        data = np.ascontiguousarray(rows, dtype=np.float32)
        count, width = data.shape
        self.index: Any = faiss.IndexFlatIP(width)
        if count >= _EXACT_BELOW:
            lists = min(lists or math.isqrt(count), count)
            self.index = faiss.IndexIVFFlat(self.index, width, lists, faiss.METRIC_INNER_PRODUCT)
            self.index.nprobe = min(probes or max(8, lists // 16), lists)
            self.index.train(data)
        self.index.add(data)

    def nearest(self, queries: Array, k: int) -> tuple[Array, Array]:
        scores, places = self.index.search(queries, k)
        return scores, places


def make_neighbours(
    rows: Array, backend: str, lists: int | None = None, probes: int | None = None
) -> Exact | Approximate:
    """The search among rows (N, E) that a backend's name stands for; errors as of `EmbeddingIndex`."""
    if backend not in BACKENDS:
        raise ConfigError(f"the backend {backend!r} is unknown; use {' or '.join(BACKENDS)}")
    if backend == "faiss":
        return Approximate(rows, lists, probes)
    if lists is not None or probes is not None:
        raise ConfigError("lists and probes are options of the backend 'faiss'; leave them out for 'exact'")
    return Exact(rows)


class EmbeddingIndex:
    """Search by cosine similarity, within and across X-rays, volumes and reports.

    By default it is exact and gives numpy's result. For millions of entries there is FAISS, from the extra
    `unimedi-components[faiss]`: its search is approximate, and may miss a neighbour. Raises ConfigError: an unknown
    backend, options that it does not have, or FAISS is not installed; DataError: there is nothing to search, or a row
    is not finite.

    Args:
        embeddings: what is searched; its model's hash is kept, and the queries of another model are refused.
        backend: "exact" or "faiss".
        lists, probes: of FAISS, see `Approximate`; None chooses them by the number of entries.
    """

    def __init__(
        self, embeddings: Embeddings, backend: str = "exact", lists: int | None = None, probes: int | None = None
    ) -> None:
        if not len(embeddings):
            raise DataError("no embedding to search; embed at least one image or report")
        if not np.isfinite(embeddings.embed).all():
            raise DataError("an embedding is not finite; the network that made it diverged, train it again")
        self.embeddings = embeddings
        self.model, self.entries = embeddings.model, embeddings.entries
        kinds = np.asarray([KINDS.index(entry["kind"]) for entry in self.entries])
        dims = embeddings.dims
        # one part per kind and dimension: a sentence has one vector for X-rays and another for volumes
        self._parts: dict[tuple[str, int], tuple[Array, Exact | Approximate]] = {}
        for kind in KINDS:
            for dim in (2, 3):
                rows = np.flatnonzero((kinds == KINDS.index(kind)) & (dims == dim))
                if len(rows):
                    self._parts[kind, dim] = rows, make_neighbours(embeddings.embed[rows], backend, lists, probes)

    def __len__(self) -> int:
        return len(self.entries)

    def query(
        self,
        vectors: Array | Mapping[int, Array],
        model: str,
        k: int = 10,
        kind: str | None = None,
        dim: int | None = None,
    ) -> list[list[Hit]]:
        """The K nearest entries of each query, the nearest first; equal similarities in the entries' order.

        Raises ConfigError: the queries are of another model, or `k`, `kind` or `dim` is none that there is; DataError:
        the queries have another width or are not finite.

        Args:
            vectors: (Q, E) of unit norm, or one such array for each dimension, as sentences have.
            model: hash of the model that made them.
            kind: "image" or "report" alone.
        """
        self.check_query(model, k, kind, dim)
        by_dim = vectors if isinstance(vectors, Mapping) else {2: vectors, 3: vectors}
        count = {len(part) for part in by_dim.values()}
        if len(count) != 1:
            raise DataError(f"queries differ in number between dimensions: {sorted(count)}")
        (queries,) = count
        found: list[list[tuple[float, int]]] = [[] for _ in range(queries)]
        for (own_kind, own_dim), (rows, search) in self._parts.items():
            if own_dim in by_dim and kind in (None, own_kind) and dim in (None, own_dim):
                asked = finite_rows(by_dim[own_dim], self.embeddings.embed.shape[1], "queries")
                scores, places = search.nearest(asked, min(k, len(rows)))
                for query in range(queries):
                    pairs = zip(scores[query], places[query], strict=True)
                    found[query] += [(float(score), int(rows[place])) for score, place in pairs if place >= 0]
        ordered = (sorted(pairs, key=lambda pair: (-pair[0], pair[1])) for pairs in found)
        return [[Hit(score, self.entries[row]) for score, row in pairs[:k]] for pairs in ordered]

    def check_model(self, model: str) -> None:
        """Pass where the weights are those that the index was made with. Raises ConfigError: they are others."""
        if model != self.model:
            raise ConfigError(
                f"the index was made with model {self.model[:12]}, the query with {model[:12]}; embed the query with "
                "the index's checkpoint, or make the index again"
            )

    def check_query(self, model: str, k: int, kind: str | None, dim: int | None) -> None:
        """Raise what `query` would raise for these arguments, before the queries are embedded."""
        self.check_model(model)
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ConfigError(f"k must be a whole number of at least 1, not {k!r}")
        if kind not in (None, *KINDS) or dim not in (None, 2, 3):
            raise ConfigError(f"kind {kind!r} and dim {dim!r}: use image or report, and 2 or 3, or leave them out")

    def save(self, path: str | Path) -> Path:
        """Write the embeddings; the index itself is built again when loaded."""
        return self.embeddings.save(path)

    @classmethod
    def load(cls, path: str | Path, backend: str = "exact", **options: Any) -> Self:
        return cls(Embeddings.load(path), backend, **options)
