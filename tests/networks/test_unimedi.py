# SPDX-License-Identifier: Apache-2.0
"""UniMedI's passes: what the student, the teacher and the selector each see."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.common import randomised
from unimedi_components import selection
from unimedi_components.engines import build_optimizer
from unimedi_components.losses import UniMediLoss
from unimedi_components.networks import DINOHead, ProjectionHead, ReportEncoder, UnifiedViT, UniMedI

TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 30, "num_attention_heads": 2}


def build(grad_checkpointing=False, **kwargs):
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "patch_size_3d": (4, 8, 8), "embed_dim": 16, "depth": 2, "num_heads": 2}
    encoder = randomised(UnifiedViT(32, (16, 16, 16), **sizes, grad_checkpointing=grad_checkpointing), 0.2)
    text = ReportEncoder(config={**TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    heads = ProjectionHead(16, 24, 8), ProjectionHead(16, 24, 8)
    options = {"num_slices": 2, **kwargs}
    return UniMedI(encoder, text, *heads, DINOHead(16, 20, 24, 12), **options)


def make_batch(two_d=3, three_d=2):
    torch.manual_seed(1)
    batch = {
        "input_ids": torch.randint(5, 30, (two_d + three_d, 7)),
        "attention_mask": torch.ones(two_d + three_d, 7, dtype=torch.long),
    }
    if two_d:
        batch["image2d"] = torch.randn(two_d, 1, 32, 32)
    if three_d:
        batch["image3d"] = torch.randn(three_d, 1, 16, 16, 16)
    return batch


def test_selection_is_eq1_and_eq2_of_the_teacher_on_the_volume_alone():
    network, batch = build(), make_batch()
    with torch.no_grad():  # make student and teacher differ, so that the test sees who selects
        network.encoder.blocks[0].attn.qkv.weight.mul_(-1)
    index, scores = network.select(batch["image3d"])
    attention = network.teacher(batch["image3d"], return_attention=True).attention
    expected = attention.view(2, 4, 4).mean(-1)
    assert torch.allclose(scores, expected, atol=1e-7)
    best = expected.argsort(dim=1, descending=True)[:, :2].sort(1).values
    assert torch.equal(index, best * 4 + 2)
    student = build(selector="student")
    student.encoder.load_state_dict(network.encoder.state_dict())
    _, scores = student.select(batch["image3d"])
    attention = network.encoder(batch["image3d"], return_attention=True).attention
    assert torch.allclose(scores, attention.view(2, 4, 4).mean(-1), atol=1e-7)


def test_slices_are_cut_resized_and_placed():
    network = build()
    ramp = torch.arange(16.0).view(1, 1, 16, 1, 1).expand(2, 1, 16, 16, 16)
    slices, position = network.take_slices(ramp, torch.tensor([[2, 14], [6, 10]]))
    assert slices.shape == (2, 2, 1, 32, 32)
    assert slices.amin((2, 3, 4)).tolist() == slices.amax((2, 3, 4)).tolist() == [[2.0, 14.0], [6.0, 10.0]]
    assert position.tolist() == [[2.5 / 16, 14.5 / 16], [6.5 / 16, 10.5 / 16]]
    volume = torch.randn(1, 1, 16, 16, 16)
    slices, _ = network.take_slices(volume, torch.tensor([[3, 5]]))
    expected = F.interpolate(volume[:, :, 3], size=(32, 32), mode="bilinear", align_corners=False)
    assert torch.allclose(slices[:, 0], expected, atol=1e-6)


@pytest.mark.parametrize("mask_mode", ["mask_token", "drop"])
def test_outputs_equal_the_passes_written_out(mask_mode):
    network, batch = build(mask_mode=mask_mode).train(), make_batch()
    with torch.no_grad():
        network.encoder.norm.bias.add_(0.3)
    out = network(batch)
    cls, student_rows, teacher_rows, weights = [], [], [], []
    for name in ("image2d", "image3d"):
        inputs = (batch[name],)
        grids = [(1, 4, 4)]
        if name == "image3d":
            index, _ = network.select(batch[name])
            assert torch.equal(index, out.selected)
            inputs = (batch[name], *network.take_slices(batch[name], index))
            grids = [(4, 2, 2), (2, 4, 4)]
        teacher = network.teacher(*inputs, return_attention=True)
        keep = selection.keep_tokens(teacher.attention, grids, 0.5)
        assert keep.shape[1] == (8 if name == "image2d" else 24)
        if mask_mode == "drop":
            student = network.encoder(*inputs, keep=keep)
            target = torch.stack([teacher.patches[b, keep[b]] for b in range(len(keep))])
        else:
            mask = torch.ones(teacher.patches.shape[:2], dtype=torch.bool)
            for b in range(len(keep)):
                mask[b, keep[b]] = False
            student = network.encoder(*inputs, mask=mask)
            target = teacher.patches
        cls.append((student.cls, teacher.cls))
        # the volume's tokens of all samples stand before their slices'
        sizes = [math.prod(grid) // (2 if mask_mode == "drop" else 1) for grid in grids]
        for student_part, target_part in zip(student.patches.split(sizes, 1), target.split(sizes, 1), strict=True):
            student_rows.append(student_part.flatten(0, 1))
            teacher_rows.append(target_part.flatten(0, 1))
            weights += [1 / student.patches.shape[1]] * len(student_rows[-1])
    student_cls = torch.cat([c[0] for c in cls])
    assert torch.allclose(out.student_cls, network.dino_head(student_cls), atol=1e-5)
    assert torch.allclose(out.teacher_cls, network.teacher_head(torch.cat([c[1] for c in cls])), atol=1e-5)
    assert torch.allclose(out.student_patches, network.dino_head(torch.cat(student_rows)), atol=1e-5)
    assert torch.allclose(out.teacher_patches, network.teacher_head(torch.cat(teacher_rows)), atol=1e-5)
    assert torch.allclose(out.patch_weight, torch.tensor(weights), atol=1e-7)
    assert out.modality.tolist() == [0, 0, 0, 1, 1]
    assert out.cls_groups == (3, 2) and out.patch_groups == tuple(len(rows) for rows in student_rows)
    network.image_projection.eval()
    assert not out.teacher_patches.requires_grad


@pytest.mark.parametrize(
    ("where", "rows"), [("masked", 3 * 8 + 2 * 24), ("visible", 3 * 8 + 2 * 24), ("all", 3 * 16 + 2 * 48)]
)
def test_patch_loss_rows(where, rows):
    network, batch = build(patch_loss_on=where), make_batch()
    out = network(batch)
    assert len(out.student_patches) == len(out.teacher_patches) == len(out.patch_weight) == rows
    assert out.patch_weight.sum().item() == pytest.approx(5.0)  # each of the five samples counts once


@pytest.mark.parametrize("mask_mode", ["mask_token", "drop"])
def test_segment_dropout_shows_the_volume_alone_then_the_slices_alone(mask_mode):
    network, batch = build(mask_mode=mask_mode, segment_dropout=0.7).train(), make_batch(two_d=0, three_d=3)
    out = network(batch)
    volume = batch["image3d"]
    inputs = (volume, *network.take_slices(volume, out.selected))
    teacher = network.teacher(*inputs, return_attention=True)
    keep = selection.keep_tokens(teacher.attention, [(4, 2, 2), (2, 4, 4)], 0.5)
    # floor(3 * 0.7 / 2) = 1 volume alone, 1 pair of slices alone, the rest whole
    segments = [range(16), range(16, 48), range(48)]
    rows = {0: [], 1: []}
    for i, segment in enumerate(segments):
        one = tuple(tensor[i : i + 1] for tensor in inputs)
        visible = [t for t in keep[i].tolist() if t in segment]
        if mask_mode == "drop":
            student = network.encoder(*one, keep=torch.tensor([visible]))
            seen = visible
        else:
            mask = torch.tensor([[t not in visible for t in range(48)]])
            student = network.encoder(*one, mask=mask, keep=torch.tensor([list(segment)]))
            seen = list(segment)
        assert torch.allclose(out.student_cls[i], network.dino_head(student.cls)[0], atol=1e-5)
        for position, token in enumerate(seen):
            rows[int(token >= 16)].append((student.patches[0, position], teacher.patches[i, token]))
    assert out.patch_groups == (0, len(rows[0]), len(rows[1]))
    student, target = (torch.stack(part) for part in zip(*rows[0], *rows[1], strict=True))
    assert torch.allclose(out.student_patches, network.dino_head(student), atol=1e-5)
    assert torch.allclose(out.teacher_patches, network.teacher_head(target), atol=1e-5)


def test_segment_dropout_out_of_range():
    with pytest.raises(ValueError, match="segment_dropout"):
        build(segment_dropout=1.5)


def test_the_head_centers_each_kind_of_token_by_its_own_mean():
    network, batch = build(), make_batch()
    network.dino_head = DINOHead(16, 20, 24, 12, center_kinds=5)
    network.teacher_head = DINOHead(16, 20, 24, 12, center_kinds=5)
    out = network.train()(batch)
    cls = torch.cat([network.teacher(batch["image2d"]).cls] * 1)
    raw = network.teacher_head.mlp(cls)
    assert torch.allclose(out.teacher_cls[:3], F.normalize(raw - raw.mean(0), dim=1), atol=1e-5)
    running = network.teacher_head.center.running_mean
    assert torch.allclose(running[0], 0.1 * raw.mean(0), atol=1e-6) and running[2:].abs().sum(1).min() > 0


def test_vl_on_full_projects_the_unmasked_student():
    network, batch = build(vl_on_full=True), make_batch(three_d=0)
    expected = network.image_projection(network.encoder(batch["image2d"]).cls, torch.zeros(3, dtype=torch.long))
    assert torch.allclose(network(batch).image_embed, expected, atol=1e-5)


def test_slabs_are_ranked_over_their_usual_profile():
    network, batch = build(profile_power=0.5, num_slices=1), make_batch()
    plain = build(num_slices=1)
    _, scores = plain.select(batch["image3d"])
    best = scores.argmax(1)
    # a profile that halves, by its root, what the best slab of the first volume scores
    network.slab_profile[best[0]] = 4.0
    selected, found = network.select(batch["image3d"])
    assert torch.allclose(found, scores)
    expected = scores / network.slab_profile.sqrt()
    assert torch.equal(selected[:, 0], expected.argmax(1) * 4 + 2) and expected.argmax(1)[0] != best[0]
    network.eval()
    with torch.no_grad():
        features = network.encode_image(batch["image3d"])
    attention = selection.slice_scores(features.attention, (4, 2, 2))
    assert torch.allclose(features.scores, attention / network.slab_profile.sqrt())


def test_the_profile_follows_the_selector_in_training_alone():
    network, batch = build(profile_power=0.5), make_batch()
    scores = network.train()(batch).slice_scores.mean(0)
    expected = 0.9 + 0.1 * scores / scores.mean()
    assert torch.allclose(network.slab_profile, expected, atol=1e-6)
    network(make_batch(three_d=0))
    network.eval()(batch)
    assert torch.allclose(network.slab_profile, expected, atol=1e-6)
    chance = build(profile_power=0.5, selector="random").train()
    chance(batch)
    assert torch.equal(chance.slab_profile, torch.ones(4))
    assert "slab_profile" not in build().state_dict()


@pytest.mark.parametrize("full", ["image2d", "image3d"])
def test_vl_on_full_of_one_modality_leaves_the_other_masked(full: str) -> None:
    """Rows of the named modality are those of whole images, the others those of masked ones."""
    batch = make_batch()
    whole, masked, found = (build(vl_on_full=on).train()(batch).image_embed for on in (True, False, full))
    rows = {"image2d": slice(0, 3), "image3d": slice(3, 5)}
    for name, own in rows.items():
        expected, other = (whole, masked) if name == full else (masked, whole)
        assert torch.allclose(found[own], expected[own], atol=1e-5)
        assert not torch.allclose(found[own], other[own], atol=1e-3)


def test_ablation_switches():
    batch = make_batch()
    plain = build(self_distillation=False, selector="random")
    assert plain.teacher is None and plain.teacher_head is None and plain.dino_head is None
    out = plain(batch)
    assert out.student_cls is None
    assert out.selected.shape == (2, 2)
    assert build(selector="random").teacher is not None
    joint = build(pseudo_pairs=False, self_distillation=False)
    assert joint.teacher is None
    out = joint(batch)
    assert out.selected is None
    expected = joint.encoder(batch["image3d"]).cls
    joint.eval()
    assert torch.allclose(joint.encode_image(batch["image3d"]).cls, expected, atol=1e-6)
    for two_d, three_d in ((3, 0), (0, 2)):
        out = build()(make_batch(two_d, three_d))
        assert out.image_embed.shape == (two_d + three_d, 8)


@pytest.mark.parametrize(("two_d", "three_d"), [(3, 2), (4, 0), (0, 3)])
@pytest.mark.parametrize("mask_mode", ["mask_token", "drop"])
def test_every_trainable_parameter_gets_a_gradient(two_d, three_d, mask_mode):
    network = build(mask_mode=mask_mode)
    UniMediLoss(out_dim=20)(network(make_batch(two_d, three_d))).backward()
    idle = [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []


def test_evaluation_is_unmasked_and_without_distillation():
    network, batch = build().eval(), make_batch()
    with torch.no_grad():
        out = network(batch)
        again = network(batch)
    assert out.student_cls is None
    assert torch.equal(out.image_embed, again.image_embed)
    features = network.encode_image(batch["image2d"])
    assert torch.allclose(out.image_embed[:3], features.embed, atol=1e-6)
    expected = network.encode_text(batch["input_ids"], batch["attention_mask"], out.modality)
    assert torch.allclose(out.text_embed, expected, atol=1e-6)


def test_teacher_moves_by_the_momentum():
    network = build()
    before = {n: p.clone() for n, p in network.teacher.named_parameters()}
    with torch.no_grad():
        for parameter in [*network.encoder.parameters(), *network.dino_head.parameters()]:
            parameter.add_(1.0)
    head = {n: p.clone() for n, p in network.teacher_head.named_parameters()}
    network.update_teacher(0.9)
    for name, parameter in network.teacher.named_parameters():
        assert torch.allclose(parameter, before[name] + 0.1, atol=1e-6), name
    for name, parameter in network.teacher_head.named_parameters():
        assert torch.allclose(parameter, head[name] + 0.1, atol=1e-6), name
    assert not any(p.requires_grad for p in [*network.teacher.parameters(), *network.teacher_head.parameters()])


def test_temperature_starts_at_007_and_is_clamped_after_the_step():
    network = build()
    assert network.logit_scale.item() == pytest.approx(1 / 0.07)
    optimizer = build_optimizer(network, lr=0.1, weight_decay=0.0)
    network.log_temperature.data.fill_(math.log(1000))
    # beyond the clamp the loss still has a gradient, which is what brings it back
    network.logit_scale.mul(0.01).backward()
    assert network.log_temperature.grad.item() == pytest.approx(10.0, rel=1e-5)
    optimizer.step()
    assert network.logit_scale.item() == pytest.approx(100.0, rel=1e-6)
    network.log_temperature.data.fill_(-1.0)
    network.log_temperature.grad.zero_()
    optimizer.step()
    assert network.logit_scale.item() == pytest.approx(1.0)
    assert not build(learn_temperature=False).log_temperature.requires_grad


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_slices": 5}, "k=5 slices: the volume has 4 slabs"),
        ({"selector": "oracle"}, "selector must be one of teacher, student, random"),
        ({"mask_mode": "drop", "patch_loss_on": "all"}, "leaves only visible tokens"),
        ({"mask_mode": "blur"}, "mask_mode must be one of"),
        ({"profile_power": 2.0}, r"profile_power must be in \[0, 1\], not 2.0"),
        ({"vl_on_full": "2d"}, "vl_on_full must be one of image2d, image3d"),
    ],
)
def test_options_that_cannot_work_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


def test_batches_that_do_not_fit_are_refused():
    network, batch = build(), make_batch()
    with pytest.raises(ValueError, match="5 images but 4 reports"):
        network({**batch, "input_ids": batch["input_ids"][:4], "attention_mask": batch["attention_mask"][:4]})
    with pytest.raises(ValueError, match="needs 'image2d' or 'image3d'"):
        network({"input_ids": batch["input_ids"]})
