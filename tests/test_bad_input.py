# SPDX-License-Identifier: Apache-2.0
"""Bad input, one fault at a time, as a user meets it: one clear message, or a counted skip.

A message names the file or the key, the fault and the remedy. Faults of a data set are met by `prepare`, faults of a
config or of a file that broke later by the training workflow.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigWorkflow
from monai.utils import OptionalImportError
from PIL import Image

from tests.common import fault_of, run_bundle
from unimedi_components import check_run
from unimedi_components.__main__ import main
from unimedi_components.bundle import user_fault
from unimedi_components.errors import CheckpointError, ConfigError, DataError

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "bundles" / "pretrain" / "configs" / "train.json"
WORDS = ["left", "right", "lung", "clear", "effusion", "heart", "normal", "small", "large", "opacity", "nodule"]
TINY = {
    **{
        "train#sampler#batch_2d": 4,
        "train#sampler#batch_3d": 4,
        "epochs": 1,
        "device": "cpu",
        "img_size": 32,
        "vol_size": [16, 24, 24],
    },
    **{"network_def#dino_head#out_dim": 32, "network_def#encoder#embed_dim": 32, "network_def#encoder#depth": 1},
    **{"network_def#encoder#num_heads": 2, "network_def#report_encoder#config#hidden_size": 32},
    **{"network_def#report_encoder#config#num_hidden_layers": 1},
}


def report(rng: np.random.Generator) -> str:
    return "The chest shows " + " ".join(rng.choice(WORDS, 6)) + ". No change is seen."


def ct(path: Path, rng: np.random.Generator, affine: Any = None, offset: int = 0) -> None:
    """A volume of air with a body of soft tissue, in Hounsfield units plus `offset`."""
    volume = rng.normal(-900, 20, (24, 24, 22))
    volume[5:15, 5:15] = rng.normal(40, 20, (10, 10, 22))
    nib.save(nib.Nifti1Image((volume + offset).astype(np.int16), np.diag([2, 2, 3, 1.0])), path)
    if affine is not None:
        # nibabel mends a header that it saves: write the fault into the bytes
        content = bytearray(path.read_bytes())
        content[252:256] = (0).to_bytes(2, "little") + (1).to_bytes(2, "little")
        content[280:328] = np.asarray(affine, np.float32)[:3].tobytes()
        path.write_bytes(bytes(content))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A team's own data: 24 X-rays and 12 volumes in one table."""
    rng = np.random.default_rng(0)
    root = tmp_path / "own"
    root.mkdir()
    rows = ["image,report,patient,split"]
    splits = ["train"] * 8 + ["val"] * 2 + ["test"] * 2
    for i in range(24):
        Image.fromarray(rng.integers(0, 255, (40, 36), dtype=np.uint8)).save(root / f"x{i:02d}.jpg")
        rows.append(f"x{i:02d}.jpg,{report(rng)},p{i:02d},{splits[i % 12]}")
    for i in range(12):
        ct(root / f"v{i:02d}.nii", rng)
        rows.append(f"v{i:02d}.nii,{report(rng)},q{i:02d},{splits[i]}")
    (root / "own.csv").write_text("\n".join(rows) + "\n")
    return root


def prepare(root: Path, dataset: str = "table", table: str = "own.csv", **options: Any) -> dict[str, Any]:
    """Run `prepare` on the command line and return the datalist."""
    source = str(root / table) if dataset == "table" else str(root)
    out = root.parent / "list.json"
    main(["prepare", dataset, source, str(out), *(f"--{key}={value}" for key, value in options.items())])
    return json.loads(out.read_text())


