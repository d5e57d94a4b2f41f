# SPDX-License-Identifier: Apache-2.0
"""ViTDet's simple feature pyramid: maps of several scales from the last map of a plain vision transformer.

Letters: B batch, D width of the encoder, C width of the pyramid, h and w rows and columns of the encoder's map.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

SCALES = (4, 2, 1, 0.5)


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel of a map (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimpleFeaturePyramid(nn.Module):
    """Maps of several scales, each from the same single map (Li et al., ViTDet, section 3; detectron2's `vit.py`).

    4 x: two transposed convolutions with a layer norm and GELU between; 2 x: one; 1 x: nothing; 1/2 x: max-pooling.
    Then a 1x1 and a 3x3 convolution to C channels, each with a layer norm over the channels. Raises ValueError: no
    scale, or one that is not known.

    Args:
        out_channels: C; ViTDet has 256.
        scales: of the maps, finest first, each of 4, 2, 1 and 0.5; ViTDet has all four.
        last_pool: one more map, every second row and column of the coarsest (ViTDet's `LastLevelMaxPool`).

    Example:
        >>> maps = SimpleFeaturePyramid(32, 16)(nn.Parameter(Tensor(1, 32, 6, 6)))
        >>> [tuple(x.shape[2:]) for x in maps]
        [(24, 24), (12, 12), (6, 6), (3, 3), (2, 2)]
    """

    def __init__(
        self, in_channels: int, out_channels: int = 256, scales: Sequence[float] = SCALES, last_pool: bool = True
    ) -> None:
        super().__init__()
        if not scales or any(scale not in SCALES for scale in scales):
            raise ValueError(f"scales must be of 4, 2, 1 and 0.5, not {tuple(scales)}")
        self.out_channels, self.last_pool = out_channels, last_pool
        self.num_levels = len(scales) + last_pool
        self.levels = nn.ModuleList(_level(in_channels, out_channels, float(scale)) for scale in scales)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (B, C, scale h, scale w) from a map (B, D, h, w), in the order of the scales."""
        maps = [level(x) for level in self.levels]
        if self.last_pool:
            maps.append(functional.max_pool2d(maps[-1], kernel_size=1, stride=2))
        return maps


def _level(dim: int, width: int, scale: float) -> nn.Sequential:
    steps: list[nn.Module] = []
    if scale == 4:
        steps += [nn.ConvTranspose2d(dim, dim // 2, 2, 2), ChannelLayerNorm(dim // 2, eps=1e-6), nn.GELU()]
        steps += [nn.ConvTranspose2d(dim // 2, dim // 4, 2, 2)]
        dim = dim // 4
    elif scale == 2:
        steps += [nn.ConvTranspose2d(dim, dim // 2, 2, 2)]
        dim = dim // 2
    elif scale == 0.5:
        steps += [nn.MaxPool2d(2, 2)]
    # the norms have biases of their own
    steps += [nn.Conv2d(dim, width, 1, bias=False), ChannelLayerNorm(width, eps=1e-6)]
    steps += [nn.Conv2d(width, width, 3, padding=1, bias=False), ChannelLayerNorm(width, eps=1e-6)]
    return nn.Sequential(*steps)
