# SPDX-License-Identifier: Apache-2.0
"""ImageClassifier against logits worked out from the encoder's CLS token, and classifiers through their files."""

import json

import pytest
import torch
from torch import nn

from tests.common import randomised
from unimedi_components.errors import CheckpointError, ConfigError
from unimedi_components.networks import UnifiedViT
from unimedi_components.networks.cards import network_card
from unimedi_components.networks.classifier import ImageClassifier, load_classifier, task_encoder

SIZES = {"img_size": 16, "vol_size": (8, 16, 16), "patch_size": 8, "patch_size_3d": (2, 8, 8)}
SIZES |= {"embed_dim": 12, "depth": 2, "num_heads": 2}
SHAPES = {2: (3, 1, 16, 16), 3: (3, 1, 8, 16, 16)}


def encoder_of(seed=0, **sizes):
    torch.manual_seed(seed)
    return randomised(UnifiedViT(**{**SIZES, **sizes}))


def classifier(dim=2, classes=3, **options):
    return ImageClassifier(encoder_of(), classes, dim, **options)


def images(dim, seed=1):
    return torch.randn(SHAPES[dim], generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dim", [2, 3])
def test_logits_of_a_probe(dim):
    network, image = classifier(dim), images(dim)
    with torch.no_grad():
        cls = encoder_of().eval()(image).cls
    expected = cls @ network.head.weight.T + network.head.bias
    assert torch.allclose(network(image), expected, atol=1e-6)
    assert torch.equal(network.features(image), cls)
    # what a FeatureDataset yields gives the same logits
    assert torch.equal(network(cls), network(image))
    assert network(image).shape == (3, 3)


def test_a_new_head_starts_small_and_without_bias():
    head = classifier(classes=200).head
    assert head.bias.count_nonzero() == 0
    assert 0.018 < float(head.weight.detach().std()) < 0.022


def test_feature_norm_by_batch_and_by_running_statistics():
    network, image = classifier(feature_norm=True), images(2)
    cls = network.features(image)
    mean, var = cls.mean(0), cls.var(0, unbiased=False)
    network.train()
    expected = (cls - mean) / (var + 1e-5).sqrt() @ network.head.weight.T
    assert torch.allclose(network(image), expected, atol=1e-5)
    # one step of momentum 0.1 from mean 0 and variance 1
    network.eval()
    running_mean, running_var = 0.1 * mean, 0.9 + 0.1 * cls.var(0)
    expected = (cls - running_mean) / (running_var + 1e-5).sqrt() @ network.head.weight.T
    assert torch.allclose(network(image), expected, atol=1e-5)
    assert not [name for name, _ in network.named_parameters() if name.startswith("feature_norm")]


def test_feature_norm_takes_a_last_batch_of_one_image():
    network = classifier(feature_norm=True).train()
    network(images(2))
    one = network.features(images(2)[:1])
    before = {name: value.clone() for name, value in network.feature_norm.named_buffers()}
    logits = network(one)
    assert torch.equal(logits, network.eval()(one))
    assert all(torch.equal(value, before[name]) for name, value in network.feature_norm.named_buffers())


def test_dropout_acts_in_training_alone():
    network, image = classifier(dropout=0.5), images(2)
    plain = classifier().eval()(image)
    assert torch.equal(network.eval()(image), plain)
    assert not torch.allclose(network.train()(image), plain)


@pytest.mark.parametrize("options", [{}, {"feature_norm": True}])
def test_a_frozen_encoder_stays_as_it_is(options):
    network = classifier(2, **options).train()
    assert network.training
    assert not any(module.training for module in network.encoder.modules())
    network(images(2)).sum().backward()
    with_gradient = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert with_gradient == {"head.weight", "head.bias"}
    assert with_gradient == {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert not network.features(images(2)).requires_grad


UNUSED = {
    "2d": {"mask_token", "patch_embed_3d.proj.weight", "patch_embed_3d.proj.bias", "pos_embed_3d"}
    | {"segment_embed", "depth_embed"},
    "3d": {"mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias", "depth_embed"},
    "slices": {"mask_token"},
}


@pytest.mark.parametrize("case", list(UNUSED))
def test_fine_tuning_reaches_every_parameter_that_may_learn(case):
    """DDP hangs at a parameter that requires a gradient and gets none."""
    options = {"use_slices": True, "num_slices": 2} if case == "slices" else {}
    dim = 2 if case == "2d" else 3
    network = classifier(dim, freeze_encoder=False, **options).train()
    assert all(module.training for module in network.modules())
    network(images(dim)).square().sum().backward()
    named = dict(network.named_parameters())
    learning = {name for name, parameter in named.items() if parameter.requires_grad}
    assert {name for name, parameter in named.items() if parameter.grad is not None} == learning
    assert all(named[name].grad.abs().sum() > 0 for name in learning)
    assert set(named) - learning == {f"encoder.{name}" for name in UNUSED[case]}


@pytest.mark.parametrize("expand", ["centre", "repeat"])
def test_slices_join_the_volume_as_in_pretraining(expand):
    network, volume = classifier(3, use_slices=True, num_slices=2, expand=expand).eval(), images(3)
    encoder = network.encoder
    attention = encoder(volume, return_attention=True).attention
    scores = attention.view(3, 4, 4).mean(-1)  # 4 slabs of 2 x 2 patches
    best = scores.argsort(1, descending=True)
    if expand == "centre":
        index = (best[:, :2] * 2 + 1).sort(1).values  # the upper of the slab's two slices
    else:
        index = torch.stack([best[:, 0] * 2, best[:, 0] * 2 + 1], 1)
    slices = torch.stack([volume[i][:, index[i]].transpose(0, 1) for i in range(3)])  # (B, k, 1, 16, 16)
    with torch.no_grad():
        expected = encoder(volume, slices, (index + 0.5) / 8).cls
        plain = encoder(volume).cls
    assert torch.allclose(network.features(volume), expected, atol=1e-6)
    assert not torch.allclose(expected, plain, atol=1e-3)


def test_attention_maps_are_those_of_the_encoder():
    network = classifier(3, use_slices=True, num_slices=1).eval()
    maps = network.attention_maps(images(3))
    assert maps.shape == (3, 4, 2, 2)
    assert torch.allclose(maps.sum((1, 2, 3)), torch.ones(3))
    assert torch.equal(maps.flatten(1), network.encoder(images(3), return_attention=True).attention)
    assert classifier(2).eval().attention_maps(images(2)).shape == (3, 2, 2)


@pytest.mark.parametrize("norm", [False, True])
def test_script_for_ckpt_export(norm):
    network = classifier(feature_norm=norm)
    if norm:
        network.train()(images(2))
    network.eval()
    script = torch.jit.script(network)
    for count in (1, 2, 3):
        assert torch.allclose(script(images(2)[:count]), network(images(2)[:count]), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, not 0"),
        ({"spatial_dims": 4}, "spatial_dims must be 2 or 3, not 4"),
        ({"spatial_dims": 3, "use_slices": True, "num_slices": 5}, r"cannot select k=5 slices: the volume has 4 slabs"),
        ({"spatial_dims": 3, "use_slices": True, "num_slices": 0}, "cannot select k=0"),
        ({"spatial_dims": 3, "use_slices": True, "expand": "all"}, "expand must be 'centre' or 'repeat'"),
    ],
)
def test_options_that_have_no_meaning(options, message):
    with pytest.raises(ValueError, match=message):
        ImageClassifier(encoder_of(), **{"num_classes": 2, **options})


def test_images_of_the_other_dimension_are_refused():
    with pytest.raises(ValueError, match=r"expected 2D images \(B, 1, ...\) or features \(B, D\), got \(3, 1, 8, 16"):
        classifier(2)(images(3))
    with pytest.raises(ValueError, match="expected 3D images"):
        classifier(3)(images(2))


def save_pretrained(folder, encoder):
    folder.mkdir(exist_ok=True)
    torch.save(encoder.state_dict(), folder / "model.pt")
    (folder / "model.json").write_text(json.dumps({"format": 1, "encoder": encoder.hparams}))
    return folder / "model.pt"


def test_a_card_has_a_name_for_each_output() -> None:
    network = ImageClassifier(encoder_of(), 1, 2)
    assert network_card(network, "binary", ["clear", "ill"], {})["label_names"] == ["clear", "ill"]
    with pytest.raises(ConfigError, match="num_classes 1 does not fit label_names"):
        network_card(network, "multiclass", ["clear", "ill"], {})


def save_classifier(folder, network):
    folder.mkdir(exist_ok=True)
    card = network_card(network, "multiclass", ["a", "b", "c"], {"xray": {"size": 16}}, note="n")
    torch.save(network.state_dict(), folder / "model.pt")
    (folder / "model.json").write_text(json.dumps(card))
    return folder / "model.pt"


def same(encoder, state):
    own = encoder.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], value) for name, value in state.items())


