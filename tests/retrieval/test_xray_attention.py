# SPDX-License-Identifier: Apache-2.0
"""Attention in boxes by hand, and boxes through resizing, padding and cropping to the network's patches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from unimedi_components.networks import UnifiedViT
from unimedi_components.retrieval.embedder import make_dataset
from unimedi_components.retrieval.features import Features
from unimedi_components.retrieval.xray_attention import attention_ratios, box_cover, xray_attention_metrics


def pretrained(**xray):
    encoder = UnifiedViT(img_size=32, vol_size=(16, 32, 32), patch_size=8, embed_dim=12, depth=1, num_heads=1)
    network = SimpleNamespace(encoder=encoder)
    card = {"preprocessing": {"xray": {"size": 32, **xray}, "ct": {}}}
    return SimpleNamespace(network=network, card=card, keep_punct=True)


def features(folder, attention, boxes, size=(64, 64)):
    items, studies = [], {}
    for i, corners in enumerate(boxes):
        Image.fromarray(np.full((size[1], size[0]), 40 + i, np.uint8) + np.eye(size[1], size[0], dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
        items.append({"id": str(i), "patient": f"p{i}", "image": f"{i}.png", "dim": 2})
        studies[str(i)] = {"findings": [{"name": "nodule", "boxes": corners}]}
    empty = torch.zeros(len(items), 1)
    return Features(items, empty, empty, empty, torch.as_tensor(attention), root=folder), studies


def test_ratios_by_hand():
    attention = np.asarray([[0.4, 0.3, 0.2, 0.1], [0.0, 0.0, 0.0, 2.0]])
    cover = np.asarray([[1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.5]])
    # rows: boxes of an image; columns: whose attention
    np.testing.assert_allclose(attention_ratios(attention, cover), [[0.4 / 0.25, 0.0], [0.2 / 0.25, 0.5 / 0.25]])


@pytest.mark.parametrize(
    ("size", "options"), [((64, 64), {}), ((80, 50), {"long_side": 32}), ((45, 90), {"long_side": 40})]
)
def test_boxes_follow_the_preparation_of_the_image(tmp_path, size, options):
    """A white box on black, prepared as the network's input, is white where the cover says."""
    box = [size[0] // 4, size[1] // 3, size[0] // 2, 2 * size[1] // 3]
    film = np.zeros((size[1], size[0]), np.uint8)
    film[box[1] : box[3] + 1, box[0] : box[2] + 1] = 255
    Image.fromarray(film).save(tmp_path / "film.png")
    item = {"id": "film", "patient": "p", "image": "film.png", "dim": 2}
    empty = torch.zeros(1, 1)
    part = Features([item], empty, empty, empty, torch.zeros(1, 16), root=tmp_path)
    network = pretrained(**options)
    found = box_cover(network, part, [[box]], [0])
    image = (make_dataset(network, [item], tmp_path)[0]["image"] + 1) / 2
    expected = torch.nn.functional.avg_pool2d(image, 8).flatten().numpy()
    assert found.shape == (1, 16)
    np.testing.assert_allclose(found[0], expected, atol=0.13)
    assert found.sum() == pytest.approx(expected.sum(), rel=0.12)


def test_metrics_by_hand(tmp_path, kept_by):
    """Films of 64 x 64, cut to their centre of 56: patches of 14 pixels; one without a box, one with a large one."""
    boxes = [[[4, 4, 17, 17]], [[46, 46, 59, 59]], [[4, 46, 17, 59]], [], [[0, 0, 63, 40]]]
    attention = torch.full((5, 16), 0.04)
    attention[0, 0], attention[1, 0], attention[2, 12] = 0.4, 0.4, 0.4
    part, studies = features(tmp_path, attention, boxes)
    found = kept_by(xray_attention_metrics, pretrained(), part, studies)
    assert found["xray_attention_studies"] == 3
    high, low = 16 * 0.4, 16 * 0.04
    assert found["xray_attention_ratio"] == pytest.approx((high + low + high) / 3, rel=1e-5)
    others = ((high + low) / 2 + low + low) / 3
    assert found["xray_attention_ratio_permuted"] == pytest.approx(others, rel=1e-5)
    assert found["xray_attention_ratio_per_finding"]["nodule"] == pytest.approx(found["xray_attention_ratio"])
    assert kept_by(xray_attention_metrics, pretrained(), part, {}) == {"xray_attention_studies": 0}
