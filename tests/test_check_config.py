# SPDX-License-Identifier: Apache-2.0
"""Config checking: what MONAI would ignore is an error that names the nearest known name."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigWorkflow

from tests.common import REPOSITORY, fault_of, run_bundle
from unimedi_components import check_config, check_run
from unimedi_components.bundle import RunCall, parse_run_call
from unimedi_components.errors import ConfigError

MONAI_MAIN = "/site-packages/monai/bundle/__main__.py"
BASE: dict[str, Any] = {
    "imports": ["$import unimedi_components"],
    "device": "$torch.device('cpu')",
    "amp": False,
    "max_epochs": 3,
    "learning_rate": 0.001,
    "note": "plain words",
    "dataset_dir": "data",
    "network_def": {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 2},
    "optimizer": {"_target_": "torch.optim.AdamW", "params": "$@network_def.parameters()", "lr": "@learning_rate"},
    "train": {
        "sizes": [4, 8],
        "dataset": {"_target_": "monai.data.Dataset", "data": "$list(@train#sizes)"},
        "dataloader": {"_target_": "monai.data.DataLoader", "dataset": "@train#dataset", "batch_size": 2},
        "trainer": {
            "_target_": "monai.engines.SupervisedTrainer",
            "max_epochs": "@max_epochs",
            "device": "@device",
            "train_data_loader": "@train#dataloader",
            "network": "@network_def",
            "optimizer": "@optimizer",
            "loss_function": {"_target_": "torch.nn.MSELoss"},
            "amp": "@amp",
        },
    },
    "initialize": ["$unimedi_components.check_run()"],
    "run": ["$@train#trainer", "$print(@note, @dataset_dir)"],
}


def changed(**entries: Any) -> dict[str, Any]:
    """The base config with entries set by id, `__` standing for `#`."""
    config = deepcopy(BASE)
    for id_, value in entries.items():
        *parents, last = id_.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return config


def write(path: Path, content: dict[str, Any]) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_sound_config_is_returned_merged() -> None:
    overlay = {"max_epochs": 7, "train#dataloader#batch_size": 5, "+network_def": {"bias": False}}
    merged = check_config([BASE, overlay], {"train::dataset::data": [1, 2], "optimizer#weight_decay": 0.05})
    assert merged["max_epochs"] == 7
    assert merged["train"]["dataloader"]["batch_size"] == 5
    assert merged["network_def"]["bias"] is False
    assert merged["train"]["dataset"]["data"] == [1, 2]
    assert merged["optimizer"]["weight_decay"] == 0.05
    assert BASE["max_epochs"] == 3 and "bias" not in BASE["network_def"]


@pytest.mark.parametrize(
    ("id_", "message"),
    [
        ("lerning_rate", "nothing defines it; did you mean 'learning_rate'?"),
        ("ghost", "nothing defines it"),
        ("train#trainr#max_epochs", "nothing defines it; did you mean 'train#trainer#max_epochs'?"),
        ("train#trainer#max_epoch", "nothing defines it; did you mean 'train#trainer#max_epochs'?"),
        ("lr", "nothing defines it; did you mean 'optimizer#lr'?"),
        ("optimizer#weight_decy", "nothing defines it; did you mean 'optimizer#weight_decay'?"),
        ("train#sizes#2", "nothing defines it; 'train#sizes' has: 0, 1"),
        ("val_interval", "nothing defines it"),
    ],
)
def test_unknown_override_names_the_nearest(id_: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_config(BASE, {id_: 7})
    assert str(error.value) == f"unknown override '--{id_}': {message}"


@pytest.mark.parametrize("id_", ["train#trainer#amp", "train::trainer::amp", "train#sizes#1"])
def test_known_override_with_either_separator(id_: str) -> None:
    check_config(BASE, {id_: False})


@pytest.mark.parametrize(
    ("id_", "value", "message"),
    [
        ("amp", "true", 'is the word "true"; write --amp True'),
        ("device", "false", 'is the word "false"; write --device False'),
        ("max_epochs", "null", "is the word \"null\"; write --max_epochs '$None'"),
        ("note", "null", "is the word \"null\"; write --note '$None'"),
        ("network_def#bias", "true", 'is the word "true"; write --network_def#bias True'),
    ],
)
def test_words_of_json_and_yaml(id_: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_config(BASE, {id_: value})
    assert str(error.value) == f"override '--{id_} {value}' {message}"


def test_none_is_dropped_by_monai() -> None:
    with pytest.raises(ConfigError) as error:
        check_config(BASE, {"max_epochs": None})
    assert str(error.value) == "override '--max_epochs None': MONAI drops it; write --max_epochs '$None'"


def test_a_text_may_be_the_word_true() -> None:
    assert check_config(BASE, {"note": "true"})["note"] == "true"


def test_merge_sign_on_the_command_line() -> None:
    with pytest.raises(ConfigError) as error:
        check_config(BASE, {"+train#sizes": [5]})
    assert str(error.value) == (
        "override '--+train#sizes': '+' merges in config files only; write the whole value with --train#sizes"
    )


def test_unused_key_of_the_base_config() -> None:
    with pytest.raises(ConfigError) as error:
        check_config(changed(learning_rte=0.1))
    assert str(error.value) == (
        "unknown config key 'learning_rte' in the config: nothing uses it; did you mean 'learning_rate'?"
    )


def test_unused_key_of_a_section() -> None:
    with pytest.raises(ConfigError) as error:
        check_config(changed(train__dataloder={"_target_": "monai.data.DataLoader"}))
    assert str(error.value) == (
        "unknown config key 'train#dataloder' in the config: nothing uses it; did you mean 'train#dataloader'?"
    )


def test_relative_reference_and_macro_count_as_use() -> None:
    config = changed(
        extra=[1], train__copy="%extra", train__length="$len(@#copy)", train__dataloader__batch_size="@##length"
    )
    assert check_config(config)["train"]["copy"] == "%extra"


def test_run_id_is_a_use_and_must_exist() -> None:
    with pytest.raises(ConfigError, match="unknown config key 'sanity' in the config: nothing uses it"):
        check_config(changed(sanity=["$print(1)"]))
    check_config(changed(sanity=["$print(1)"]), run_ids=["sanity"])
    with pytest.raises(ConfigError) as error:
        check_config(changed(sanity=["$print(1)"]), run_ids=["sanity", "rum"])
    assert str(error.value) == "unknown run id 'rum': the config has no such key; did you mean 'run'?"


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"max_epoch": 1}, "'max_epoch' in the config: nothing defines it; did you mean 'max_epochs'?"),
        ({"+imprts": []}, "'imprts' in the config: nothing defines it; did you mean 'imports'?"),
        (
            {"train#trainer#amq": 1},
            "'train#trainer#amq' in the config: nothing defines it; did you mean 'train#trainer#amp'?",
        ),
        (
            {"train": {**BASE["train"], "weather": 1}},
            "'train#weather' in the config: nothing uses it; 'train' has: sizes, dataset, dataloader, ",
        ),
    ],
)
def test_unknown_overlay_key(overlay: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_config([BASE, overlay])
    assert str(error.value).startswith(f"unknown config key {message}")


def test_overlay_may_add_what_it_refers_to() -> None:
    overlay = {
        "world_size": 2,
        "train#sampler": {"_target_": "monai.data.DistributedSampler", "dataset": "@train#dataset"},
        "train#dataloader#sampler": "@train#sampler",
        "finalize": ["$print(@world_size)"],
    }
    assert check_config([BASE, overlay])["train"]["dataloader"]["sampler"] == "@train#sampler"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"network_def__in_feature": 3},
            "unknown argument 'in_feature' of 'torch.nn.Linear' at 'network_def'; did you mean 'in_features'?",
        ),
        (
            {"train__dataloader___disbled_": True},
            "unknown argument '_disbled_' of 'monai.data.DataLoader' at 'train#dataloader'; did you mean '_disabled_'?",
        ),
        (
            {"network_def___target_": "torch.nn.Linaer"},
            "cannot find '_target_' 'torch.nn.Linaer' at 'network_def'; did you mean 'Linear'?",
        ),
        (
            {"network_def___target_": "unimedi_components.data.LabelledDataset"},
            "'unimedi_components.data.LabelledDataset' at 'network_def' is now "
            'unimedi_components.loading.ImageDataset, with "target": "label"',
        ),
        (
            {"train__dataloader__batch_size": "$unimedi_components.data.rank_share([4])"},
            "'unimedi_components.data.rank_share' at 'train#dataloader#batch_size' is now "
            "unimedi_components.loading.rank_share",
        ),
        (
            {"network_def___target_": "unimedi_components.search.Embedder"},
            "'unimedi_components.search.Embedder' at 'network_def' is now unimedi_components.retrieval.Embedder",
        ),
        (
            {"optimizer__lr": "@lerning_rate", "run": ["$@train#trainer, @learning_rate, @note, @dataset_dir"]},
            "'optimizer#lr' refers to '@lerning_rate', which nothing defines; did you mean '@learning_rate'?",
        ),
        (
            {"train__copy": "%train#sises", "train__dataloader__batch_size": "@train#copy"},
            "'train#copy' refers to '%train#sises', which nothing defines; did you mean '%train#sizes'?",
        ),
    ],
)
def test_components_and_references(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_config(changed(**entries))
    assert str(error.value) == message


def test_disabled_component_may_be_missing() -> None:
    check_config(changed(train__trainer__loss_function={"_target_": "no.such.Loss", "_disabled_": True}))


def test_faults_of_the_files(tmp_path: Path) -> None:
    missing = tmp_path / "none.json"
    with pytest.raises(ConfigError) as error:
        check_config(missing)
    assert str(error.value) == f"config file '{missing}' does not exist"
    broken = tmp_path / "broken.json"
    broken.write_text('{"a": 1,}')
    with pytest.raises(ConfigError, match=r"^cannot read config file '.*broken.json': .*line 1 column"):
        check_config(broken)
    broken.write_text('{"a": 1, "a": 2}')
    with pytest.raises(ConfigError, match=r"^cannot read config file '.*broken.json': Duplicate key: `a`"):
        check_config(broken)
    broken.write_text("[1]")
    with pytest.raises(ConfigError) as error:
        check_config(broken)
    assert str(error.value) == f"config file '{broken}' holds a list, not a dictionary"
    with pytest.raises(ConfigError, match=r"^no config file: name one with --config_file"):
        check_config([])
    with pytest.raises(ConfigError) as error:
        check_config(changed(train__sizes=f"%{missing}#sizes"))
    assert str(error.value) == f"a macro names a file that does not exist: '%{missing}'"


def test_message_names_the_overlay_file(tmp_path: Path) -> None:
    base, overlay = write(tmp_path / "train.json", BASE), write(tmp_path / "rsna.json", {"lerning_rate": 1})
    with pytest.raises(ConfigError) as error:
        check_config([base, overlay])
    assert str(error.value) == (
        "unknown config key 'lerning_rate' in rsna.json: nothing defines it; did you mean 'learning_rate'?"
    )


def test_parse_run_call(tmp_path: Path) -> None:
    words = ["run", "sanity", "--config_file", "['a.json','b.json']", "--train#trainer#max_epochs", "2"]
    words += ["--lr=1e-4", "--amp", "--device", "cpu", "--shift", "-1", "--tracking", "mlflow", "--run_name=x"]
    call = parse_run_call([MONAI_MAIN, *words])
    assert call == RunCall(
        ["a.json", "b.json"],
        {"train#trainer#max_epochs": 2, "lr": 1e-4, "amp": True, "device": "cpu", "shift": -1},
        {"run_id": "sanity", "config_file": ["a.json", "b.json"], "tracking": "mlflow", "run_name": "x"},
    )
    args_file = write(tmp_path / "args.json", {"config_file": "c.json", "lr": 1, "device": "cpu"})
    call = parse_run_call([MONAI_MAIN, "run", "--args_file", args_file, "--lr", "2"])
    assert (call.config_files, call.overrides) == (["c.json"], {"lr": 2, "device": "cpu"})


def test_check_run_raises_for_a_given_command_line(tmp_path: Path) -> None:
    base = write(tmp_path / "train.json", BASE)
    overlay = write(tmp_path / "more.json", {"max_epochs": 1})
    check_run(argv=[MONAI_MAIN, "run", "--config_file", f"['{base}','{overlay}']", "--amp", "True"])
    check_run(config_file=[base, overlay])
    with pytest.raises(ConfigError) as error:
        check_run(argv=[MONAI_MAIN, "run", "--config_file", base, "--max_epoch", "2"])
    assert str(error.value) == "unknown override '--max_epoch': nothing defines it; did you mean 'max_epochs'?"


def test_check_run_ends_the_running_bundle_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write(tmp_path / "train.json", BASE)
    workflow = ConfigWorkflow(config_file=base, logging_file=False)
    monkeypatch.setattr(sys, "argv", ["pytest", "--ghost", "7"])
    workflow.initialize()  # not a command line of MONAI
    monkeypatch.setattr(sys, "argv", [MONAI_MAIN, "run", "--config_file", base, "--ghost", "7"])
    with pytest.raises(SystemExit) as stop:
        workflow.initialize()
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: unknown override '--ghost': nothing defines it"


UNKNOWN = {
    "ghost": "unknown config key 'ghost' in the workflow: nothing uses it",
    "max_epoch": "unknown config key 'max_epoch' in the workflow: nothing uses it; did you mean 'max_epochs'?",
    "train#sises": "unknown config key 'train#sises' in the workflow: nothing uses it; did you mean 'train#sizes'?",
    "optimizer#lrs": "unknown argument 'lrs' of 'torch.optim.AdamW' at 'optimizer'; did you mean 'lr'?",
}


def test_a_workflow_made_in_python_is_checked(tmp_path: Path) -> None:
    config = changed(extra=[1], train__copy="%extra", train__dataloader__batch_size="$len(@train#copy)")
    file = write(tmp_path / "train.json", config)
    # an override that takes a reference's place, and a macro, leave keys that nothing but the file refers to
    run_bundle(Path(file), "train", start=False, **{"train#dataset#data": [3], "optimizer#lr": 0.1, "device": "cpu"})
    for key, message in UNKNOWN.items():
        assert fault_of(run_bundle, Path(file), "train", start=False, **{key: 7}) == message


MOVED = {
    ("chest_xray_classification", "probe_lr"): "recipe#probe#lr",
    ("chest_xray_classification", "batch_size"): "train#dataloader#batch_size",
    ("chest_xray_classification", "img_size"): "preprocessing#xray#size",
    ("chest_xray_segmentation", "augment_prob"): "train#augment#prob",
    ("chest_xray_detection", "data_set"): "data#datalist#dataset",
    ("abdomen_ct_segmentation", "lr"): "optimizer#lr",
    ("abdomen_ct_segmentation", "steps_per_pass"): "train#repeated#steps",
    ("pretrain", "strict"): "train#dataset#strict",
    ("pretrain", "amp_dtype"): "amp",
}


@pytest.mark.parametrize(("bundle", "old"), MOVED)
def test_names_of_earlier_configs_say_the_new_place(bundle: str, old: str) -> None:
    config = REPOSITORY / "bundles" / bundle / "configs" / "train.json"
    with pytest.raises(ConfigError) as error:
        check_config(config, {old: 1})
    hint = f"did you mean '{MOVED[bundle, old]}'?"
    assert str(error.value) == f"unknown override '--{old}': nothing defines it; {hint}"
    told = fault_of(run_bundle, config, "train", start=False, **{old: 1})
    assert told == f"unknown config key '{old}' in the workflow: nothing uses it; {hint}"


@pytest.mark.parametrize("name", ["rsna", "evaluate"])
def test_an_overlay_alone(name: str) -> None:
    overlay = REPOSITORY / "bundles" / "chest_xray_classification" / "configs" / f"{name}.json"
    with pytest.raises(ConfigError) as caught:
        check_config(overlay)
    both = [overlay.with_name("train.json"), overlay]
    assert str(caught.value).endswith(f"give both: {both[0]} {both[1]}")
    check_config(both)
