# SPDX-License-Identifier: Apache-2.0
"""The commands embed, index and search: files and sentences in the common space."""

from __future__ import annotations

import glob
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimedi_components.command_options import CHECKPOINT, check_options, whole_number
from unimedi_components.errors import ConfigError
from unimedi_components.lazy import importing

if TYPE_CHECKING:
    from unimedi_components.retrieval.embeddings import Embeddings
    from unimedi_components.retrieval.index import Hit

_WORDS = 60
# what nobody means as a sentence: no blank, and a slash or an ending
_PATH_LIKE = re.compile(r"\S*/\S*|\S+\.\w+")


def embed(
    *paths: str, checkpoint: str = CHECKPOINT, out: str = "embeddings.npz", device: str = "auto", **options: Any
) -> None:
    """Embed X-rays and CT volumes: DICOM files and series folders, NIfTI, PNG and JPG, or folders of them.

    The npz holds "embed", unit vectors of the space that images and reports share, "cls", "scores" and "selected" of
    volumes' slices, "id", "dim", and as JSON text "entries", "card" (the preparation of the images) and "skipped".

    Args:
        paths: files, folders or patterns.
        checkpoint: weights that a pre-training run left.
        out: the npz to write.
        device: cpu, cuda, or auto for a GPU where there is one.
        options: --batch_2d, --batch_3d, --num_workers, --strict (an unreadable file is an error), --assume_hu (take
            CT values for Hounsfield units that do not say how they are rescaled).
    """
    with importing():
        from unimedi_components.retrieval.embedder import Embedder

    if not paths:
        raise ConfigError("embed: name at least one file or folder")
    check_options("embed", Embedder.images, options)
    found = Embedder(str(checkpoint), str(device)).images([str(path) for path in paths], **options)
    _print_written(found.save(_npz(out)), found)


def index(
    out: str,
    *paths: str,
    datalist: str | None = None,
    root: str | None = None,
    split: str = "all",
    reports: str | None = None,
    dim: int | None = None,
    checkpoint: str = CHECKPOINT,
    device: str = "auto",
    **options: Any,
) -> None:
    """Embed images, and reports where they are known, into an index that the command search reads.

    Args:
        out: the npz to write.
        paths: files, folders or patterns of images without reports.
        datalist: a JSON file that prepare wrote: its images and their reports.
        root: folder that the datalist's image paths are relative to; by default the datalist's own.
        split: training, validation, test, or all of the datalist.
        reports: a csv with the columns id and report, and dim (2 for X-rays, 3 for volumes) unless --dim gives it.
        dim: what the reports of the csv are about.
        checkpoint: weights that a pre-training run left; search needs the same.
        device: cpu, cuda, or auto for a GPU where there is one.
        options: --batch_2d, --batch_3d, --num_workers, --strict (an unreadable file is an error), --assume_hu (take
            CT values for Hounsfield units that do not say how they are rescaled).
    """
    with importing():
        from unimedi_components.data.table import read_reports
        from unimedi_components.retrieval.embedder import Embedder
        from unimedi_components.retrieval.embeddings import Embeddings

    if not paths and datalist is None and reports is None:
        raise ConfigError("index: name images, or give --datalist or --reports")
    if dim is not None:
        _check_dim(dim)
    check_options("index", Embedder.images, options)
    embedder, parts = Embedder(str(checkpoint), str(device)), []
    # what is wrong with the tables is said before minutes go into images
    texts = read_reports(str(reports), dim, embedder.pretrained.keep_punct) if reports is not None else []
    if datalist is not None:
        folder = Path(str(datalist)).absolute().parent if root is None else str(root)
        of_items = {name: value for name, value in options.items() if name != "assume_hu"}
        parts.append(embedder.datalist(str(datalist), folder, str(split), **of_items))
    if paths:
        parts.append(embedder.images([str(path) for path in paths], **options))
    if texts:
        parts.append(embedder.reports(texts))
    found = Embeddings.join(parts)
    _print_written(found.save(_npz(out)), found)


