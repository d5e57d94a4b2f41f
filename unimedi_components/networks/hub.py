# SPDX-License-Identifier: Apache-2.0
"""The encoder as a folder in the Hugging Face hub's form: weights, config, input preparation, card, loading code."""

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from torch import nn

from unimedi_components import __version__
from unimedi_components.errors import CheckpointError

MODEL_TYPE = "unimedi_vit"
CONFIG_FILE, PROCESSOR_FILE, WEIGHTS_FILE = "config.json", "preprocessor_config.json", "model.safetensors"
CODE_FILE = "unimedi_auto.py"
#: What `trust_remote_code=True` runs: the classes of the installed package, so that files are read in one way.
CODE = '''# SPDX-License-Identifier: Apache-2.0
"""For `trust_remote_code=True`: needs `pip install unimedi-components`."""

from unimedi_components.hub import UniMediConfig, UniMediImageProcessor, UniMediVisionModel

__all__ = ["UniMediConfig", "UniMediImageProcessor", "UniMediVisionModel"]
'''
_OPTIONS = ("revision", "cache_dir", "token", "force_download", "local_files_only")
_CARD = """---
{{ card_data }}
---

# UniMedI vision encoder

One vision transformer for chest X-rays and CT volumes, pre-trained with radiology reports after
[UniMedI](https://arxiv.org/abs/2311.14851): {{ size }}.
**Not for clinical use**: for research on image representations.

## Use

```python
from unimedi_components import UniMediImageProcessor, UnifiedViT  # pip install unimedi-components

encoder, processor = UnifiedViT.from_pretrained("FOLDER"), UniMediImageProcessor.from_pretrained("FOLDER")
features = encoder(**processor("scan.nii.gz")).cls  # or a film, a DICOM series' folder, or a list of either
```

With that package, `transformers.AutoModel` and `AutoImageProcessor` read the same folder (`trust_remote_code=True`);
their `pooler_output` is `cls`. For a volume this is the volume alone, without selected slices.

## Training data and licence

{{ data }}

The licence of the weights is {{ card_data.license }}; the code is Apache-2.0. Data sets and weights that a run started
from have terms of their own: share weights only as those allow.

## Input preparation

{{ preparation }}

"""
_NO_PREPARATION = "None is stored with these weights: images in [-1, 1], volumes from inferior to superior."
_Encoder = TypeVar("_Encoder", bound="HubEncoder")


