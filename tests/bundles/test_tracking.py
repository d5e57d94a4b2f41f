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
SIZES = {"img_size": 32, "vol_size": [16, 24, 24], "embed_dim": 16, "depth": 2, "num_heads": 2}

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
    assert [handler["_target_"] for handler in handlers[:-1]] == [handler["_target_"] for handler in ours]
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


def small(name: str, folder: Path) -> dict[str, Any]:
    """Overrides of train.json for a run of two or three steps over a few phantoms."""
    config = json.loads((BUNDLES / name / "configs" / "train.json").read_text())
    changes: dict[str, Any] = {key: str(folder / key) for key in ("ckpt_dir", "output_dir", "cache_dir")}
    changes |= {"dataset_dir": str(folder / "data"), "device": "cpu", "encoder_weights": "none", "epochs": 1}
    changes |= {key if key in config else f"network_def#encoder#{key}": value for key, value in SIZES.items()}
    if name == "pretrain":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        changes |= {f"network_def#report_encoder#config#{key}": value for key, value in sizes.items()}
        changes |= {"datalist#phantoms": {"mimic_cxr": 12, "bimcv": 12}, "network_def#dino_head#out_dim": 32}
        return {**changes, "train#sampler#batch_2d": 4, "train#sampler#batch_3d": 4}
    return {**changes, "datalist_file": str(folder / "data.json"), "data#datalist#phantoms": 24}


@with_mlflow
@pytest.mark.slow
@pytest.mark.parametrize("name", ["chest_ct_classification", "pretrain"])
def test_training_is_tracked(name: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path}/store.db"
    made = workflow(name, {**small(name, tmp_path), "tracking_uri": store, "experiment_name": name})
    made.parser.get_parsed_content("train#trainer").run()
    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    losses = [point.value for point in client.get_metric_history(run.info.run_id, "train_loss")]
    rows = made.parser.get_parsed_content("train#run").history.rows
    assert losses == pytest.approx([row["loss"] for row in rows]) and len(losses) > 0
    assert run.info.status == "FINISHED"
    assert any(key.startswith("val_") for key in run.data.metrics)