def error(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The one line that a failing command prints."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    assert lines[-1].startswith("error: ") and sum(line.startswith("error: ") for line in lines) == 1
    return lines[-1].removeprefix("error: ")


def folders(root: Path) -> dict[str, str]:
    run = root.parent / "run"
    return {
        "datalist": str(root.parent / "list.json"),
        "dataset_dir": str(root),
        "cache_dir": str(run / "cache"),
        "ckpt_dir": str(run / "models"),
        "output_dir": str(run / "eval"),
    }


def train(root: Path, **overrides: Any) -> ConfigWorkflow:
    """Train for an epoch on the prepared data, as `monai.bundle run` does."""
    return run_bundle(CONFIG, "train", **{**TINY, **folders(root), **overrides})


# ---- the data set's root and tables ----------------------------------------------------------------------------


def test_missing_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "list.json")
    for dataset, name in (("mimic_cxr", "MIMIC-CXR-JPG"), ("bimcv", "BIMCV-COVID19+")):
        missing = tmp_path / "nowhere"
        assert error(capsys, ["prepare", dataset, str(missing), out]) == (
            f"{missing}: no such folder. Give the folder that holds the {name} data as ROOT; "
            "a run looks below UNIMEDI_DATA."
        )
    missing = tmp_path / "own.csv"
    assert error(capsys, ["prepare", "table", str(missing), out]) == f"{missing}: no such file. Correct the path."
    assert not (tmp_path / "list.json").exists()


@pytest.mark.usefixtures("in_process")
def test_missing_root_of_a_training_run(own: Path) -> None:
    prepare(own)
    moved = own.parent / "moved"
    assert fault_of(train, own, dataset_dir=str(moved)) == (
        f"{moved}: no such folder. Give the folder that the images of {own.parent / 'list.json'} are relative to."
    )
    absent = own.parent / "absent.json"
    assert fault_of(train, own, datalist=str(absent)).startswith(f"{absent}: no such datalist. Make it with 'python -m")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty. It needs a header line and at least one row."),
        ("image,report\n", "the table holds no rows. It needs at least one row below the header line."),
    ],
)
def test_empty_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str) -> None:
    table = tmp_path / "own.csv"
    table.write_text(content)
    assert error(capsys, ["prepare", "table", str(table), str(tmp_path / "o.json")]) == f"{table}: {message}"


# ---- files --------------------------------------------------------------------------------------------------------


