# SPDX-License-Identifier: Apache-2.0
"""What every task bundle keeps: files of a run, evaluation, resuming, refusals, and one error where nothing is read."""

from __future__ import annotations

import gzip
from copy import deepcopy
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from jsonschema import validate
from monai.bundle import ConfigParser
from PIL import Image

from tests.bundles.conftest import SHORT
from tests.common import fault_of, last, read
from unimedi_components.bundle import user_fault
from unimedi_components.errors import DataError
from unimedi_components.networks import load_network
from unimedi_components.tasks import evaluate_task

SCHEMA = Path(__file__).with_name("meta_schema_20240725.json")
NAMES = [
    "chest_xray_classification",
    "chest_ct_classification",
    "chest_xray_segmentation",
    "chest_xray_detection",
    "abdomen_ct_segmentation",
]

pytestmark = [pytest.mark.usefixtures("in_process"), pytest.mark.parametrize("name", NAMES)]


def test_a_run_leaves_its_files(name: str, task_bundle: Any) -> None:
    bundle = task_bundle(name)
    folder, made = bundle.finished()
    assert made.check_properties() == []
    assert {path.name for path in (folder / "models").iterdir()} == {"model.pt", "model.json", "last.ckpt"}
    names = {path.name for path in (folder / "eval").iterdir()}
    events = {name for name in names if "tfevents" in name}
    figures = {"loss_curves.png", *bundle.figures}
    assert events and names - events == {"metrics.json", "run.json", "cases.csv", *figures}
    for figure in figures:
        with Image.open(folder / "eval" / figure) as image:
            assert image.width >= 400, figure
    card, datalist = (read(folder / part) for part in ("models/model.json", "data.json"))
    metrics, meta = read(folder / "eval" / "metrics.json"), datalist["meta"]
    assert (metrics["split"], metrics["checkpoint"], metrics["skipped_files"]) == ("test", "model.pt", 0)
    assert metrics.get("cases", metrics.get("images")) == len(datalist["test"]) > 0
    assert card["task"] == meta["task"] == metrics["task"]
    assert card["label_names"] == meta["label_names"] == metrics["label_names"]
    # a frozen encoder is the pre-trained one
    before = torch.load(bundle.encoder, weights_only=True)
    after = load_network(folder / "models" / "model.pt").encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before) == (name != "abdomen_ct_segmentation")
    with open(folder / "eval" / "cases.csv") as file:
        rows = {line.split(",")[0] for line in file.read().splitlines()[1:]}
    assert rows == {item["id"] for item in datalist["test"]}


def test_evaluate_reproduces_the_runs_metrics(name: str, task_bundle: Any, tmp_path: Path, capsys: Any) -> None:
    bundle = task_bundle(name)
    folder, _ = bundle.finished()
    bundle.workflow(bundle.overrides(folder, output_dir=str(tmp_path)), "train", "evaluate").run()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "cases.csv", *bundle.figures}
    for file in ("metrics.json", "cases.csv"):
        assert (tmp_path / file).read_bytes() == (folder / "eval" / file).read_bytes(), file
    assert '"split": "test"' in capsys.readouterr().out


def test_a_resumed_run_equals_one_that_was_never_interrupted(
    name: str, task_bundle: Any, checkpoint_differences: Any, tmp_path: Path
) -> None:
    bundle = task_bundle(name)
    folder, _ = bundle.finished()
    epoch = bundle.changes["epochs"] // 2
    bundle.interrupted(tmp_path, epoch)
    assert last(tmp_path)["epoch"] == epoch
    bundle.train(tmp_path, resume=True)
    assert checkpoint_differences(last(tmp_path), last(folder)) == []
    best = [torch.load(place / "models" / "model.pt", weights_only=True) for place in (tmp_path, folder)]
    assert checkpoint_differences(*best) == []
    assert read(tmp_path / "eval" / "metrics.json") == read(folder / "eval" / "metrics.json")


def test_a_run_is_not_resumed_with_other_weights_or_data(name: str, task_bundle: Any, tmp_path: Path) -> None:
    bundle = task_bundle(name)
    folder, _ = bundle.finished()
    other = tmp_path / "model.pt"
    torch.save({key: value + 1 for key, value in torch.load(bundle.encoder, weights_only=True).items()}, other)
    other.with_name("model.json").write_bytes(bundle.encoder.with_name("model.json").read_bytes())
    # more epochs and other folders are no reason
    given = {"epochs": 2 * bundle.changes["epochs"], "output_dir": str(tmp_path), "resume": True}
    before = last(folder)["settings"]
    for changes in ({"encoder_weights": str(other)}, {"seed": 1, "lr": 0.125}, {"label_fraction": 0.5}):
        told = fault_of(bundle.train, folder, **given, **changes)
        names = [SHORT.get(key, key) for key in changes]
        assert told.startswith(
            f"{folder}/models/last.ckpt: its run was started with {names[0]} {before[names[0]]}, not "
        )
        assert all(f"--{key} " in told for key in names)
    assert before["training images"].startswith(f"{len(read(folder / 'data.json')['training'])} (ids ")
    assert not any(str(part).startswith(str(folder)) for part in before.values())


