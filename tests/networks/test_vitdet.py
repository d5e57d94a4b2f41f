# SPDX-License-Identifier: Apache-2.0
"""The detector: pyramid, anchors, losses against hand-written ones, boxes, learning, and strict loading."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.apps.detection.utils.ATSS_matcher import ATSSMatcher
from torch import Tensor, nn

from unimedi_components.errors import CheckpointError
from unimedi_components.losses import DetectionLoss
from unimedi_components.metrics.boxes import box_ious
from unimedi_components.networks import UnifiedViT, ViTDet, load_network, network_card
from unimedi_components.networks.feature_pyramid import ChannelLayerNorm, SimpleFeaturePyramid

SIZES: dict[str, Any] = {"vol_size": (8, 32, 32), "embed_dim": 24, "depth": 2, "num_heads": 2}


def make(seed: int = 0, **options: Any) -> ViTDet:
    torch.manual_seed(seed)
    return ViTDet(UnifiedViT(img_size=32, **SIZES), **{"width": 16, "head_convs": 1, **options})


def target(*boxes: list[float]) -> dict[str, Tensor]:
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.zeros(len(boxes), dtype=torch.int64)}


def test_channel_norm_is_a_layer_norm_of_each_pixel() -> None:
    torch.manual_seed(0)
    norm = ChannelLayerNorm(5, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 3, 4)
    got = norm(x)
    for b, i, j in np.ndindex(2, 3, 4):
        pixel = x[b, :, i, j]
        expected = (pixel - pixel.mean()) / (pixel.var(unbiased=False) + 1e-6).sqrt() * norm.weight + norm.bias
        assert torch.allclose(got[b, :, i, j], expected, atol=1e-5)


def test_the_pyramid_has_vitdets_layout() -> None:
    """Layers as in detectron2's `SimpleFeaturePyramid` for scales 4, 2, 1 and 1/2, and its last level."""
    pyramid = SimpleFeaturePyramid(32, 16)
    maps = pyramid(torch.randn(2, 32, 6, 10))
    assert [tuple(x.shape) for x in maps] == [
        (2, 16, 24, 40),
        (2, 16, 12, 20),
        (2, 16, 6, 10),
        (2, 16, 3, 5),
        (2, 16, 2, 3),
    ]
    assert torch.equal(maps[4], maps[3][:, :, ::2, ::2])
    conv, norm = nn.Conv2d, ChannelLayerNorm
    tail = [conv, norm, conv, norm]
    assert [[type(step) for step in level] for level in pyramid.levels] == [  # type: ignore[union-attr]
        [nn.ConvTranspose2d, norm, nn.GELU, nn.ConvTranspose2d, *tail],
        [nn.ConvTranspose2d, *tail],
        tail,
        [nn.MaxPool2d, *tail],
    ]
    shapes = {name: tuple(p.shape) for name, p in pyramid.levels[0].named_parameters() if p.ndim > 1}
    assert list(shapes.values()) == [(32, 16, 2, 2), (16, 8, 2, 2), (16, 8, 1, 1), (16, 16, 3, 3)]
    with pytest.raises(ValueError, match="scales must be of 4, 2, 1 and"):
        SimpleFeaturePyramid(32, 16, scales=(3,))


def test_anchors_lie_around_the_centres_of_the_cells() -> None:
    """x along the columns, y along the rows, in an image that is no square; rows of a map come first."""
    network = make(scales=(1,), last_pool=False, anchor_sizes=[[10, 20]], aspect_ratios=[0.25, 1])
    image = torch.zeros(1, 1, 32, 48)
    rows, anchors, places = network.detector.read(image, network.head_maps(image))
    assert places == [6]
    # sizes vary fastest, then the ratio of height to width; sides are rounded to even pixels
    shapes = [(20, 5), (40, 10), (10, 10), (20, 20)]
    expected = []
    for row in range(2):
        for column in range(3):
            x, y = 16 * column + 8, 16 * row + 8
            expected += [[x - w / 2, y - h / 2, x + w / 2, y + h / 2] for w, h in shapes]
    assert torch.allclose(anchors, torch.tensor(expected), atol=0.5)
    assert {name: tuple(value.shape) for name, value in rows.items()} == {
        "classification": (1, 24, 1),
        "box_regression": (1, 24, 4),
    }


