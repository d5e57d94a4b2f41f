# SPDX-License-Identifier: Apache-2.0
"""Reports against the findings, by keywords that the writer does not know."""

import re

import numpy as np
import pytest

from unimedi_components.data.phantom.findings import FINDINGS
from unimedi_components.data.phantom.mimic_cxr import format_report
from unimedi_components.data.phantom.reports import Report, write_report
from unimedi_components.data.phantom.studies import make_patient

KEYWORDS = {
    "nodule": r"nodul|\bmass(es)?\b",
    "consolidation": r"consolidat|airspace",
    "ground_glass": r"ground.glass|hazy",
    "effusion": r"effusion|pleural fluid",
    "pneumothorax": r"pneumothora",
    "cardiomegaly": r"cardiomegaly|heart is enlarged|silhouette is enlarged|enlargement of the cardiac",
    "atelectasis": r"atelecta|volume loss|bandlike",
    "edema": r"\bedema|congestion|septal|perihilar",
}
DENIAL = re.compile(r"^(no |there is no |negative for )", re.IGNORECASE)
HEALTHY_HEART = (
    r"heart is normal|heart size is normal|size of the cardiac silhouette is normal|cardiac size is unremarkable"
)
HEALTHY_HEART += r"|chambers are not|contour and size are normal|of normal size"
HEALTHY_LUNG = r"lungs? (are|parenchyma is) .*clear|lungs are clear|normal aeration|parenchyma is clear"


def reports(modality: str, count: int = 250):
    for index in range(count):
        patient, streams = make_patient(np.random.SeedSequence([31, len(modality), index]))
        yield patient, write_report(patient, modality, streams[3])


@pytest.mark.parametrize("modality", ["xray", "ct"])
def test_every_finding_is_named_and_no_absent_one_is_asserted(modality):
    for patient, report in reports(modality):
        present = {f.name for f in patient.findings}
        for section in (report.findings, report.impression):
            asserted = [s for s in section if not DENIAL.search(s)]
            denied = [s for s in section if DENIAL.search(s)]
            for name in FINDINGS:
                said = any(re.search(KEYWORDS[name], s, re.IGNORECASE) for s in asserted)
                assert said == (name in present), (name, section)
                if name in present:
                    assert not any(re.search(KEYWORDS[name], s, re.IGNORECASE) for s in denied), section
        text = " ".join(report.findings + report.impression)
        if "cardiomegaly" in present:
            assert not re.search(HEALTHY_HEART, text, re.IGNORECASE)
        if present:
            assert not re.search(HEALTHY_LUNG, text, re.IGNORECASE)


@pytest.mark.parametrize("modality", ["xray", "ct"])
def test_side_zone_and_size_are_stated(modality):
    zones = {"upper": "upper", "middle": "mid|lingula", "lower": "lower|lung base"}
    for patient, report in reports(modality, 120):
        for f in patient.findings:
            said = [
                s for s in report.findings if re.search(KEYWORDS[f.name], s, re.IGNORECASE) and not DENIAL.search(s)
            ]
            if f.side and f.name != "edema":
                side = {"bilateral": "bilateral|both|middle lobe and lingula", "left": "left|lingula"}.get(
                    f.side, f.side
                )
                assert any(re.search(side, s, re.IGNORECASE) for s in said), said
            if f.zone and f.name in ("nodule", "consolidation", "ground_glass", "atelectasis"):
                assert any(re.search(zones[f.zone], s, re.IGNORECASE) for s in said), said
            if f.size:
                assert any(f"{f.size:.0f} mm" in s or f"{f.size / 10:.1f} cm" in s for s in said), said


def test_sentence_counts_and_vocabulary():
    words, counts = set(), []
    for modality in ("xray", "ct"):
        for _, report in reports(modality):
            sentences = report.findings + report.impression
            counts.append(len(sentences))
            assert all(s[0].isupper() and s.endswith(".") and "{" not in s and "  " not in s for s in sentences)
            assert not re.search(r"\b[Aa] [aeiou]", " ".join(sentences))
            words |= set(re.findall(r"[a-z-]+", " ".join(sentences).lower()))
    assert min(counts) >= 3 and max(counts) <= 10
    assert len(words) >= 200


def test_text_file_has_the_real_files_form():
    report = Report("44 year old man with cough", ("One is long. " * 12 + "End.",), ("Two.",))
    lines = format_report(report, portable=True).split("\n")
    assert lines[0] == " " * 33 + "FINAL REPORT"
    assert lines[1] == " EXAMINATION:  CHEST (PORTABLE AP)"
    assert " FINDINGS: " in lines and " IMPRESSION: " in lines
    assert lines[lines.index(" IMPRESSION: ") + 1 :] == [" ", " Two.", ""]
    assert all(line.startswith(" ") and len(line) <= 80 for line in lines[:-1])
