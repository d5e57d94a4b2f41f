# SPDX-License-Identifier: Apache-2.0
"""The K rows with the largest inner product: exactly with torch, or approximately with FAISS for millions of rows.

Letters: N rows, E their width, Q queries.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from unimedi_components.errors import ConfigError

__all__ = ["BACKENDS", "Approximate", "Exact", "Neighbours", "make_neighbours"]

Array = npt.NDArray[Any]

BACKENDS = ("exact", "faiss")
# below this many rows, exact search takes milliseconds
_EXACT_BELOW = 10_000


class Neighbours(Protocol):
    """What finds neighbours."""

    def nearest(self, queries: Array, k: int) -> tuple[Array, Array]:
        """Inner products and places, (Q, k) each, the largest first; a place is -1 where none was found."""


class Exact:
    """One matrix product and the K largest.

    Args:
        rows: (N, E) float32.
    """

    def __init__(self, rows: Array) -> None:
        # in this layout the product for one query is fastest
        self.columns = torch.from_numpy(np.ascontiguousarray(rows.T, dtype=np.float32))

    def nearest(self, queries: Array, k: int) -> tuple[Array, Array]:
        """See `Neighbours`; numpy's result."""
        scores, places = (torch.from_numpy(queries) @ self.columns).topk(k, dim=1)
        return scores.numpy(), places.numpy()


class Approximate:
    """FAISS's inverted lists (IndexIVFFlat): rows in clusters, of which a query looks into the nearest few.

    Args:
        rows: (N, E) float32 of unit norm; fewer than 10,000 are searched exactly, which is as fast.
        lists: clusters; None for the square root of N.
        probes: clusters that a query looks into, more for a higher recall; None for a sixteenth of them, at least 8.

    Raises:
        ConfigError: FAISS is not installed, or `lists` or `probes` is not a whole number of at least 1.
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
        """See `Neighbours`."""
        scores, places = self.index.search(queries, k)
        return scores, places


def make_neighbours(rows: Array, backend: str, lists: int | None = None, probes: int | None = None) -> Neighbours:
    """The search among rows that a backend's name stands for.

    Args:
        rows: (N, E).
        backend: of `BACKENDS`.
        lists, probes: see `Approximate`.

    Raises:
        ConfigError: an unknown backend, options that it does not have, or FAISS is missing.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"the backend {backend!r} is unknown; use {' or '.join(BACKENDS)}")
    if backend == "faiss":
        return Approximate(rows, lists, probes)
    if lists is not None or probes is not None:
        raise ConfigError("lists and probes are options of the backend 'faiss'; leave them out for 'exact'")
    return Exact(rows)