def test_default_anchors_are_retinanets() -> None:
    network = make()
    sizes = [4 * stride * 2 ** (i / 3) for stride in (4, 8, 16, 32, 64) for i in range(3)]
    assert np.ravel(network.hparams["anchor_sizes"]) == pytest.approx(sizes)
    assert network.detector.num_anchors_per_loc == 9


def atss(boxes: np.ndarray, anchors: np.ndarray, levels: list[int], per_place: int, k: int) -> list[int]:
    """Zhang et al., ATSS, algorithm 1, as MONAI reads it: k anchors per anchor of a place and level, no centre rule."""
    ious = box_ious(boxes, anchors)
    best: dict[int, tuple[float, int]] = {}
    for g, box in enumerate(boxes):
        centre = np.array([box[0] + box[2], box[1] + box[3]]) / 2
        candidates: list[int] = []
        start = 0
        for places in levels:
            level = range(start, start + places * per_place)
            far = [float(np.hypot(*((anchors[i, :2] + anchors[i, 2:]) / 2 - centre))) for i in level]
            count = min(k * per_place, places)
            candidates += [start + int(i) for i in np.argsort(far, kind="stable")[:count]]
            start += places * per_place
        own = ious[g, candidates]
        limit = own.mean() + own.std(ddof=1)
        for i, value in zip(candidates, own, strict=True):
            if value >= limit and value > best.get(i, (-1.0, 0))[0]:
                best[i] = (float(value), g)
    return [best[i][1] if i in best else -1 for i in range(len(anchors))]


def test_the_losses_are_retinanets() -> None:
    """Focal loss over all anchors per matched one, and smooth L1 on encoded boxes, against loops."""
    network = make(scales=(2, 1), last_pool=False, anchor_sizes=[[11, 17], [23, 31]], aspect_ratios=[0.7, 1.3])
    for head in (network.classification_head.cls_logits, network.regression_head.bbox_reg):
        nn.init.normal_(head.weight, std=0.3)
    image = torch.randn(2, 1, 64, 48)
    # centres off the grid: equal distances would leave the candidates to chance
    targets = [target([5.1, 8.3, 24.2, 30.7], [20.6, 31.9, 41.3, 60.4]), target()]
    losses = network.train()(image, targets)
    rows, anchors, places = network.detector.read(image, network.head_maps(image))
    logits, codes = rows["classification"][..., 0].double(), rows["box_regression"].double()
    boxes = targets[0]["boxes"].numpy()
    index = atss(boxes, anchors.numpy(), places, network.detector.num_anchors_per_loc, 4)
    matched = [i for i, g in enumerate(index) if g >= 0]
    assert {index[i] for i in matched} == {0, 1}
    focal, smooth = 0.0, []
    for b in range(2):
        for i, logit in enumerate(logits[b].tolist()):
            p = 1 / (1 + math.exp(-logit))
            positive = b == 0 and index[i] >= 0
            focal += -0.25 * (1 - p) ** 2 * math.log(p) if positive else -0.75 * p**2 * math.log(1 - p)
    for i in matched:
        x0, y0, x1, y1 = anchors[i].tolist()
        u0, v0, u1, v1 = boxes[index[i]].tolist()
        w, h = x1 - x0, y1 - y0
        code = [(u0 + u1 - x0 - x1) / 2 / w, (v0 + v1 - y0 - y1) / 2 / h]
        code += [math.log((u1 - u0) / w), math.log((v1 - v0) / h)]
        for found, wanted in zip(codes[0, i].tolist(), code, strict=True):
            d = abs(found - wanted)
            smooth.append(4.5 * d * d if d < 1 / 9 else d - 1 / 18)
    assert float(losses["classification"].detach()) == pytest.approx(focal / len(matched), rel=1e-4)
    assert float(losses["box_regression"].detach()) == pytest.approx(float(np.mean(smooth)), rel=1e-4)
    total = DetectionLoss(box_regression=3.0)(losses, targets).detach()
    assert float(total) == pytest.approx(focal / len(matched) + 3 * np.mean(smooth), rel=1e-4)
    with pytest.raises(ValueError, match="were expected"):
        DetectionLoss()({"classification": torch.zeros(())})


