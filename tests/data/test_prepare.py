# SPDX-License-Identifier: Apache-2.0
"""The prepare command: account, options, fractions, merging, and phantoms through the converters."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from unimedi_components.data.catalogue import DATASETS
from unimedi_components.data.datalist import load_datalist, select
from unimedi_components.data.phantom import LAYOUTS, write_phantom
from unimedi_components.data.prepare import merge_datalists, prepare
from unimedi_components.errors import ConfigError, DataError

REPORT = "The lungs are clear. No effusion is seen. The heart is normal."


def make_table(folder, count=20, bad=1):
    folder.mkdir(parents=True)
    lines = ["image,report,patient"]
    for index in range(count):
        pixels = np.arange(256, dtype=np.uint8).reshape(16, 16) + np.uint8(index)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        lines.append(f"{index:02d}.png,{REPORT},p{index}")
    lines += [f"gone{index}.png,{REPORT},q{index}" for index in range(bad)]
    (folder / "t.csv").write_text("\n".join(lines))
    return folder / "t.csv"


def test_account_and_files(tmp_path, capsys):
    table = make_table(tmp_path / "set", bad=30)
    out = tmp_path / "out" / "list.json"
    prepare("table", table, out)
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    for expected in ("kept 16 training", "kept 2 validation", "kept 2 test"):
        assert expected.split() in lines
    assert "dropped        30  missing image: gone0, gone1, gone2, ...\n" in text
    assert f"e.g. {tmp_path}/set/gone0.png: no such file" in text
    assert f"every dropped item: {tmp_path}/out/list.drops.json" in text
    datalist = load_datalist(out, root=tmp_path / "set", required=("id", "report"))
    assert len(datalist["meta"]["dropped_items"]["missing image"]) == 20
    drops = json.loads((out.parent / "list.drops.json").read_text())
    assert [drop["id"] for drop in drops["missing image"]] == [f"gone{index}" for index in range(30)]
    # the account of an earlier run does not outlive it
    prepare("table", make_table(tmp_path / "clean", bad=0), out)
    assert [entry.name for entry in out.parent.iterdir()] == ["list.json"]


def test_fractions_are_nested_and_leave_the_other_splits(tmp_path):
    table = make_table(tmp_path / "set")
    kept = {}
    for fraction in (0.1, 0.5, None):
        prepare("table", table, tmp_path / "l.json", fraction=fraction)
        datalist = load_datalist(tmp_path / "l.json")
        kept[fraction] = {item["id"] for item in datalist["training"]}
        assert len(datalist["validation"]) == len(datalist["test"]) == 2
        assert datalist["meta"]["kept"]["training"] == len(kept[fraction])
    # 16 training patients: 1.6 to the nearest, and 8
    assert [len(kept[fraction]) for fraction in (0.1, 0.5, None)] == [2, 8, 16]
    assert kept[0.1] < kept[0.5] < kept[None]
    first = (tmp_path / "l.json").read_bytes()
    prepare("table", table, tmp_path / "l.json")
    assert (tmp_path / "l.json").read_bytes() == first


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("mimc", {}, "unknown data set 'mimc'. did you mean 'mimic_cxr'"),
        ("BIMCV", {}, "did you mean 'bimcv'"),
        ("table", {"min_sentence": 1}, "prepare table: unknown option 'min_sentence'. did you mean 'min_sentences'"),
        ("mimic_cxr", {"fractoin": 1}, "did you mean 'fraction'"),
    ],
)
def test_unknown_names(tmp_path, dataset, options, message):
    with pytest.raises(ConfigError, match=message):
        prepare(dataset, tmp_path, tmp_path / "l.json", **options)


@pytest.mark.parametrize(
    ("dataset", "option", "message"),
    [
        (
            "chexpert",
            {"validation_images": "many"},
            "validation_images is 'many', it must be a whole number such as 5000",
        ),
        ("chexpert", {"num_workers": 1.5}, r"num_workers is 1\.5, it must be a whole number such as 8"),
        ("covidx", {"validation_fraction": True}, r"validation_fraction is True, it must be a number such as 0\.1"),
        ("luna16", {"min_diameter": "x"}, r"min_diameter is 'x', it must be a number such as 0\.0"),
        ("mimic_cxr", {"labels": "no"}, "labels is 'no', it must be True or False such as True"),
    ],
)
def test_values_of_options(tmp_path, dataset, option, message):
    with pytest.raises(ConfigError, match=f"prepare {dataset}: {message}"):
        prepare(dataset, tmp_path, tmp_path / "l.json", **option)


def test_folders_as_the_command_line_gives_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stage_2_train_labels.csv").write_text(
        "patientId,x,y,width,height,Target\n" + "".join(f"p{n},,,,,0\n" for n in range(4))
    )
    # a folder called 2024 arrives as a number
    with pytest.raises(DataError, match=r"^2024: no such folder"):
        prepare("rsna", tmp_path, "l.json", split="lovt", split_dir=2024)
    with pytest.raises(ConfigError, match=r"is a folder\. Give the file .* such as rsna\.json"):
        prepare("rsna", tmp_path, tmp_path)
    # without any film the message says how to do without
    (tmp_path / "stage_2_train_images").mkdir()
    with pytest.raises(
        DataError, match=r"dropped +4  missing image(.|\n)*--check_images none prepares the tables alone"
    ):
        prepare("rsna", tmp_path, "l.json")
    prepare("rsna", tmp_path, "l.json", check_images="none")
    assert load_datalist("l.json")["meta"]["kept"] == {"training": 2, "validation": 1, "test": 1}


@pytest.mark.parametrize("dataset", sorted(DATASETS))
def test_missing_root(tmp_path, dataset):
    with pytest.raises(DataError, match=r"gone.*: no such (folder|file)"):
        prepare(dataset, tmp_path / "gone", tmp_path / "l.json")
    assert not (tmp_path / "l.json").exists()


def test_nothing_kept_and_strict(tmp_path):
    table = make_table(tmp_path / "set", count=0, bad=3)
    with pytest.raises(
        DataError, match=r"no training item is left(.|\n)*dropped +3  missing image: gone0, gone1, gone2"
    ):
        prepare("table", table, tmp_path / "l.json")
    assert not (tmp_path / "l.json").exists()
    with pytest.raises(DataError, match=r"missing image: .*gone0\.png: no such file"):
        prepare("table", table, tmp_path / "l.json", strict=True)


def test_merge(tmp_path):
    for name in ("one", "two"):
        prepare("table", make_table(tmp_path / "data" / name), tmp_path / f"{name}.json")
    parts = {name: tmp_path / f"{name}.json" for name in ("one", "two")}
    joined = merge_datalists(parts, tmp_path / "all.json", tmp_path / "data")
    assert load_datalist(tmp_path / "all.json", root=tmp_path / "data") == joined
    assert joined["meta"]["kept"] == {"training": 32, "validation": 4, "test": 4}
    assert joined["meta"]["dropped"] == {"missing image": 2}
    single = load_datalist(parts["two"])["training"][0]
    moved = next(item for item in select(joined, "training") if item["image"] == f"two/{single['image']}")
    assert moved == {
        **single,
        "id": f"two-{single['id']}",
        "patient": f"two-{single['patient']}",
        "image": moved["image"],
    }
    # a moved data set is found below root/NAME
    (tmp_path / "data").rename(tmp_path / "moved")
    assert merge_datalists(parts, tmp_path / "b.json", tmp_path / "moved")["training"] == joined["training"]
    with pytest.raises(DataError, match=r"one\.json: image .* is neither below .*elsewhere/one nor below"):
        merge_datalists(parts, tmp_path / "c.json", tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"are not below root .*Give a folder above both"):
        prepare("table", tmp_path / "moved" / "one" / "t.csv", tmp_path / "one.json")
        merge_datalists({"x": tmp_path / "one.json"}, tmp_path / "c.json", tmp_path / "moved" / "two")


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_phantoms_come_through_the_converters(tmp_path, layout):
    write_phantom(layout, tmp_path / layout, patients=12, seed=3, workers=1, progress=False)
    truth = json.loads((tmp_path / layout / "truth.json").read_text())["studies"]
    prepare(layout, tmp_path / layout, tmp_path / "l.json")
    datalist = load_datalist(tmp_path / "l.json", root=tmp_path / layout)
    items = [item for split in ("training", "validation", "test") for item in select(datalist, split)]
    assert {item["id"]: item["image"] for item in items} == {name: study["image"] for name, study in truth.items()}
