# SPDX-License-Identifier: Apache-2.0
"""Search across X-rays and CT, separability of the modalities, and the paired search, on features of known geometry."""

from pathlib import Path

import numpy as np
import pytest
import torch

from unimedi_components.metrics.bootstrap import Measures, PatientResamples
from unimedi_components.retrieval import common_space
from unimedi_components.retrieval.class_search import class_precision, same_findings_precision
from unimedi_components.retrieval.common_space import cross_search_metrics, paired_search_metrics, separation_metrics
from unimedi_components.retrieval.features import Features

NAMES = ("a", "b", "c")


def make(dim, labels, cls, embed=None):
    """Features of one study for each row of labels, two studies of a patient."""
    items = [{"id": f"{dim}-{i}", "patient": f"{dim}-{i // 2}", "image": "x", "dim": dim} for i in range(len(labels))]
    cls = torch.as_tensor(cls, dtype=torch.float32)
    embed = cls if embed is None else torch.as_tensor(embed, dtype=torch.float32)
    studies = {item["id"]: {"labels": row.tolist()} for item, row in zip(items, labels, strict=True)}
    return Features(items, embed, embed, cls, torch.ones(len(items), 4)), studies


@pytest.fixture
def case():
    """Findings point in directions of their own in both dimensions; volumes lie a constant away."""
    rng = np.random.default_rng(0)
    labels = {dim: (rng.random((40, 3)) < 0.4).astype(int) for dim in (2, 3)}
    rows = {dim: labels[dim] @ np.eye(3, 8) + 0.6 * rng.normal(size=(40, 8)) for dim in (2, 3)}
    rows[3] = rows[3] + 5.0
    parts, studies = {}, {}
    for dim in (2, 3):
        parts[dim], known = make(dim, labels[dim], rows[dim], rng.normal(size=(40, 8)))
        studies |= known
    return parts, studies, labels


def test_search_equals_the_protocols_functions(case, kept_by):
    parts, studies, labels = case
    found = kept_by(cross_search_metrics, parts, studies)
    for name, query, other in (("xray_to_ct", 2, 3), ("ct_to_xray", 3, 2)):
        for end, space in (("", "image_embed"), ("_cls", "cls")):
            rows = {dim: getattr(parts[dim], space).double() for dim in (2, 3)}
            if space == "cls":
                rows = {dim: part - part.mean(0) for dim, part in rows.items()}
            exact = same_findings_precision(rows[query], rows[other], labels[query], labels[other])
            by_class = class_precision(rows[query], rows[other], labels[query], labels[other], NAMES, ks=(5, 10))
            for k in (5, 10):
                for kind, expected in (("", exact), ("_class", by_class)):
                    for chance in ("", "_chance"):
                        value = found[f"{name}{end}{kind}_precision_at_{k}{chance}"]
                        assert value == pytest.approx(expected[f"precision_at_{k}{chance}"]), (name, end, k, kind)
    # the constant between the dimensions is taken out of the CLS alone
    assert found["xray_to_ct_cls_precision_at_5"] > 1.6 * found["xray_to_ct_cls_precision_at_5_chance"]
    assert found["xray_to_ct_precision_at_5"] < 1.6 * found["xray_to_ct_precision_at_5_chance"]


def test_search_has_intervals_and_leaves_out_what_cannot_be_asked(case, kept_by):
    parts, studies, _ = case
    kept = Measures(PatientResamples(p for part in parts.values() for p in part.patients))
    cross_search_metrics(kept, parts, studies, ks=(5, 41))
    found = kept.content()
    assert not [key for key in found if "at_41" in key]
    low, high = found["intervals"]["xray_to_ct_cls_class_precision_at_5"]
    assert low < found["xray_to_ct_cls_class_precision_at_5"] < high
    assert kept_by(cross_search_metrics, {2: parts[2]}, studies) == {}
    nothing = {name: {"labels": [0, 0, int(name.startswith("3"))]} for name in studies}
    assert kept_by(cross_search_metrics, parts, nothing) == {}


def test_modalities_that_a_plane_separates_and_that_none_does(case, kept_by):
    parts, studies, _ = case
    kept = Measures(PatientResamples(p for part in parts.values() for p in part.patients))
    separation_metrics(kept, parts, studies, NAMES)
    found = kept.content()
    assert found["modality_accuracy_cls"] > 0.95
    assert found["modality_accuracy_embed"] == pytest.approx(0.5, abs=0.15)
    assert found["modality_accuracy_chance"] == 0.5
    assert found["centroid_distance_cls"] > 1.2 > 0.6 > found["centroid_distance_embed"]
    assert set(found["centroid_distance_cls_per_finding"]) == set(NAMES)
    assert {"modality_accuracy_embed", "centroid_distance_cls"} <= found["intervals"].keys()
    assert found["intervals"]["modality_accuracy_cls"][1] == 1.0
    assert kept_by(separation_metrics, {3: parts[3]}, studies, NAMES) == {}


def test_accuracy_is_balanced():
    """All of few volumes and half of many X-rays told right: three quarters."""
    kept = Measures()
    right = np.asarray([True] * 5 + [False] * 5 + [True, True])
    common_space._balanced_accuracy(kept, "x", right, np.repeat([0, 1], [10, 2]), list("abcdefghijkl"))
    assert kept.values == {"x": 0.75}


def test_paired_search_by_hand(case, monkeypatch, tmp_path, kept_by):
    """Ten patients whose X-rays lie at their own volume after projection, at their neighbour's on the CLS."""
    written = []

    def write(path, layout, seed, index):
        written.append((Path(path).name, layout, seed, index))
        return path

    volumes, studies = make(3, np.zeros((10, 3), int), np.eye(10), np.eye(10))
    studies = {name: {**study, "phantom": ("bimcv", 7, i)} for i, (name, study) in enumerate(studies.items())}

    def run(pretrained, items, root, **options):
        assert all(item["dim"] == 2 and Path(item["image"]).is_absolute() for item in items)
        assert options == {"batch_2d": 3}
        return {2: Features(items, torch.eye(10), torch.eye(10), 3 + torch.eye(10).roll(1, 0), torch.ones(10, 4))}

    monkeypatch.setattr(common_space, "write_paired_xray", write)
    monkeypatch.setattr(common_space, "extract_features", run)
    kept = Measures(PatientResamples(volumes.patients))
    paired_search_metrics(kept, None, volumes, studies, tmp_path, batch_2d=3)
    found = kept.content()
    assert written == [(f"3-{i}.jpg", "bimcv", 7, i) for i in range(10)]
    assert (found["drr_to_ct_recall_at_1"], found["drr_to_ct_cls_recall_at_1"]) == (1.0, 0.0)
    assert (found["drr_to_ct_recall_at_10"], found["drr_to_ct_cls_recall_at_10"]) == (1.0, 1.0)
    assert found["drr_to_ct_recall_at_1_chance"] == pytest.approx(0.1)
    assert found["drr_to_ct_cls_recall_at_5_chance"] == pytest.approx(0.5)
    assert found["intervals"]["drr_to_ct_recall_at_1"] == [1.0, 1.0]
    bare = {name: {"labels": [0, 0, 0]} for name in studies}
    monkeypatch.setattr(common_space, "extract_features", lambda *args, **kwargs: {})
    assert kept_by(paired_search_metrics, None, volumes, bare, tmp_path) == {}
