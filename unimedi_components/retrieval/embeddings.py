# SPDX-License-Identifier: Apache-2.0
"""Embeddings of images and reports with what they are of, as one npz file."""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from unimedi_components.arrays import Array
from unimedi_components.errors import DataError
from unimedi_components.files import replacing

KINDS = ("image", "report")
_ENTRY = ("id", "kind", "dim", "source", "text")


@dataclass
class Embeddings:
    """N embeddings of one model. Raises DataError: rows and entries differ in number, or an entry lacks a field.

    Args:
        embed: (N, E) float32 of unit norm, in the space that X-rays, volumes and reports share.
        entries: what each row is of: "id", "kind" ("image" or "report"), "dim" (2 for an X-ray or its report, 3 for a
            volume or its report), "source" (a file's path, or empty), "text" (a report, or empty).
        model: hash of the weights that made them, see `model_hash`.
        cls: (N, D) float32 CLS features before the projection, for probes; reports have none (NaN).
        scores: Eq. 2's slab scores of volumes, (N, S); NaN where a row has none.
        selected: selected slices of the network's input, from inferior to superior, (N, k); -1 where a row has none.
        card: how the network was built and its input prepared.
        skipped: {"id", "file", "reason"} of images that were left out.
    """

    embed: Array
    entries: list[dict[str, Any]]
    model: str
    cls: Array | None = None
    scores: Array | None = None
    selected: Array | None = None
    card: dict[str, Any] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.embed.ndim != 2 or len(self.embed) != len(self.entries):
            raise DataError(f"{len(self.entries)} entries do not fit embeddings of shape {self.embed.shape}")
        for number, entry in enumerate(self.entries):
            lacking = [name for name in _ENTRY if name not in entry]
            if lacking or entry["kind"] not in KINDS or entry["dim"] not in (2, 3):
                raise DataError(f"entry {number} ({entry.get('id')!r}): {lacking or entry} is not what an entry holds")

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def ids(self) -> list[str]:
        return [entry["id"] for entry in self.entries]

    @property
    def dims(self) -> Array:
        return np.asarray([entry["dim"] for entry in self.entries], dtype=np.int64)

    def save(self, path: str | Path) -> Path:
        """Write one npz file, whole or not at all, that loads without unpickling: arrays, and the rest as JSON."""
        path = Path(path)
        arrays = {name: value for name in ("cls", "scores", "selected") if (value := getattr(self, name)) is not None}
        texts = {"entries": self.entries, "card": self.card, "skipped": self.skipped, "model": self.model}
        content: dict[str, Any] = {name: np.asarray(json.dumps(value)) for name, value in texts.items()}
        # what a user looks for first, beside the entries
        content |= {"id": np.asarray(self.ids), "dim": self.dims, "embed": self.embed, **arrays}
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **content)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Raises DataError: missing, damaged, or something else."""
        try:
            with np.load(path, allow_pickle=False) as content:
                texts = {name: json.loads(str(content[name])) for name in ("entries", "card", "skipped", "model")}
                arrays = {name: content[name] for name in ("embed", "cls", "scores", "selected") if name in content}
        except FileNotFoundError:
            raise DataError(
                f"{path}: no such file; make it with 'python -m unimedi_components embed' or 'index'"
            ) from None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{path}: holds no embeddings ({reason}); make them again with 'embed'") from error
        return cls(**arrays, **texts)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Sets of one model as one, without CLS features, scores, slices. Raises DataError: none, or other models."""
        if not parts:
            raise DataError("no embeddings to join; name at least one file")
        if len({part.model for part in parts}) > 1:
            raise DataError("embeddings of different models cannot be compared; embed all of them with one checkpoint")
        entries = [entry for part in parts for entry in part.entries]
        embed = np.concatenate([part.embed for part in parts])
        return cls(embed, entries, parts[0].model, card=parts[0].card, skipped=[s for p in parts for s in p.skipped])


def finite_rows(rows: Array, width: int, name: str) -> Array:
    """Rows (N, width) as float32. Raises DataError, which calls them `name`: another width, or not finite."""
    array = np.ascontiguousarray(rows, dtype=np.float32)
    if array.ndim != 2 or array.shape[1] != width or not np.isfinite(array).all():
        raise DataError(f"{name} {array.shape} are not finite rows of {width} values")
    return array


def entry_of(name: str, kind: str, dim: int, source: str = "", text: str = "") -> dict[str, Any]:
    return {"id": name, "kind": kind, "dim": dim, "source": source, "text": text}
