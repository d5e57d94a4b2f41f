# SPDX-License-Identifier: Apache-2.0
"""The disease patterns of the three-class data sets: normal, lobar pneumonia, COVID-19."""

from __future__ import annotations

from typing import Literal

import numpy as np

from .findings import ZONES, Finding

__all__ = ["Disease", "draw_disease"]

Disease = Literal["normal", "pneumonia", "covid"]


def draw_disease(disease: Disease, rng: np.random.Generator) -> tuple[Finding, ...]:
    """Draw the findings of a patient with one disease.

    Common pneumonia is one consolidation of one lung, with a small effusion beside every third; COVID-19 is
    bilateral ground glass of the middle or lower zones, with a consolidation within every fourth.

    Args:
        disease: which one; ``normal`` has no findings.
        rng: source of the draws.
    """
    severity = str(rng.choice(("moderate", "large")))
    side = str(rng.choice(("left", "right")))
    more = rng.random()
    if disease == "pneumonia":
        found = (Finding("consolidation", side, str(rng.choice(ZONES)), severity),)
        return (*found, Finding("effusion", side, "lower", "small")) if more < 1 / 3 else found
    if disease == "covid":
        glass = Finding("ground_glass", "bilateral", str(rng.choice(("middle", "lower"))), severity)
        return (Finding("consolidation", side, "lower", "small"), glass) if more < 1 / 4 else (glass,)
    return ()
