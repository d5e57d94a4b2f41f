# SPDX-License-Identifier: Apache-2.0
"""Classification of X-rays and volumes: a linear head on the CLS token of the unified encoder.

Letters: B batch, D width, C classes, k slices.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unimedi_components import selection
from unimedi_components.errors import CheckpointError
from unimedi_components.networks.cards import load_network
from unimedi_components.networks.modality_norm import ModalityBatchNorm1d
from unimedi_components.networks.output import EncoderOutput
from unimedi_components.networks.task_network import TaskNetwork
from unimedi_components.networks.unified_vit import UnifiedViT
from unimedi_components.networks.weights import create_encoder


class ImageClassifier(TaskNetwork):
    """Dropout and one linear layer on the CLS token after the final norm (MGCA's `ssl_finetuner.py`).

    Raises ValueError: no classes, or more slices than the volume has slabs.

    Args:
        encoder: reads X-rays or volumes; its CLS token before any projection is the feature.
        spatial_dims: 2 for X-rays, 3 for volumes.
        freeze_encoder: linear probe (the encoder gets no gradient and stays in evaluation mode) or, if False, full
            fine-tuning.
        feature_norm: standardise each feature by batch statistics of all ranks without learnable scale first (the
            MAE repository's linear probe); the paper's head has none.
        use_slices: let the k slices of a volume that the encoder attends most join it as 2D images, as in
            pre-training (sections 3.2 and 3.3).

    Example:
        >>> encoder = UnifiedViT(img_size=32, vol_size=(8, 32, 32), embed_dim=24, depth=2, num_heads=2)
        >>> ImageClassifier(encoder, 5)(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 5])
    """

    kind = "classifier"

    def __init__(
        self,
        encoder: UnifiedViT,
        num_classes: int,
        spatial_dims: int = 2,
        *,
        freeze_encoder: bool = True,
        dropout: float = 0.0,
        feature_norm: bool = False,
        use_slices: bool = False,
        num_slices: int = 4,
        expand: str = "centre",
    ) -> None:
        super().__init__(locals())
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {num_classes}")
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, not {spatial_dims!r}")
        if use_slices:
            slabs = torch.zeros(1, encoder.grid_3d[0])
            selection.select_slices(slabs, num_slices, encoder.patch_depth, expand=expand)
        self.spatial_dims, self.use_slices = spatial_dims, use_slices
        self.num_slices, self.expand = num_slices, expand
        self.hold(encoder)
        # unlike nn.BatchNorm1d it takes a last batch of one image, and joins the ranks' batches on CPU too
        norm = ModalityBatchNorm1d(encoder.embed_dim, num_modalities=1, affine=False) if feature_norm else nn.Identity()
        self.feature_norm: nn.Module = norm
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def unused(self) -> list[nn.Parameter]:
        """See `TaskNetwork`; slices join a volume as X-rays."""
        return [self.encoder.mask_token] if self.spatial_dims == 3 and self.use_slices else super().unused()

    def encode(self, image: Tensor, return_attention: bool = False) -> EncoderOutput:
        """The encoder's output for X-rays (B, 1, H, W) or volumes (B, 1, D, H, W), with slices where they are used."""
        if self.spatial_dims == 2 or not self.use_slices:
            return self.encoder(image, return_attention=return_attention)
        with torch.no_grad():
            attention = self.encoder(image, return_attention=True).attention
            scores = selection.slice_scores(attention, self.encoder.token_grids(image)[0])
            index = selection.select_slices(scores, self.num_slices, self.encoder.patch_depth, expand=self.expand)
        # autocast keeps the weights that it cast without a history, and a fine-tuned encoder would get no gradient
        torch.clear_autocast_cache()
        slices = selection.take_slices(image, index, self.encoder.img_size)
        return self.encoder(image, *slices, return_attention=return_attention)

    def features(self, image: Tensor) -> Tensor:
        """CLS features (B, D); without gradient if the encoder is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            return self.encode(image).cls

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, C) of X-rays (B, 1, H, W) or volumes (B, 1, D, H, W) in [-1, 1], or of their features (B, D).

        Raises ValueError: images of another dimension.
        """
        if image.ndim not in (2, 2 + self.spatial_dims):
            raise ValueError(
                f"expected {self.spatial_dims}D images (B, 1, ...) or features (B, D), got {tuple(image.shape)}"
            )
        features = image if image.ndim == 2 else self.features(image)
        # half precision is too coarse for probabilities
        return self.head(self.dropout(self.feature_norm(features))).float()

    def attention_maps(self, image: Tensor) -> Tensor:
        """Eq. 1's **v** of an image's own tokens on their grid: (B, rows, columns) or (B, slabs, rows, columns)."""
        grid = self.encoder.token_grids(image)[0]
        attention = self.encoder(image, return_attention=True).attention
        assert attention is not None
        return attention.unflatten(1, grid if image.ndim == 5 else grid[1:])


def task_encoder(weights: str | Path | None, size: str | Mapping[str, Any] | None = None, **kwargs: Any) -> UnifiedViT:
    """The encoder of a task bundle: `create_encoder`, with a task's words where the weights are missing.

    ``weights``: `models/model.pt` of a pre-training run, with `model.json` beside it; any other weights that
    `load_weights` reads, or "none" for random initialisation. Raises CheckpointError: the weights are missing, do not
    fit, or are of another size than the config asks for; ConfigError: no such size or argument.
    """
    path, given = Path(str(weights)), weights is not None and str(weights).lower() != "none"
    if given and not str(weights).startswith(("timm:", "hf:")) and not path.is_file():
        raise CheckpointError(
            f"{path}: no pre-trained encoder. Train one with 'make pretrain', give other weights with "
            "--encoder_weights, or --encoder_weights none for random initialisation"
        )
    return create_encoder(weights, size, **kwargs)


def load_classifier(checkpoint: str | Path, device: str | torch.device = "cpu") -> ImageClassifier:
    """A trained classifier, in evaluation mode; see `load_network`."""
    return load_network(checkpoint, device, "classifier")
