# SPDX-License-Identifier: Apache-2.0
"""A hub folder: the same features from files as the checkpoint's, offline, with one clear error for what is none."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from transformers import AutoImageProcessor, AutoModel

from unimedi_components import UnifiedViT, UniMediImageProcessor, load_encoder
from unimedi_components.__main__ import main
from unimedi_components.errors import CheckpointError, DataError
from unimedi_components.images.greys import FILM_VALUES
from unimedi_components.networks import ProjectionHead, ReportEncoder, UniMedI
from unimedi_components.networks.pretrained import Pretrained
from unimedi_components.retrieval import Embedder

README = Path(__file__).resolve().parents[1] / "README.md"
PREPROCESSING = {"xray": {"size": 16}, "ct": {"spatial_size": [8, 16, 16], "window": [-1000, 400]}}
FILES = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json", "unimedi_auto.py"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves of its encoder, none of whose parameters is at its default."""
    torch.manual_seed(0)
    encoder = UnifiedViT(16, (8, 16, 16), patch_size=8, patch_size_3d=(4, 8, 8), embed_dim=16, depth=2, num_heads=2)
    for parameter in encoder.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("models")
    torch.save(encoder.state_dict(), folder / "model.pt")
    card = {"format": 1, "encoder": encoder.hparams, "film_values": FILM_VALUES, "phantom_seed": 7}
    card["preprocessing"] = {**PREPROCESSING, "max_length": 9, "keep_punct": True}
    (folder / "model.json").write_text(json.dumps(card))
    return folder / "model.pt"


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    folder = checkpoint.parent / "encoder"
    main(["export", str(checkpoint), str(folder)])
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "encoder"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two films, two volumes, and the folder of a DICOM series."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(3)
    for i in range(2):
        Image.fromarray(random.integers(0, 255, (40, 30 + i), dtype=np.uint8)).save(root / f"film{i}.png")
        voxels = random.normal(-300, 400, (20, 18, 10)).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2, 5, 1])), root / f"scan{i}.nii.gz")
    (root / "series").mkdir()
    for z in range(6):
        slice_ = pydicom.Dataset()
        slice_.SOPClassUID, slice_.SOPInstanceUID, slice_.Modality = CTImageStorage, f"1.2.3.{z + 1}", "CT"
        slice_.StudyInstanceUID, slice_.SeriesInstanceUID = "1.2", "1.2.3"
        slice_.ImagePositionPatient, slice_.ImageOrientationPatient = [0, 0, 4 * z], [1, 0, 0, 0, 1, 0]
        slice_.PixelSpacing, slice_.SliceThickness = [1.5, 1.5], 4
        slice_.RescaleIntercept, slice_.RescaleSlope, slice_.RescaleType = -1024, 1, "HU"
        slice_.Rows = slice_.Columns = 24
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 12, 11, 0
        slice_.PixelData = random.integers(0, 2000, (24, 24), dtype=np.uint16).tobytes()
        slice_.file_meta = pydicom.dataset.FileMetaDataset()
        slice_.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        # from the head to the feet: the order of names is not that of places
        slice_.save_as(root / "series" / f"{9 - z}.dcm", enforce_file_format=True)
    return root


@torch.no_grad()
def test_features_of_files_are_those_of_embed(checkpoint: Path, exported: Path, images: Path) -> None:
    encoder, processor = UnifiedViT.from_pretrained(exported), UniMediImageProcessor.from_pretrained(exported)
    auto = AutoModel.from_pretrained(str(exported), trust_remote_code=True)
    auto_processor = AutoImageProcessor.from_pretrained(str(exported), trust_remote_code=True)
    assert not encoder.training and not auto.training

    text = ReportEncoder(config={"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 9, "num_attention_heads": 2})
    heads = ProjectionHead(16, None, 8), ProjectionHead(16, None, 8)
    network = UniMedI(load_encoder(checkpoint), text, *heads, num_slices=1, selector="student", self_distillation=False)
    card = json.loads(checkpoint.with_name("model.json").read_text())
    embedder = Embedder(Pretrained(network.eval(), None, card, checkpoint), "cpu", use_slices=False)
    names = ["film0.png", "film1.png", "scan0.nii.gz", "scan1.nii.gz", "series"]
    expected = embedder.images([str(images / name) for name in names], progress=False)
    assert [entry["dim"] for entry in expected.entries] == [2, 2, 3, 3, 3]

    assert expected.cls is not None
    for name, row in zip(names, expected.cls, strict=True):
        batch, auto_batch = processor(images / name), auto_processor(str(images / name), return_tensors="pt")
        np.testing.assert_allclose(encoder(**batch).cls[0], row, atol=1e-6)
        outputs = auto(**auto_batch)
        np.testing.assert_allclose(outputs.pooler_output[0], row, atol=1e-6)
        np.testing.assert_array_equal(outputs.last_hidden_state[:, 1:], encoder(**batch).patches)
    pair = processor([images / "film0.png", images / "film1.png"])
    np.testing.assert_allclose(encoder(**pair).cls, expected.cls[:2], atol=1e-6)
    assert processor(images / "series", return_tensors="np")["image"].shape == (1, 1, 8, 16, 16)


def test_the_window_and_the_axes_come_from_the_folder(exported: Path, tmp_path: Path) -> None:
    # air below, bone above the middle: -1000 HU becomes -1, the upper end of the window 1; tissue at one corner
    voxels = np.full((16, 16, 8), -1000.0, np.float32)
    voxels[..., 4:], voxels[0, 0, 0], voxels[8:, 12:, 0] = 400, 3000, 0
    # the file's third axis runs down
    nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2, -5, 1])), tmp_path / "down.nii.gz")
    volume = UniMediImageProcessor.from_pretrained(exported)(tmp_path / "down.nii.gz")["image"][0, 0]
    assert volume.shape == (8, 16, 16)
    assert (volume[:4] == 1).all() and (volume[4:] == -1).sum() == 4 * 256 - 33