def test_truncated_jpg_is_counted_by_prepare(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = own / "x03.jpg"
    path.write_bytes(path.read_bytes()[:-150])
    meta = prepare(own)["meta"]
    assert meta["dropped"] == {"unreadable image": 1} and meta["dropped_items"] == {"unreadable image": ["x03"]}
    assert sum(meta["kept"].values()) == 35
    printed = capsys.readouterr().out
    assert f"{path}: truncated JPEG, the end-of-image mark is missing. Download or export it again" in printed
    assert "unreadable image: x03" in " ".join(printed.split())
    words = ["prepare", "table", str(own / "own.csv"), str(own.parent / "s.json"), "--strict"]
    message = error(capsys, words)
    assert str(path) in message and "truncated JPEG" in message and "prepare without --strict to skip" in message


@pytest.mark.usefixtures("in_process")
def test_files_damaged_after_prepare_are_skipped_counted_and_listed(
    own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    datalist = prepare(own)
    xray = own / datalist["training"][-1]["image"]
    volumes = [own / item["image"] for item in datalist["validation"] if item["dim"] == 3]
    assert xray.suffix == ".jpg" and len(volumes) == 2
    for path in (xray, *volumes):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    workflow = train(own)
    rows = workflow.parser.get_parsed_content("train#run").history.rows
    assert len(rows) == 4 and all(np.isfinite(row["loss"]) for row in rows)
    listed = json.loads((own.parent / "run" / "eval" / "skipped.json").read_text())
    assert {entry["file"] for entry in listed} == {str(xray), *map(str, volumes)}
    assert all(entry["reason"] for entry in listed)
    assert "3 of 30 studies could not be read and were left out; see" in caplog.text
    # the X-rays of the validation split are counted once, though its volumes are all lost
    recall = workflow.parser.get_parsed_content("validate#evaluator").state.metrics["val_recall_at_5"]
    assert recall == 1.0
    assert workflow.parser.get_parsed_content("validate#evaluator").state.iteration == 1
    metrics = json.loads((own.parent / "run" / "eval" / "metrics.json").read_text())
    assert (metrics["studies_2d"], metrics["studies_3d"]) == (4, 2)


@pytest.mark.usefixtures("in_process")
def test_a_damaged_file_ends_a_strict_run(own: Path) -> None:
    path = own / prepare(own)["training"][-1]["image"]
    path.write_bytes(path.read_bytes()[:200])
    message = fault_of(train, own, **{"train#dataset#strict": True})
    assert message.startswith(f"{path}: truncated JPEG, the end-of-image mark is missing")
    assert message.endswith("; repair or remove it or its report")


def test_zero_affine(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = own / "v00.nii"
    ct(path, np.random.default_rng(1), affine=np.zeros((4, 4)))
    meta = prepare(own)["meta"]
    assert meta["dropped"] == {"zero affine": 1} and meta["dropped_items"] == {"zero affine": ["v00"]}
    printed = capsys.readouterr().out
    assert f"{path}: the affine is zero, so size and orientation are unknown. Convert it again from DICOM" in printed


@pytest.mark.usefixtures("in_process")
def test_zero_affine_at_training_time(own: Path) -> None:
    item = next(item for item in prepare(own)["training"] if item["dim"] == 3)
    ct(own / item["image"], np.random.default_rng(1), affine=np.zeros((4, 4)))
    message = fault_of(train, own, **{"train#dataset#strict": True})
    assert message.startswith(f"{own / item['image']}: the affine is zero, so size and orientation are unknown")


def test_stored_values_instead_of_hounsfield_units(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = own / "v01.nii"
    ct(path, np.random.default_rng(1), offset=1024)
    meta = prepare(own)["meta"]
    assert meta["dropped"] == {"not Hounsfield units": 1}
    printed = capsys.readouterr().out
    assert f"{path}: values " in printed and "are not Hounsfield units: none reaches air (below -500)" in printed
    assert "Apply RescaleSlope/RescaleIntercept (HU = stored value * slope + intercept)" in printed


# ---- reports and splits --------------------------------------------------------------------------------------------


def test_report_file_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "mimic"
    main(["phantom", "mimic_cxr", str(root), "--patients", "6", "--seed", "3", "--workers", "1"])
    before = prepare(root, "mimic_cxr")["meta"]
    item = prepare(root, "mimic_cxr")["training"][0]
    text = (root / item["image"]).parent.with_suffix(".txt")
    text.unlink()
    capsys.readouterr()
    meta = prepare(root, "mimic_cxr")["meta"]
    assert meta["dropped"]["missing report"] >= 1 and item["id"] in meta["dropped_items"]["missing report"]
    assert sum(meta["kept"].values()) == sum(before["kept"].values()) - meta["dropped"]["missing report"]
    assert f"{text}: no such file" in capsys.readouterr().out
    shutil.rmtree(root / "files", ignore_errors=True)
    message = error(capsys, ["prepare", "mimic_cxr", str(root), str(tmp_path / "o.json")])
    assert message.startswith(f"{root}: no report texts. Looked for ") and "give reports_root" in message


def test_patient_in_two_splits_of_a_table(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = own / "own.csv"
    table.write_text(table.read_text().replace(",p00,train", ",p08,train"))
    assert error(capsys, ["prepare", "table", str(table), str(own / "o.json")]) == (
        f"{table}, row 10: patient 'p08' is in two splits, training ({table}, row 2) and validation. "
        "Put all rows of a patient into one split, or leave the split column out to have it made."
    )


@pytest.mark.usefixtures("in_process")
def test_patient_in_two_splits_of_a_datalist(own: Path) -> None:
    datalist = prepare(own)
    datalist["validation"][0]["patient"] = datalist["training"][0]["patient"]
    path = own.parent / "list.json"
    path.write_text(json.dumps(datalist))
    patient = datalist["training"][0]["patient"]
    assert fault_of(train, own) == (
        f"{path}: patient {patient!r} is in two splits, training and validation. "
        "Put all items of a patient into one split, or prepare the data again."
    )


def test_spanish_reports(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = own / "own.csv"
    spanish = "No se observa derrame pleural en el torax. Los pulmones sin opacidades."
    lines = table.read_text().splitlines()
    for i in (1, 2):
        image, _, rest = lines[i].partition(",")
        lines[i] = f"{image},{spanish},{rest.split(',', 1)[1]}"
    table.write_text("\n".join(lines) + "\n")
    meta = prepare(own)["meta"]
    assert meta["dropped"] == {"report not English": 2}
    printed = capsys.readouterr().out
    assert "Translate the reports that are not English, or keep all with language='any'." in printed
    assert prepare(own, language="any")["meta"]["dropped"] == {}


@pytest.mark.usefixtures("in_process")
def test_datalist_of_another_root(own: Path) -> None:
    prepare(own)
    other = own.parent / "other"
    other.mkdir()
    assert fault_of(train, own, dataset_dir=str(other)) == (
        f"{own.parent / 'list.json'}: training image v00.nii is not below {other}. "
        f"Give the data set's root (prepared from {own})."
    )


# ---- configs -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_process")
def test_more_slices_than_slabs(own: Path) -> None:
    prepare(own)
    assert fault_of(train, own, **{"network_def#num_slices": 99}) == (
        "cannot select k=99 slices: the volume has 4 slabs to choose from (4 slabs of 4 slices each); "
        "set num_slices (k) between 1 and 4 or use a smaller patch depth"
    )


@pytest.mark.usefixtures("in_process")
def test_an_image_size_that_the_patch_does_not_divide(own: Path) -> None:
    prepare(own)
    assert fault_of(train, own, img_size=60) == (
        "an image of 60x60 cannot be cut into patches of 16x16: each side must be a multiple of it; "
        "resize or pad it (nearest: 64x64; config keys img_size and vol_size) or change patch_size"
    )
    message = fault_of(train, own, vol_size=[30, 24, 24])
    assert "an image of 30x24x24 cannot be cut into patches of 4x12x12" in message and "nearest: 32x24x24" in message


def test_unknown_config_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert error(capsys, ["check", str(CONFIG), "--image_size", "64"]) == (
        "unknown override '--image_size': nothing defines it; did you mean 'img_size'?"
    )
    words = ["monai.bundle", "run", "--config_file", str(CONFIG), "--train#trainer#max_epoch", "2"]
    with pytest.raises(ConfigError, match=r"unknown override '--train#trainer#max_epoch'.*'train#trainer#max_epochs'"):
        check_run(argv=words)


def test_the_user_of_the_command_line_reads_the_fault_alone(own: Path) -> None:
    prepare(own)
    overrides = {**TINY, **folders(own), "network_def#num_slices": 99}
    words = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", str(CONFIG), *words],
        cwd=own,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.strip().splitlines()[-1] == (
        "error: cannot select k=99 slices: the volume has 4 slabs to choose from (4 slabs of 4 slices each); "
        "set num_slices (k) between 1 and 4 or use a smaller patch depth"
    )


def test_which_faults_are_the_users() -> None:
    def chain(*errors: BaseException) -> BaseException:
        for outer, inner in pairwise(errors):
            outer.__cause__ = inner
        return errors[0]

    monai_error = RuntimeError("Failed to instantiate target 'x'")
    assert user_fault(chain(monai_error, DataError("own.csv: empty"), OSError("disk"))) == "own.csv: empty"
    assert (
        user_fault(chain(RuntimeError("a"), RuntimeError("b"), CheckpointError("model.pt: torn"))) == "model.pt: torn"
    )
    assert user_fault(chain(RuntimeError("a"), ValueError("of another package"))) is None
    built = RuntimeError("Failed to instantiate component 'torch.nn.Dropout' with keywords: p\n set '_mode_=debug' to")
    assert user_fault(chain(RuntimeError("run"), built, ValueError("p must be below 1,\n not 2"))) == (
        "torch.nn.Dropout: p must be below 1, not 2; correct what the config gives it (UNIMEDI_DEBUG=1 shows where)"
    )
    assert user_fault(chain(built, KeyError("p"))) is None
    device = RuntimeError("Expected one of cpu, cuda device type at start of device string: gpu")
    assert str(user_fault(device)).endswith("at start of device string: gpu); leave --device out, or give --device cpu")
    missing = OptionalImportError("Please install mlflow before using MLFlowHandler. (No module named 'mlflow').")
    assert "pip install 'unimedi-components[mlflow]'" in str(user_fault(chain(RuntimeError("instantiate"), missing)))
    said = user_fault(chain(RuntimeError("instantiate"), AssertionError("Torch not compiled with CUDA enabled")))
    assert said == (
        "no GPU can be used here (Torch not compiled with CUDA enabled); leave --device out, or give --device cpu"
    )
    assert user_fault(KeyError("a")) is None
    worker = "Caught DataError in DataLoader worker process 0.\nOriginal Traceback:\n ...\nx.DataError: a.jpg: torn"
    assert user_fault(DataError(worker)) == "a.jpg: torn"
