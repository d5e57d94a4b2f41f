# SPDX-License-Identifier: Apache-2.0
"""evaluate_task on films with mask files and a network whose answers are known, and what its figure shows."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from unimedi_components.errors import CheckpointError
from unimedi_components.figures.panels import MaskView, draw_masks
from unimedi_components.networks import SETRPUP, UnifiedViT, network_card
from unimedi_components.tasks import evaluate_task

SIDE = 16


@pytest.fixture
def checkpoint(tmp_path):
    """A network that says the same of every pixel: its bias."""

    def make(bias):
        torch.manual_seed(0)
        encoder = UnifiedViT(
            SIDE, (8, 16, 16), patch_size=4, patch_size_3d=(2, 8, 8), embed_dim=8, depth=1, num_heads=2
        )
        network = SETRPUP(encoder, widths=(4, 4))
        with torch.no_grad():
            network.head.weight.zero_()
            network.head.bias.fill_(bias)
        torch.save(network.state_dict(), tmp_path / "model.pt")
        card = network_card(network, "segmentation", ["background", "lung"], {"film": {"size": SIDE}})
        (tmp_path / "model.json").write_text(json.dumps(card))
        return tmp_path / "model.pt"

    return make


@pytest.fixture
def datalist(tmp_path):
    """Films of the network's size with masks of 0, 16, ... pixels, and one that cannot be read."""
    items = []
    for number in range(6):
        rng = np.random.default_rng(number)
        Image.fromarray(rng.integers(0, 255, (SIDE, SIDE), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[:number] = 255
        Image.fromarray(mask).save(tmp_path / f"{number}_mask.png")
        item = {"id": f"film{number}", "patient": f"p{number // 2}", "dim": 2}
        items.append({**item, "image": f"{number}.png", "mask": f"{number}_mask.png"})
    (tmp_path / "bad.png").write_bytes(b"no picture")
    bad = {"id": "bad", "patient": "q", "dim": 2, "image": "bad.png", "mask": "0_mask.png"}
    return {"training": [], "validation": [], "test": [*items, bad]}


def test_everything_found(checkpoint, datalist, tmp_path):
    values = evaluate_task(checkpoint(3.0), datalist, tmp_path, tmp_path / "eval", batch_size=4, bootstrap=100)
    # a mask of n rows against all 16
    dice = [0, *(2 * n / (n + SIDE) for n in range(1, 6))]
    assert values["dice"] == pytest.approx(np.mean(dice))
    assert values["dice_positive"] == pytest.approx(np.mean(dice[1:]))
    assert values["iou_positive"] == pytest.approx(np.mean([n / SIDE for n in range(1, 6)]))
    assert (values["false_alarms"], values["missed"]) == (1, 0)
    assert (values["cases"], values["patients"], values["positive"], values["skipped_files"]) == (6, 3, 5, 1)
    assert values["label_names"] == ["background", "lung"] and values["grid"] == [SIDE, SIDE]
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text()) == values
    with open(tmp_path / "eval" / "cases.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["id"] for row in rows] == [f"film{n}" for n in range(6)]
    assert [int(row["true_pixels"]) for row in rows] == [SIDE * n for n in range(6)]
    assert {int(row["predicted_pixels"]) for row in rows} == {SIDE * SIDE}
    assert [float(row["dice"]) for row in rows] == pytest.approx(dice, abs=1e-6)
    assert [float(row["probability"]) for row in rows] == pytest.approx([1 / (1 + np.exp(-3))] * 6, abs=1e-6)


@pytest.mark.parametrize(("bias", "threshold"), [(-3.0, 0.5), (3.0, 0.99)])
def test_nothing_found(bias, threshold, checkpoint, datalist, tmp_path):
    values = evaluate_task(checkpoint(bias), datalist, tmp_path, bootstrap=0, threshold=threshold)
    assert values["dice"] == pytest.approx(1 / 6)
    assert (values["dice_positive"], values["false_alarms"], values["missed"]) == (0, 0, 1)
    assert values["threshold"] == threshold
    assert not (tmp_path / "eval").exists()


def test_a_network_that_diverged(checkpoint, datalist, tmp_path):
    with pytest.raises(CheckpointError, match="gives values that are not finite; its training diverged, train again"):
        evaluate_task(checkpoint(float("nan")), datalist, tmp_path)


def test_the_figure_shows_best_to_worst_and_a_false_alarm(checkpoint, datalist, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("unimedi_components.tasks.xray_masks.draw_masks", lambda *args: drawn.extend(args))
    evaluate_task(checkpoint(3.0), datalist, tmp_path, tmp_path / "eval", bootstrap=0)
    views, path, title = drawn
    assert [view.name for view in views] == ["film5", "film4", "film3", "film2", "film1", "film0"]
    assert [view.note for view in views[:2]] == ["Dice 0.48", "Dice 0.40"] and views[-1].note == "false alarm"
    assert all(view.found.all() for view in views)
    assert [int(view.truth.sum()) for view in views] == [80, 64, 48, 32, 16, 0]
    assert path == tmp_path / "eval" / "masks.png"
    assert title == "test split: Dice 0.255 over 6 images, 0.306 over the 5 with lung"


def test_figures_of_films_of_any_shape(tmp_path):
    for shape in ((40, 500), (1700, 60), (1, 1)):
        mask = np.zeros(shape, bool)
        mask[: shape[0] // 2 + 1] = True
        draw_masks([MaskView("a", np.zeros(shape), mask)], tmp_path / "one.png")
        with Image.open(tmp_path / "one.png") as image:
            assert image.width >= 400
    with pytest.raises(ValueError, match="no image to draw"):
        draw_masks([], tmp_path / "none.png")


def test_true_and_predicted_masks_have_their_colours(tmp_path):
    image, found, truth = np.zeros((40, 40)), np.zeros((40, 40), bool), np.zeros((40, 40), bool)
    found[:, :20], truth[:20] = True, True
    draw_masks([MaskView("a", image, found, truth)], tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    third = pixels.shape[1] // 3
    green = (pixels[..., 1] > pixels[..., 0] + 20) & (pixels[..., 1] > pixels[..., 2] + 20)
    orange = (pixels[..., 0] > pixels[..., 1] + 20) & (pixels[..., 1] > pixels[..., 2])
    body = slice(0, int(0.8 * pixels.shape[0]))
    assert green[body, third : 2 * third].mean() > 0.2 and not green[body, 2 * third + 5 :].any()
    assert orange[body, 2 * third :].mean() > 0.2 and not orange[body, : 2 * third - 5].any()