def search(
    index: str,
    *queries: str,
    k: int = 5,
    kind: str | None = None,
    dim: int | None = None,
    text: bool = False,
    checkpoint: str = CHECKPOINT,
    device: str = "auto",
    backend: str = "exact",
    json: str | None = None,
) -> None:
    """Find what is nearest to a sentence, an X-ray or a volume in an index that the command index wrote.

    Args:
        index: the npz.
        queries: sentences, and files or folders of images; each image is a query of its own.
        k: neighbours of each.
        kind: image or report alone.
        dim: 2 for X-rays and their reports alone, 3 for volumes and theirs.
        text: take every query for a sentence, even if a file has this name.
        checkpoint: the weights that the index was made with.
        device: cpu, cuda, or auto for a GPU where there is one.
        backend: exact, or faiss (approximate, for millions of entries; needs the extra faiss).
        json: file to write the neighbours to.
    """
    with importing():
        from unimedi_components.data.datalist import write_json
        from unimedi_components.retrieval.embedder import Embedder
        from unimedi_components.retrieval.index import EmbeddingIndex

    if not queries:
        raise ConfigError("search: give at least one sentence or image")
    whole_number("k", k, 1)
    if dim is not None:
        _check_dim(dim)
    words = [str(query) for query in queries]
    sentences = [word for word in words if text or not _is_file(word)]
    files = [word for word in words if word not in sentences]
    searched, embedder = EmbeddingIndex.load(str(index), str(backend)), Embedder(str(checkpoint), str(device))
    searched.check_query(embedder.model, k, kind, dim)
    found: list[tuple[str, list[Hit]]] = []
    if sentences:
        vectors = {d: embedder.sentences(sentences, d).numpy() for d in (2, 3)}
        found += zip(sentences, searched.query(vectors, embedder.model, k, kind, dim), strict=True)
    if files:
        images = embedder.images(files)
        print_skipped(images)
        names = [entry["source"] for entry in images.entries]
        found += zip(names, searched.query(images.embed, embedder.model, k, kind, dim), strict=True)
    for query, hits in found:
        print("\n".join(_hit_lines(query, hits)))
    if json is not None:
        rows = [
            {
                "query": query,
                "hits": [{"rank": rank, "similarity": hit.score, **hit.entry} for rank, hit in _ranked(hits)],
            }
            for query, hits in found
        ]
        write_json(rows, str(json))


def _is_file(query: str) -> bool:
    place = os.path.expanduser(query)
    if os.path.exists(place) or glob.glob(place, recursive=True):
        return True
    if _PATH_LIKE.fullmatch(query):
        raise ConfigError(f"{query}: no such file or folder; --text searches for it as a sentence")
    return False


def _check_dim(dim: Any) -> None:
    if isinstance(dim, bool) or dim not in (2, 3):
        raise ConfigError(f"--dim must be 2 (X-rays) or 3 (volumes), got {dim!r}")


def _npz(out: str) -> str:
    return str(out) if str(out).endswith(".npz") else f"{out}.npz"


def print_skipped(found: Embeddings) -> None:
    """List what was left out, and why."""
    for record in found.skipped:
        print(f"skipped {record['file']}: {record['reason']}")


def _print_written(path: Path, found: Embeddings) -> None:
    print_skipped(found)
    counts = {(kind, dim): 0 for kind in ("image", "report") for dim in (2, 3)}
    for entry in found.entries:
        counts[entry["kind"], entry["dim"]] += 1
    texts = counts["report", 2] + counts["report", 3]
    print(
        f"{path}: {counts['image', 2]} X-rays and {counts['image', 3]} volumes{f', {texts} reports' if texts else ''}, "
        f"{len(found.skipped)} left out"
    )


def _ranked(hits: Sequence[Hit]) -> list[tuple[int, Hit]]:
    return list(enumerate(hits, 1))


def _hit_lines(query: str, hits: Sequence[Hit]) -> list[str]:
    width = max((len(hit.entry["id"]) for hit in hits), default=2)
    lines = [f"\n{query}", f"rank  similarity  kind    dim  {'id':<{width}}  report or file"]
    for rank, hit in _ranked(hits):
        entry = hit.entry
        words = textwrap.shorten(entry["text"], _WORDS, placeholder=" ...") or entry["source"]
        place = f"{entry['kind']:<6}  {entry['dim']:>3}  {entry['id']:<{width}}"
        lines.append(f"{rank:>4}  {hit.score:>10.4f}  {place}  {words}")
    return lines if hits else [*lines, "      nothing of this kind in the index"]
