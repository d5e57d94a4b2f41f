# SPDX-License-Identifier: Apache-2.0
"""Radiology reports of phantom patients, written from the findings."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .anatomy import Patient
from .findings import FINDINGS, Finding

# Templates per finding, and what is said beside the findings. Slots: {sev} severity word, {side}, {where} (side and
# zone as a place), {size}, {nodule} and {nodular} (a mass above 3 cm), and for number {a}, {s}, {y}, {is}, {verb} (the
# s of a verb); a finding on both sides is worded in the plural. X-ray and CT differ in places, in style and in what
# only one of them shows ("own"): a film projections, silhouettes and pleural lines, a CT attenuation, septa and lobes.
_PHRASES: dict[str, Any] = json.loads(Path(__file__).with_name("phrases.json").read_text(encoding="utf-8"))
_PLURAL = ("", "s", "ies", "are", "")
# Above 30 mm a nodule is a mass (Fleischner Society, Radiology 246:697, 2008).
_MASS_MM, _MASS = 30.0, ("mass", "masses", "mass-like")
# What a finding may hide or bring with it is not denied: edema is haze, fluid and air compress the lung.
_UNDENIED = {"edema": ("ground_glass",), "effusion": ("atelectasis",), "pneumothorax": ("atelectasis",)}


@dataclass(frozen=True)
class Report:
    """A report of 3 to 10 sentences."""

    indication: str
    findings: tuple[str, ...]
    impression: tuple[str, ...]


def write_report(patient: Patient, modality: str, rng: np.random.Generator) -> Report:
    """Write the report of a patient's study.

    Every finding is named in both sections; an absent one appears in negations only; nothing contradicts the findings.
    ``modality``: ``xray`` or ``ct``; decides style and places.
    """
    words = {f.name: _words(f, modality, rng) for f in patient.findings}
    body = [
        _fill(_pick(rng, _PHRASES["positive"][name] + _PHRASES["own"][modality].get(name, [])), slots)
        for name, slots in words.items()
    ]
    rng.shuffle(body)
    normal, present = _PHRASES["normal"][modality], set(words)
    curved = abs(patient.scoliosis[0]) > 9.0
    impression = _impression(words, modality, curved, rng)
    if patient.shift:
        body.append(_pick(rng, _PHRASES["shift"]).format(side="left" if patient.shift > 0 else "right"))
    if not present:
        body.append(_pick(rng, _PHRASES["clear"][modality]))
    body += _negations(present, modality, rng)
    optional = [_pick(rng, normal[key]) for key in ("bones", "other") if rng.random() < 0.5]
    if curved:
        optional.insert(0, _pick(rng, _PHRASES["scoliosis"]))
    # A mediastinum that is pushed aside is not called normal.
    if not patient.shift and rng.random() < 0.5:
        optional.insert(0, _pick(rng, normal["mediastinum"]))
    if "cardiomegaly" not in present and rng.random() < 0.85:
        optional.insert(0, _pick(rng, normal["heart"]))
    body += optional[: max(8 - len(body) - max(1, (len(present) + 1) // 2), 0)]
    if len(body) + len(impression) < 3:
        body.append(next(s for s in normal["bones"] if s not in body))
    sex = "woman" if patient.sex == "F" else "man"
    indication = f"{patient.age} year old {sex} {_pick(rng, _PHRASES['indications'])}"
    return Report(indication, tuple(body), tuple(impression))


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _words(f: Finding, modality: str, rng: np.random.Generator) -> dict[str, str]:
    """The slots that templates may use for one finding."""
    one = f.side != "bilateral"
    slots = {"sev": _pick(rng, _PHRASES["severity"][f.name][f.severity]), "side": f.side or ""}
    slots |= dict(zip(("a", "s", "y", "is", "verb"), ("a ", "", "y", "is", "s") if one else _PLURAL, strict=True))
    if f.zone and f.side:
        slots["where"] = _pick(rng, _PHRASES["where"][modality][f.side][f.zone])
    if f.size:
        size = f"{f.size / 10:.1f} cm" if rng.random() < 0.5 else f"{f.size:.0f} mm"
        slots["size"] = size if one else f"up to {size}"
        noun, plural, adjective = ("nodule", "nodules", "nodular") if f.size <= _MASS_MM else _MASS
        slots |= {"nodule": noun if one else plural, "nodular": adjective}
    return slots


def _fill(template: str, slots: dict[str, str]) -> str:
    """Fill a template; it starts with a capital, and "a" becomes "an" before a vowel."""
    text = re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", template.format(**slots))
    return text[0].upper() + text[1:]


def _negations(present: set[str], modality: str, rng: np.random.Generator) -> list[str]:
    """One or two sentences that deny some of the absent findings; pleura and consolidation first."""
    hidden = {name for cause, names in _UNDENIED.items() if cause in present for name in names}
    absent = [name for name in _PHRASES["negative"] if name not in present | hidden]
    chance = {"effusion": 0.9, "pneumothorax": 0.9, "consolidation": 0.7}
    named = [name for name in absent if rng.random() < chance.get(name, 0.35)]
    rng.shuffle(named)
    groups = [named[:2], named[2:5]] if rng.random() < 0.5 else [named[:3]]
    sentences = []
    for group in groups:
        if group:
            items = [_pick(rng, _PHRASES["negative"][name]) for name in group]
            joined = items[0] if len(items) == 1 else ", ".join(items[:-1]) + f" or {items[-1]}"
            sentences.append(_pick(rng, _PHRASES["style"][modality]).format(list=joined))
    return sentences


def _impression(words: dict[str, dict[str, str]], modality: str, curved: bool, rng: np.random.Generator) -> list[str]:
    normal = _PHRASES["normal"][modality]
    if not words:
        return [_pick(rng, normal["impression"] + ([] if curved else normal["unremarkable"]))]
    parts = [_fill(_pick(rng, _PHRASES["impression"][name]), words[name]) for name in FINDINGS if name in words]
    sentences = []
    while parts:
        first = parts.pop(0)
        if parts and not re.search(",| and ", first + parts[0]) and rng.random() < 0.6:
            second = parts.pop(0)
            first = f"{first} and {second[0].lower()}{second[1:]}"
        sentences.append(f"{first}.")
    if len(words) < 3 and rng.random() < 0.25:
        sentences.append(_pick(rng, normal["follow"]))
    return sentences
