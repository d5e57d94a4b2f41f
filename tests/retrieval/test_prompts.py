# SPDX-License-Identifier: Apache-2.0
"""Prompt sets: what ships covers the data sets' labels, and a file of one's own is checked."""

from __future__ import annotations

import json
import re

import pytest

from unimedi_components.data import chexpert
from unimedi_components.data.phantom.findings import FINDINGS
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.retrieval import PromptSet, load_prompts, shipped_prompts

# CT-RATE's abnormalities
CT_RATE = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)
# NIH ChestX-ray14's
NIH = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"),
    *("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"),
)


def own(**changes):
    findings = {"pericardial effusion": {"positive": ["fluid around the heart."], "negative": ["no fluid."]}}
    return {"format": 1, "name": "own", "dim": 3, "findings": findings, **changes}


def write(folder, content):
    path = folder / "own.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(("name", "dim"), [("chest_xray", 2), ("chest_ct", 3)])
def test_shipped_sets_are_varied_sentences(name, dim):
    prompts = load_prompts(name)
    assert (prompts.name, prompts.dim) == (name, dim)
    for finding, sides in prompts.findings.items():
        for side, phrasings in sides.items():
            assert 6 <= len(phrasings) <= 12, (finding, side)
            assert len(set(phrasings)) == len(phrasings), (finding, side)
            for text in phrasings:
                assert re.fullmatch(r"[a-z0-9][a-z0-9 ,.-]+\.", text) and len(text.split()) >= 2, text


def test_labels_of_data_sets_find_their_prompts():
    assert shipped_prompts() == ("chest_ct", "chest_xray")
    for name in shipped_prompts():
        for labels in (FINDINGS, chexpert.FINDINGS, CT_RATE if name == "chest_ct" else NIH):
            assert tuple(load_prompts(name).select(labels).findings) == tuple(labels)


@pytest.mark.parametrize(
    ("name", "asked", "finding"),
    [
        ("chest_xray", "Pleural Effusion", "pleural effusion"),
        ("chest_xray", "effusion", "pleural effusion"),
        ("chest_ct", "Ground-glass opacity", "ground-glass opacity"),
        ("chest_ct", "ground_glass", "ground-glass opacity"),
        ("chest_ct", "Lung nodule", "lung nodule"),
        ("chest_xray", "Pleural_Thickening", "pleural other"),
    ],
)
def test_names_are_folded(name, asked, finding):
    prompts = load_prompts(name)
    chosen = prompts.select(["Cardiomegaly", asked])
    assert list(chosen.findings) == ["Cardiomegaly", asked] and chosen.dim == prompts.dim
    assert chosen.findings[asked] == prompts.findings[finding]
    # what was chosen still answers to its other names
    assert chosen.select([finding]).findings[finding] == prompts.findings[finding]


def test_two_names_of_one_finding_can_be_asked_for_together():
    chosen = load_prompts("chest_xray").select(["Fibrosis", "scarring"])
    assert chosen.findings["Fibrosis"] == chosen.findings["scarring"]


def test_own_file(tmp_path):
    found = load_prompts(write(tmp_path, own()))
    sides = {"positive": ("fluid around the heart.",), "negative": ("no fluid.",)}
    assert found == PromptSet("own", 3, {"pericardial effusion": sides}, {"pericardial effusion": ()})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "own.json: is no JSON"),
        ([], "must be a JSON object with format, name, dim, findings"),
        (own(format=2), "format 2; this version reads format 1"),
        (own(dim=4), r"own.json: prompt set 'own': dim is 4; use 2 for X-rays or 3 for volumes"),
        (own(findings={}), "holds no finding"),
        (own(findings=[]), "must be a text and"),
        (own(findng={}), "unknown key 'findng'; did you mean 'findings'?"),
        ({"format": 1, "name": "own", "dim": 2}, "lacks 'findings'"),
        (own(findings={"a": {"positive": ["a."]}}), "finding 'a': lacks 'negative'"),
        (own(findings={"a": {"positive": ["a."], "negative": []}}), "finding 'a': no negative phrasing"),
        (own(findings={"a": {"positive": ["a."], "negative": ["..."]}}), r"phrasing '...' holds no word"),
        (own(findings={"a": {"positive": ["a."], "negative": "b."}}), "finding 'a', negative: must be a list of texts"),
        (own(findings={"a": {"positive": ["a."], "negative": ["A."]}}), "'a.' is on both sides"),
        (
            own(
                findings={
                    "a b": {"positive": ["a."], "negative": ["b."]},
                    "A_b": {"positive": ["c."], "negative": ["d."]},
                }
            ),
            "the name 'A_b' stands for 'a b' and 'A_b'",
        ),
        ('{"format": 1, "name": "o", "dim": 2, "findings": {"a": {}, "a": {}}}', "'a' stands twice"),
    ],
)
def test_faults_of_files(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as fault:
        load_prompts(write(tmp_path, content))
    assert str(fault.value).startswith(str(tmp_path / "own.json"))


def test_missing_files_and_unknown_findings(tmp_path):
    with pytest.raises(DataError, match=r"chest_xry: neither a JSON file.*did you mean 'chest_xray'\?"):
        load_prompts("chest_xry")
    with pytest.raises(DataError, match="neither a JSON file"):
        load_prompts(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is no text file"):
        load_prompts(tmp_path / "bytes.json")
    prompts = load_prompts("chest_xray")
    with pytest.raises(ConfigError, match=r"no prompts for 'plural effusion'.*did you mean 'pleural effusion'\?"):
        prompts.select(["plural effusion"])
    with pytest.raises(ConfigError, match="'Edema' comes twice"):
        prompts.select(["edema", "Edema"])
    with pytest.raises(ConfigError, match="no finding named"):
        prompts.select([])
