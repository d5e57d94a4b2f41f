# SPDX-License-Identifier: Apache-2.0
"""The image side of a trained network as one module: an X-ray or a volume in, its embedding out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimedi_components.networks.cards import KINDS, load_network
from unimedi_components.networks.export import ScriptableByDimension, trace
from unimedi_components.networks.output import ImageFeatures
from unimedi_components.networks.pretrained import load_pretrained, read_card

__all__ = ["EmbeddingNetwork", "load_trained"]


class EmbeddingNetwork(nn.Module):
    """A trained network as MONAI's inferers and checks expect one: it takes images and returns one tensor.

    The weights are loaded when it is built, strictly, and it is in evaluation mode. Its state is the encoder's, as
    `model.pt` holds it, so that MONAI's tools save and load it; the projection stays as it was built.

    Args:
        checkpoint: `model.pt`, `model_best.pt` or `unimedi.pt` in a training run's `models` folder.
        use_slices: feed a volume's selected slices beside it, as in pre-training.

    Attributes:
        pretrained: what was loaded, for an `Embedder` over the same weights.
        card: how the network was built, and under "preprocessing" how its input was prepared.

    Raises:
        CheckpointError: a file is missing or does not fit.
    """

    def __init__(self, checkpoint: str | Path, use_slices: bool = True) -> None:
        super().__init__()
        self.pretrained = load_pretrained(checkpoint)
        self.network = self.pretrained.network
        self.card = self.pretrained.card
        self.use_slices = use_slices
        self.eval()

    def features(self, image: Tensor) -> ImageFeatures:
        """All that the network makes of X-rays (B, C, H, W) or volumes (B, C, D, H, W) in [-1, 1]."""
        return self.network.encode_image(image, self.use_slices)

    def token_grid(self, image: Tensor) -> tuple[int, ...]:
        """Rows and columns of an X-ray's tokens, or slabs, rows and columns of a volume's: the grid of **v**."""
        grid = self.network.encoder.token_grids(image)[0]
        return grid if image.ndim == 5 else grid[1:]

    def forward(self, image: Tensor) -> Tensor:
        """Images as in `features` to unit vectors in the space that images and reports share, (B, E)."""
        return F.normalize(self.features(image).embed, dim=-1)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder's state, which `model.pt` holds."""
        return self.network.encoder.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load another encoder's state."""
        return self.network.encoder.load_state_dict(state_dict, strict, assign)

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script`, and so `monai.bundle ckpt_export`, compiles in place of this network."""
        encoder = self.network.encoder
        channels, device = encoder.patch_embed.proj.in_channels, encoder.cls_token.device
        two_d, three_d = (
            trace(
                self,
                torch.zeros(2, channels, *size, device=device),
                ("network.report_encoder", "network.text_projection"),
            )
            for size in (encoder.img_size, encoder.vol_size)
        )
        return ScriptableByDimension(two_d, three_d).eval()


def load_trained(checkpoint: str | Path) -> nn.Module:
    """The network that `model.pt` of any bundle holds, on the CPU, in evaluation mode.

    Returns:
        a task's network as of `load_network`, or an `EmbeddingNetwork` of what pre-training left.

    Raises:
        CheckpointError: a file is missing or does not fit.
    """
    path = Path(checkpoint)
    return load_network(path) if KINDS.keys() & read_card(path) else EmbeddingNetwork(path)
