# SPDX-License-Identifier: Apache-2.0
"""What a radiologist would strike out of the phantoms' reports, over thousands of them, and of the shipped prompts."""

import re
from collections import Counter

import numpy as np
import pytest

from unimedi_components.data.phantom import mimic_cxr, write_phantom
from unimedi_components.data.phantom.findings import Finding
from unimedi_components.data.phantom.reports import Report, write_report
from unimedi_components.data.phantom.studies import make_patient
from unimedi_components.retrieval.prompts import SIDES, load_prompts, shipped_prompts

COUNT = 2000
# No lung has these: the left one has no middle lobe, no lobe is called mid or basal, and only one has a lingula.
NO_SUCH_PLACE = re.compile(
    r"left (mid|middle) lobe|\bmid lobe|basal lobe|apical lobe|(both|bilateral) (mid|middle) lobes|right lingula"
    r"|(?<!right )middle lobe|middle lung|bilateral (upper|mid|lower|lingula)|both lingula",
    re.IGNORECASE,
)
# One effusion on two sides, an article before two, a verb for the other number, and "a 18 mm".
WRONG_NUMBER = re.compile(
    r"\ban? [\w -]*(effusions|nodules|masses|areas|opacities)\b|\ba [\w -]*bilateral pleural effusion"
    r"|bilateral (pleural effusion|pneumothorax)\b|(effusions|nodules|masses|opacities) is\b"
    r"|(effusion|nodule|mass|opacity) are|\ba (8|11|18)\b",
    re.IGNORECASE,
)
FILM_WORDS = re.compile(r"project|silhouette|radiograph|\bfilm|costophrenic|pleural line|haze\b", re.I)
CT_WORDS = re.compile(
    r"\bsolid|attenuation|septal thickening|interlobular|\blobes?\b|lingula|window|\bCT\b|axial", re.I
)
UNREMARKABLE = re.compile(r"normal chest|unremarkable chest|within normal limits\.$", re.IGNORECASE)
PLACE = {
    ("left", "upper"): "left.*upper|upper.*left",
    ("left", "middle"): "lingula|left.*mid|mid.*left",
    ("left", "lower"): "left.*(lower|base)|lower.*left",
    ("right", "upper"): "right.*upper|upper.*right",
    ("right", "middle"): "right middle lobe|right.*mid|mid.*right",
    ("right", "lower"): "right.*(lower|base)|lower.*right",
    ("bilateral", "upper"): "(both|bilaterally).*upper|upper.*(both|bilaterally)",
    ("bilateral", "middle"): "right middle lobe and lingula|both.*mid|mid.*(both|bilaterally)",
    ("bilateral", "lower"): "both.*(lower|base)|lower.*(both|bilaterally)",
}
WORDS = {"upper": "upper", "middle": r"\bmid|lingula", "lower": "lower|base|basal"}
NOUN = {
    "nodule": "nodul|mass",
    "consolidation": "consolidation",
    "ground_glass": "ground-glass",
    "atelectasis": "atelect",
}
DENIAL = re.compile(r"^(no |there is no |negative for )", re.IGNORECASE)


@pytest.fixture(scope="module")
def studies():
    """(patient, report) pairs of each modality."""
    found = {}
    for code, modality in enumerate(("xray", "ct")):
        pairs = []
        for index in range(COUNT):
            patient, _ = make_patient(np.random.SeedSequence([77, code, index]))
            pairs.append((patient, write_report(patient, modality, np.random.default_rng([78, code, index]))))
        found[modality] = pairs
    return found


def sentences(report: Report) -> list[str]:
    return [*report.findings, *report.impression]


@pytest.mark.parametrize("modality", ["xray", "ct"])
def test_no_impossible_phrase(studies, modality):
    other = CT_WORDS if modality == "xray" else FILM_WORDS
    for patient, report in studies[modality]:
        for sentence in sentences(report):
            assert not NO_SUCH_PLACE.search(sentence), sentence
            assert not WRONG_NUMBER.search(sentence), sentence
            assert not other.search(sentence), sentence
        assert len(set(sentences(report))) == len(sentences(report)) >= 3, report
        text = " ".join(sentences(report))
        if abs(patient.scoliosis[0]) > 9.0:
            assert not any(UNREMARKABLE.search(s) for s in report.impression), text
        if patient.finding("edema") and not patient.finding("ground_glass"):
            assert "ground-glass" not in text
        for size in (f.size for f in patient.findings if f.size):
            assert bool(re.search(r"\bmass(es)?\b", text)) == (size > 30), text
            asserted = " ".join(s for s in sentences(report) if not DENIAL.search(s))
            assert bool(re.search(r"nodul", asserted)) == (size <= 30), text


