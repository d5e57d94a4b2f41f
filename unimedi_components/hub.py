# SPDX-License-Identifier: Apache-2.0
"""A hub folder with `transformers`: the encoder as a model, and files to its input."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, PretrainedConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from unimedi_components.data.transforms import input_transforms
from unimedi_components.errors import CheckpointError, DataError, reason_of
from unimedi_components.images.find import image_at, image_items
from unimedi_components.networks.hub import MODEL_TYPE, PROCESSOR_FILE, hub_folder, read_hub_json
from unimedi_components.networks.unified_vit import UnifiedViT

logger = logging.getLogger(__name__)


class UniMediConfig(PretrainedConfig):
    """Sizes of the encoder as `transformers` keeps them. ``encoder``: arguments of `UnifiedViT`."""

    model_type = MODEL_TYPE

    def __init__(self, encoder: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.encoder = dict(encoder or {})
        super().__init__(**kwargs)


class UniMediVisionModel(PreTrainedModel):
    """`UnifiedViT` as `AutoModel` gives it."""

    config_class = UniMediConfig
    base_model_prefix = "encoder"
    main_input_name = "image"
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: UniMediConfig) -> None:
        super().__init__(config)
        self.encoder = UnifiedViT(**config.encoder)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """The encoder has done it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a hub folder; arguments as of `transformers`, errors as of `UnifiedViT.from_pretrained`."""
        folder = hub_folder(pretrained_model_name_or_path, **kwargs)
        encoder = UnifiedViT.from_pretrained(folder)
        kwargs["config"] = kwargs.get("config") or UniMediConfig.from_pretrained(folder)
        state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
        return super().from_pretrained(None, *args, state_dict=state, **kwargs)

    def forward(self, image: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode X-rays (B, 1, H, W) or volumes (B, 1, D, H, W) in [-1, 1].

        Args:
            image: of `UniMediImageProcessor`.

        Returns:
            "last_hidden_state" (B, 1 + P, D), CLS first, and "pooler_output" (B, D), the CLS token.
        """
        output = self.encoder(image)
        tokens = torch.cat([output.cls.unsqueeze(1), output.patches], dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=output.cls)


class UniMediImageProcessor(ImageProcessingMixin):
    """Files to network input as in training: window, size and orientation, with the checks of every other command.

    Args:
        preprocessing: arguments of `xray_transforms` under "xray" and of `ct_transforms` under "ct".
        film_values: what becomes of the values of films, in words.
    """

    model_input_names = ("image",)

    def __init__(self, preprocessing: Mapping[str, Any], film_values: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.preprocessing, self.film_values = dict(preprocessing), film_values
        # the file does not change where it was loaded from
        self.image_processor_type = type(self).__name__

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load a hub folder's processor; arguments as of `UnifiedViT.from_pretrained`.

        Raises:
            CheckpointError: the folder is missing or damaged, or says nothing about this processor's preparation.
        """
        folder = hub_folder(pretrained_model_name_or_path, **kwargs)
        content = read_hub_json(folder, PROCESSOR_FILE)
        try:
            input_transforms(content["preprocessing"])
        except (AttributeError, DataError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder / PROCESSOR_FILE}: no preparation of X-rays and CT as this project writes it "
                f"({type(error).__name__}: {error}); give a folder that the command export wrote"
            ) from error
        return cls(**content)

    def __call__(
        self, images: str | Path | Sequence[str | Path], return_tensors: str = "pt", assume_hu: bool = False
    ) -> BatchFeature:
        """Read images of one kind, one for each path.

        Args:
            images: an X-ray's file, a CT's file, the folder of one DICOM series, or several of one kind.
            return_tensors: "pt", or "np" for numpy.
            assume_hu: take CT values for Hounsfield units that do not say how they are rescaled.

        Returns:
            "image" (B, 1, H, W) of X-rays or (B, 1, D, H, W) of volumes, float32 in [-1, 1].

        Raises:
            DataError: a path is no image or several, cannot be read, or X-rays and volumes are mixed.
        """
        paths = list(images) if isinstance(images, Sequence) and not isinstance(images, str) else [images]
        if not all(isinstance(path, (str, Path)) for path in paths):
            raise DataError(f"the processor reads files, got {type(images).__name__}; give paths")
        items = [image_items([image_at(Path(path), assume_hu)], Path(path).parent, assume_hu)[0] for path in paths]
        if len({item["dim"] for item in items}) != 1:
            kinds = ", ".join(f"{path} ({item['dim']}D)" for path, item in zip(paths[:4], items, strict=False))
            raise DataError(f"one batch takes X-rays or volumes, got {kinds or 'no path'}; call once for each kind")
        transforms = input_transforms(self.preprocessing)
        tensors = []
        for path, item in zip(paths, items, strict=True):
            try:
                tensors.append(transforms(item)["image"])
            except (DataError, MemoryError):
                raise
            except Exception as error:  # readers raise many kinds for a damaged file
                raise DataError(f"{path}: {reason_of(error, path)}") from error
            if not torch.isfinite(tensors[-1]).all():
                raise DataError(f"{path}: holds values that are not finite numbers. Export it again")
        return BatchFeature({"image": torch.stack(tensors)}, tensor_type=return_tensors)
