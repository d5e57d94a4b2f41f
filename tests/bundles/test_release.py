# SPDX-License-Identifier: Apache-2.0
"""The zips of `make bundles`: made of small networks, served from this machine, and taken apart by MONAI's tools."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import torch
import yaml
from monai.data import load_net_with_metadata

from benchmarks.release import data_licence, move_large, release, sha256, stage
from unimedi_components.data.catalogue import DATASETS
from unimedi_components.errors import CheckpointError, ConfigError
from unimedi_components.networks import load_pretrained
from unimedi_components.retrieval import model_hash

REPOSITORY = Path(__file__).resolve().parents[2]
SCHEMA = Path(__file__).with_name("meta_schema_20240725.json")
NAMES = sorted(path.parents[1].name for path in REPOSITORY.glob("bundles/*/configs/metadata.json"))
# of the images that the metadata describe; small besides
SIZES = {"vol_size": (32, 48, 48), "patch_size": 8, "patch_size_3d": (4, 12, 12)}
SIZES |= {"embed_dim": 16, "depth": 2, "num_heads": 2}

pytestmark = pytest.mark.usefixtures("in_process")


def metadata(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "configs" / "metadata.json").read_text())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, write_weights: Any) -> Path:
    """What trainings leave, with what only a resumed one needs; retrieval trains nothing."""
    folder = tmp_path_factory.mktemp("trained")
    for name in NAMES:
        if name != "report_retrieval":
            formats = metadata(REPOSITORY / "bundles" / name)["network_data_format"]
            film = formats["inputs"]["image"]["spatial_shape"]
            sizes = {**SIZES, "img_size": film[0] if len(film) == 2 else 64}
            write_weights(name, folder / name / "models", sizes, formats["outputs"]["pred"]["num_channels"])
            for left in ("last.pt", "last.ckpt", "model_best.pt"):
                (folder / name / "models" / left).write_bytes(b"left out")
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def served(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder of zips, and the address where it is served."""
    folder = tmp_path_factory.mktemp("dist")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    release(str(weights), str(folder), url)
    yield folder, url
    server.shutdown()
    server.server_close()


