# SPDX-License-Identifier: Apache-2.0
"""The report encoder: padding, local folders, cut and frozen stacks, messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizer, DistilBertConfig, DistilBertModel

from unimedi_components.errors import CheckpointError, ConfigError
from unimedi_components.networks.report_encoder import ReportEncoder, load_tokenizer

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 50, "max_position_embeddings": 40}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "pleural", "effusion", "##s", "."]


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 50, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return ids, mask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(**SMALL, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_small_bert_from_a_dict(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    encoder = ReportEncoder(config=SMALL).eval()
    features = encoder(*batch)
    assert features.shape == (3, 32) and encoder.width == 32
    assert encoder.model.config.intermediate_size == 128
    assert not any("pooler" in name for name, _ in encoder.named_parameters())
    torch.testing.assert_close(features, encoder.model(*batch).last_hidden_state[:, 0])
    encoder.train()(*batch).square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters()), "every weight must take part under DDP"


def test_padding_does_not_change_the_features(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    encoder = ReportEncoder(config=SMALL).eval()
    ids, mask = batch
    longer = [torch.nn.functional.pad(x, (0, 20)) for x in batch]
    torch.testing.assert_close(encoder(*longer), encoder(ids, mask), atol=1e-5, rtol=0)
    alone = encoder(ids[1:2, :7], mask[1:2, :7])
    torch.testing.assert_close(alone, encoder(ids, mask)[1:2], atol=1e-5, rtol=0)


def test_local_folder_is_loaded_without_a_hub(folder: Path, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    expected = BertModel.from_pretrained(folder).eval()(*batch).last_hidden_state[:, 0]
    encoder = ReportEncoder(folder)
    assert encoder.training and encoder.model.training
    torch.testing.assert_close(encoder.eval()(*batch), expected)
    untrained = ReportEncoder(str(folder), pretrained=False)
    weight = "embeddings.word_embeddings.weight"
    assert not torch.equal(untrained.model.get_parameter(weight), encoder.model.get_parameter(weight))


def test_cut_stack_is_the_first_layers(folder: Path, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    full = BertModel.from_pretrained(folder).eval()
    encoder = ReportEncoder(folder, num_hidden_layers=2).eval()
    states = full(*batch, output_hidden_states=True).hidden_states
    torch.testing.assert_close(encoder(*batch), states[2][:, 0])
    with pytest.raises(ConfigError, match="the encoder has 3 layers"):
        ReportEncoder(folder, num_hidden_layers=4)


def test_weights_of_a_language_model_and_in_half_precision(
    tmp_path: Path, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model = BertForMaskedLM(BertConfig(**SMALL, num_attention_heads=2, intermediate_size=64)).eval()
    model.half().save_pretrained(tmp_path)
    encoder = ReportEncoder(tmp_path).eval()
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    torch.testing.assert_close(encoder(*batch), model.float().bert(*batch).last_hidden_state[:, 0])


def test_another_architecture(tmp_path: Path, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    config = DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=50)
    DistilBertModel(config).save_pretrained(tmp_path)
    encoder = ReportEncoder(tmp_path)
    assert encoder.width == 32 and encoder(*batch).shape == (3, 32)


def test_frozen_layers_and_checkpointing(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    values = {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    encoder = ReportEncoder(config=values, freeze_layers=2, gradient_checkpointing=True)
    frozen = {name.split(".")[1] for name, p in encoder.named_parameters() if not p.requires_grad}
    layers = {name.split(".")[3] for name, p in encoder.named_parameters() if p.requires_grad}
    assert frozen == {"embeddings", "encoder"} and layers == {"2"}
    plain = ReportEncoder(config=values, freeze_layers=2)
    plain.load_state_dict(encoder.state_dict())
    for each in (plain, encoder):
        each(*batch).square().sum().backward()
    for ours, theirs in zip(encoder.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)
    with pytest.raises(ConfigError, match="the encoder has 3 layers"):
        ReportEncoder(config=SMALL, freeze_layers=9)


def test_tokenizer_of_a_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    encoded = load_tokenizer(folder)(["No pleural effusions.", "No edema"], padding=True)
    assert encoded["input_ids"] == [[2, 5, 6, 7, 8, 9, 3], [2, 5, 1, 3, 0, 0, 0]]
    assert encoded["attention_mask"] == [[1] * 7, [1] * 4 + [0] * 3]


def test_messages(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="and not both"):
        ReportEncoder(folder, config=SMALL)
    with pytest.raises(CheckpointError, match="no such folder"):
        ReportEncoder(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="cannot be read as a transformers folder"):
        ReportEncoder(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no vocab\.txt"):
        load_tokenizer(folder)
    with pytest.raises(ConfigError, match="report encoder config"):
        ReportEncoder(config={**SMALL, "num_attention_heads": 5})
    tokens = torch.ones(1, 9, dtype=torch.long)
    with pytest.raises(ConfigError, match="9 tokens meets an encoder of 8 positions"):
        ReportEncoder(config={**SMALL, "max_position_embeddings": 8})(tokens, tokens)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (ReportEncoder, load_tokenizer):
        with pytest.raises(CheckpointError, match="hf download nobody/nothing --local-dir FOLDER"):
            load("nobody/nothing")


def test_weights_of_another_encoder_are_refused(folder: Path) -> None:
    BertModel(BertConfig(**{**SMALL, "num_hidden_layers": 1}, num_attention_heads=2)).save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 1', '"num_hidden_layers": 2'))
    with pytest.raises(CheckpointError, match="16 weights of BertModel are not in it"):
        ReportEncoder(folder)
