# SPDX-License-Identifier: Apache-2.0
"""The two tokenizers T_2D and T_3D, and position tables that fit any grid.

Letters: B batch, P patches, D width; h, w (and d) the token grid.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def to_tuple(value: int | Sequence[int], length: int, name: str) -> tuple[int, ...]:
    """An int repeated, or a sequence, as `length` positive ints. Raises ValueError: other lengths or values."""
    values = (int(value),) * length if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) != length or min(values) < 1:
        raise ValueError(f"{name} must be a positive int or {length} of them, not {value!r}")
    return values


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens, for 2D images or 3D volumes; timm's name `proj` for the kernel."""

    def __init__(self, patch_size: Sequence[int], in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = tuple(patch_size)
        conv: Any = {2: nn.Conv2d, 3: nn.Conv3d}[len(self.patch_size)]
        self.proj = conv(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)
        fan_in = in_chans * math.prod(self.patch_size)
        nn.init.trunc_normal_(self.proj.weight, std=fan_in**-0.5)
        nn.init.zeros_(self.proj.bias)

    def grid(self, size: Sequence[int]) -> tuple[int, ...]:
        """Token grid of an image of this spatial size. Raises ValueError: the patch does not divide the size."""
        if len(size) != len(self.patch_size):
            raise ValueError(
                f"expected {len(self.patch_size)} spatial axes for patch {self.patch_size}, got {tuple(size)}"
            )
        if any(s % p for s, p in zip(size, self.patch_size, strict=True)):
            shape, patch = "x".join(map(str, size)), "x".join(map(str, self.patch_size))
            fits = "x".join(str(max(1, round(s / p)) * p) for s, p in zip(size, self.patch_size, strict=True))
            raise ValueError(
                f"an image of {shape} cannot be cut into patches of {patch}: each side must be a multiple of it; "
                f"resize or pad it (nearest: {fits}; config keys img_size and vol_size) or change patch_size"
            )
        return tuple(s // p for s, p in zip(size, self.patch_size, strict=True))

    def patches(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) or volume (B, C, D, H, W) to the values of its patches (B, P, C * patch), depth-major."""
        grid, patch = self.grid(x.shape[2:]), self.patch_size
        axes = len(grid)
        split = [s for pair in zip(grid, patch, strict=True) for s in pair]
        x = x.view(x.shape[0], x.shape[1], *split)  # (B, C, g1, p1, g2, p2, ...)
        order = [0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2)]
        return x.permute(order).reshape(x.shape[0], math.prod(grid), -1)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) or volume (B, C, D, H, W) to tokens (B, P, D), depth-major."""
        return F.linear(self.patches(x), self.proj.weight.flatten(1), self.proj.bias)


def resample_patch_embed(kernel: Tensor, size: Sequence[int]) -> Tensor:
    """A 2D patch kernel for patches of another size, by FlexiViT's pseudo-inverse (Beyer et al., CVPR 2023, eq. 5).

    (D, C, ph, pw) to (D, C, ph', pw'): of a patch that is resized bicubically the result makes the token that `kernel`
    makes of the patch, exactly for larger patches and with the least squared error for smaller ones.
    """
    old = kernel.shape[-2:]
    if tuple(old) == tuple(size):
        return kernel
    pixels = torch.eye(math.prod(old), dtype=torch.float64).view(-1, 1, *old)
    resize = F.interpolate(pixels, size=tuple(size), mode="bicubic", antialias=True).flatten(1)  # (old, new) pixels
    fitted = kernel.double().flatten(-2) @ torch.linalg.pinv(resize).T
    return fitted.unflatten(-1, tuple(size)).to(kernel.dtype)


def resample_pos_embed_2d(table: Tensor, old: Sequence[int], new: Sequence[int], antialias: bool = True) -> Tensor:
    """A 2D position table (1, h * w, D), without the CLS entry, on another grid, bicubic; itself where the grids agree.

    ``antialias``: as timm's `resample_abs_pos_embed`; False as `transformers`.
    """
    if tuple(old) == tuple(new):
        return table
    maps = table.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=tuple(new), mode="bicubic", antialias=antialias)
    return maps.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)


def resample_pos_embed_3d(table: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """A 3D position table (1, d * h * w, D) on another grid, trilinear; the table itself where the grids agree."""
    if tuple(old) == tuple(new):
        return table
    maps = table.float().reshape(1, *old, -1).permute(0, 4, 1, 2, 3)
    maps = F.interpolate(maps, size=tuple(new), mode="trilinear", align_corners=False)
    return maps.permute(0, 2, 3, 4, 1).flatten(1, 3).to(table.dtype)


def rotary_angles(periods: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
    """Angles (P, C), float32, of DINOv3's rotary positions: rows, then columns, -1 to 1 over an image of any size.

    ``periods``: (C / 4,), for heads of C channels. ``grids``: (depth, rows, columns) of each segment; depth turns none.
    """
    places = []
    for depth, *plane in grids:
        axes = [(torch.arange(n, device=periods.device) + 0.5) / n * 2 - 1 for n in plane]
        places.append(torch.cartesian_prod(*axes).repeat(depth, 1))
    return (2 * math.pi * torch.cat(places).unsqueeze(-1) / periods.float()).flatten(1).tile(2)


def interpolate_depth(table: Tensor, position: Tensor) -> Tensor:
    """Rows (B, k, D) of a depth table (1, S, D) at fractional depths, linear between neighbours.

    ``position``: fraction of the volume, 0 inferior to 1 superior, (B, k). The centre of slab s of S, (s + 0.5) / S,
    gives row s.
    """
    # a Python number also while tracing, where a size is a tensor on the CPU
    rows = int(table.shape[1])
    place = (position * rows - 0.5).clamp(0, rows - 1)
    low = place.floor().long()
    high = (low + 1).clamp(max=rows - 1)
    weight = (place - low).unsqueeze(-1).to(table.dtype)
    return torch.lerp(table[0, low], table[0, high], weight)
