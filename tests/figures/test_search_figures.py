# SPDX-License-Identifier: Apache-2.0
"""The figure of searches: which frame is green, and that all of it is drawn."""

import matplotlib.image
import numpy as np
import pytest

from unimedi_components.figures import attention as figures
from unimedi_components.figures.panels import Found, _colour, draw_search

IMAGE = np.random.default_rng(0).normal(size=(20, 16))


@pytest.mark.parametrize(
    ("query", "found", "colour"),
    [
        (["edema"], ["edema", "nodule"], figures.RIGHT),
        (["edema"], ["nodule"], figures.WRONG),
        (["edema"], [], figures.WRONG),
        ([], [], figures.RIGHT),
        ([], ["edema"], figures.WRONG),
        (None, ["edema"], figures.NEUTRAL),
        (["edema"], None, figures.NEUTRAL),
    ],
)
def test_a_frame_says_whether_findings_are_shared(query, found, colour):
    assert _colour(Found(IMAGE, query), Found(IMAGE, found, 0.5)) == colour
    assert _colour(Found(IMAGE, query), Found(IMAGE, found)) == figures.NEUTRAL


def test_rows_are_drawn(tmp_path):
    row = (Found(IMAGE, ["edema"]), [Found(IMAGE, ["edema"], 0.9), Found(IMAGE, None, 0.8)])
    one = matplotlib.image.imread(draw_search([row], tmp_path / "one.png"))
    two = matplotlib.image.imread(draw_search([row, row], tmp_path / "two.png", "title"))
    assert two.shape[1] == one.shape[1] == 1200 and two.shape[0] > 1.8 * one.shape[0]
    # green of the frame around what shares a finding, in the first row alone where there is one
    green = np.asarray([0x2A, 0x9D, 0x4A]) / 255
    assert (np.abs(one[..., :3] - green).max(-1) < 0.02).sum() > 300
    with pytest.raises(ValueError, match="no query"):
        draw_search([], tmp_path / "none.png")