def test_matching_all_images_at_once_is_monais_of_each() -> None:
    network = make()
    image = torch.zeros(4, 1, 64, 96)
    _, anchors, places = network.detector.read(image, network.head_maps(image))
    generator = torch.Generator().manual_seed(3)
    corner = torch.rand(4, 6, 2, generator=generator) * torch.tensor([60.0, 40.0])
    boxes = torch.cat([corner, corner + 3 + 25 * torch.rand(4, 6, 2, generator=generator)], dim=2)
    counts = torch.tensor([6, 0, 1, 4])
    real = torch.arange(6) < counts[:, None]
    per_place = network.detector.num_anchors_per_loc
    peer = ATSSMatcher(4, center_in_gt=False)
    expected = [peer(own[:count], anchors, places, per_place)[1] for own, count in zip(boxes, counts, strict=True)]
    found = network.detector.match(boxes, real, anchors, places)
    assert torch.equal(found, torch.stack(expected))
    assert [len(row[row >= 0].unique()) for row in found] == [6, 0, 1, 4]


def test_matching_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make()
    image, targets = torch.randn(3, 1, 64, 64), [target([4.0, 6, 30, 40]), target(), target([30.0, 30, 60, 50])]
    whole = network.train()(image, targets)
    monkeypatch.setattr("unimedi_components.networks.box_detector._COMPARED", 1)
    parts = network(image, targets)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_loss_of_an_image_in_evaluation_is_its_loss_alone_in_training() -> None:
    network = make()
    image, targets = torch.randn(3, 1, 64, 64), [target([4.0, 6, 30, 40]), target(), target([30.0, 30, 60, 50])]
    found = network.eval()(image, targets)
    network.train()
    for i, row in enumerate(found):
        alone = network(image[i : i + 1], targets[i : i + 1])
        assert float(row["loss"].detach()) == pytest.approx(float(sum(alone.values()).detach()), rel=1e-5)


def test_a_batch_without_boxes_gives_every_head_a_gradient() -> None:
    """DDP waits for one."""
    network = make().train()
    sum(network(torch.randn(2, 1, 32, 32), [target(), target()]).values()).backward()
    missing = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad is None for p in network.encoder.parameters())


def test_boxes_are_decoded_clipped_and_suppressed() -> None:
    """Hand-set logits: two boxes at the same place, the weaker one suppressed; one beyond the border, clipped."""
    network = make(scales=(1,), last_pool=False, anchor_sizes=[[16]], aspect_ratios=[1], score_threshold=0.3).eval()
    image = torch.zeros(1, 1, 32, 48)
    logits, codes = torch.full((1, 1, 2, 3), -9.0), torch.zeros(1, 4, 2, 3)
    logits[0, 0, 0, 1], logits[0, 0, 0, 2], logits[0, 0, 1, 2] = 2.0, 1.0, 0.0
    # the anchor at column 2 of row 0 moved by one width to the left: upon the one at column 1
    codes[0, 0, 0, 2] = -1.0
    # twice as wide and half as high
    codes[0, 2, 1, 2], codes[0, 3, 1, 2] = math.log(2), math.log(0.5)
    (found,) = network.detector.boxes(image, {"classification": [logits], "box_regression": [codes]})
    assert found["boxes"].tolist() == [[16, 0, 32, 16], [24, 20, 48, 28]]
    assert found["scores"].tolist() == pytest.approx([1 / (1 + math.exp(-2)), 0.5])
    assert found["labels"].tolist() == [0, 0]
    network.select_boxes(0.3, 1.0)
    assert len(network.detector.boxes(image, {"classification": [logits], "box_regression": [codes]})[0]["boxes"]) == 3
    network.select_boxes(0.6, 0.5)
    assert len(network.detector.boxes(image, {"classification": [logits], "box_regression": [codes]})[0]["boxes"]) == 1


def test_with_targets_unlikely_boxes_count_too() -> None:
    network = make(score_threshold=0.5, lowest_score=0.005, width=8).eval()
    image = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        shown = network(image)
        counted = network(image, [target([4.0, 6, 30, 40]), target()])
        after = network(image)
        network.select_boxes(0.005, 0.5)
        expected = network(image)
    for one, two, three, four in zip(shown, counted, after, expected, strict=True):
        assert len(one["boxes"]) == len(three["boxes"]) == 0 < len(two["boxes"])
        assert two["scores"].min() > 0.005 and torch.equal(two["boxes"], four["boxes"])