def test_task_encoder_takes_grids_and_tensors_of_the_pretrained_one(tmp_path):
    path = save_pretrained(tmp_path, encoder_of())
    found = task_encoder(path, {name: SIZES[name] for name in ("embed_dim", "num_heads")})
    assert found.hparams == encoder_of().hparams
    assert same(found, torch.load(path, weights_only=True))


def test_a_named_grid_takes_effect(tmp_path):
    path = save_pretrained(tmp_path, encoder_of())
    found = task_encoder(path, img_size=[2 * side for side in encoder_of().img_size], include_cls_key=True)
    assert found.img_size == tuple(2 * side for side in encoder_of().img_size)
    assert found.include_cls_key and found.hparams["vol_size"] == encoder_of().hparams["vol_size"]
    assert torch.equal(found.blocks[0].attn.qkv.weight, encoder_of().blocks[0].attn.qkv.weight)


def test_task_encoder_without_a_card_takes_the_configs_sizes(tmp_path):
    torch.save(encoder_of().state_dict(), tmp_path / "other.pt")
    assert same(task_encoder(str(tmp_path / "other.pt"), **SIZES), encoder_of().state_dict())
    with pytest.raises(CheckpointError, match=r"other.pt: .* tensors fit UnifiedViT; missing: blocks.2"):
        task_encoder(tmp_path / "other.pt", **{**SIZES, "depth": 3})


