# SPDX-License-Identifier: Apache-2.0
"""A trained network from its files: equal outputs from every one of them, and one message where they do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.bert.tokenization_bert import BertTokenizer

from tests.common import randomised
from unimedi_components.__main__ import main
from unimedi_components.engines.checkpoint import TrainingCheckpoint
from unimedi_components.errors import CheckpointError
from unimedi_components.networks import DINOHead, ProjectionHead, ReportEncoder, UnifiedViT, UniMedI
from unimedi_components.networks.pretrained import load_encoder, load_pretrained, make_card, student_state, untrained

TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 30, "num_attention_heads": 2}
PREPROCESSING = {"xray": {"size": 16}, "ct": {"spatial_size": [8, 16, 16], "window": [-1000, 400]}, "max_length": 9}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "clear", "lungs", "effusion")


def build(seed: int, width: int = 16) -> UniMedI:
    """A network none of whose parameters or statistics is at its default."""
    torch.manual_seed(seed)
    encoder = UnifiedViT(16, (8, 16, 16), patch_size=8, patch_size_3d=(4, 8, 8), embed_dim=width, depth=2, num_heads=2)
    heads = ProjectionHead(width, 24, 8), ProjectionHead(16, None, 8)
    options: dict[str, Any] = {"num_slices": 3, "expand": "repeat", "mask_mode": "drop"}
    network = randomised(UniMedI(encoder, ReportEncoder(config=TEXT), *heads, DINOHead(width, 20, 24, 12), **options))
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer) * 0.5)
    return network.eval()


def write(folder: Path, network: UniMedI, best: UniMedI | None = None) -> Path:
    """The files that a training run leaves."""
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    evaluator = SimpleNamespace(state=SimpleNamespace(epoch=1, metrics={"key": 1.0}, key_metric_name="key"))
    state = SimpleNamespace(epoch=1, epoch_length=2, max_epochs=2)
    checkpoint = TrainingCheckpoint(
        str(folder), network, {}, PREPROCESSING, tokenizer, evaluator=evaluator, card={"phantom_seed": 7}
    )
    engine: Any = SimpleNamespace(state=state)
    checkpoint.start(engine)
    if best is not None:
        checkpoint.network = best
        checkpoint(engine)
        checkpoint.network = network
    checkpoint(engine)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models"), build(0), best=build(1))


@torch.no_grad()
def outputs(network: UniMedI) -> list[Tensor]:
    torch.manual_seed(9)
    xray, volume = torch.randn(2, 1, 16, 16), torch.randn(2, 1, 8, 16, 16)
    tokens = torch.randint(4, 30, (2, 5))
    flat, deep = network.encode_image(xray, use_slices=True), network.encode_image(volume, use_slices=True)
    text = network.encode_text(tokens, torch.ones_like(tokens), torch.tensor([0, 1]))
    assert deep.selected is not None and deep.scores is not None
    return [flat.cls, flat.embed, deep.cls, deep.embed, deep.selected, deep.scores, text, network.logit_scale]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["model.pt", "unimedi.pt", "last.pt"])
def test_every_file_gives_the_same_network(models: Path, name: str) -> None:
    loaded = load_pretrained(models / name)
    assert not loaded.network.training and loaded.network.teacher is None and loaded.network.dino_head is None
    assert equal(outputs(loaded.network), outputs(build(0)))
    assert loaded.card["preprocessing"] == PREPROCESSING and loaded.card["phantom_seed"] == 7
    assert loaded.path == models / name
    assert loaded.tokenizer("clear lungs [SEP] effusion")["input_ids"] == [2, 4, 5, 3, 6, 3]


def test_the_best_encoder_comes_with_the_newest_report_side(models: Path) -> None:
    found = outputs(load_pretrained(models / "model_best.pt").network)
    best, last = outputs(build(1)), outputs(build(0))
    assert torch.equal(found[0], best[0]) and torch.equal(found[2], best[2])
    assert torch.equal(found[6], last[6]) and torch.equal(found[7], last[7])
    assert not torch.equal(found[0], last[0])


@pytest.mark.parametrize("name", ["model.pt", "model_best.pt"])
def test_the_encoder_alone(models: Path, name: str) -> None:
    encoder = load_encoder(models / name)
    assert not encoder.training
    image = torch.randn(2, 1, 16, 16)
    expected = build(0 if name == "model.pt" else 1).encoder
    with torch.no_grad():
        assert torch.equal(encoder(image).cls, expected(image).cls)


def test_card_and_student_state() -> None:
    network = build(0)
    card = make_card(network, PREPROCESSING, note="x")
    assert tuple(card["encoder"]["patch_size_3d"]) == (4, 8, 8) and card["encoder"]["embed_dim"] == 16
    assert card["selection"] == {"num_slices": 3, "expand": "repeat", "profile_power": 0.0, "pseudo_pairs": True}
    assert card["text_projection"]["hidden_dim"] is None and card["image_projection"]["hidden_dim"] == 24
    assert card["note"] == "x" and json.loads(json.dumps(card))["report_encoder"]["hidden_size"] == 16
    names = {name.partition(".")[0] for name in student_state(network)}
    assert names == {"encoder", "report_encoder", "image_projection", "text_projection", "log_temperature"}


def test_untrained_is_random_repeatable_and_leaves_the_random_state_alone(models: Path) -> None:
    trained = load_pretrained(models / "model.pt")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first, second, other = untrained(trained), untrained(trained), untrained(trained, seed=1)
    assert torch.equal(torch.rand(4), expected)
    assert equal(outputs(first.network), outputs(second.network))
    assert not torch.equal(outputs(first.network)[0], outputs(other.network)[0])
    assert not torch.equal(outputs(first.network)[0], outputs(trained.network)[0])
    assert equal(outputs(trained.network), outputs(build(0))) and not first.network.training
    assert (first.card, first.path, first.tokenizer) == (trained.card, trained.path, trained.tokenizer)
    shapes = {name: value.shape for name, value in trained.network.state_dict().items()}
    assert shapes == {name: value.shape for name, value in first.network.state_dict().items()}


def message(call: Any, *args: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_one_message_for_files_that_are_missing_or_do_not_fit(models: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "model.pt"
    assert message(load_pretrained, nothing) == (
        f"{nothing}: no such checkpoint; train the pretrain bundle first or give another path"
    )
    folder = tmp_path / "copy"
    shutil.copytree(models, folder)

    (folder / "unimedi.pt").unlink()
    text = message(load_pretrained, folder / "model.pt")
    assert text.startswith(f"{folder / 'unimedi.pt'}: ") and "no such weights file" in text
    assert load_encoder(folder / "model.pt") is not None

    card = folder / "model.json"
    content = json.loads(card.read_text())
    card.write_text(json.dumps({**content, "format": 2}))
    assert message(load_encoder, folder / "model.pt") == (f"{card}: format 2 is not known to this version; expected 1")
    card.write_text("{half")
    assert message(load_pretrained, folder / "model.pt").startswith(f"{card}: not valid JSON")
    card.unlink()
    assert message(load_pretrained, folder / "model.pt") == (
        f"{card}: missing; keep model.json beside model.pt, it says how the network is built"
    )
    card.write_text(json.dumps({**content, "encoder": {**content["encoder"], "embed_dim": 32}}))
    text = message(load_encoder, folder / "model.pt")
    assert text.startswith(f"{folder / 'model.pt'}: ") and "cls_token: (1, 1, 16) in the file, (1, 1, 32)" in text


def test_a_damaged_or_foreign_file(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(models, folder)
    path = folder / "model.pt"
    path.write_bytes(path.read_bytes()[:500])
    assert message(load_pretrained, path).startswith(f"{path}: cannot be read as weights (")
    torch.save({"cls_token": torch.zeros(1, 1, 16)}, path)
    text = message(load_pretrained, path)
    assert text.startswith(f"{path}: 1 of ") and "missing: mask_token" in text
    torch.save([1, 2], path)
    assert "holds no state dict" in message(load_encoder, path)


@torch.no_grad()
def test_encoder_and_towers_in_onnx(models: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
    main(["export", str(models / "model.pt"), str(tmp_path / "onnx"), "--format", "onnx"])
    network, count = build(0), 5
    film, volume = torch.randn(count, 1, 16, 16), torch.randn(count, 1, 8, 16, 16)
    joint = (volume, torch.randn(count, 3, 1, 16, 16), torch.rand(count, 3))
    words = torch.randint(4, 30, (count, 6))
    reports = (words, (torch.arange(6) < torch.tensor([[6], [4], [2], [6], [1]])).long(), torch.arange(count) % 2)
    for name, inputs, expected in (
        ("encoder_2d", (film,), network.encoder(film, return_attention=True)),
        ("encoder_3d", (volume,), network.encoder(volume, return_attention=True)),
        ("encoder_joint", joint, network.encoder(*joint, return_attention=True)),
        ("image_2d", (film,), network.encode_image(film).embed),
        ("image_3d", (volume,), network.encode_image(volume).embed),
        ("report", reports, network.encode_text(*reports)),
    ):
        session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / f"{name}.onnx"))
        feed = {entry.name: value.numpy() for entry, value in zip(session.get_inputs(), inputs, strict=True)}
        outputs = [torch.from_numpy(output) for output in session.run(None, feed)]
        if isinstance(expected, Tensor):
            wanted = [expected / expected.norm(dim=1, keepdim=True)]
        else:
            wanted = [expected.cls, expected.patches, expected.attention]
        torch.testing.assert_close(outputs, wanted, atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    assert json.loads((tmp_path / "onnx" / "model.json").read_text())["preprocessing"] == PREPROCESSING
    assert (tmp_path / "onnx" / "report_encoder" / "tokenizer.json").is_file()
