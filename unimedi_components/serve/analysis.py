# SPDX-License-Identifier: Apache-2.0
"""What a trained network makes of one study or sentence: findings, what it looked at, neighbours."""

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from unimedi_components.arrays import Array
from unimedi_components.data.volume_loading import part_of
from unimedi_components.errors import DataError
from unimedi_components.retrieval.embedder import Embedder
from unimedi_components.retrieval.index import EmbeddingIndex, Hit
from unimedi_components.retrieval.prompts import PromptSet
from unimedi_components.retrieval.zero_shot import ZeroShot
from unimedi_components.serve.faults import bad_request
from unimedi_components.serve.results import Analysis, Finding, Neighbour, Neighbours, Picture, Slab
from unimedi_components.serve.study import Study
from unimedi_components.serve.views import View, data_url, grey_png, overlay_png, view_of, volume_view, xray_view

_THUMBNAIL, _KEPT = 160, 256
_MAX_TEXT = 5000
_MAX_PICTURES = 12
# neighbours looked at for each one shown, where several are the same
_SPARE = 8


class Analyser:
    """A trained network with what it is asked.

    Args:
        prompts: sets by the dimension that they are for, as `search.load_prompt_sets` gives them.
        index: what is searched for neighbours; None for no search.
        k: neighbours of each kind and dimension.

    Raises:
        ConfigError: the index is of another model.
    """

    def __init__(
        self,
        embedder: Embedder,
        prompts: Mapping[int, PromptSet] | None = None,
        index: EmbeddingIndex | None = None,
        k: int = 5,
    ) -> None:
        if index is not None:
            index.check_model(embedder.model)
        self.embedder, self.index, self.k = embedder, index, k
        self.prompts = dict(prompts or {})
        self.zero_shot = {dim: ZeroShot(embedder, one) for dim, one in self.prompts.items()}
        entries = [] if index is None else index.entries
        # hits hold these very entries
        self._rows = {id(entry): row for row, entry in enumerate(entries)}
        self._reports = {(e["id"], e["dim"]): e["text"] for e in entries if e["kind"] == "report" and e["text"]}
        self._thumbnails: OrderedDict[int, bytes] = OrderedDict()

    def study(self, study: Study) -> Analysis:
        """Analyse an uploaded study. Raises UploadError: it cannot be read."""
        start = time.perf_counter()
        view = view_of(study, self.embedder.card["preprocessing"])
        image = view.image[None].to(self.embedder.device)
        with torch.no_grad():
            found = self.embedder.encode(image)
        embed = F.normalize(found.embed.float(), dim=-1).cpu().numpy()
        assert found.attention is not None
        grid = self.embedder.token_grid(image)
        attention = found.attention[0].float().cpu().numpy().reshape(grid)
        selected, scores = found.selected, found.scores
        slabs: list[Slab] = []
        if scores is not None and selected is not None:
            chosen = sorted(int(index) for index in selected[0])
            slabs = _slabs(scores[0].float().cpu().numpy(), chosen, len(view.shown))
            pictures = _slices(view, attention, chosen, slabs)
        else:
            pictures = [_xray(view, attention)]
        prompts, zero_shot = self.prompts.get(study.dim), self.zero_shot.get(study.dim)
        findings = []
        if zero_shot is not None:
            pairs = zip(zero_shot.names, zero_shot.probabilities(embed)[0], strict=True)
            findings = [Finding(name, float(value)) for name, value in pairs]
        tokens = f"{' × '.join(map(str, grid))} tokens"
        return Analysis(
            name=study.name,
            kind="X-ray" if study.dim == 2 else "CT",
            dim=study.dim,
            seen={**study.facts, **view.facts, "Attention": f"over {tokens}"},
            warnings=[*study.warnings, *view.warnings],
            prompts="" if prompts is None else prompts.name,
            findings=findings,
            pictures=pictures,
            slabs=slabs,
            neighbours=None if self.index is None else self._neighbours(embed),
            seconds=round(time.perf_counter() - start, 2),
        )

    def sentence(self, text: str) -> Neighbours:
        """The reports and studies nearest to a sentence. Raises UploadError: no index, or no word in the text."""
        if self.index is None:
            raise bad_request("there is no index to search. Start the server with --index.")
        if len(text) > _MAX_TEXT:
            raise bad_request(f"the text has {len(text)} characters, more than {_MAX_TEXT}. Shorten it.")
        try:
            vectors = {dim: self.embedder.sentences([text], dim).numpy() for dim in (2, 3)}
        except DataError:
            raise bad_request("the text holds no word. Write a finding or a sentence of a report.") from None
        return self._neighbours(vectors)

    def _neighbours(self, vectors: Any) -> Neighbours:
        assert self.index is not None

        def nearest(kind: str, dim: int) -> list[Neighbour]:
            assert self.index is not None
            (hits,) = self.index.query(vectors, self.embedder.model, _SPARE * self.k, kind, dim)
            found = [self._neighbour(hit) for hit in hits]
            # one report of many images is shown once
            texts = [hit.text if kind == "report" else hit.id for hit in found]
            return [hit for place, hit in enumerate(found) if texts[place] not in texts[:place]][: self.k]

        def both(kind: str) -> list[Neighbour]:
            return sorted((*nearest(kind, 2), *nearest(kind, 3)), key=lambda hit: -hit.similarity)

        return Neighbours(both("report"), both("image"))

    def _neighbour(self, hit: Hit) -> Neighbour:
        entry = hit.entry
        text = entry["text"] or self._reports.get((entry["id"], entry["dim"]), "")
        row = self._rows[id(entry)]
        seen = entry["kind"] == "image" and entry["source"] and Path(entry["source"]).exists()
        address = f"/api/thumbnail/{row}" if seen else ""
        return Neighbour(round(hit.score, 4), entry["id"], entry["kind"], entry["dim"], text, address)

    def thumbnail(self, row: int) -> bytes | None:
        """A small PNG of an image of the index, the middle slice of a volume; None where that cannot be made.

        Args:
            row: of the index; no other file is ever read.
        """
        if self.index is None or not 0 <= row < len(self.index) or self.index.entries[row]["kind"] != "image":
            return None
        if row not in self._thumbnails:
            entry = self.index.entries[row]
            options, path = self.embedder.card["preprocessing"], Path(entry["source"])
            try:
                if entry["dim"] == 2:
                    view = xray_view(path, options["xray"], _THUMBNAIL)
                else:
                    # what was embedded is shown as it is
                    as_it_is = part_of({"assume_hu": True})
                    view = volume_view(path, options["ct"], shown=_THUMBNAIL, part=as_it_is)
            except Exception:  # the readers raise many kinds for files that were moved or damaged since
                return None
            image = view.shown if entry["dim"] == 2 else view.shown[len(view.shown) // 2]
            self._thumbnails[row] = grey_png(image, *_grey_range(view.shown))
            while len(self._thumbnails) > _KEPT:
                self._thumbnails.popitem(last=False)
        return self._thumbnails[row]


def _grey_range(image: Array) -> tuple[float, float]:
    low, high = np.percentile(image, (0.5, 99.5))
    return float(low), float(high)


def _xray(view: View, attention: Array) -> Picture:
    shape = (int(view.shown.shape[0]), int(view.shown.shape[1]))
    image, overlay = grey_png(view.shown, *_grey_range(view.shown)), overlay_png(attention, attention, shape)
    return Picture(data_url(image), data_url(overlay), "The X-ray with the network's attention")


def _slabs(scores: Array, chosen: Sequence[int], depth: int) -> list[Slab]:
    relative = scores * len(scores) / max(float(scores.sum()), 1e-12)
    taken = {index * len(scores) // depth for index in chosen}
    return [Slab(float(score), number in taken) for number, score in enumerate(relative)]


def _slices(view: View, attention: Array, chosen: Sequence[int], slabs: Sequence[Slab]) -> list[Picture]:
    depth, low_high = len(view.shown), _grey_range(view.shown)
    pictures = []
    for index in chosen[:_MAX_PICTURES]:
        image, slab = view.shown[index], index * len(slabs) // depth
        overlay = overlay_png(attention[slab], attention, (image.shape[0], image.shape[1]))
        in_file = min(view.slices, int((index + 0.5) / depth * view.slices) + 1)
        text = f"Selected slice {index} of {depth} with the network's attention"
        urls = data_url(grey_png(image, *low_high)), data_url(overlay)
        pictures.append(Picture(*urls, text, index, in_file, slabs[slab].score))
    return pictures