@pytest.mark.parametrize("weights", ["none", "None", None])
def test_task_encoder_at_random(weights):
    torch.manual_seed(3)
    expected = UnifiedViT(**SIZES).state_dict()
    torch.manual_seed(3)
    assert same(task_encoder(weights, **SIZES), expected)


def test_task_encoder_of_another_classifier(tmp_path):
    path = save_classifier(tmp_path, classifier(feature_norm=True))
    assert same(task_encoder(path, embed_dim=SIZES["embed_dim"]), encoder_of().state_dict())


def test_task_encoder_says_how_to_get_weights(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        task_encoder(tmp_path / "model.pt", **SIZES)
    assert str(caught.value) == (
        f"{tmp_path}/model.pt: no pre-trained encoder. Train one with 'make pretrain', give other weights with "
        "--encoder_weights, or --encoder_weights none for random initialisation"
    )


@pytest.mark.parametrize(
    ("dim", "options"),
    [
        (2, {"feature_norm": True, "dropout": 0.25}),
        (3, {"freeze_encoder": False, "use_slices": True, "num_slices": 2, "expand": "repeat"}),
    ],
)
def test_a_classifier_through_its_files(tmp_path, dim, options):
    network = classifier(dim, **options).train()
    network(images(dim))
    path = save_classifier(tmp_path, network)
    loaded = load_classifier(path)
    assert not loaded.training
    assert loaded.hparams == network.hparams
    assert loaded.spatial_dims == dim
    assert loaded.card["label_names"] == ["a", "b", "c"]
    assert (loaded.card["task"], loaded.card["preprocessing"]) == ("multiclass", {"xray": {"size": 16}})
    assert loaded.card["note"] == "n"
    assert torch.equal(loaded(images(dim)), network.eval()(images(dim)))


def test_the_card_of_a_wrapped_network():
    class Wrapper(nn.Module):
        """As DistributedDataParallel holds its network."""

        def __init__(self, module):
            super().__init__()
            self.module = module

    network = classifier()
    arguments = ("multiclass", ["a", "b", "c"], {"xray": {"size": 16}})
    assert network_card(Wrapper(network), *arguments) == network_card(network, *arguments)


def test_a_classifier_that_cannot_be_loaded(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint; train the bundle first"):
        load_classifier(tmp_path / "model.pt")
    path = save_pretrained(tmp_path / "encoder", encoder_of())
    with pytest.raises(CheckpointError, match=r"model.json: describes no classifier; give the model.pt of such a"):
        load_classifier(path)
    path = save_classifier(tmp_path / "classifier", classifier())
    card = json.loads(path.with_name("model.json").read_text())
    card["classifier"]["num_classes"] = 5
    path.with_name("model.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=r"head.weight: \(3, 12\) in the file, \(5, 12\) in the network"):
        load_classifier(path)
    path.with_name("model.json").unlink()
    with pytest.raises(CheckpointError, match=r"model.json: missing; keep model.json beside model.pt"):
        load_classifier(path)
