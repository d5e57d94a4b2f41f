# SPDX-License-Identifier: Apache-2.0
"""The datalist format, its checks, nested fractions and splits by patient."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise

import pytest
from monai.data import load_decathlon_datalist

from unimedi_components.data.datalist import DatalistBuilder, load_datalist, select, write_datalist, write_json
from unimedi_components.data.splits import hold_out, nested_fraction, split_patients
from unimedi_components.errors import DataError


def item(name, patient, dim=2):
    return {"id": name, "patient": patient, "image": f"{name}.jpg", "dim": dim, "report": "clear lungs"}


@pytest.fixture
def datalist():
    return {
        "training": [item("a", "p1"), item("b", "p1", 3)],
        "validation": [item("c", "p2")],
        "test": [item("d", "p3", 3)],
        "meta": {"root": "/data/set"},
    }


def test_builder_counts_sorts_and_hashes(tmp_path):
    table = tmp_path / "t.csv"
    table.write_bytes(b"x\n1\n")
    builder = DatalistBuilder("demo", tmp_path)
    builder.add_source(table)
    for name in ("b", "a"):
        builder.add("training", item(name, "p1"))
    builder.add("test", item("c", "p2"))
    builder.drop_many("lateral", (f"x{i}" for i in range(25)))
    builder.drop("unreadable image", "y", "y.jpg: truncated")
    built = builder.build()
    meta = built["meta"]
    assert [entry["id"] for entry in built["training"]] == ["a", "b"]
    assert meta["kept"] == {"training": 2, "validation": 0, "test": 1}
    assert meta["dropped"] == {"lateral": 25, "unreadable image": 1}
    assert meta["dropped_items"]["lateral"] == [f"x{i}" for i in range(20)]
    assert builder.dropped["unreadable image"] == [{"id": "y", "detail": "y.jpg: truncated"}]
    assert meta["sources"] == {"t.csv": hashlib.sha256(b"x\n1\n").hexdigest()}
    assert sum(map(len, builder.items.values())) == 3


def test_strict_raises_for_faults_only(tmp_path):
    builder = DatalistBuilder("demo", tmp_path, strict=True)
    builder.drop("not a frontal view", "a")
    with pytest.raises(DataError, match=r"unreadable image: b\.jpg: truncated\. .*without --strict"):
        builder.drop("unreadable image", "b", "b.jpg: truncated")


def test_write_is_atomic_and_monai_reads_it(tmp_path, datalist):
    path = write_json(datalist, tmp_path / "deep" / "list.json")
    assert [entry.name for entry in path.parent.iterdir()] == ["list.json"]
    with pytest.raises(TypeError):
        write_json({"training": [object()]}, path)
    assert json.loads(path.read_text()) == datalist
    assert [entry.name for entry in path.parent.iterdir()] == ["list.json"]
    read = load_decathlon_datalist(str(path), data_list_key="validation", base_dir="/data/set")
    assert read[0]["image"] == "/data/set/c.jpg"
    assert read[0]["report"] == "clear lungs"


def test_select_by_split_and_dim(datalist):
    assert [entry["id"] for entry in select(datalist, "training")] == ["a", "b"]
    assert [entry["id"] for entry in select(datalist, "training", dims=3)] == ["b"]
    assert [entry["id"] for entry in select(datalist, "training", dims=(2,))] == ["a"]
    assert [entry["id"] for entry in select(datalist, "test", dims=[2, 3])] == ["d"]
    with pytest.raises(DataError, match="'train' is unknown"):
        select(datalist, "train")


def test_missing_splits_become_empty(tmp_path, datalist):
    path = write_json({"training": datalist["training"]}, tmp_path / "l.json")
    read = load_datalist(path)
    assert (read["validation"], read["test"]) == ([], [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["validation"].append(item("e", "p1")), r"patient 'p1' is in two splits, training and validation"),
        (lambda d: d["test"].append(item("a", "p9")), r"test\[1\]: the id 'a' is used twice"),
        (lambda d: d["test"][0].update(dim=4), r"test\[0\] \(id d\) has dim 4; it must be 2 or 3"),
        (lambda d: d["training"][1].pop("image"), r"training\[1\] has no 'image'"),
        (lambda d: d["training"].clear(), "training split is empty"),
        (lambda d: d.pop("training"), 'key "training" is missing'),
    ],
)
def test_invalid_datalists_name_the_fault(tmp_path, datalist, change, message):
    change(datalist)
    path = write_json(datalist, tmp_path / "l.json")
    with pytest.raises(DataError, match=message) as caught:
        load_datalist(path)
    assert str(path) in str(caught.value)


def test_missing_file_bad_json_and_wrong_root(tmp_path, datalist):
    with pytest.raises(DataError, match="no such datalist"):
        load_datalist(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"training": [')
    with pytest.raises(DataError, match="not valid JSON"):
        load_datalist(tmp_path / "bad.json")
    path = write_json(datalist, tmp_path / "l.json")
    with pytest.raises(DataError, match=r"training image a\.jpg is not below .*prepared from /data/set"):
        load_datalist(path, root=tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        load_datalist(path, root=tmp_path / "gone")
    with pytest.raises(DataError, match="has no 'label'"):
        load_datalist(path, required=("id", "label"))


def test_fractions_are_nested_by_patient_and_kind():
    items = [item(f"x{i}-{j}", f"x{i}") for i in range(200) for j in range(2)]
    items += [item(f"c{i}", f"c{i}", 3) for i in range(30)]
    kept = {}
    for fraction in (0.01, 0.1, 0.5, 1.0):
        kept[fraction] = {entry["id"] for entry in nested_fraction(items, fraction, seed=1)}
    assert kept[0.01] <= kept[0.1] <= kept[0.5] <= kept[1.0] == {entry["id"] for entry in items}
    # 0.01 * 200 = 2 patients with two X-rays each, and of 30 CT patients at least one
    assert [len(kept[f]) for f in (0.01, 0.1, 0.5)] == [2 * 2 + 1, 20 * 2 + 3, 100 * 2 + 15]
    assert all(f"{name[:-1]}1" in kept[0.1] for name in kept[0.1] if name.endswith("-0"))
    again = nested_fraction(items[::-1], 0.1, seed=1)
    assert {entry["id"] for entry in again} == kept[0.1]
    assert {entry["id"] for entry in nested_fraction(items, 0.1, seed=2)} != kept[0.1]
    # BCV's 21 training cases, as the paper's sources count them
    cases = [item(f"q{i}", f"q{i}", 3) for i in range(21)]
    assert [len(nested_fraction(cases, f)) for f in (0.2, 0.4, 1.0)] == [4, 8, 21]
    # 0.3 * 5 is 1.4999999999999998 in floating point
    assert len(nested_fraction(cases[:5], 0.3)) == 2
    for wrong in (0, 1.5, -0.1):
        with pytest.raises(DataError, match=r"not in \(0, 1\]"):
            nested_fraction(items, wrong)


def test_split_counts_groups_and_order():
    strata = {f"x{i}": "2" for i in range(92)} | {f"c{i}": "3" for i in range(10)}
    split = split_patients(strata, 0.1, 0.1, seed=42)
    counts = {
        (strata[p], s): sum(strata[q] == strata[p] and t == s for q, t in split.items()) for p, s in split.items()
    }
    assert counts == {
        ("2", "training"): 74,
        ("2", "validation"): 9,
        ("2", "test"): 9,
        ("3", "training"): 8,
        ("3", "validation"): 1,
        ("3", "test"): 1,
    }
    assert split_patients(dict(reversed(strata.items())), 0.1, 0.1, seed=42) == split
    order = sorted((p for p in strata if p[0] == "c"), key=lambda p: hashlib.sha256(f"42:{p}".encode()).digest())
    assert (split[order[0]], split[order[1]]) == ("validation", "test")
    assert set(split_patients({"a": "2", "b": "2"}, 0.1, 0.1, seed=0).values()) == {"training"}
    with pytest.raises(DataError, match="leave no training data"):
        split_patients(strata, 0.5, 0.5, seed=0)


def test_official_splits_are_kept_apart(tmp_path):
    builder = DatalistBuilder("demo", tmp_path)
    for split, patients in (("training", "abc"), ("validation", "bd"), ("test", "ade")):
        for patient in patients:
            builder.add(split, item(f"{split}-{patient}", patient))
    builder.keep_apart()
    kept = {split: [entry["patient"] for entry in entries] for split, entries in builder.items.items()}
    assert kept == {"training": ["c"], "validation": ["b"], "test": ["a", "d", "e"]}
    dropped = {entry["id"] for entry in builder.dropped["patient in another split"]}
    assert dropped == {"training-a", "training-b", "validation-d"}


def test_datalists_are_written_an_item_per_line(tmp_path):
    lists = {"training": [{"id": "ä", "label": [1, 0]}, {"id": "b"}], "test": [], "meta": {"kept": {"test": 0}}}
    path = write_datalist(lists, tmp_path / "l.json")
    assert json.loads(path.read_text(encoding="utf-8")) == lists
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[:5] == ["{", ' "training": [', '  {"id": "ä", "label": [1, 0]},', '  {"id": "b"}', " ],"]
    assert json.loads(write_datalist({}, tmp_path / "empty.json").read_text()) == {}


def test_fractions_keep_the_labels_proportions():
    """900 patients: 600 of class 0, 270 of class 1, 30 of class 2, and one image of each."""
    classes = [0] * 600 + [1] * 270 + [2] * 30
    items = [{**item(f"p{i}", f"p{i}"), "label": label} for i, label in enumerate(classes)]
    kept: dict[float, list] = {}
    for fraction in (0.01, 0.1, 0.4, 1.0):
        kept[fraction] = nested_fraction(items, fraction, seed=3)
        counts = [sum(entry["label"] == label for entry in kept[fraction]) for label in (0, 1, 2)]
        assert sum(counts) == round(900 * fraction)
        exact = [600 * fraction, 270 * fraction, 30 * fraction]
        assert all(abs(count - share) < 1 for count, share in zip(counts, exact, strict=True))
    names = [{entry["id"] for entry in kept[fraction]} for fraction in sorted(kept)]
    assert all(small < large for small, large in pairwise(names))


def test_hold_out_is_exact_and_by_patient():
    images = {f"p{i}": 1 + i % 4 for i in range(100)}
    chosen = hold_out(images, 61, seed=5)
    assert sum(images[patient] for patient in chosen) == 61
    assert hold_out(dict(reversed(images.items())), 61, seed=5) == chosen != hold_out(images, 61, seed=6)
    # nobody has a single image: of 5 at most 4 can be held out
    assert sum({"a": 2, "b": 2, "c": 2}[patient] for patient in hold_out({"a": 2, "b": 2, "c": 2}, 5, 0)) == 4
