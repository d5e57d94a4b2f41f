# SPDX-License-Identifier: Apache-2.0
"""What is like an image, and what prompts say about it: the files that the retrieval bundle's inference writes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from unimedi_components.errors import ConfigError, DataError
from unimedi_components.figures.panels import draw_prediction
from unimedi_components.search.embedder import Embedder
from unimedi_components.search.embeddings import KINDS
from unimedi_components.search.index import EmbeddingIndex
from unimedi_components.search.prompts import load_prompt_sets
from unimedi_components.search.zero_shot import ZeroShot
from unimedi_components.tasks.writer import PredictionWriter, check_finite

__all__ = ["SaveNeighbours"]

_SHOWN = ("similarity", "source", "text")
# bars that a figure has room for
_MOST_BARS = 12


class SaveNeighbours(PredictionWriter):
    """Search for each image and classify it zero-shot; a postprocessing step after `engines.embed_batch`.

    - `predictions.json`: for each image "zero_shot", a probability for each finding, and "neighbours" by kind ("xray",
      "ct", "xray_report", "ct_report"), the nearest first, each with "similarity", "id", "source" and "text"; and the
      inputs that could not be read.
    - `neighbours.csv` and `zero_shot.csv`: the same, one line per neighbour and one per image and finding.
    - `<id>.png`: the image with Eq. 1's **v** over it and the highest probabilities; see `draw_prediction`.

    Args:
        output_dir, figures: see `PredictionWriter`; images that get probabilities have a figure.
        embedder: the network that the images go through.
        index: npz of `EmbeddingIndex`, made with the same weights; None searches nothing.
        prompts: prompt sets, at most one for each dimension; without one for a dimension its images get no probability.
        neighbours: of each kind.

    Raises:
        ConfigError: the index is of another model, `neighbours` is below 1, or there are two sets for one dimension.
        DataError: the index or a prompt set is missing or damaged.
    """

    def __init__(
        self,
        output_dir: str | Path,
        embedder: Embedder,
        index: str | Path | None = None,
        prompts: Sequence[str | Path] = ("chest_xray", "chest_ct"),
        neighbours: int = 5,
        figures: bool = True,
    ) -> None:
        super().__init__(output_dir, figures)
        self.embedder, self.count = embedder, neighbours
        if index is not None and not Path(index).is_file():
            raise DataError(
                f"{index}: no such file; evaluate.json makes it, 'python -m unimedi_components index FILE PATH...' one "
                "of your own, and --index '$None' classifies without one"
            )
        self.index = None if index is None else EmbeddingIndex.load(index)
        if self.index is not None:
            self.index.check_model(embedder.model)
        if neighbours < 1:
            raise ConfigError(f"neighbours is {neighbours}; at least 1 is needed, and index None searches nothing")
        self.zero_shot = {dim: ZeroShot(embedder, found) for dim, found in load_prompt_sets(prompts).items()}

    def row(self, name: str, data: Mapping[Hashable, Any]) -> dict[str, Any]:
        """What the prompts say about an embedding (E,), and what is nearest."""
        dim = int(data["dim"])
        embed = torch.as_tensor(data["pred"]).float().cpu().numpy()[None]
        check_finite(name, embed, "values of an embedding")
        row: dict[str, Any] = {"dim": dim, "zero_shot": {}, "neighbours": {}}
        if dim in self.zero_shot:
            values = self.zero_shot[dim].probabilities(embed)[0]
            row["zero_shot"] = {
                finding: round(float(value), 6)
                for finding, value in zip(self.zero_shot[dim].names, values, strict=True)
            }
        if self.index is not None:
            row["neighbours"] = self._search(self.index, embed)
        if self.figures and row["zero_shot"]:
            image, attention = (torch.as_tensor(data[key]).float().cpu().numpy() for key in ("image", "attention"))
            likeliest = dict(sorted(row["zero_shot"].items(), key=lambda pair: -pair[1])[:_MOST_BARS])
            chosen = tuple(finding for finding, value in likeliest.items() if value >= 0.5)
            draw_prediction(name, image[0], attention, likeliest, chosen, self.folder / f"{name}.png")
        return row

    def _search(self, index: EmbeddingIndex, embed: np.ndarray) -> dict[str, list[dict[str, Any]]]:
        found = {}
        for dim, modality in ((2, "xray"), (3, "ct")):
            for kind in KINDS:
                (hits,) = index.query(embed, self.embedder.model, self.count, kind, dim)
                name = modality if kind == "image" else f"{modality}_report"
                found[name] = [
                    {"similarity": round(hit.score, 6), **{key: hit.entry[key] for key in ("id", "source", "text")}}
                    for hit in hits
                ]
        return {name: hits for name, hits in found.items() if hits}

    def about(self) -> dict[str, Any]:
        """Model, index and prompts."""
        return {
            "model": self.embedder.model,
            "index": None if self.index is None else {"entries": len(self.index)},
            "prompts": {f"{dim}d": zero_shot.prompts.name for dim, zero_shot in self.zero_shot.items()},
        }

    def tables(self, rows: list[dict[str, Any]]) -> dict[str, pd.DataFrame]:
        """`neighbours.csv` and `zero_shot.csv`."""
        near = [
            {"id": row["id"], "kind": kind, "rank": rank, "neighbour": hit["id"], **{key: hit[key] for key in _SHOWN}}
            for row in rows
            for kind, hits in row["neighbours"].items()
            for rank, hit in enumerate(hits, 1)
        ]
        said = [
            {"id": row["id"], "finding": finding, "probability": value}
            for row in rows
            for finding, value in row["zero_shot"].items()
        ]
        return {
            "neighbours.csv": pd.DataFrame(near, columns=["id", "kind", "rank", "neighbour", *_SHOWN]),
            "zero_shot.csv": pd.DataFrame(said, columns=["id", "finding", "probability"]),
        }