class HubEncoder(
    nn.Module,
    ModelHubMixin,
    library_name="unimedi-components",
    pipeline_tag="image-feature-extraction",
    tags=["medical-imaging", "chest-x-ray", "computed-tomography"],
    model_card_template=_CARD,
):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` of an encoder with `hparams`.

    Attributes:
        card: of weights that were loaded, `model.json` or what a hub folder holds of it: "preprocessing" of images,
            "film_values" and "phantom_seed" go into the folder that is written.
    """

    hparams: dict[str, Any]
    card: Mapping[str, Any] = {}

    @classmethod
    def from_pretrained(cls: type[_Encoder], pretrained_model_name_or_path: str | Path, **options: Any) -> _Encoder:
        """The encoder of a folder that `save_pretrained` or the command export wrote, in evaluation mode.

        Raises CheckpointError: the folder is missing, damaged or of another model, or the repository cannot be had.

        Args:
            pretrained_model_name_or_path: the folder, or `<owner>/<repo>`, which alone reaches the network.
            options: of a repository: revision, cache_dir, token, force_download, local_files_only.
        """
        from unimedi_components.networks.weights import load_strict, read_state_dict

        folder = hub_folder(pretrained_model_name_or_path, **options)
        config = read_hub_json(folder, CONFIG_FILE)
        if config.get("model_type") != MODEL_TYPE:
            kind = config.get("model_type") or (config.get("architectures") or ["nothing by name"])[0]
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: describes {kind!r} and no {MODEL_TYPE}; give a folder that the command "
                "export wrote (weights of other ViTs are read by `load_weights`)"
            )
        try:
            encoder = cls(**config["encoder"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: no encoder can be built from it ({error}); export it again"
            ) from error
        state = read_state_dict(folder / WEIGHTS_FILE)
        # transformers' save_pretrained writes the name of the model's part
        state = {name.removeprefix("encoder."): value for name, value in state.items()}
        load_strict(encoder, state, str(folder / WEIGHTS_FILE))
        more = read_hub_json(folder, PROCESSOR_FILE) if (folder / PROCESSOR_FILE).is_file() else {}
        facts = {**more, **config}
        encoder.card = {name: facts[name] for name in ("preprocessing", "film_values", "phantom_seed") if name in facts}
        return encoder.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        from safetensors.torch import save_file

        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(state, save_directory / WEIGHTS_FILE, metadata={"format": "pt"})
        module = Path(CODE_FILE).stem
        config = {
            "model_type": MODEL_TYPE,
            "architectures": ["UniMediVisionModel"],
            "auto_map": {"AutoConfig": f"{module}.UniMediConfig", "AutoModel": f"{module}.UniMediVisionModel"},
            "dtype": str(next(self.parameters()).dtype).removeprefix("torch."),
            "encoder": self.hparams,
            "unimedi_components_version": __version__,
            **({"phantom_seed": self.card["phantom_seed"]} if "phantom_seed" in self.card else {}),
        }
        _write_json(config, save_directory / CONFIG_FILE)
        (save_directory / CODE_FILE).write_text(CODE, encoding="utf-8")
        if preprocessing := _of_images(self.card):
            processor = {
                "image_processor_type": "UniMediImageProcessor",
                "auto_map": {"AutoImageProcessor": f"{module}.UniMediImageProcessor"},
                "preprocessing": preprocessing,
                "film_values": self.card.get("film_values", ""),
            }
            _write_json(processor, save_directory / PROCESSOR_FILE)

    def generate_model_card(self, *args: Any, license: str | None = None, **kwargs: Any) -> ModelCard:
        """The README of a folder.

        ``license``: of the weights, a name of the hub's; by default Apache-2.0 where the run was on phantoms, else
        "unknown"; weights that the run started from may have another.
        """
        phantoms = self.card.get("phantom_seed") is not None
        info = self._hub_mixin_info
        data = copy.deepcopy(info.model_card_data)
        data.license = license or ("apache-2.0" if phantoms else "unknown")
        sizes = {name: self.hparams[name] for name in ("embed_dim", "depth", "num_heads", "img_size", "vol_size")}
        preprocessing = _of_images(self.card)
        prepared = f"```json\n{json.dumps(preprocessing, indent=1)}\n```" if preprocessing else _NO_PREPARATION
        films = f"\n\nValues of films: {self.card['film_values']}" if self.card.get("film_values") else ""
        seen = "Pre-trained on synthetic phantoms: no accuracy on patients is claimed."
        values = {
            "size": ", ".join(f"{name} {value}" for name, value in sizes.items()),
            "data": seen if phantoms else "The training data are not recorded here; name them.",
            "preparation": prepared + films,
            **kwargs,
        }
        return ModelCard.from_template(card_data=data, template_str=info.model_card_template, **values)


def hub_folder(name: str | Path, **options: Any) -> Path:
    """A local folder, or where the hub's client keeps a repository's files; see `HubEncoder.from_pretrained`.

    Raises CheckpointError: no such folder, or the repository cannot be had.
    """
    path, text = Path(name).expanduser(), str(name).removeprefix("hf:")
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(
            f"{name}: is a file and no folder; read it with `load_encoder`, or make a folder of it with "
            f"python -m unimedi_components export {name} FOLDER"
        )
    # a misspelt folder is not asked for on the hub
    local = not isinstance(name, str) or (text == name and path.parent.is_dir())
    if local or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", text):
        raise CheckpointError(f"{name}: no such folder; give one that the command export wrote, or <owner>/<repo>")
    files = [CONFIG_FILE, PROCESSOR_FILE, WEIGHTS_FILE]
    options = {key: value for key, value in options.items() if key in _OPTIONS}
    try:
        return Path(snapshot_download(text, allow_patterns=files, **options))
    except Exception as error:  # the hub client raises many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{name}: no such folder, and not to be had from the Hugging Face hub ({reason}); check the name and the "
            "network"
        ) from error


def read_json(path: Path, missing: str, again: str) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError: missing or damaged.

    Args:
        missing: what to do where there is none.
        again: what to do where it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; {missing}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); {again}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no JSON object; {again}")
    return content


def read_hub_json(folder: Path, file: str) -> dict[str, Any]:
    """One of a hub folder's JSON files; raises as `read_json`."""
    return read_json(folder / file, "give a folder that the command export wrote", "export or download it again")


def _of_images(card: Mapping[str, Any]) -> dict[str, Any]:
    """How images are prepared, without what concerns reports."""
    return {name: value for name, value in card.get("preprocessing", {}).items() if name in ("xray", "ct")}


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