def test_what_the_folder_holds(exported: Path) -> None:
    assert sorted(file.name for file in exported.iterdir()) == FILES
    config = json.loads((exported / "config.json").read_text())
    assert config["encoder"]["embed_dim"] == 16 and config["phantom_seed"] == 7
    processor = json.loads((exported / "preprocessor_config.json").read_text())
    assert processor["preprocessing"] == PREPROCESSING and processor["film_values"] == FILM_VALUES
    readme = (exported / "README.md").read_text()
    assert "license: apache-2.0\n" in readme and "synthetic phantoms" in readme
    assert FILM_VALUES in readme and '"window"' in readme and "Not for clinical use" in readme


@pytest.mark.parametrize(("option", "expected"), [([], "unknown"), (["--license", "cc-by-4.0"], "cc-by-4.0")])
def test_the_licence_of_weights_of_own_data(checkpoint: Path, tmp_path: Path, option: list[str], expected: str) -> None:
    card = json.loads(checkpoint.with_name("model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**card, "phantom_seed": None}))
    shutil.copy(checkpoint, tmp_path)
    main(["export", str(tmp_path / "model.pt"), str(tmp_path / "encoder"), *option])
    readme = (tmp_path / "encoder" / "README.md").read_text()
    assert f"license: {expected}\n" in readme and "phantoms" not in readme


def test_export_keeps_what_lies_there(checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(checkpoint), str(folder)])
    assert capsys.readouterr().err == f"error: {folder} exists and is no empty folder; name a new one\n"


def test_saved_again_it_is_the_same(exported: Path, tmp_path: Path) -> None:
    encoder = UnifiedViT.from_pretrained(str(exported))
    encoder.save_pretrained(tmp_path / "ours")
    for name in FILES:
        assert (tmp_path / "ours" / name).read_bytes() == (exported / name).read_bytes()
    AutoModel.from_pretrained(str(exported), trust_remote_code=True).save_pretrained(tmp_path / "theirs")
    again = UnifiedViT.from_pretrained(tmp_path / "theirs").state_dict()
    assert all(torch.equal(again[name], value) for name, value in encoder.state_dict().items())


def test_without_preprocessing_there_is_no_processor(tmp_path: Path) -> None:
    UnifiedViT(
        16, (8, 16, 16), patch_size=8, patch_size_3d=(4, 8, 8), embed_dim=8, depth=1, num_heads=1
    ).save_pretrained(tmp_path)
    assert UnifiedViT.from_pretrained(tmp_path).card == {}
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: missing"):
        UniMediImageProcessor.from_pretrained(tmp_path)


def damaged(folder: Path, kind: str) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    content = json.loads(config.read_text())
    if kind == "no config":
        config.unlink()
    elif kind == "half a config":
        config.write_text(config.read_text()[:40])
    elif kind == "a list":
        config.write_text("[]")
    elif kind == "foreign":
        config.write_text(json.dumps({"model_type": "vit", "hidden_size": 768}))
    elif kind == "no sizes":
        config.write_text(json.dumps({**content, "encoder": None}))
    elif kind == "unknown size":
        config.write_text(json.dumps({**content, "encoder": {**content["encoder"], "width": 3}}))
    elif kind == "other size":
        config.write_text(json.dumps({**content, "encoder": {**content["encoder"], "depth": 3}}))
    elif kind == "no weights":
        weights.unlink()
    elif kind == "half the weights":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no config", r"config\.json: missing"),
        ("half a config", r"config\.json: not valid JSON"),
        ("a list", r"config\.json: holds no JSON object"),
        ("foreign", r"config\.json: describes 'vit' and no unimedi_vit"),
        ("no sizes", r"config\.json: no encoder can be built"),
        ("unknown size", r"config\.json: no encoder can be built .*width"),
        ("other size", r"model\.safetensors: 36 of 48 tensors fit UnifiedViT; missing: blocks\.2"),
        ("no weights", r"model\.safetensors: no such weights file"),
        ("half the weights", r"model\.safetensors: cannot be read as weights"),
    ],
)
def test_a_damaged_folder_is_one_error(folder: Path, kind: str, message: str) -> None:
    damaged(folder, kind)
    with pytest.raises(CheckpointError, match=message):
        UnifiedViT.from_pretrained(folder)
    if kind in ("other size", "no weights", "half the weights"):
        with pytest.raises(CheckpointError, match=message):
            AutoModel.from_pretrained(str(folder), trust_remote_code=True)


