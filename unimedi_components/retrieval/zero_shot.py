# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification: is an image nearer to the sentences that affirm a finding, or to those that deny it?

Letters: N images, F findings, E width of the common space.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from unimedi_components.arrays import Array
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.losses.classification import UNCERTAIN
from unimedi_components.metrics.classification import classification_metrics
from unimedi_components.retrieval.embedder import Embedder
from unimedi_components.retrieval.embeddings import Embeddings, finite_rows
from unimedi_components.retrieval.prompts import SIDES, PromptSet

_SCORES = ("cases", "patients", "positives", "uncertain", "macro_auroc", "auroc", "skipped")


class ZeroShot:
    """Probabilities of findings without training on their labels.

    The phrasings of each side are embedded, averaged and normalised again; a finding's probability is the softmax over
    the image's cosines to the two sides, times the network's own logit scale (prompt pairs of CheXzero, prompt
    ensembles of GLoRIA and CLIP).

    Args:
        prompts: phrasings, see `load_prompts`.
        sentences: each phrasing is embedded with the next ones, as a text of so many: the network has seen no report
            of fewer than three sentences (S4.1.1). 1 embeds each alone.

    Attributes:
        names: the findings, in the order of the columns.
        positive, negative: (F, E) float32 of unit norm, on the CPU.
    """

    def __init__(self, embedder: Embedder, prompts: PromptSet, sentences: int = 3) -> None:
        if sentences < 1:
            raise ConfigError(f"sentences is {sentences}; a text has at least 1")
        self.prompts, self.names, self.dim = prompts, tuple(prompts.findings), prompts.dim
        self.model = embedder.model
        self.logit_scale = embedder.network.logit_scale.item()
        self.positive, self.negative = (self._side(embedder, side, sentences) for side in SIDES)

    def _side(self, embedder: Embedder, side: str, sentences: int) -> Tensor:
        groups = [_texts(sides[side], sentences) for sides in self.prompts.findings.values()]
        rows = embedder.sentences([text for group in groups for text in group], self.dim)
        means = [part.mean(0) for part in rows.split([len(group) for group in groups])]
        return F.normalize(torch.stack(means), dim=-1)

    def probabilities(self, embed: Array) -> Array:
        """Probability of each finding in each image, (N, F) float32, from embeddings (N, E) of unit norm."""
        rows = torch.from_numpy(finite_rows(embed, self.positive.shape[1], "embeddings"))
        cosines = torch.stack([rows @ side.T for side in (self.positive, self.negative)])
        return (self.logit_scale * cosines).softmax(0)[0].numpy()

    def classify(self, embeddings: Embeddings) -> tuple[list[str], Array]:
        """Ids and probabilities (N, F) of the images of the prompts' dimension; other rows are left out.

        Raises ConfigError: the embeddings are of another model; DataError: there is no such image.
        """
        if embeddings.model != self.model:
            raise ConfigError(
                f"the prompts were embedded with model {self.model[:12]}, the images with {embeddings.model[:12]}; "
                "embed both with one checkpoint"
            )
        entries = embeddings.entries
        rows = [i for i, e in enumerate(entries) if e["kind"] == "image" and e["dim"] == self.dim]
        if not rows:
            what = "X-ray" if self.dim == 2 else "volume"
            raise DataError(f"no {what} among the embeddings; the prompt set {self.prompts.name!r} is for {what}s")
        return [entries[row]["id"] for row in rows], self.probabilities(embeddings.embed[rows])


def _texts(phrasings: Sequence[str], sentences: int) -> list[str]:
    """Every phrasing followed by the next ones of its side, from the first again after the last."""
    count, length = len(phrasings), min(sentences, len(phrasings))
    return [" ".join(phrasings[(start + i) % count] for i in range(length)) for start in range(count)]


def zero_shot_scores(
    probabilities: npt.ArrayLike,
    labels: npt.ArrayLike,
    names: Sequence[str],
    patients: Sequence[Hashable] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """AUROC of zero-shot probabilities.

    Args:
        labels: 1 present, 0 absent, negative not known, (N, F).
        patients: of the N images; None: every image is a patient of its own.
        bootstrap: resamples of the patients for the intervals; 0 gives none.

    Returns:
        plain values for JSON: "auroc" by finding, None where only one class occurs (the reason is under "skipped"),
        their mean "macro_auroc", "intervals" of both, and counts, all as of `classification_metrics`.
    """
    known = np.maximum(np.asarray(labels, dtype=np.int64), UNCERTAIN)
    found = classification_metrics(probabilities, known, "multilabel", names, patients, bootstrap, seed)
    result = {name: found[name] for name in _SCORES}
    if bootstrap > 0:
        # no threshold is meant here, so nothing is said about accuracy
        intervals = found["intervals"]
        used = {name: value for name, value in intervals["resamples_used"].items() if name != "accuracy"}
        result["intervals"] = {name: value for name, value in intervals.items() if name != "accuracy"}
        result["intervals"]["resamples_used"] = used
    return result
