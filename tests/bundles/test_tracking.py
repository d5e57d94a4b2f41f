# SPDX-License-Identifier: Apache-2.0
"""`--tracking mlflow` of every bundle that trains, into a file beside the run's outputs, without a server."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
NAMES = sorted(path.parents[1].name for path in BUNDLES.glob("*/configs/train.json"))
TASKS = [name for name in NAMES if name != "pretrain"]
SMALL = {"img_size": 32, "vol_size": [8, 24, 24], "embed_dim": 16, "depth": 2, "num_heads": 2}

pytestmark = pytest.mark.usefixtures("in_process")
with_mlflow = pytest.mark.skipif(
    importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed; pip install '.[mlflow]'"
)


def workflow(name: str, overrides: dict[str, Any], tracking: Any = "mlflow", **options: Any) -> ConfigWorkflow:
    file = str(BUNDLES / name / "configs" / "train.json")
    made = ConfigWorkflow(file, workflow_type="train", logging_file=False, tracking=tracking, **options, **overrides)
    made.initialize()
    return made


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_a_number(name: str, tmp_path: Path) -> None:
    """MONAI's default is a tuple where a batch is not decollated; no other handler is touched."""
    made = workflow(name, {"output_dir": str(tmp_path)})
    handlers = made.parser["train#handlers"]
    ours = json.loads((BUNDLES / name / "configs" / "train.json").read_text())["train"]["handlers"]
    assert handlers[:-1] == ours
    transform = made.parser.get_parsed_content(f"train#handlers#{len(ours)}#output_transform")
    assert transform({"loss": torch.tensor(1.5)}) == 1.5
    assert handlers[-1]["_target_"] == "MLFlowHandler" and handlers[-1]["tag_name"] == "train_loss"


def test_settings_of_the_users_own_stay(tmp_path: Path) -> None:
    mine = {"_target_": "MLFlowHandler", "output_transform": "$lambda output: 7"}
    ids = {"trainer": {"id": "train#trainer", "handlers": "train#handlers"}}
    settings = tmp_path / "tracking.json"
    settings.write_text(json.dumps({"handlers_id": ids, "configs": {"trainer": mine}}))
    made = workflow("pretrain", {"output_dir": str(tmp_path)}, tracking=str(settings))
    assert made.parser["train#handlers"][-1] == mine


def logged(store: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(store)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return [(run, {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}) for run in runs]


@with_mlflow
@pytest.mark.slow
def test_pretraining_is_tracked(new_run: Any) -> None:
    made = workflow("pretrain", {**new_run.overrides, "epochs": 1})
    made.run()
    ((run, metrics),) = logged(f"sqlite:///{new_run.eval}/mlruns.db")
    rows = new_run.last()["history"]["rows"]
    assert [point.value for point in metrics["train_loss"]] == pytest.approx([row["loss"] for row in rows])
    assert metrics["val_recall_at_5"][0].value == pytest.approx(rows[-1]["val_recall_at_5"])
    assert run.info.status == "FINISHED" and run.data.params["max_epochs"] == "1"


@with_mlflow
@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_tasks_training_is_tracked(name: str, tmp_path: Path) -> None:
    config = json.loads((BUNDLES / name / "configs" / "train.json").read_text())
    folders = {key: str(tmp_path / key) for key in ("ckpt_dir", "output_dir", "cache_dir")}
    folders |= {"dataset_dir": str(tmp_path / "data"), "datalist_file": str(tmp_path / "data.json")}
    sizes = {f"network_def#encoder#{key}": value for key, value in SMALL.items() if key not in config}
    changes: dict[str, Any] = {key: value for key, value in SMALL.items() if key in config}
    changes |= {"iterations": 2, "steps_per_pass": 2} if "iterations" in config else {"epochs": 1}
    if "hidden_states" in config:
        changes["hidden_states"] = [0, 1]
    overrides = {**folders, **sizes, **changes, "phantoms": 24, "encoder_weights": "none", "device": "cpu"}
    store = f"sqlite:///{tmp_path}/store.db"
    made = workflow(name, {**overrides, "tracking_uri": store, "experiment_name": name})
    made.parser.get_parsed_content("train#trainer").run()
    ((_, metrics),) = logged(store)
    rows = made.parser.get_parsed_content("train#history").rows
    assert [point.value for point in metrics["train_loss"]] == pytest.approx([row["loss"] for row in rows])
    assert any(key.startswith("val_") for key in metrics)
