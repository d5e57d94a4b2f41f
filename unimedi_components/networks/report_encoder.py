# SPDX-License-Identifier: Apache-2.0
"""E_l, the report encoder: any `transformers` text encoder, or a small BERT from a dict."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from unimedi_components.errors import CheckpointError, ConfigError


def _source(name_or_path: str | Path) -> tuple[str, dict[str, bool]]:
    """A local folder, never sought on the network, or the name of a model on the hub."""
    name = str(name_or_path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder), {"local_files_only": True}
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name}: no such folder; give a folder with config.json or the name of a hub model")
    return name, {}


def _unreachable(name: str, local: bool, error: Exception) -> CheckpointError:
    reason = str(error).strip().split("\n")[0]
    if local:
        return CheckpointError(
            f"{name}: cannot be read as a transformers folder ({reason}); save it there with save_pretrained"
        )
    return CheckpointError(
        f"{name}: neither cached nor to be had from the Hugging Face hub ({reason}); check the name and the "
        f"connection, or run 'hf download {name} --local-dir FOLDER' on a connected machine and give FOLDER"
    )


def _small_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """A config from a dict, BERT unless "model_type" says otherwise; heads and MLP follow the width."""
    values = dict(config)
    model_type = values.pop("model_type", "bert")
    if model_type == "bert" and "hidden_size" in values:
        width = values["hidden_size"]
        values.setdefault("num_attention_heads", max(width // 32, 1))
        values.setdefault("intermediate_size", 4 * width)
    try:
        return AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"report encoder config {dict(config)}: {error}") from error


def _model_class(config: PretrainedConfig) -> Any:
    if type(config) not in MODEL_MAPPING:
        raise ConfigError(f"transformers has no encoder for model type {config.model_type!r}")
    found = MODEL_MAPPING[type(config)]
    return found[0] if isinstance(found, list | tuple) else found


def _without_pooler(cls: Any) -> dict[str, bool]:
    # An unused pooler would be weights without gradient, which DistributedDataParallel refuses.
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(cls).parameters else {}


def _cut(config: PretrainedConfig, num_hidden_layers: int | None) -> PretrainedConfig:
    if num_hidden_layers is None:
        return config
    if not 1 <= num_hidden_layers <= config.num_hidden_layers:
        raise ConfigError(
            f"num_hidden_layers is {num_hidden_layers}, but the encoder has {config.num_hidden_layers} layers"
        )
    config.num_hidden_layers = num_hidden_layers
    return config


def _from_scratch(config: PretrainedConfig) -> PreTrainedModel:
    cls = _model_class(config)
    try:
        return cls(config, **_without_pooler(cls))
    except ValueError as error:
        raise ConfigError(f"report encoder config: {error}") from error


def _load_pretrained(name: str, where: dict[str, bool], config: PretrainedConfig) -> PreTrainedModel:
    cls = _model_class(config)
    verbosity = transformers_logging.get_verbosity()
    # The library reports the heads and layers left out on purpose at length; what is missing is an error
    # below.
    transformers_logging.set_verbosity_error()
    try:
        model, info = cls.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True, **where, **_without_pooler(cls)
        )
    except OSError as error:
        raise _unreachable(name, bool(where), error) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{name}: {len(missing)} weights of {cls.__name__} are not in it, first {missing[:3]}; "
            "give the folder of an encoder of this type or pretrained=False"
        )
    return model


class ReportEncoder(nn.Module):
    """CLS features of reports from a `transformers` encoder, without pooler.

    The paper's is `emilyalsentzer/Bio_ClinicalBERT`, all layers trainable. Nothing reaches the network unless
    `name_or_path` is the name of a hub model. Raises ConfigError: not exactly one of `name_or_path` and `config`, or a
    config that cannot be built; CheckpointError: the folder or hub model cannot be loaded.

    Args:
        name_or_path: folder saved by `save_pretrained`, or the name of a hub model.
        config: values of a config instead, for an encoder from scratch: a BERT (hidden_size,
            num_hidden_layers, vocab_size, ...), or another kind by "model_type".
        num_hidden_layers: cut the stack to its first layers; 6 is MGCA's.
        pretrained: load the weights of `name_or_path`; False takes its architecture alone.
        freeze_layers: freeze the embeddings and this many first layers; 0 trains everything.
    """

    def __init__(
        self,
        name_or_path: str | Path | None = None,
        config: Mapping[str, Any] | None = None,
        num_hidden_layers: int | None = None,
        pretrained: bool = True,
        freeze_layers: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if (name_or_path is None) == (config is None):
            raise ConfigError("ReportEncoder needs either name_or_path or config, and not both")
        if config is not None:
            self.model = _from_scratch(_cut(_small_config(config), num_hidden_layers))
        elif name_or_path is not None:
            name, where = _source(name_or_path)
            try:
                whole = AutoConfig.from_pretrained(name, **where)
            except (OSError, ValueError) as error:
                raise _unreachable(name, bool(where), error) from error
            resolved = _cut(whole, num_hidden_layers)
            self.model = _load_pretrained(name, where, resolved) if pretrained else _from_scratch(resolved)
        # from_pretrained hands over a model in evaluation mode.
        self.model.train()
        self._freeze(freeze_layers)
        if gradient_checkpointing:
            # transformers renamed it within its version 5.
            enable = getattr(self.model, "activation_checkpointing_enable", None)
            (enable or self.model.gradient_checkpointing_enable)()

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    def _freeze(self, num_layers: int) -> None:
        if num_layers == 0:
            return
        stack = next((m for m in self.model.modules() if isinstance(m, nn.ModuleList)), nn.ModuleList())
        if not 0 < num_layers <= len(stack):
            raise ConfigError(f"freeze_layers is {num_layers}, but the encoder has {len(stack)} layers")
        for module in (self.model.get_submodule("embeddings"), *stack[:num_layers]):
            module.requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """CLS feature of the last layer, (B, width), of `input_ids` (B, T); padding does not change it.

        Raises:
            ConfigError: more tokens than the encoder has positions for.
        """
        positions = getattr(self.model.config, "max_position_embeddings", None) or input_ids.shape[1]
        if input_ids.shape[1] > positions:
            raise ConfigError(
                f"a report of {input_ids.shape[1]} tokens meets an encoder of {positions} positions; lower "
                "preprocessing#max_length, or raise max_position_embeddings of an encoder from scratch"
            )
        if self.model.config.model_type == "bert" and self.model.config._attn_implementation == "sdpa":
            # transformers would ask the GPU whether anything is padded before it makes this of a 2D mask
            attention_mask = attention_mask[:, None, None, :].bool()
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]


def load_tokenizer(name_or_path: str | Path) -> Any:
    """The fast tokenizer of a folder (vocab.txt or tokenizer.json with its config) or of a hub model.

    Raises CheckpointError: the folder has no tokenizer, or the hub model cannot be reached.
    """
    name, where = _source(name_or_path)
    if where and not any((Path(name) / file).is_file() for file in ("vocab.txt", "tokenizer.json", "vocab.json")):
        raise CheckpointError(f"{name}: holds no vocab.txt or tokenizer.json; save the tokenizer there")
    try:
        return AutoTokenizer.from_pretrained(name, **where)
    except (OSError, ValueError) as error:
        raise _unreachable(name, bool(where), error) from error