def test_data_for_something_else_is_refused(name: str, task_bundle: Any) -> None:
    bundle = task_bundle(name)
    folder, _ = bundle.finished()
    lists, root = read(folder / "data.json"), bundle.data / bundle.data_set
    card = load_network(folder / "models" / "model.pt").card

    def fault(changes: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            evaluate_task(folder / "models" / "model.pt", {**lists, **changes}, root)

    trained = f"was trained for the {card['task']} labels {', '.join(card['label_names'])}, but the datalist holds the"
    fault({"meta": {**lists["meta"], "task": "something"}}, f"{trained} something labels")
    fault({"meta": {**lists["meta"], "label_names": ["a", "b"]}}, f"{trained} {card['task']} labels a, b; prepare")
    fault({"validation": [], "test": []}, r"no [23]D item in the test or validation split")
    missing = [{**item, "image": "missing.png"} for item in lists["test"][:1]]
    fault({"test": missing}, r"none of 1 (image|volume)s can be read, first .*missing.png")


def test_nothing_readable_is_one_error(name: str, task_bundle: Any, tmp_path: Path) -> None:
    bundle = task_bundle(name)
    # headers that say what the files are, and no image behind them
    bad = tmp_path / ("bad.nii.gz" if "_ct_" in name else "bad.png")
    voxels = np.random.default_rng(0).integers(-1000, 1000, (30, 30, 12)).astype(np.int16)
    packed = gzip.compress(nib.Nifti1Image(voxels, np.diag([2.0, 2, 4, 1])).to_bytes())
    bad.write_bytes(packed[: len(packed) // 2] if "_ct_" in name else b"\x89PNG\r\n\x1a\n no film")
    changes = {
        "ckpt_dir": str(bundle.finished()[0] / "models"),
        "output_dir": str(tmp_path / "out"),
        "device": bundle.device,
    }
    made = bundle.workflow({**changes, "inputs": str(bad)}, "inference", kind="infer")
    with pytest.raises(Exception) as caught:
        made.run()
    assert str(user_fault(caught.value)).startswith(f"none of 1 inputs could be read, first {bad}: ")
    content = read(tmp_path / "out" / "predictions.json")
    assert content["predictions"] == [] and [row["file"] for row in content["skipped"]] == [str(bad)]


def test_inference_reads_the_test_split_by_default(name: str, task_bundle: Any, tmp_path: Path) -> None:
    bundle = task_bundle(name)
    folder, _ = bundle.finished()
    changes = {
        "ckpt_dir": str(folder / "models"),
        "output_dir": str(tmp_path),
        "device": bundle.device,
        "figures": False,
    }
    places = {"dataset_dir": str(bundle.data / bundle.data_set), "datalist_file": str(folder / "data.json")}
    made = bundle.workflow({**changes, **places}, "inference", kind="infer")
    assert made.check_properties() == []
    made.run()
    wanted = [item["id"] for item in read(folder / "data.json")["test"]]
    assert [row["id"] for row in read(tmp_path / "predictions.json")["predictions"]] == wanted


def test_the_metadata_fits_the_schema_and_the_configs(name: str, task_bundle: Any) -> None:
    configs = task_bundle(name).configs
    metadata, train, inference = (read(configs / f"{part}.json") for part in ("metadata", "train", "inference"))
    validate(metadata, read(SCHEMA))
    formats = metadata["network_data_format"]
    image, (output,) = formats["inputs"]["image"], formats["outputs"].values()
    assert image["num_channels"] == 1
    preprocessing = ConfigParser(deepcopy(train)).get_parsed_content("preprocessing")
    (size, *_) = (chain.get("size") for chain in preprocessing.values())
    assert image["spatial_shape"] == (train["vol_size"] if "_ct_" in name else [size] * 2)
    assert output["spatial_shape"] in ([], image["spatial_shape"])
    labels = train["label_names"][1:] if name == "chest_xray_detection" else train["label_names"]
    assert output["channel_def"] == {str(index): label for index, label in enumerate(labels)}
    channels = {"chest_xray_segmentation": 1, "chest_xray_detection": 4}
    assert output["num_channels"] == channels.get(name, len(labels))
    assert "classification" not in name or output["value_range"] == [0, 1]
    shared = ["data_dir", "datalist_file", "ckpt_dir", "bundle_root", "device", "amp"]
    assert {key: inference[key] for key in shared} == {key: train[key] for key in shared}
    assert inference["data_set"] == train["data"]["datalist"]["dataset"]
    assert inference["dataset_dir"] == train["dataset_dir"].replace("data#datalist#dataset", "data_set")
    threshold = train["evaluation"].get("threshold")
    assert threshold is None or inference["threshold"] == threshold
