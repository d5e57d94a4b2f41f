# SPDX-License-Identifier: Apache-2.0
"""The datalist of a task bundle: when it is made, kept and made again, and what it must hold."""

import json
import logging
import shutil

import numpy as np
import pytest
from PIL import Image

from unimedi_components.data import made
from unimedi_components.data.made import load_task, task_datalist
from unimedi_components.data.phantom import write_phantom
from unimedi_components.errors import ConfigError, DataError

NAMES = ["normal", "pneumonia", "COVID-19"]


@pytest.fixture
def root(tmp_path):
    """COVIDx by hand: 60 training patients of one film, 20 of each class, and six for testing."""
    folder = tmp_path / "covidx"
    film = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    for kind, count in (("train", 60), ("test", 6)):
        (folder / kind).mkdir(parents=True)
        rows = [f"{kind}{i} {kind}{i}.png {NAMES[i % 3]} rsna" for i in range(count)]
        (folder / f"{kind}_COVIDx9A.txt").write_text("\n".join(rows) + "\n")
        for i in range(count):
            film.save(folder / kind / f"{kind}{i}.png")
    return folder


@pytest.fixture
def prepared(monkeypatch):
    """The options of every call of `prepare`."""
    calls, prepare = [], made.prepare

    def counting(dataset, root, out, **options):
        calls.append(options)
        prepare(dataset, root, out, **options)

    monkeypatch.setattr(made, "prepare", counting)
    return calls


def test_the_second_call_finds_the_first_ones_datalist(root, prepared):
    path = task_datalist("covidx", root)
    assert path == str(root.with_name("covidx.json"))
    before = root.with_name("covidx.json").stat()
    assert task_datalist("covidx", root) == path
    after = root.with_name("covidx.json").stat()
    assert prepared == [{}]
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    datalist = json.loads(root.with_name("covidx.json").read_text())
    assert [len(datalist[split]) for split in ("training", "validation", "test")] == [54, 6, 6]
    assert datalist["meta"]["recipe"] == {"dataset": "covidx", "options": {}, "phantoms": None, "phantom_seed": 0}


def test_a_changed_option_prepares_again(root, prepared, tmp_path):
    out = tmp_path / "lists" / "own.json"
    for options in ({}, {"classes": "two"}, {"classes": "two"}, {"validation_fraction": 0.2}):
        assert task_datalist("covidx", root, out=out, **options) == str(out)
    assert prepared == [{}, {"classes": "two"}, {"validation_fraction": 0.2}]
    assert [len(json.loads(out.read_text())[split]) for split in ("training", "validation")] == [48, 12]
    with pytest.raises(ConfigError, match=r"unknown option 'classses'\. did you mean 'classes'"):
        task_datalist("covidx", root, out=out, classses="two")


def test_a_tuple_among_the_options_is_its_list(tmp_path, monkeypatch):
    calls = []

    def prepare(dataset, root, out, **options):
        calls.append(options)
        out.write_text('{"training": [{"id": "a", "image": "a", "dim": 3, "patient": "a"}], "meta": {}}')

    monkeypatch.setattr(made, "prepare", prepare)
    for _ in range(2):
        task_datalist("luna16", tmp_path / "luna16", train_subsets=(0, 1))
    assert calls == [{"train_subsets": (0, 1)}]


@pytest.mark.parametrize("meta", [{}, {"meta": {"task": "multiclass", "label_names": NAMES}}])
def test_a_datalist_of_the_users_own_stays_as_it_is(root, prepared, caplog, meta):
    path = root.with_name("covidx.json")
    item = {"id": "a", "patient": "p", "image": "train/train0.png", "dim": 2, "label": 0}
    path.write_text(json.dumps({"training": [item], **meta}))
    before = path.read_text()
    with caplog.at_level(logging.WARNING):
        assert task_datalist("covidx", root, classes="two") == str(path)
    assert (path.read_text(), prepared) == (before, [])
    assert f"{path}: not made by this config, so its options do not apply; taken as it is" in caplog.text
    assert load_task(path, root, 2, "multiclass", NAMES)["training"] == [item]


def test_phantoms_are_written_once_and_their_datalist_with_them(tmp_path, prepared, monkeypatch):
    written = []

    def write(layout, out, patients, seed):
        folder = write_phantom(layout, out, patients, seed, workers=0, progress=False)
        written.append(folder.fresh)
        return folder

    monkeypatch.setattr(made, "write_phantom", write)
    root = tmp_path / "covidx"
    for _ in range(2):
        path = task_datalist("covidx", root, phantoms=6, phantom_seed=1)
    assert (written, prepared) == ([True, False], [{}])
    assert json.loads((tmp_path / "covidx.json").read_text())["meta"]["recipe"]["phantoms"] == 6
    datalist = load_task(path, root, 2, "multiclass", NAMES)
    assert [len({item["patient"] for item in datalist[split]}) for split in ("training", "test")] == [5, 1]
    # phantoms that were deleted are written again, and their datalist too
    shutil.rmtree(root)
    task_datalist("covidx", root, phantoms=6, phantom_seed=1)
    assert written == [True, False, True]
    assert len(prepared) == 2


def test_a_missing_data_set_is_named(tmp_path):
    with pytest.raises(DataError, match=str(tmp_path / "covidx")):
        task_datalist("covidx", tmp_path / "covidx")


def test_load_task_checks_what_the_config_expects(root):
    path = task_datalist("covidx", root)
    datalist = load_task(path, root, 2, "multiclass", NAMES)
    assert [len(datalist[split]) for split in ("training", "validation", "test")] == [54, 6, 6]
    with pytest.raises(DataError, match="task is multiclass, the config's is binary; set --task to the data's"):
        load_task(path, root, 2, "binary")
    with pytest.raises(DataError, match=r"label_names is \['normal', .*'\], the config's is \['pneumonia', 'normal'"):
        load_task(path, root, 2, "multiclass", ["pneumonia", "normal", "COVID-19"])
    with pytest.raises(DataError, match="no 3D training item; this bundle reads 3D images"):
        load_task(path, root, 3)
    with pytest.raises(DataError, match="is not below"):
        load_task(path, root / "train", 2)


def test_items_of_the_other_dimension_are_left_out(root):
    item = {"id": "a", "patient": "p", "image": "train/train0.png", "dim": 2, "label": 0}
    other = {"id": "b", "patient": "q", "image": "train/train1.png", "dim": 3, "label": 1}
    path = root / "mixed.json"
    path.write_text(json.dumps({"training": [item, other], "validation": []}))
    datalist = load_task(path, root, 3)
    assert [datalist[split] for split in ("training", "validation", "test")] == [[other], [], []]


def test_fractions_of_the_labels_are_nested_and_stratified(root):
    path = task_datalist("covidx", root)

    def training(fraction, **options):
        return load_task(path, root, 2, label_fraction=fraction, **options)["training"]

    kept = {f: [item["id"] for item in training(f)] for f in (0.01, 0.1, 0.5, 1.0)}
    # 54 patients: 0.54, 5.4 and 27 of them, rounded, and at least one
    assert [len(ids) for ids in kept.values()] == [1, 5, 27, 54]
    assert set(kept[0.01]) < set(kept[0.1]) < set(kept[0.5]) < set(kept[1.0])
    labels = [item["label"] for item in training(0.5)]
    assert [labels.count(label) for label in range(3)] == [9, 9, 9]
    assert [item["id"] for item in training(0.1)] == kept[0.1]
    assert [item["id"] for item in training(0.1, fraction_seed=1)] != kept[0.1]
    with pytest.raises(DataError, match="fraction 0 is not in"):
        training(0)
