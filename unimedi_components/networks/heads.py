# SPDX-License-Identifier: Apache-2.0
"""Heads on top of the encoders: MGCA's projection for L_vl and DINO's head for the self-distillation."""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimedi_components.errors import ConfigError
from unimedi_components.networks.layers import arguments
from unimedi_components.networks.modality_norm import ModalityBatchNorm1d

_NORMS = ("batch_per_modality", "batch", "layer", "none")


def _make_norm(norm: str, num_features: int, affine: bool) -> nn.Module:
    if norm == "layer":
        return nn.LayerNorm(num_features, elementwise_affine=affine)
    if norm == "none":
        return nn.Identity()
    return ModalityBatchNorm1d(num_features, num_modalities=2 if norm == "batch_per_modality" else 1, affine=affine)


def _apply_norm(norm: nn.Module, x: Tensor, modality: Tensor | None) -> Tensor:
    return norm(x, modality) if isinstance(norm, ModalityBatchNorm1d) else norm(x)


class ProjectionHead(nn.Module):
    """Projects CLS features of images or reports into the common space.

    The default is MGCA's GlobalEmbedding (Linear, BN, ReLU, Linear, BN without affine) with statistics per modality,
    preceded by a normalisation of the features per modality; both are ours, see `ModalityBatchNorm1d`. Reports use the
    modality of their image. Raises ConfigError: unknown `norm`.

    Args:
        hidden_dim: width of the hidden layer; None for A-CLIP's single Linear, after a normalisation of the
            features if `norm` is one of the batch kinds.
        norm: "batch_per_modality"; "batch" for statistics over the joint batch (MGCA); "layer"; or "none".
    """

    def __init__(
        self, in_dim: int, hidden_dim: int | None = 2048, out_dim: int = 128, norm: str = "batch_per_modality"
    ) -> None:
        super().__init__()
        if norm not in _NORMS:
            raise ConfigError(f"norm is {norm!r}; use one of {', '.join(_NORMS)}")
        self.hparams = arguments(locals())
        normalise_input = norm == "batch_per_modality" or (norm == "batch" and hidden_dim is None)
        self.input_norm = _make_norm(norm if normalise_input else "none", in_dim, affine=False)
        self.hidden: nn.Linear | None = None
        self.hidden_norm: nn.Module = nn.Identity()
        self.output_norm: nn.Module = nn.Identity()
        if hidden_dim is not None:
            self.hidden = nn.Linear(in_dim, hidden_dim)
            self.hidden_norm = _make_norm(norm, hidden_dim, affine=True)
            self.output_norm = _make_norm(norm, out_dim, affine=False)
        self.output = nn.Linear(in_dim if hidden_dim is None else hidden_dim, out_dim)

    def forward(self, x: Tensor, modality: Tensor | None = None) -> Tensor:
        """Embed features (B, in_dim) as (B, out_dim), not L2-normalised.

        ``modality``: 0 for 2D and 1 for 3D rows, (B,); needed by "batch_per_modality" alone. Raises ValueError:
        `modality` is needed and missing, or has not one entry per row.
        """
        x = _apply_norm(self.input_norm, x, modality)
        if self.hidden is not None:
            x = torch.relu(_apply_norm(self.hidden_norm, self.hidden(x), modality))
        return _apply_norm(self.output_norm, self.output(x), modality)


class _Prototypes(nn.Module):
    """DINO's weight-normalised last layer, kept as its direction and gain under DINO's names."""

    def __init__(self, bottleneck_dim: int, out_dim: int, norm_last_layer: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not norm_last_layer)
        # nn.Linear's own initialisation, as in DINO.
        self.weight_v = nn.Parameter(nn.Linear(bottleneck_dim, out_dim, bias=False).weight.detach().clone())

    @property
    def weight(self) -> Tensor:
        return F.normalize(self.weight_v, dim=1) * self.weight_g


class DINOHead(nn.Module):
    """DINO's projection head, with the behaviour and state keys of its `DINOHead`.

    Keys are mlp.*, last_layer.weight_g and last_layer.weight_v. The product with the prototypes is left to
    the loss, which computes it in chunks.

    Args:
        norm_last_layer: keep the prototypes at unit norm.
        center_kinds: number of kinds of token whose bottleneck features are centered each by their own mean, before
            they get unit norm; 0 centers nothing, as DINO. What all tokens of a kind share says nothing about their
            image, and where it is large it alone decides which prototype is nearest.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 8192,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        nlayers: int = 3,
        norm_last_layer: bool = True,
        center_kinds: int = 0,
    ) -> None:
        super().__init__()
        self.hparams = arguments(locals())
        widths = [in_dim, *[hidden_dim] * (max(nlayers, 1) - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            linear = nn.Linear(before, after)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.GELU()]
        layers.pop()
        # DINO holds a single layer without a container, which decides its state keys.
        self.mlp = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
        self.last_layer = _Prototypes(bottleneck_dim, out_dim, norm_last_layer)
        means = partial(ModalityBatchNorm1d, bottleneck_dim, affine=False, scale=False)
        self.center = means(center_kinds) if center_kinds else None

    @property
    def prototypes(self) -> Tensor:
        """Weights of the last layer, (out_dim, bottleneck_dim)."""
        return self.last_layer.weight

    def forward(self, x: Tensor, kind: Tensor | None = None) -> Tensor:
        """Bottleneck features (..., bottleneck_dim) of tokens (..., in_dim), rows of unit norm, in fp32 at least.

        ``kind``: index of each row's kind of token, (N,), where kinds are centered and there is more than one.
        """
        x = self._bottleneck(x)
        if self.center is not None:
            x = self.center(x, kind)
        return F.normalize(x, dim=-1)

    def _bottleneck(self, x: Tensor) -> Tensor:
        """`mlp`; under autocast with fp32 between its products.

        What is behind it centers the features, so that the gradients of its biases nearly cancel over the tokens:
        rounded to bfloat16 before they are added up, little but the rounding would be left.
        """
        if not torch.is_autocast_enabled(x.device.type):
            x = self.mlp(x)
            return x.to(torch.promote_types(x.dtype, torch.float32))
        *hidden, last = self.mlp if isinstance(self.mlp, nn.Sequential) else [self.mlp]
        for layer in hidden:
            x = F.linear(x, layer.weight).float() + layer.bias if isinstance(layer, nn.Linear) else layer(x)
        with torch.autocast(x.device.type, enabled=False):
            return last(x.float())
