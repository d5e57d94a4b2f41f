# SPDX-License-Identifier: Apache-2.0
"""Images of one finding each, drawn from a datalist written by hand."""

from __future__ import annotations

import pytest

from unimedi_components.errors import ConfigError, DataError
from unimedi_components.retrieval.protocols import PROTOCOLS, exclusive_sample

NAMES = ["No Finding", "Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion"]


def item(number, patient, **labels):
    return {"id": f"i{number}", "patient": patient, "label": [labels.get(name.replace(" ", "_"), -2) for name in NAMES]}


@pytest.fixture
def items():
    """Of each finding of 5x200 seven images alone, two of one patient, and images that no class may take."""
    found = []
    for name in PROTOCOLS["5x200"]:
        key = name.replace(" ", "_")
        for number in range(7):
            found.append(item(len(found), f"{name}{max(number, 1)}", **{key: 1}))
    found.append(item(100, "p1", Edema=1, Consolidation=1))
    found.append(item(101, "p2", Edema=1, Atelectasis=-1))
    # a finding outside the protocol does not matter
    found.append(item(102, "p3", Edema=1, No_Finding=1, Atelectasis=0))
    found.append(item(103, "p4"))
    return found


def test_every_image_has_its_class_alone(items):
    sample = exclusive_sample(items, NAMES, "5x200", per_class=3, queries=2)
    assert sample.classes == PROTOCOLS["5x200"] and sample.missing == {} and sample.per_class == 3
    assert [index for _, index in sample.candidates] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert [index for _, index in sample.queries] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    pairs = (*sample.candidates, *sample.queries)
    ids = {entry["id"] for entry, _ in pairs}
    assert len(ids) == 25 and not {"i100", "i101", "i103"} & ids
    for entry, index in pairs:
        assert entry["label"][NAMES.index(sample.classes[index])] == 1
    assert not {e["patient"] for e, _ in sample.candidates} & {e["patient"] for e, _ in sample.queries}


def test_draws_are_seeded(items):
    drawn = [exclusive_sample(items, NAMES, "5x200", 3, 2, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] and drawn[0] != drawn[2]


def test_too_few_images_are_an_error_or_fewer_candidates(items):
    with pytest.raises(DataError, match=r"5x200 cannot be drawn from 39 images \(Atelectasis: 7 images of it alone, 2"):
        exclusive_sample(items, NAMES, "5x200", per_class=200, queries=2)
    sample = exclusive_sample(items, NAMES, "5x200", per_class=200, queries=2, exact=False)
    # the query of a patient with two images takes both out
    assert sample.per_class in (4, 5) and len(sample.candidates) == 5 * sample.per_class
    few = [entry for entry in items if entry["label"][NAMES.index("Edema")] != 1][:-1]
    sample = exclusive_sample(few, NAMES, "8x200", per_class=4, queries=1, exact=False)
    assert sample.classes == ("Cardiomegaly", "Atelectasis", "Pleural Effusion")
    assert sample.missing["Fracture"] == "no such label"
    assert sample.missing["Edema"] == "0 images of it alone, 1 + 1 are needed"


def test_unknown_protocol(items):
    with pytest.raises(ConfigError, match="'6x200' is unknown; use one of 5x200, 8x200"):
        exclusive_sample(items, NAMES, "6x200")