@pytest.mark.parametrize("content", ["{", "{}", '{"preprocessing": {"xray": {"size": 16}}}', '{"crop_size": 224}'])
def test_a_foreign_processor_is_one_error(folder: Path, content: str) -> None:
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: n"):
        UniMediImageProcessor.from_pretrained(folder)


def test_only_a_remote_name_reaches_the_hub(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options.get("revision")))
        if name == "team/gone":
            raise OSError("404 not found\nmore lines")
        return str(exported)

    monkeypatch.setattr("unimedi_components.networks.hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("nowhere", "./a/b", "models/encodr", "/a/b", tmp_path / "gone", Path("team/gone")):
        with pytest.raises(CheckpointError, match="no such folder; give one that"):
            UnifiedViT.from_pretrained(name)
    with pytest.raises(CheckpointError, match=r"model\.pt: is a file and no folder; .* export"):
        UnifiedViT.from_pretrained(exported.parent / "model.pt")
    assert asked == []
    assert UnifiedViT.from_pretrained("team/encoder", revision="v1").embed_dim == 16
    assert UniMediImageProcessor.from_pretrained("hf:team/encoder").preprocessing == PREPROCESSING
    with pytest.raises(CheckpointError, match=r"team/gone: .* hub \(404 not found\); check the name"):
        UnifiedViT.from_pretrained("team/gone")
    assert asked == [("team/encoder", "v1"), ("team/encoder", None), ("team/gone", None)]


def test_push_to_hub_sends_the_whole_folder(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, bytes] = {}

    class Repository:
        repo_id = "team/encoder"

    def upload(_: HfApi, *, folder_path: Path, **__: Any) -> str:
        sent.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})
        return "url"

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: Repository)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert str(UnifiedViT.from_pretrained(exported).push_to_hub("team/encoder")) == "url"
    assert sent == {name: (exported / name).read_bytes() for name in FILES}


def test_the_processor_refuses_what_is_not_one_image(exported: Path, images: Path, tmp_path: Path) -> None:
    processor: Any = UniMediImageProcessor.from_pretrained(exported)
    with pytest.raises(DataError, match=r"X-rays or volumes, got .*film0\.png \(2D\), .*scan0\.nii\.gz \(3D\)"):
        processor([images / "film0.png", images / "scan0.nii.gz"])
    with pytest.raises(DataError, match="holds 5 images and not one"):
        processor(images)
    for wrong in (np.zeros((3, 3)), [np.zeros((3, 3))], None):
        with pytest.raises(DataError, match="the processor reads files"):
            processor(wrong)
    with pytest.raises(DataError, match="got no path"):
        processor([])
    with pytest.raises(DataError, match="no such file"):
        processor(tmp_path / "gone.png")
    (tmp_path / "cut.png").write_bytes((images / "film0.png").read_bytes()[:300])
    with pytest.raises(DataError, match=r"cut\.png"):
        processor(tmp_path / "cut.png")
    affine = np.diag([2.0, 2, 0, 1])
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), None)
    image.header.set_sform(affine, code=1)
    nib.save(image, tmp_path / "flat.nii.gz")
    with pytest.raises(DataError, match=r"flat\.nii\.gz"):
        processor(tmp_path / "flat.nii.gz")


def test_the_readme(
    checkpoint: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    section = README.read_text(encoding="utf-8").split("\n## Three lines without a clone\n")[1].split("\n## ")[0]
    (command,) = re.findall(r"python -m unimedi_components (export .*?)(?: *#.*)?\n", section)
    examples = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint.parent, "bundles/pretrain/models", ignore=shutil.ignore_patterns("encoder"))
    shutil.copy(images / "scan0.nii.gz", "scan.nii.gz")
    shutil.copy(images / "film0.png", "film.png")
    main(command.split())
    capsys.readouterr()
    assert len(list(filter(None, examples[0].splitlines()))) == 3
    for example in examples:
        exec(example, {})
    assert capsys.readouterr().out.splitlines() == ["torch.Size([1, 16])", "torch.Size([1, 16])"]
