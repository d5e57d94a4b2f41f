# SPDX-License-Identifier: Apache-2.0
"""inference.json of the classification bundles: files of every kind to probabilities, against the network itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.transforms import Compose
from PIL import Image

from tests.common import fault_of, run_bundle, write_ct_slice, write_radiograph
from unimedi_components.data import find_images, task_transforms
from unimedi_components.errors import CheckpointError, DataError
from unimedi_components.networks import load_classifier
from unimedi_components.tasks.classification import SavePredictions

pytestmark = pytest.mark.usefixtures("in_process")
Predict = Callable[..., dict[str, dict[str, Any]]]
XRAY, CT = "chest_xray_classification", "chest_ct_classification"
FINDINGS = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, untrained_bundle: Any) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    for name in (XRAY, CT):
        untrained_bundle(name, folder)
    return folder


@pytest.fixture
def workflow(bundles: Path, tmp_path: Path) -> Callable[..., ConfigWorkflow]:
    def make(name: str, **overrides: Any) -> ConfigWorkflow:
        folders = {"bundle_root": str(bundles / name), "output_dir": str(tmp_path / "out"), "device": "cpu"}
        config = bundles / name / "configs" / "inference.json"
        return run_bundle(config, "inference", start=False, **{**folders, **overrides})

    return make


@pytest.fixture
def predict(workflow: Any, tmp_path: Path) -> Predict:
    """Run inference.json and read predictions.json, by id."""

    def run(name: str, inputs: Any, figures: bool = False, **overrides: Any) -> dict[str, dict[str, Any]]:
        flow = workflow(name, inputs=inputs, figures=figures, **overrides)
        flow.run()
        flow.finalize()
        content = json.loads((tmp_path / "out" / "predictions.json").read_text())
        return {entry["id"]: entry for entry in content["predictions"]}

    return run


def direct(bundles: Path, name: str, path: Path) -> list[float]:
    """Probabilities by the network alone."""
    network = load_classifier(bundles / name / "models" / "model.pt")
    image = Compose(task_transforms(network.card["preprocessing"]))({"image": str(path)})["image"]
    with torch.no_grad():
        logits = network(image[None])[0].double()
    return (logits.sigmoid() if name == XRAY else logits.softmax(0)).tolist()


def shapes(rows: int = 90, columns: int = 70) -> np.ndarray:
    """A picture that no flip leaves alone."""
    y, x = np.mgrid[:rows, :columns]
    return (255 * np.exp(-((x - 20) ** 2 + (y - 30) ** 2) / 400) + 0.5 * x).clip(0, 255).astype(np.uint8)


def scan() -> np.ndarray:
    """Hounsfield units over (right-left, back-front, foot-head), with an odd number of slices."""
    x, y, z = np.mgrid[:40, :36, :31]
    return (-1000 + 1100 * np.exp(-((x - 12) ** 2 + (y - 22) ** 2 + (z - 20) ** 2) / 90) + 3 * z).astype(np.float32)


def write_series(folder: Path, volume: np.ndarray) -> None:
    """(right-left, back-front, foot-head) as a CT series; DICOM counts columns to the left and rows to the back."""
    folder.mkdir()
    stack = volume[::-1, ::-1].transpose(2, 1, 0).astype(np.int16)
    for number, plane in enumerate(stack):
        image = itk.image_from_array(plane[None].copy())
        image.SetOrigin([0.0, 0.0, 2.0 * number])
        write_ct_slice(folder / f"{number}.dcm", image, number + 1)


def values(entry: dict[str, Any]) -> list[float]:
    return list(entry["probability"].values())


@pytest.mark.parametrize("name", [XRAY, CT])
def test_properties(name: str, workflow: Any, tmp_path: Path) -> None:
    Image.fromarray(shapes()).save(tmp_path / "a.png")
    nib.save(nib.Nifti1Image(scan(), np.eye(4)), tmp_path / "v.nii.gz")
    flow = workflow(name, inputs=str(tmp_path))
    assert flow.check_properties() == []
    (image,) = (item["image"] for item in flow.parser.get_parsed_content("dataset"))
    assert tuple(image.shape) == ((1, 64, 64) if name == XRAY else (1, 32, 48, 48))


def test_xrays_of_every_kind(predict: Predict, bundles: Path, tmp_path: Path, caplog: Any) -> None:
    own = tmp_path / "own"
    own.mkdir()
    pixels = shapes()
    Image.fromarray(pixels).save(own / "grey.png")
    Image.fromarray(np.stack([pixels] * 3, -1)).save(own / "colour.png")
    Image.fromarray(pixels).save(own / "photo.jpg", quality=95)
    deep = pixels.astype(np.uint16) * 257
    write_radiograph(own / "1.2.dcm", deep, b"MONOCHROME2")
    write_radiograph(own / "1.3.dcm", 65535 - deep, b"MONOCHROME1")
    nib.save(nib.Nifti1Image(scan(), np.eye(4)), own / "ct.nii.gz")
    (tmp_path / "letter.dcm").write_text("Dear colleague")
    with caplog.at_level(logging.WARNING):
        found = predict(XRAY, [str(own), str(tmp_path / "letter.dcm")], figures=True)
    assert f"1 of 6 images left out, this bundle reads X-rays: first {own / 'ct.nii.gz'}" in caplog.text
    assert sorted(found) == ["1.2", "1.3", "colour", "grey", "photo"]
    expected = direct(bundles, XRAY, own / "grey.png")
    assert max(expected) - min(expected) > 0.2
    for name, entry in found.items():
        assert list(entry["probability"]) == FINDINGS
        assert values(entry) == pytest.approx(expected, abs=2e-2 if name == "photo" else 2e-6), name
        assert entry["predicted"] == [f for f, p in entry["probability"].items() if p >= 0.5]
        with Image.open(tmp_path / "out" / f"{name}.png") as figure:
            assert figure.width == 1200
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    skipped = {record["file"]: record["reason"] for record in content.pop("skipped")}
    assert skipped.pop(str(own / "ct.nii.gz")) == "is a CT volume, and this bundle reads X-rays"
    assert skipped.pop(str(tmp_path / "letter.dcm")).startswith("is named as DICOM but holds text") and not skipped
    del content["predictions"]
    assert content == {"task": "multilabel", "label_names": FINDINGS, "threshold": 0.5}
    table = pd.read_csv(tmp_path / "out" / "predictions.csv", keep_default_na=False)
    assert list(table) == ["id", "source", *(f"probability_{name}" for name in FINDINGS), "predicted"]
    for row in table.to_dict("records"):
        entry = found[str(row["id"])]
        assert row["source"] == entry["source"]
        assert [row[f"probability_{name}"] for name in FINDINGS] == values(entry)
        assert row["predicted"] == "; ".join(entry["predicted"])


def test_volumes_of_every_kind(predict: Predict, bundles: Path, tmp_path: Path, caplog: Any) -> None:
    own = tmp_path / "own"
    own.mkdir()
    volume, spacing = scan(), np.diag([1.0, 1.0, 2.0, 1.0])
    nib.save(nib.Nifti1Image(volume, spacing), own / "plain.nii.gz")
    turn = np.eye(4)
    angle = np.deg2rad(12)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    nib.save(nib.Nifti1Image(volume, turn @ spacing), own / "oblique.nii.gz")
    # stored head first and back first, axes exchanged
    stored = volume[::-1].transpose(2, 0, 1)[::-1]
    affine = np.zeros((4, 4))
    affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = -2, -1, 1, 1
    nib.save(nib.Nifti1Image(stored, affine), own / "permuted.nii")
    image = itk.image_from_array(volume[::-1, ::-1].transpose(2, 1, 0).copy())
    image.SetSpacing([1.0, 1.0, 2.0])
    itk.imwrite(image, str(own / "meta.mhd"))
    write_series(own / "series", volume)
    (own / "slices").mkdir()
    for number, plane in enumerate(volume.transpose(2, 1, 0)[::-1, ::-1]):
        Image.fromarray(((plane + 1350) * 255 / 1500).clip(0, 255).astype(np.uint8)).save(
            own / "slices" / f"{number}.png"
        )
    Image.fromarray(shapes()).save(own / "xray.png")
    with caplog.at_level(logging.WARNING):
        found = predict(CT, str(own), figures=True)
    assert f"1 of 7 images left out, this bundle reads CT volumes: first {own / 'xray.png'}" in caplog.text
    assert sorted(found) == ["meta", "oblique", "permuted", "plain", "series", "slices"]
    expected = direct(bundles, CT, own / "plain.nii.gz")
    assert max(expected) - min(expected) > 0.1
    for name, entry in found.items():
        assert list(entry["probability"]) == ["CP", "NCP", "Normal"]
        # slices are chosen, not averaged; whole Hounsfield units in DICOM
        limit = {"slices": 0.1, "series": 1e-3}.get(name, 2e-6)
        assert values(entry) == pytest.approx(expected, abs=limit), name
        assert sum(values(entry)) == pytest.approx(1, abs=2e-6)
        assert entry["predicted"] == ["CP", "NCP", "Normal"][int(np.argmax(values(entry)))]
        with Image.open(tmp_path / "out" / f"{name}.png") as figure:
            assert figure.width == 1200
    assert values(found["slices"]) == pytest.approx(direct(bundles, CT, own / "slices"), abs=2e-6)
    assert found["slices"]["source"] == str(own / "slices")


def test_a_list_and_a_pattern(predict: Predict, tmp_path: Path) -> None:
    for name in "abc":
        Image.fromarray(shapes()).save(tmp_path / f"{name}.png")
    assert list(predict(XRAY, [str(tmp_path / "c.png"), str(tmp_path / "a.png")], batch_size=1)) == ["a", "c"]
    assert list(predict(XRAY, "*.png", dataset_dir=str(tmp_path), batch_size=2)) == ["a", "b", "c"]


def test_the_test_split_of_a_training_run(predict: Predict, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in "abc":
        Image.fromarray(shapes()).save(data / f"{name}.png")
    items = [
        {"id": f"s{n}", "patient": n, "image": f"{n}.png", "dim": 2, "label": [0] * 5, "report": "x"} for n in "abc"
    ]
    lists = {"training": items[:1], "validation": items[1:2], "test": items[2:], "meta": {"task": "multilabel"}}
    (tmp_path / "data.json").write_text(json.dumps(lists))
    folders = {"dataset_dir": str(data), "datalist_file": str(tmp_path / "data.json")}
    (only,) = predict(XRAY, None, **folders).values()
    assert (only["id"], only["source"]) == ("sc", str(data / "c.png"))
    with pytest.raises(DataError, match=r"data\.json: no 3D image in its test split; name files or folders"):
        find_images(None, data, dim=3, datalist=tmp_path / "data.json")


def test_nothing_to_read_is_one_clear_error(predict: Predict, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert fault_of(lambda: predict(XRAY, str(empty))).startswith(f"{empty}: no image in it; name X-ray or CT files")
    missing = tmp_path / "missing"
    text = f"{missing}: no such folder of images; name files or folders with --inputs PATH"
    assert fault_of(lambda: predict(CT, None, dataset_dir=str(missing))) == text
    nib.save(nib.Nifti1Image(scan(), np.eye(4)), tmp_path / "v.nii.gz")
    message = fault_of(lambda: predict(XRAY, str(tmp_path / "v.nii.gz")))
    assert message == f"{tmp_path / 'v.nii.gz'}: no X-ray, nor any of 1 images named; this bundle reads no other"
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    message = fault_of(lambda: predict(XRAY, str(tmp_path / "cut.png")))
    assert message.startswith(f"none of 1 inputs could be read, first {tmp_path / 'cut.png'}: ")
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["skipped"]) == 1
    message = fault_of(lambda: predict(XRAY, str(tmp_path / "cut.png"), strict=True))
    assert message.startswith(f"{tmp_path / 'cut.png'}: truncated PNG") and message.endswith("; repair or remove it")
    message = fault_of(lambda: predict(XRAY, str(tmp_path / "cut.png"), ckpt_dir=str(missing)))
    assert message == f"{missing / 'model.pt'}: no such checkpoint; train the bundle first or give another path"


def test_two_pictures_beside_a_volume_are_no_slices(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(scan(), np.eye(4)), tmp_path / "v.nii.gz")
    for name in "ab":
        Image.fromarray(shapes()).save(tmp_path / f"{name}.png")
    assert [item["id"] for item in find_images(None, tmp_path, dim=3, slice_folders=True)] == ["v"]
    (tmp_path / "p" / "s").mkdir(parents=True)
    for name in "ab":
        Image.fromarray(shapes()).save(tmp_path / "p" / "s" / f"{name}.png")
    assert [item["id"] for item in find_images(None, tmp_path, dim=3, slice_folders=True)] == ["p_s", "v"]
    assert [item["id"] for item in find_images(None, tmp_path, dim=3)] == ["v"]


@pytest.mark.parametrize(("given", "predicted"), [(0.5, "ill"), (0.499, "healthy")])
def test_one_output_of_a_binary_task(given: float, predicted: str, bundles: Path, tmp_path: Path) -> None:
    network = load_classifier(bundles / XRAY / "models" / "model.pt")
    network.card = {**network.card, "task": "binary", "label_names": ["healthy", "ill"]}
    writer = SavePredictions(tmp_path / "out", network, figures=False)
    writer({"id": "a", "pred": torch.tensor([given])})
    writer({"image_path": "request.png", "pred": torch.tensor([given])})
    assert not (tmp_path / "out").exists()

    read = SimpleNamespace(data=[{"id": "a", "source": "/a.png"}, {"id": "b", "source": "/b.png"}], skipped=[])
    writer.finish(read)  # type: ignore[arg-type]
    lines = (tmp_path / "out" / "predictions.csv").read_text().splitlines()
    assert lines == ["id,source,probability_ill,predicted", f"a,/a.png,{given},{predicted}"]


def test_refused_arguments(bundles: Path, tmp_path: Path) -> None:
    network = load_classifier(bundles / XRAY / "models" / "model.pt")
    with pytest.raises(ValueError, match="threshold must be a probability from 0 to 1, not 50"):
        SavePredictions(tmp_path, network, threshold=50)
    with pytest.raises(CheckpointError, match="a: probabilities that are not finite"):
        SavePredictions(tmp_path, network)({"id": "a", "pred": torch.full((5,), torch.nan)})
