# SPDX-License-Identifier: Apache-2.0
"""Values as users write them in overlays and on the command line: they work, or one line says what to write."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from unimedi_components.__main__ import main
from unimedi_components.bundle import parse_run_call, user_fault
from unimedi_components.command_options import exact_words, path_names
from unimedi_components.config_check import check_config
from unimedi_components.data import find_images
from unimedi_components.errors import ConfigError, DataError

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
TRAIN = BUNDLES / "pretrain" / "configs" / "train.json"
PROBE = BUNDLES / "chest_xray_classification" / "configs" / "train.json"


def overlay(tmp_path: Path, text: str, name: str = "own.yaml") -> Path:
    (tmp_path / name).write_text(text)
    return tmp_path / name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optimizer#lr: 1e-4", "'optimizer#lr' in own.yaml is the text '1e-4' where a number is meant; write 0.0001"),
        ("optimizer#lr: 2E-6", "'optimizer#lr' in own.yaml is the text '2E-6' where a number is meant; write 2.0e-06"),
        ("epochs: '20'", "'epochs' in own.yaml is the text '20' where a number is meant; write 20"),
        (
            "optimizer#betas: [0.9, 999e-3]",
            "'optimizer#betas' in own.yaml, entry 1 is the text '999e-3' where a number is meant; write 0.999",
        ),
        ("network_def#encoder#norm_eps: 1e-5", "'network_def#encoder#norm_eps' in own.yaml is the text '1e-5'"),
    ],
)
def test_numbers_that_yaml_reads_as_text(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as info:
        check_config([TRAIN, overlay(tmp_path, text)])
    assert str(info.value).startswith(words)
    written = str(info.value).rpartition("write ")[2]
    assert isinstance(yaml.safe_load(written), (int, float))


@pytest.mark.parametrize(
    ("config", "key", "value", "words"),
    [
        (PROBE, "epochs", 2.5, "is 2.5 where a whole number of at least 1 is meant"),
        (PROBE, "epochs", "abc", "is 'abc' where a whole number of at least 1 is meant"),
        (PROBE, "seed", "abc", "is the text 'abc' where a number is meant, such as 0"),
        (PROBE, "seed", -1, "is -1 where a whole number of at least 0 is meant"),
        (PROBE, "label_fraction", "10%", "is the text '10%' where a number is meant, such as 1.0"),
        (PROBE, "freeze_encoder", "no", "is the text 'no' where True or False is meant"),
        (PROBE, "preprocessing#xray#size", [32, 32], "is the list [32, 32] where one number is meant, such as 64"),
        (PROBE, "label_names", "Edema", "is 'Edema' where a list is meant, such as ['Atelectasis', 'Cardiomegaly', "),
        (
            PROBE,
            "loss",
            "bce",
            "is 'bce' where a component with a _target_ is meant; write it in an overlay, or change",
        ),
        (PROBE, "evaluation#split", "tst", "is 'tst'; use one of training, validation, test"),
        (TRAIN, "datalist#phantoms", 12, "is 12 where a dictionary of mimic_cxr, bimcv is meant; write it in an"),
        (TRAIN, "vol_size", 16, "is 16 where a list is meant, such as [32, 48, 48]"),
        (TRAIN, "vol_size", (16, 24), "is [16, 24] where 3 numbers are meant, such as [32, 48, 48]"),
        (TRAIN, "preprocessing#ct#window", [400, -160], "is [400, -160]; write the lower end first, then the"),
        (TRAIN, "preprocessing#ct#window", (5, 5), "is [5, 5]; write the lower end first, then the higher one"),
        (TRAIN, "train#run#momentum_teacher", 2, "is 2 where a number in [0, 1] is meant"),
        (TRAIN, "train#run#max_grad_norm", 0, "is 0 where a number in (0, inf) is meant"),
        (TRAIN, "optimizer#betas", (0.9, 1), ", entry 1 is 1 where a number in [0, 1) is meant"),
        (TRAIN, "optimizer#muon_lr", -0.1, "is -0.1 where a number in [0, inf) is meant"),
        (TRAIN, "loss_def#vl_weight", float("nan"), "is nan where a finite number is meant"),
        (TRAIN, "loss_def#vl_weight", float("inf"), "is inf where a finite number is meant"),
        (TRAIN, "vol_size", (16, 24.5, 24), ", entry 1 is 24.5 where a whole number of at least 1 is meant"),
        (TRAIN, "validate#dataloader#batch_size", (0, 4), ", entry 0 is 0 where a whole number of at least 1 is meant"),
        (TRAIN, "network_def#dino_head#out_dim", 0, "is 0 where a whole number of at least 1 is meant"),
        (TRAIN, "train#dataloader#num_workers", 100000, "is 100000 where at most 512 is meant"),
        (PROBE, "seed", 2**32, "is 4294967296 where at most 4294967295 is meant"),
        (TRAIN, "preprocessing#max_length", 0, "is 0 where a whole number of at least 3 is meant"),
    ],
)
def test_values_of_another_kind_than_the_configs(
    tmp_path: Path, config: Path, key: str, value: Any, words: str
) -> None:
    with pytest.raises(ConfigError) as info:
        check_config(config, {key: value})
    words = words if words.startswith(",") else f" {words}"
    assert str(info.value).startswith(f"override '--{key}'{words}")
    written = overlay(tmp_path, yaml.safe_dump({key: list(value) if isinstance(value, tuple) else value}))
    with pytest.raises(ConfigError) as info:
        check_config([config, written])
    assert str(info.value).startswith(f"'{key}' in own.yaml{words}")


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (TRAIN, "dims", 2),
        (TRAIN, "validate#dataloader#batch_size", 4),
        (TRAIN, "vol_size", (16, 24, 24)),
        (TRAIN, "train#run#max_grad_norm", "$None"),
        (TRAIN, "network_def#encoder#patch_size", [8, 8]),
        (TRAIN, "datalist#phantoms", "$None"),
        (TRAIN, "datalist", "own.json"),
        (TRAIN, "loss_def", "$unimedi_components.losses.UniMediLoss(out_dim=512)"),
        (PROBE, "amp", True),
        (PROBE, "freeze_encoder", 0),
        (PROBE, "train#run#patience", "$None"),
        (PROBE, "label_fraction", 1),
    ],
)
def test_values_of_another_kind_that_work(config: Path, key: str, value: Any) -> None:
    check_config(config, {key: value})


def test_a_switch_that_may_be_a_word(tmp_path: Path) -> None:
    check_config([TRAIN, TRAIN.with_name("literal.json")], {"network_def#vl_on_full": "image2d"})
    check_config([PROBE, overlay(tmp_path, "amp: false")], {"amp": "bfloat16"})


def test_the_same_where_the_default_is_an_expression_or_none(tmp_path: Path) -> None:
    for text in ("optimizer#lr: 1e-4", "train#run#max_grad_norm: 3e0"):
        with pytest.raises(ConfigError, match="where a number is meant"):
            check_config([PROBE, overlay(tmp_path, text)])
    with pytest.raises(ConfigError, match="override '--epochs' is the text '5' where a number is meant; write 5"):
        check_config(TRAIN, {"epochs": "5"})


def test_text_of_digits_stays_text_where_text_is_meant(tmp_path: Path) -> None:
    merged = check_config(
        [PROBE, overlay(tmp_path, "data#datalist#dataset: '2024'\ncache_dir: '2025'\noptimizer#lr: 1.0e-4")]
    )
    assert (merged["data"]["datalist"]["dataset"], merged["cache_dir"]) == ("2024", "2025")
    assert merged["optimizer"]["lr"] == 1e-4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: 0.1\nepochs: [1, 2", ", line 2, column 14: not valid YAML (expected ',' or ']'"),
        (
            "lr: 0.1\n\tepochs: 2",
            ", line 2, column 1: not valid YAML (found character '\\t' that cannot start any token",
        ),
        ("lr: 'a", ", line 1, column 7: not valid YAML (found unexpected end of stream"),
        ("a: !!python/object:os.system x", ", line 1, column 4: not valid YAML (could not determine a constructor"),
        ("on: 1", " has the key True, a bool; put it in quotes"),
        ("- 1", " holds a list, not a dictionary"),
    ],
)
def test_yaml_faults_name_file_and_line(tmp_path: Path, text: str, words: str) -> None:
    path = overlay(tmp_path, text)
    with pytest.raises(ConfigError) as info:
        check_config([TRAIN, path])
    message = str(info.value)
    assert message.startswith(f"config file '{path}'{words}") and "\n" not in message


def test_paths_that_are_numbers_or_hold_a_hash(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as info:
        check_config(TRAIN, {"output_dir": 2025})
    assert (
        str(info.value) == "override '--output_dir' is the number 2025 where a path is meant; write --output_dir ./2025"
    )
    with pytest.raises(ConfigError, match=r"'cache_dir' in own.yaml is the number 2.5 where .* write \"./2.5\""):
        check_config([TRAIN, overlay(tmp_path, "cache_dir: 2.5")])
    with pytest.raises(ConfigError, match="override '--output_dir': MONAI turns '#' into '::', so 'out#1' would not"):
        check_config(TRAIN, {"output_dir": "out#1"})
    check_config(BUNDLES / "pretrain" / "configs" / "inference.json", {"inputs": "scan#1.png", "output_dir": "./2025"})


def test_a_hash_that_fire_takes_for_a_comment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["monai", "run", "--config_file", str(TRAIN), "--inputs", "film #2.png"]
    with pytest.raises(ConfigError) as info:
        parse_run_call(argv)
    assert str(info.value) == (
        "override '--inputs film #2.png': what follows '#' is dropped as a comment; write --inputs './film #2.png'"
    )
    assert parse_run_call([*argv[:-1], "./film #2.png"]).overrides["inputs"] == "./film #2.png"
    assert exact_words(["own#1", "--out=a#b", "[1,2]", "2024"], lists=True) == [
        "'own#1'",
        "--out='a#b'",
        "[1,2]",
        "2024",
    ]
    with pytest.raises(SystemExit):
        main(["prepare", "chexpert", "none#1", str(tmp_path / "out.json")])
    assert "error: none#1: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("given", [2024, [2024], (2024,), "2024"])
def test_inputs_called_like_a_number(given: Any, tmp_path: Path) -> None:
    (tmp_path / "2024").mkdir()
    Image.new("L", (20, 30), 7).save(tmp_path / "2024" / "a.png")
    assert [item["id"] for item in find_images(given, tmp_path)] == ["2024_a"]


def test_inputs_with_a_hash(tmp_path: Path) -> None:
    path = tmp_path / "film #1.png"
    Image.new("L", (20, 30), 7).save(path)
    assert path_names(str(path).replace("#", "::")) == [str(path)]
    assert [item["image"] for item in find_images(str(path).replace("#", "::"))] == [str(path)]
    with pytest.raises(ConfigError, match="--inputs True names no files; give a file, a folder, a pattern"):
        path_names(True)
    with pytest.raises(DataError, match=r"2024: no such file, .*; a name of digits alone is written \./2024"):
        find_images(2024, tmp_path)  # type: ignore[arg-type]


def test_without_inputs_no_other_folder_is_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (20, 30), 7).save(tmp_path / "private.png")
    monkeypatch.chdir(tmp_path)
    missing = tmp_path / "data" / "phantom"
    with pytest.raises(DataError) as info:
        find_images(None, missing)
    assert str(info.value) == f"{missing}: no such folder of images; name files or folders with --inputs PATH"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.ENOTDIR])
def test_a_place_that_cannot_be_written_has_a_remedy(code: int) -> None:
    try:
        try:
            raise OSError(code, os.strerror(code), "/srv/bundle/eval")
        except OSError as error:
            raise RuntimeError("Failed to evaluate") from error
    except RuntimeError as error:
        message = user_fault(error)
    assert message is not None and message.startswith(
        f"/srv/bundle/eval: {os.strerror(code)}; name folders that can be"
    )
    assert "--output_dir PATH" in message and "\n" not in message
    assert user_fault(FileNotFoundError(errno.ENOENT, "x", "y")) is None


@pytest.mark.parametrize("make", [os.makedirs, lambda path: Path(path).mkdir(parents=True)])
@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_a_folder_that_cannot_be_made_has_the_same_remedy(make: Any) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        make("/proc/unimedi/eval")
    assert str(user_fault(caught.value)).startswith("/proc/unimedi")
    with pytest.raises(FileNotFoundError) as caught:
        Path("/proc/unimedi").read_text()
    assert user_fault(caught.value) is None


def test_exit_code_of_a_run_with_a_fault(tmp_path: Path) -> None:
    """Through MONAI's own command line: one line, exit code 2."""
    config = BUNDLES / "pretrain" / "configs" / "inference.json"
    words = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(config), "--output_dir", "2025"]
    environment = {**os.environ, "PYTHONPATH": str(BUNDLES.parent)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: override '--output_dir' is the number 2025")