@pytest.mark.parametrize("modality", ["xray", "ct"])
def test_places_are_those_of_the_finding_in_both_sections(studies, modality):
    """Where one focal finding is alone, each sentence that names it gives its side and zone and no other."""
    checked = Counter()
    for patient, report in studies[modality]:
        if len(patient.findings) != 1 or patient.findings[0].name not in NOUN:
            continue
        (f,) = patient.findings
        for section in (report.findings, report.impression):
            said = [s for s in section if re.search(NOUN[f.name], s, re.IGNORECASE) and not DENIAL.search(s)]
            assert len(said) == 1 and re.search(PLACE[f.side, f.zone], said[0], re.IGNORECASE), (f, section)
            assert not any(re.search(word, said[0]) for zone, word in WORDS.items() if zone != f.zone), said
            other = {"left": "right|both", "right": "left|both|lingula", "bilateral": "left"}[f.side]
            assert not re.search(other, said[0]), said
            if f.name == "nodule":
                assert bool(re.search("nodules|masses|opacities", said[0])) == (f.side == "bilateral"), said
        checked[f.side, f.zone] += 1
    assert len(checked) == 9 and min(checked.values()) >= 15, checked


def test_the_right_phrases_are_used(studies):
    text = {m: " ".join(s for _, r in pairs for s in sentences(r)) for m, pairs in studies.items()}
    for phrase in (
        "the lingula",
        "the left mid lung",
        "the right middle lobe",
        "the right middle lobe and lingula",
        "both lower lobes",
        "solid nodule",
        "ground-glass attenuation",
        "septal thickening",
    ):
        assert text["ct"].count(phrase) >= 10, phrase
    for phrase in ("the left mid lung", "projects over", "project over", "cardiac silhouette", "septal lines"):
        assert text["xray"].count(phrase) >= 5, phrase
    for modality in ("xray", "ct"):
        for phrase in ("bilateral pleural effusions", "nodules of up to", "mass", "mediastinal shift to the left"):
            assert text[modality].count(phrase) >= 3, (modality, phrase)
        # templates, severities and places multiply: hardly a sentence about a nodule comes twice
        about = Counter(s for _, r in studies[modality] for s in r.findings if "nodul" in s and not DENIAL.search(s))
        assert len(about) >= 0.6 * sum(about.values())


def test_the_shift_goes_away_from_the_cause(studies):
    seen = Counter()
    for patient, report in (pair for pairs in studies.values() for pair in pairs):
        said = [s for s in report.findings if re.search("shift|displaced", s)]
        assert len(said) == bool(patient.shift)
        causes = [f for f in patient.findings if f.name in ("effusion", "pneumothorax") and f.severity == "large"]
        if said and len(causes) == 1:
            away = {"left": "right", "right": "left"}[causes[0].side]
            assert said[0].endswith(f"to the {away}."), (causes, said)
            seen[away] += 1
    assert min(seen["left"], seen["right"]) >= 20


def test_sizes_above_three_centimetres_are_masses():
    patient, _ = make_patient(
        np.random.SeedSequence(1), lambda rng: (Finding("nodule", "left", "middle", "large", 30.0),)
    )
    larger, _ = make_patient(
        np.random.SeedSequence(1), lambda rng: (Finding("nodule", "left", "middle", "large", 31.0),)
    )
    texts = [
        {s for i in range(40) for s in write_report(p, "ct", np.random.default_rng(i)).impression if "m in" in s}
        for p in (patient, larger)
    ]
    assert texts[0] and all("nodule of 30 mm" in s or "nodule of 3.0 cm" in s for s in texts[0])
    assert texts[1] and all("mass of 31 mm" in s or "mass of 3.1 cm" in s for s in texts[1])


def test_shipped_prompts_name_no_impossible_place():
    for name in shipped_prompts():
        prompts = load_prompts(name)
        own = FILM_WORDS if prompts.dim == 3 else re.compile(r"\bsolid|septal thickening|interlobular|window|axial")
        for finding, sides in prompts.findings.items():
            for text in (text for side in SIDES for text in sides[side]):
                assert not NO_SUCH_PLACE.search(text) and not WRONG_NUMBER.search(text), (finding, text)
                assert not own.search(text), (finding, text)


def test_other_words_change_no_image(tmp_path, monkeypatch):
    """Reports draw from a stream of their own: whatever they draw, images, tables and truth keep their bytes."""

    def files(root):
        return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.suffix != ".txt"}

    write_phantom("mimic_cxr", tmp_path / "a", 3, 4, workers=1, progress=False)
    monkeypatch.setattr(mimic_cxr, "write_report", lambda *_: Report("", ("One.", "Two."), ("Three.",)))
    write_phantom("mimic_cxr", tmp_path / "b", 3, 4, workers=1, progress=False)
    assert files(tmp_path / "a") == files(tmp_path / "b")
