# SPDX-License-Identifier: Apache-2.0
"""What the server answers with; FastAPI describes these classes in openapi.json."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """A zero-shot result: probability in [0, 1], not calibrated."""

    name: str
    probability: float


@dataclass(frozen=True)
class Picture:
    """An X-ray, or one selected slice of a volume, as the network saw it, in more pixels.

    Args:
        image: grey PNG as a data URL.
        overlay: the attention as a transparent PNG of the same size, as a data URL.
        text: what it is, for those who do not see it.
        slice: slice of the network's input, from 0 at the feet; None for an X-ray.
        file_slice: nearest slice of the volume itself, from 1 at the feet.
        score: the slab's score over the mean of all slabs.
    """

    image: str
    overlay: str
    text: str
    slice: int | None = None
    file_slice: int | None = None
    score: float | None = None


@dataclass(frozen=True)
class Slab:
    """One slab of a volume's tokens, from the feet: its score over the mean, and whether a slice of it was selected."""

    score: float
    selected: bool


@dataclass(frozen=True)
class Neighbour:
    """One entry of the index: cosine similarity, and what it is of.

    Args:
        similarity: in [-1, 1].
        kind: "image" or "report".
        dim: 2 for an X-ray or its report, 3 for a volume or its report.
        text: the report, empty where the index holds none.
        thumbnail: address of a small picture, empty where the study's file is not there.
    """

    similarity: float
    id: str
    kind: str
    dim: int
    text: str
    thumbnail: str = ""


@dataclass(frozen=True)
class Neighbours:
    """The nearest reports and studies of X-rays and of CTs, some of each dimension, the nearest first.

    Similarities compare within a dimension first: X-rays and volumes lie in parts of their own.
    """

    reports: list[Neighbour]
    studies: list[Neighbour]


@dataclass(frozen=True)
class Analysis:
    """All that is said about one study.

    Args:
        kind: "X-ray" or "CT".
        dim: 2 or 3.
        prompts: name of the prompt set; empty where there is none for this dimension.
        findings: in the prompt set's order.
        pictures: the X-ray, or the selected slices from the feet up.
        slabs: of a volume, from the feet up.
        neighbours: None without an index.
        seconds: from the checked upload to this answer.
    """

    name: str
    kind: str
    dim: int
    seen: dict[str, str]
    warnings: list[str]
    prompts: str
    findings: list[Finding]
    pictures: list[Picture]
    slabs: list[Slab] = field(default_factory=list)
    neighbours: Neighbours | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class About:
    """What this server runs on.

    Args:
        phantoms: the card says that the network was trained on synthetic studies.
        device: "cpu" or "cuda".
        prompts: prompt sets by dimension.
        index: number of entries by kind, empty without an index.
    """

    model: str
    checkpoint: str
    phantoms: bool
    device: str
    max_upload_bytes: int
    max_files: int
    prompts: dict[str, str]
    index: dict[str, int]
