# SPDX-License-Identifier: Apache-2.0
"""Which findings a phantom patient has: names, side, zone, severity and size."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

FINDINGS = (
    *("nodule", "consolidation", "ground_glass", "effusion"),
    *("pneumothorax", "cardiomegaly", "atelectasis", "edema"),
)
FOCAL = ("nodule", "consolidation", "ground_glass", "atelectasis")
ZONES = ("upper", "middle", "lower")
SEVERITIES = ("small", "moderate", "large")
_DIFFUSE = tuple(name for name in FINDINGS if name not in FOCAL)
_NORMAL, _FOCAL_ONLY = 0.22, 0.45
#: The patterns of the three-class data sets: normal, lobar pneumonia, COVID-19.
Disease = Literal["normal", "pneumonia", "covid"]


@dataclass(frozen=True)
class Finding:
    """One finding of one patient.

    Args:
        side: ``left``, ``right``, ``bilateral``, or ``None`` for the heart.
        size: in mm where the report gives a size (diameter of a nodule), else ``None``.
    """

    name: str
    side: str | None
    zone: str | None
    severity: str
    size: float | None = None

    @property
    def sides(self) -> tuple[str, ...]:
        return ("left", "right") if self.side == "bilateral" else (self.side,) if self.side else ()


def draw_findings(rng: np.random.Generator) -> tuple[Finding, ...]:
    """Draw the findings of one patient, in the order of `FINDINGS`.

    About 22 % of the patients have none, 45 % one or two focal ones, and the others one to three diffuse ones
    with or without a focal one, so that each finding has a prevalence of 15 to 20 %. Two focal findings keep
    to different sides or zones.
    """
    pattern = rng.random()
    names: list[str] = []
    if pattern >= _NORMAL + _FOCAL_ONLY:
        names += rng.choice(_DIFFUSE, rng.choice((1, 2, 3), p=(0.25, 0.45, 0.30)), replace=False).tolist()
        names += rng.choice(FOCAL, 1).tolist() if rng.random() < 0.3 else []
    elif pattern >= _NORMAL:
        names += rng.choice(FOCAL, rng.choice((1, 2), p=(0.7, 0.3)), replace=False).tolist()
    free = {(side, zone) for side in ("left", "right") for zone in ZONES}
    found = {name: _draw(rng, name, free, len(names)) for name in (*_DIFFUSE, *FOCAL) if name in names}
    return tuple(found[name] for name in FINDINGS if name in found)


def _draw(rng: np.random.Generator, name: str, free: set[tuple[str, str]], count: int) -> Finding:
    # Most nodules are of a size that a small network can see.
    odds = (0.20, 0.35, 0.45) if name == "nodule" else (0.3, 0.4, 0.3)
    severity = str(rng.choice(SEVERITIES, p=odds))
    if name == "cardiomegaly":
        return Finding(name, None, None, severity)
    if name == "edema":
        return Finding(name, "bilateral", None, severity)
    if name == "effusion":
        side = str(rng.choice(("left", "right", "bilateral"), p=(0.35, 0.35, 0.3)))
        finding = Finding(name, side, "lower", severity)
        taken: tuple[str, ...] = ("lower", "middle") if severity == "large" else ("lower",)
    elif name == "pneumothorax":
        # A side without fluid where there is one, so that both are seen.
        sides = sorted({side for side, zone in free if zone == "lower"}) or ["left", "right"]
        finding = Finding(name, str(rng.choice(sides)), "upper", severity)
        taken = ZONES if severity == "large" else ("upper",)
    else:
        return _draw_focal(rng, name, severity, free, count)
    free -= {(side, zone) for side in finding.sides for zone in taken}
    return finding


def _draw_focal(rng: np.random.Generator, name: str, severity: str, free: set[tuple[str, str]], count: int) -> Finding:
    cells = sorted(free)
    if name == "atelectasis":
        cells = [cell for cell in cells if cell[1] != "upper"] or cells
    cells = cells or [("left", "middle"), ("right", "middle")]
    side, zone = cells[int(rng.random() * len(cells))]
    free.discard((side, zone))
    other = {"left": "right", "right": "left"}[side]
    bilateral = 0.0 if name == "atelectasis" else 0.45 if name == "ground_glass" else 0.2
    if rng.random() < bilateral and (other, zone) in free:
        free.discard((other, zone))
        side = "bilateral"
    if name in ("consolidation", "ground_glass") and count <= 2 and severity == "large" and rng.random() < 0.4:
        severity = "moderate"
    size = None
    if name == "nodule":
        low, high = {"small": (12, 17), "moderate": (18, 28), "large": (29, 40)}[severity]
        size = float(np.round(rng.uniform(low, high)))
    return Finding(name, side, zone, severity, size)


def draw_disease(disease: Disease, rng: np.random.Generator) -> tuple[Finding, ...]:
    """Draw the findings of a patient with one disease.

    Common pneumonia is one consolidation of one lung, with a small effusion beside every third; COVID-19 is
    bilateral ground glass of the middle or lower zones, with a consolidation within every fourth.
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
