# SPDX-License-Identifier: Apache-2.0
"""What evaluate_task writes of a classifier, against direct forward passes over the same files."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from monai.transforms import Compose
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import nn

from unimedi_components.data import write_json, xray_transforms
from unimedi_components.errors import CheckpointError, ConfigError, DataError
from unimedi_components.figures.charts import RocCurve, draw_confusion, draw_roc
from unimedi_components.networks import UnifiedViT
from unimedi_components.networks.cards import network_card
from unimedi_components.networks.classifier import ImageClassifier, load_classifier
from unimedi_components.tasks import evaluate, evaluate_task

NAMES = {
    "multilabel": ["Edema", "Pleural Effusion"],
    "multiclass": ["normal", "pneumonia", "COVID-19"],
    "binary": ["healthy", "ill"],
}
LABELS = {
    "multilabel": [[1, 0], [0, 1], [0, 0], [1, -1], [1, 1], [0, 0], [-1, 1]],
    "multiclass": [0, 1, 2, 2, 1, 0, 0],
    "binary": [0, 1, 1, 0, 1, 0, 0],
}
FILES = {"metrics.json", "cases.csv", "roc.png", "confusion.png"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(7):
        Image.fromarray(rng.integers(0, 256, (40 + i, 50), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def datalist_of(task, split="test"):
    """Seven X-rays of five patients, and a volume that a classifier of X-rays does not read."""
    items = [
        {"id": f"x{i}", "patient": f"p{i % 5}", "image": f"{i}.png", "dim": 2, "label": label}
        for i, label in enumerate(LABELS[task])
    ]
    volume = {"id": "ct", "patient": "p9", "image": "ct.nii.gz", "dim": 3, "label": 0}
    meta = {"task": task, "label_names": NAMES[task]}
    return {"training": [], "validation": [], "test": [], split: [*items, volume], "meta": meta}


def save_classifier(folder, task, broken=False):
    torch.manual_seed(0)
    encoder = UnifiedViT(img_size=32, vol_size=(8, 32, 32), embed_dim=24, depth=2, num_heads=2)
    network = ImageClassifier(encoder, 1 if task == "binary" else len(NAMES[task]))
    nn.init.normal_(network.head.weight, std=2.0)
    nn.init.constant_(network.head.bias, float("nan") if broken else 0.0)
    folder.mkdir()
    torch.save(network.state_dict(), folder / "model.pt")
    write_json(network_card(network, task, NAMES[task], {"xray": {"size": 32}}), folder / "model.json")
    return folder / "model.pt"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {task: save_classifier(folder / task, task) for task in NAMES}


def forward(checkpoint, root, indices=range(7)):
    """One image at a time through the transforms and the network alone."""
    network, transform = load_classifier(checkpoint), Compose(xray_transforms(32))
    images = [transform({"image": str(root / f"{i}.png")})["image"] for i in indices]
    with torch.no_grad():
        return torch.cat([network(image[None]) for image in images]).double()


@pytest.mark.parametrize("task", list(NAMES))
def test_files_hold_what_the_network_gives(task, checkpoints, root, tmp_path):
    lists = datalist_of(task)
    lists["training"] = [{**lists["test"][0], "id": "seen", "patient": "seen"}]
    write_json(lists, tmp_path / "datalist.json")
    arguments = (checkpoints[task], tmp_path / "datalist.json", root)
    found = evaluate_task(*arguments, tmp_path / "new" / "eval", batch_size=3, bootstrap=30)
    folder = tmp_path / "new" / "eval"
    assert {path.name for path in folder.iterdir()} == FILES
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(found))
    assert (found["split"], found["task"], found["checkpoint"], found["skipped_files"]) == ("test", task, "model.pt", 0)
    assert (found["cases"], found["patients"], found["label_names"]) == (7, 5, NAMES[task])
    table, names = pd.read_csv(folder / "cases.csv"), NAMES[task]
    assert table["id"].tolist() == [f"x{i}" for i in range(7)]
    assert table["patient"].tolist() == [f"p{i % 5}" for i in range(7)]
    logits, labels = forward(checkpoints[task], root), np.array(LABELS[task])
    expected = (logits.softmax(1) if task == "multiclass" else logits.sigmoid()).numpy()
    columns = names[1:] if task == "binary" else names
    np.testing.assert_allclose(table[[f"probability_{name}" for name in columns]], expected, atol=1e-5)
    if task == "multilabel":
        assert table[[f"label_{name}" for name in names]].to_numpy().tolist() == LABELS[task]
        predicted = table[[f"predicted_{name}" for name in names]].to_numpy()
        np.testing.assert_array_equal(predicted, expected >= 0.5)
        assert found["auroc"]["Edema"] == pytest.approx(roc_auc_score(labels[:6, 0], expected[:6, 0]))
        assert found["uncertain"] == {"Edema": 1, "Pleural Effusion": 1}
    else:
        chosen = expected.argmax(1) if task == "multiclass" else (expected[:, 0] >= 0.5).astype(int)
        assert table["label"].tolist() == [names[label] for label in labels]
        assert table["predicted"].tolist() == [names[label] for label in chosen]
        assert found["accuracy"] == pytest.approx(np.mean(chosen == labels))
        assert np.trace(found["confusion_matrix"]) == (chosen == labels).sum()
    for name in ("roc.png", "confusion.png"):
        with Image.open(folder / name) as image:
            assert np.asarray(image.convert("L")).std() > 10
    assert evaluate_task(*arguments, batch_size=7, bootstrap=30)["auroc"] == pytest.approx(found["auroc"])


def test_validation_stands_in_for_an_empty_test_split(checkpoints, root):
    lists = datalist_of("binary", "validation")
    assert evaluate_task(checkpoints["binary"], lists, root, bootstrap=0)["split"] == "validation"
    lists = datalist_of("binary", "training")
    with pytest.raises(DataError, match="no 2D item in the test or validation split"):
        evaluate_task(checkpoints["binary"], lists, root)
    assert evaluate_task(checkpoints["binary"], lists, root, split="training", bootstrap=0)["cases"] == 7
    with pytest.raises(DataError, match="no 2D item in the validation split"):
        evaluate_task(checkpoints["binary"], lists, root, split="validation")
    with pytest.raises(DataError, match="split 'dev' is unknown"):
        evaluate_task(checkpoints["binary"], lists, root, split="dev")


def test_another_transform_replaces_the_cards(checkpoints, root, tmp_path):
    """Without padding to a larger square first, the same files give other values."""
    options = {"output_dir": tmp_path, "bootstrap": 0, "transform": xray_transforms(32, long_side=32)}
    evaluate_task(checkpoints["binary"], datalist_of("binary"), root, **options)
    given = pd.read_csv(tmp_path / "cases.csv")["probability_ill"]
    assert np.abs(given - forward(checkpoints["binary"], root).sigmoid()[:, 0].numpy()).max() > 1e-3


def test_unreadable_files_are_counted(checkpoints, root, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    lists = datalist_of("binary")
    lists["test"][2]["image"] = str(broken)
    lists["test"][3]["image"] = "missing.png"
    found = evaluate_task(checkpoints["binary"], lists, root, tmp_path / "eval", bootstrap=0)
    assert (found["skipped_files"], found["cases"]) == (2, 5)
    table = pd.read_csv(tmp_path / "eval" / "cases.csv")
    assert table["id"].tolist() == ["x0", "x1", "x4", "x5", "x6"]
    expected = forward(checkpoints["binary"], root, (0, 1, 4, 5, 6)).sigmoid()[:, 0]
    np.testing.assert_allclose(table["probability_ill"], expected, atol=1e-5)
    for item in lists["test"]:
        item["image"] = str(broken)
    with pytest.raises(DataError, match=r"none of 7 images can be read, first .*broken\.png"):
        evaluate_task(checkpoints["binary"], lists, root)


def test_other_labels_are_refused(checkpoints, root):
    lists = datalist_of("binary")
    lists["meta"]["label_names"] = ["normal", "ill"]
    with pytest.raises(DataError, match=r"binary labels healthy, ill, but the datalist holds.* normal, ill; prepare"):
        evaluate_task(checkpoints["binary"], lists, root)
    lists["meta"] = {"task": "multiclass", "label_names": NAMES["binary"]}
    with pytest.raises(DataError, match="holds the multiclass labels"):
        evaluate_task(checkpoints["binary"], lists, root)
    lists["meta"] = {}
    assert evaluate_task(checkpoints["binary"], lists, root, bootstrap=0)["task"] == "binary"


def test_options_of_another_task_are_refused(checkpoints, root):
    with pytest.raises(ConfigError, match="of a classifier network has no option lowest_score; it takes transform"):
        evaluate_task(checkpoints["binary"], datalist_of("binary"), root, lowest_score=0.1)


def test_labels_of_one_class_or_none(checkpoints, root, tmp_path):
    lists = datalist_of("multilabel")
    for item in lists["test"][:7]:
        item["label"] = [0, -1]
    found = evaluate_task(checkpoints["multilabel"], lists, root, tmp_path, bootstrap=5)
    assert (found["macro_auroc"], set(found["skipped"])) == (None, set(NAMES["multilabel"]))
    assert {path.name for path in tmp_path.iterdir()} == FILES
    for item in lists["test"][:7]:
        item["label"] = [-1, -1]
    with pytest.raises(DataError, match="every label of the test split is uncertain"):
        evaluate_task(checkpoints["multilabel"], lists, root)


def test_a_diverged_network_is_named(root, tmp_path):
    checkpoint = save_classifier(tmp_path / "broken", "binary", broken=True)
    with pytest.raises(CheckpointError, match=r"model\.pt: gives values that are not finite"):
        evaluate_task(checkpoint, datalist_of("binary"), root)


def test_other_ranks_return_at_once(root, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "rank", lambda: 1)
    assert evaluate_task(tmp_path / "nowhere.pt", datalist_of("binary"), root, tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


def test_roc_is_drawn_where_it_is(tmp_path):
    """A perfect curve runs along the left and the top, and nowhere else."""
    perfect = RocCurve("a $1", np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0]), 1.0, (0.9, 1.0))
    absent = RocCurve("b", np.empty(0), np.empty(0), None)
    draw_roc([perfect, absent], tmp_path / "roc.png", "title")
    with Image.open(tmp_path / "roc.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (520, 1000, 3)
    blue = np.argwhere(pixels[..., 2] - pixels[..., 0] > 60)
    height, left = np.ptp(blue[:, 0]), blue[:, 1].min()
    # the axes are square; the legend lies to their right
    rows, columns = blue[blue[:, 1] <= left + height].T
    width = np.ptp(columns)
    assert min(height, width) > 350
    assert not ((rows > rows.min() + 0.1 * height) & (columns > columns.min() + 0.1 * width)).any()
    with pytest.raises(ValueError, match="no ROC curve"):
        draw_roc([], tmp_path / "none.png")


def test_confusion_has_true_classes_in_rows(tmp_path):
    draw_confusion({"": [[10, 0], [10, 0]]}, ["no", "yes"], tmp_path / "left.png")
    draw_confusion({"": [[10, 0], [0, 10]]}, ["no", "yes"], tmp_path / "diagonal.png")
    dark = {}
    for name in ("left", "diagonal"):
        with Image.open(tmp_path / f"{name}.png") as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        place = np.argwhere(np.abs(pixels - (8, 48, 107)).max(-1) <= 12)
        dark[name] = (np.ptp(place[:, 0]), np.ptp(place[:, 1]))
    assert dark["left"][0] > 1.9 * dark["left"][1]
    assert dark["diagonal"][0] == pytest.approx(dark["diagonal"][1], abs=4)
    draw_confusion({f"finding {i}": [[1, 2], [0, 0]] for i in range(7)}, ["absent", "present"], tmp_path / "many.png")
    with pytest.raises(ValueError, match="no confusion matrix"):
        draw_confusion({}, ["a", "b"], tmp_path / "none.png")