@pytest.fixture
def downloaded(served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Downloads a bundle by MONAI into a folder that holds nothing else, which is not the current one."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))

    def download(name: str) -> Path:
        version = metadata(REPOSITORY / "bundles" / name)["version"]
        url = f"{served[1]}/{name}_v{version}.zip"
        monai.bundle.download(name=name, url=url, bundle_dir=tmp_path / "bundles", progress=False)
        return tmp_path / "bundles" / name

    return download


@pytest.mark.parametrize("name", NAMES)
def test_monais_tools_take_a_download(name: str, downloaded: Any, weights: Path) -> None:
    bundle = downloaded(name)
    trained = weights / ("pretrain" if name == "report_retrieval" else name) / "models"
    state = torch.load(trained / "model.pt", weights_only=True)
    paths: dict[str, Any] = {"meta_file": str(bundle / "configs/metadata.json")}
    monai.bundle.verify_metadata(**paths, filepath=SCHEMA)
    paths["config_file"] = str(bundle / "configs/inference.json")
    network: Any = monai.bundle.load(name, bundle_dir=bundle.parent, workflow_type="inference", device="cpu")
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert network.state_dict().keys() == state.keys()

    excluded = metadata(bundle).get("excluded_checks", {})
    left_out = {"verify_net_in_out", "ckpt_export", "onnx_export"}
    assert set(excluded) == (left_out if name == "chest_xray_detection" else set())
    if not excluded:
        monai.bundle.verify_net_in_out("network_def", device="cpu", **paths)
        monai.bundle.ckpt_export("network_def", ckpt_file=str(bundle / "models/model.pt"), filepath="again.ts", **paths)
        shape = metadata(bundle)["network_data_format"]["inputs"]["image"]["spatial_shape"]
        image = torch.rand(3, 1, *shape) * 2 - 1
        carried, about, _ = load_net_with_metadata(str(bundle / "models/model.ts"))
        with torch.no_grad():
            expected = network.eval()(image)
            torch.testing.assert_close(torch.jit.load("again.ts")(image), expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(carried(image), expected, atol=1e-5, rtol=0)
        assert about["version"] == metadata(bundle)["version"]
    assert (bundle / "models" / "model.ts").is_file() != bool(excluded)


def test_a_zip_holds_the_bundle_and_what_running_needs(served: tuple[Path, str]) -> None:
    folder, _ = served
    with zipfile.ZipFile(folder / "pretrain_v0.1.0.zip") as archive:
        names = {Path(name).relative_to("pretrain").as_posix() for name in archive.namelist()}
    kept = {
        path.relative_to(REPOSITORY / "bundles/pretrain").as_posix()
        for part in ("configs", "docs")
        for path in (REPOSITORY / "bundles/pretrain" / part).rglob("*")
    }
    own = {f"models/{name}" for name in ("model.pt", "model.json", "model.ts", "unimedi.pt")}
    own |= {name for name in names if name.startswith("models/report_encoder/")}
    assert names == kept | own | {"LICENSE", "docs/data_license.txt"}
    assert {"docs/README.md", "models/report_encoder/tokenizer.json"} <= names


LICENCES = {
    "abdomen_ct_segmentation": "amos bcv",
    "chest_ct_classification": "cc_ccii luna16",
    "chest_xray_classification": "chexpert covidx rsna",
    "chest_xray_detection": "rsna",
    "chest_xray_segmentation": "rsna",
    "pretrain": "bimcv mimic_cxr",
    "report_retrieval": "bimcv chexpert mimic_cxr",
}


@pytest.mark.parametrize("name", LICENCES)
def test_licences_of_the_data_sets_that_a_bundle_reads(name: str) -> None:
    text = data_licence(REPOSITORY / "bundles" / name / "configs")
    assert sorted(key for key, data in DATASETS.items() if data.title in text) == LICENCES[name].split()
    assert all(DATASETS[key].licence in text and DATASETS[key].source in text for key in LICENCES[name].split())


def test_the_towers_are_whole_without_the_doubled_encoder(downloaded: Any, weights: Path) -> None:
    expected = load_pretrained(weights / "pretrain" / "models" / "model.pt").network
    for name in ("pretrain", "report_retrieval"):
        models = downloaded(name) / "models"
        assert model_hash(load_pretrained(models / "model.pt").network) == model_hash(expected)
        assert not any(key.startswith("encoder.") for key in torch.load(models / "unimedi.pt", weights_only=True))


def test_hashes_and_bytes_are_those_of_the_files(served: tuple[Path, str], weights: Path, tmp_path: Path) -> None:
    folder, _ = served
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    found = dict(reversed(line.split("  ")) for line in lines)
    assert found == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "SHA256SUMS"
    }
    assert set(found) == {f"{name}_v0.1.0.zip" for name in NAMES}
    release(str(weights), str(tmp_path))
    again = "chest_xray_detection_v0.1.0.zip"
    assert (tmp_path / again).read_bytes() == (folder / again).read_bytes()


def test_what_is_too_large_lies_beside_the_zip(served: tuple[Path, str], weights: Path, tmp_path: Path) -> None:
    folder, url = served
    models = weights / "pretrain" / "models"

    # TorchScript alone may go without an address: it can be made again
    bundle = stage("pretrain", models, tmp_path / "without")
    rest = [path for path in bundle.rglob("*") if path.is_file() and path.name != "model.ts"]
    limit = sum(len(zlib.compress(path.read_bytes(), 9)) for path in rest)
    moved = move_large(bundle, tmp_path / "pretrain_v1.zip", limit, None)
    assert [path.name for path in moved] == ["pretrain_v1_model.ts"] and not (bundle / "large_files.yml").exists()
    with pytest.raises(ConfigError, match=r"pretrain_v1.zip would have 0\.\d MB; name where unimedi.pt .* --url"):
        move_large(bundle, tmp_path / "pretrain_v1.zip", 1000, None)

    bundle = stage("pretrain", models, tmp_path / "with")
    moved = move_large(bundle, folder / "pretrain_v1.zip", 1000, url + "/")
    entries = yaml.safe_load((bundle / "large_files.yml").read_text())["large_files"]
    assert [entry["path"] for entry in entries] == ["models/model.ts", "models/unimedi.pt", "models/model.pt"]
    assert {path.name for path in (bundle / "models").iterdir()} == {"model.json", "report_encoder"}
    monai.bundle.download_large_files(str(bundle))
    for entry, path in zip(entries, moved, strict=True):
        assert hashlib.sha256((bundle / entry["path"]).read_bytes()).hexdigest() == entry["hash_val"] == sha256(path)
        path.unlink()
    load_pretrained(bundle / "models" / "model.pt")


def test_a_bundle_without_weights_is_an_error_that_names_the_training(weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights, tmp_path / "trained")
    shutil.rmtree(tmp_path / "trained" / "pretrain")
    run = "run 'python -m monai.bundle run --config_file bundles/pretrain/configs/train.json'"
    with pytest.raises(CheckpointError, match=rf"trained/pretrain/models/model\.pt: pretrain is not trained; {run}"):
        release(str(tmp_path / "trained"), str(tmp_path))
    (tmp_path / "trained" / "chest_xray_detection" / "models" / "model.json").unlink()
    with pytest.raises(CheckpointError, match=r"chest_xray_detection/models/model\.json: missing"):
        release(str(tmp_path / "trained"), str(tmp_path))
    assert list(tmp_path.glob("*.zip")) == []


@pytest.mark.skipif("MODEL_ZOO" not in os.environ, reason="MODEL_ZOO names no checkout of Project-MONAI/model-zoo")
def test_the_zoos_own_checks(served: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(Path(os.environ["MODEL_ZOO"], "ci"), tmp_path / "ci")
    (tmp_path / "models").mkdir()
    shutil.copy(Path(os.environ["MODEL_ZOO"], "models", "model_info.json"), tmp_path / "models")
    lines = ["import sys; sys.path.insert(0, 'ci')", "import bundle_custom_data as own, verify_bundle"]
    for name in NAMES:
        with zipfile.ZipFile(served[0] / f"{name}_v0.1.0.zip") as archive:
            archive.extractall(tmp_path / "models")
        (tmp_path / "models" / name / "eval").mkdir()
        shutil.copy(SCHEMA, tmp_path / "models" / name / "eval" / "schema.json")
        if metadata(tmp_path / "models" / name).get("excluded_checks"):
            lines += [f"own.exclude_verify_shape_list.append({name!r})"]
            lines += [f"own.exclude_verify_torchscript_list.append({name!r})"]
        lines.append(f"verify_bundle.verify({name!r})")
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("data shape is verified correctly.") == len(NAMES) - 1
    assert done.stdout.count("Provided TorchScript module is verified correctly.") == len(NAMES) - 1