def test_it_learns_where_squares_are() -> None:
    """Bright squares on noise: after some training the likeliest box of each image is the square."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        images, targets = 0.3 * torch.randn(count, 1, 64, 64, generator=generator), []
        for image in images:
            x, y = torch.randint(0, 48, (2,), generator=generator).tolist()
            w, h = torch.randint(12, 16, (2,), generator=generator).tolist()
            image[:, y : y + h, x : x + w] += 2
            targets.append(target([x, y, x + w, y + h]))
        return images, targets

    network = make(scales=(4,), last_pool=False, anchor_sizes=[[14]], aspect_ratios=[1], width=32).train()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(70):
        optimizer.zero_grad()
        DetectionLoss()(network(*draw(12))).backward()
        optimizer.step()
    images, targets = draw(40)
    network.eval()
    with torch.no_grad():
        found = network(images)
    ious = [
        float(box_ious(row["boxes"][:1].numpy(), true["boxes"].numpy())[0, 0]) if len(row["boxes"]) else 0.0
        for row, true in zip(found, targets, strict=True)
    ]
    assert np.mean(np.asarray(ious) > 0.4) > 0.9


def test_the_frozen_encoder_stays_and_a_fine_tuned_one_moves() -> None:
    for frozen in (True, False):
        network = make(freeze_encoder=frozen).train()
        assert network.encoder.training is not frozen
        before = copy.deepcopy(network.encoder.state_dict())
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
        sum(network(torch.randn(2, 1, 32, 32), [target([3.0, 4, 20, 22]), target()]).values()).backward()
        missing = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []
        optimizer.step()
        after = network.encoder.state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        unused = {"mask_token", "pos_embed_3d", "segment_embed", "depth_embed"}
        expected = {n for n in before if n not in unused and not n.startswith("patch_embed_3d")}
        assert moved == (set() if frozen else expected)


def test_a_checkpoint_loads_strictly_and_gives_the_same_boxes(tmp_path: Path) -> None:
    network = make(score_threshold=0.001).eval()
    card = network_card(network, "detection", ["background", "pneumonia"], {"film": {"size": 64}})
    torch.save(network.state_dict(), tmp_path / "model.pt")
    (tmp_path / "model.json").write_text(json.dumps(card))
    again = load_network(tmp_path / "model.pt", kind="vitdet")
    assert again.card["label_names"] == ["background", "pneumonia"]
    image = torch.randn(2, 1, 64, 64)
    for one, two in zip(network(image), again(image), strict=True):
        assert len(one["boxes"]) > 0
        assert all(torch.equal(one[key], two[key]) for key in ("boxes", "scores", "labels"))
    state = network.state_dict()
    state.pop("regression_head.bbox_reg.bias")
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"bbox_reg\.bias"):
        load_network(tmp_path / "model.pt")


def test_bad_input_is_named() -> None:
    network = make()
    with pytest.raises(ValueError, match="needs targets"):
        network.train()(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="2 images but 1 targets"):
        network(torch.zeros(2, 1, 32, 32), [target()])
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\)"):
        network.eval()(torch.zeros(1, 32, 32))
    for wrong, said in [
        ({"num_classes": 0}, "the background is none"),
        ({"head_convs": 5}, "from 0 to 4"),
        ({"width": 12}, "multiple of 8"),
        ({"anchor_sizes": [[8], [8]]}, "2 lists of anchor_sizes for 5 maps"),
        ({"anchor_sizes": [[8], [8, 9], [8], [8], [8]]}, "same number of sizes"),
    ]:
        with pytest.raises(ValueError, match=said):
            make(**wrong)


def test_the_map_is_the_encoders_tokens_in_place() -> None:
    network = make()
    image = torch.randn(1, 1, 32, 48)
    tokens = network.encoder(image).patches
    found = network.features(image)
    assert found.shape == (1, 24, 2, 3)
    assert torch.equal(found[0, :, 1, 2], tokens[0, 5])
    assert not found.requires_grad
