# SPDX-License-Identifier: Apache-2.0
"""From a grid of tokens to voxels: how a patch's sides are upsampled stage for stage.

Letters: B batch, D width of the tokens.
"""

from collections.abc import Sequence
from typing import Any

from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetResBlock, get_conv_layer
from torch import Tensor, nn

Stride = tuple[int, ...]


def upsampling_strides(patch_size: Sequence[int]) -> list[Stride]:
    """Strides of the stages that lead from tokens to voxels, the coarsest first.

    Each side of the patch is taken apart into its prime factors, the largest first, so that the axis with the most of
    them sets the number of stages, and a side with fewer is upsampled at the coarse stages alone (nnU-Net's and
    UniMiSS's convention for thick slices). Raises ValueError: a patch of one voxel, whose tokens need no decoder.

    Example:
        >>> upsampling_strides((4, 16, 16))
        [(2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)]
        >>> upsampling_strides((4, 12, 12))
        [(2, 3, 3), (2, 2, 2), (1, 2, 2)]
    """
    axes = [_prime_factors(int(side)) for side in patch_size]
    stages = max(map(len, axes))
    if not stages:
        raise ValueError("a patch of one voxel needs no upsampling; use larger patches (patch_size_3d)")
    padded = [factors + [1] * (stages - len(factors)) for factors in axes]
    return list(zip(*padded, strict=True))


def _prime_factors(number: int) -> list[int]:
    factors, divisor = [], 2
    while number > 1:
        if number % divisor:
            divisor += 1
        else:
            factors.append(divisor)
            number //= divisor
    return factors[::-1]


class TokenUpsampling(nn.Module):
    """A hidden state on its way up to a skip connection: MONAI's `UnetrPrUpBlock` with a kernel for each layer.

    Args:
        strides: of the layers, one or more; each doubles, triples or keeps an axis.
        res_block: convolve with a residual block after each layer but the first, else with a plain one.
    """

    def __init__(
        self, in_channels: int, out_channels: int, strides: Sequence[Stride], norm: Any, res_block: bool
    ) -> None:
        super().__init__()
        block = UnetResBlock if res_block else UnetBasicBlock
        channels = [in_channels] + [out_channels] * len(strides)
        layers: list[nn.Module] = []
        for index, stride in enumerate(strides):
            up = get_conv_layer(
                3, channels[index], out_channels, kernel_size=stride, stride=stride, conv_only=True, is_transposed=True
            )
            convolutions = [block(3, out_channels, out_channels, kernel_size=3, stride=1, norm_name=norm)]
            layers.append(nn.Sequential(up, *(convolutions if index else [])))
        self.layers = nn.Sequential(*layers)

    def forward(self, grid: Tensor) -> Tensor:
        """(B, D, d, h, w) to (B, out_channels, ...), larger by the product of the strides."""
        return self.layers(grid)
