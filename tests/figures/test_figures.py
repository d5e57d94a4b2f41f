# SPDX-License-Identifier: Apache-2.0
"""Figures: files of the promised size that show what they were given."""

import matplotlib
import numpy as np
import pytest
from PIL import Image

from unimedi_components.figures.attention import CTView, XrayView, draw_selection, draw_xrays
from unimedi_components.figures.curves import draw_loss_curves

GREEN, RED = (42, 157, 74), (209, 73, 91)


def history(iterations=40, **extra):
    return [
        {
            "iteration": i,
            "epoch": 1 + (i - 1) // 10,
            "loss": 5.0 - i / 20,
            "vl": 3.0,
            "icl": 1.0,
            "pcl": 1.0,
            "lr": 1e-3,
            **({"val_recall_at_5": i / 40} if i % 10 == 0 else {}),
            **extra,
        }
        for i in range(1, iterations + 1)
    ]


def ct_view(k=2, lesions=(3,), depth=8, **changes):
    rng = np.random.default_rng(0)
    attention = rng.random((4, 4, 4))
    mask = None if lesions is None else np.isin(np.arange(depth), lesions)
    view = {
        "name": "study $1",
        "volume": rng.normal(size=(depth, 32, 32)),
        "selected": list(range(1, 2 * k, 2)),
        "scores": attention.mean((1, 2)),
        "attention": attention / attention.sum(),
        "report": "There is a nodule of 5$ in the _left_ lung. " * 4,
        "lesions": mask,
    }
    return CTView(**{**view, **changes})


def near(image, colour, tolerance=10):
    """How many pixels have about this colour."""
    return int((np.abs(image.astype(int) - colour).max(-1) <= tolerance).sum())


def read(path):
    assert path.stat().st_size < 400_000
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_loss_curves_show_losses_and_validation(tmp_path):
    image = read(draw_loss_curves(history(), tmp_path / "new" / "loss.png"))
    assert image.shape == (360, 1200, 3)
    for colour in ((51, 51, 51), (47, 111, 178), (217, 131, 36), (42, 157, 74), (122, 79, 163)):
        assert near(image, colour) > 20, colour
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["loss.png"]  # no temporary file is left


def test_loss_curves_of_a_short_run_without_parts(tmp_path):
    image = read(draw_loss_curves([{"iteration": 1, "epoch": 1, "loss": 2.0}], tmp_path / "loss.png"))
    assert image.shape == (360, 1200, 3)
    with pytest.raises(ValueError, match="history is empty"):
        draw_loss_curves([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_falling_loss_falls_on_the_page(tmp_path):
    image = read(draw_loss_curves(history(), tmp_path / "loss.png"))
    dark = np.abs(image[60:300, 60:360].astype(int) - 51).max(-1) < 40
    columns = np.flatnonzero(dark.any(0))
    first, last = columns[: len(columns) // 4], columns[-(len(columns) // 4) :]
    assert dark[:, first].nonzero()[0].mean() < dark[:, last].nonzero()[0].mean()


@pytest.mark.parametrize("k", [1, 2, 4])
def test_selection_marks_lesion_slices(tmp_path, k):
    views = [ct_view(k, lesions=(3,)), ct_view(k, lesions=(0,)), ct_view(k, lesions=None)]
    image = read(draw_selection(views, tmp_path / "selection.png", "title"))
    assert image.shape[1] == 1200
    thirds = np.array_split(image[40:], 3)
    # frames: slice 3 is selected from k = 2 on and is a lesion slice in the first study alone
    assert (near(thirds[0], GREEN) > 300) == (k > 1)
    assert near(thirds[1], GREEN) == 0
    assert near(thirds[0], RED) > 300
    assert near(thirds[1], RED) > 300
    assert near(thirds[2], RED) == 0
    assert all(third.std() > 20 for third in thirds)


def test_selection_shows_the_volume_upright(tmp_path):
    """A bright mark at the front right of the patient belongs to the upper left of the slice."""
    volume = np.zeros((8, 32, 32))
    volume[:, 2:8, 2:8] = 1.0
    view = ct_view(1, lesions=None, volume=volume, attention=np.full((4, 4, 4), 1e-9))
    image = read(draw_selection([view], tmp_path / "selection.png")).astype(float).mean(-1)
    panel = image[30:210, 15:190]
    rows, columns = panel.shape[0] // 2, panel.shape[1] // 2
    bright = [panel[:rows, :columns].mean(), panel[:rows, columns:].mean(), panel[rows:, :columns].mean()]
    assert bright[0] > 1.5 * max(bright[1:])


def test_attention_is_drawn_where_it_is(tmp_path):
    attention = np.full((4, 4), 1e-6)
    attention[3, 0] = 1.0
    view = XrayView("x-ray", np.linspace(-1, 1, 64 * 64).reshape(64, 64), attention, "Clear lungs.")
    image = read(draw_xrays([view], tmp_path / "xray.png")).astype(int)
    assert image.shape[1] == 1200
    colourful = np.ptp(image[30:240, 212:410], axis=-1) > 60
    where = np.argwhere(colourful[4:-8, 4:-8])
    assert len(where) > 200
    assert where[:, 0].mean() > 120
    assert where[:, 1].mean() < 80


def test_many_xrays_and_long_reports_stay_in_bounds(tmp_path):
    rng = np.random.default_rng(0)
    views = [XrayView(f"{i}", rng.random((64, 64)), rng.random((8, 8)), "word " * 400) for i in range(5)]
    image = read(draw_xrays(views, tmp_path / "xray.png", "title"))
    assert image.shape == (round(100 * (3 * 2.45 + 0.38)), 1200, 3)
    with pytest.raises(ValueError, match="no X-ray"):
        draw_xrays([], tmp_path / "none.png")
    with pytest.raises(ValueError, match="no CT study"):
        draw_selection([], tmp_path / "none.png")


def test_the_callers_matplotlib_is_left_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    backend = matplotlib.get_backend()
    draw_loss_curves(history(), tmp_path / "loss.png")
    draw_selection([ct_view()], tmp_path / "selection.png")
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend() == backend
