# SPDX-License-Identifier: Apache-2.0
"""Segmentation of volumes: UNETR's decoder over the unified encoder, for patches of any shape.

Letters: B batch, D width of the tokens, C classes; n stages of upsampling, from the token grid to the voxels.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks.dynunet_block import UnetOutBlock
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrUpBlock
from torch import Tensor, nn
from torch.nn import functional as F

from unimedi_components.networks.embed import interpolate_depth, resample_pos_embed_3d, to_tuple
from unimedi_components.networks.task_network import TaskNetwork, at_least_float16
from unimedi_components.networks.token_upsampling import TokenUpsampling, upsampling_strides
from unimedi_components.networks.unified_vit import UnifiedViT


def resize_positions_3d(encoder: UnifiedViT, vol_size: Sequence[int]) -> UnifiedViT:
    """Make an encoder's 3D tables for another size of volume, so that training at that size has its own positions.

    ``encoder``: changed in place; what it computes for volumes of `vol_size` stays the same. Raises ValueError: the
    patch does not divide the size.
    """
    size = to_tuple(vol_size, 3, "vol_size")
    grid = encoder.patch_embed_3d.grid(size)
    with torch.no_grad():
        table = resample_pos_embed_3d(encoder.pos_embed_3d, encoder.grid_3d, grid)
        centres = (torch.arange(grid[0], device=table.device) + 0.5)[None] / grid[0]
        depths = interpolate_depth(encoder.depth_embed, centres)
    encoder.pos_embed_3d, encoder.depth_embed = nn.Parameter(table.clone()), nn.Parameter(depths.clone())
    encoder.vol_size, encoder.grid_3d = size, grid
    encoder.hparams = {**encoder.hparams, "vol_size": size}
    return encoder


class UnifiedUNETR(TaskNetwork):
    """UNETR (Hatamizadeh et al., WACV 2022) with the unified encoder in the transformer's place (supplement, 7.2).

    The decoder is MONAI's, stage for stage, but its strides follow the 3D patch: `upsampling_strides`. n stages take n
    - 1 hidden states beside the last tokens and the image itself. Raises ValueError: hidden states that the encoder
    lacks, or not one for each skip connection; too few classes.

    Args:
        encoder: reads volumes; its position table is resampled to `vol_size` once and learned there.
        vol_size: D, H, W of the volumes or crops that the network is trained on; None keeps the encoder's. Others can
            be fed, their position table is interpolated.
        hidden_states: blocks whose outputs reach the skip connections, 0 for the first, in rising order: the first
            one joins the finest stage. MONAI's UNETR takes (3, 6, 9) of twelve for its four stages.
        feature_size: channels of the finest stage, doubled at each coarser one.
        freeze_encoder: train the decoder alone; the paper trains the entire model.
        deep_supervision: in training also return the scores of the coarser stages, which `OrganLoss` weighs in
            (UniMiSS's protocol); organs are found in fewer steps.
        background_prior: share of the voxels that a new network gives to the background (its output's bias); the rest
            is shared evenly. None starts from no preference, as MONAI's UNETR.
        residual_scores: a linear layer reads scores from the last tokens, and every stage adds its own to those of the
            coarser one, upsampled, so that a stage learns what the coarser ones cannot know (Kayalibay et al., arXiv
            1701.03056); False takes the last stage's alone, as UNETR does.
        normalize_states: bring every token of the hidden states to zero mean and unit variance, as the encoder's last
            norm does with the last tokens, so that no skip connection is louder than another. MONAI's UNETR takes them
            as they are.

    Example:
        >>> encoder = UnifiedViT(vol_size=(8, 32, 32), embed_dim=24, depth=4, num_heads=2)
        >>> network = UnifiedUNETR(encoder, 14, hidden_states=(0, 1, 2), feature_size=4)
        >>> network(torch.zeros(1, 1, 8, 32, 32)).shape
        torch.Size([1, 14, 8, 32, 32])
    """

    kind = "unetr"
    spatial_dims = 3

    def __init__(
        self,
        encoder: UnifiedViT,
        num_classes: int,
        *,
        vol_size: Sequence[int] | None = None,
        hidden_states: Sequence[int] = (3, 6, 9),
        feature_size: int = 16,
        norm: str | Sequence[Any] = "instance",
        res_block: bool = True,
        freeze_encoder: bool = False,
        deep_supervision: bool = False,
        background_prior: float | None = None,
        residual_scores: bool = False,
        normalize_states: bool = False,
    ) -> None:
        super().__init__(locals())
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2 with the background, not {num_classes}")
        strides = upsampling_strides(encoder.patch_embed_3d.patch_size)
        _check_hidden_states(hidden_states, len(strides), len(encoder.blocks), encoder.patch_embed_3d.patch_size)
        if vol_size is not None and tuple(vol_size) != encoder.vol_size:
            resize_positions_3d(encoder, vol_size)
        self.hparams |= {"vol_size": encoder.vol_size, "hidden_states": tuple(hidden_states)}
        self.hparams["norm"] = norm if isinstance(norm, str) else list(norm)
        self.hold(encoder)
        self.hidden_states = tuple(hidden_states)
        self.deep_supervision, self.residual_scores = deep_supervision, residual_scores
        self.normalize_states = normalize_states
        norm_name: Any = norm if isinstance(norm, str) else tuple(norm)
        width, channels = encoder.embed_dim, encoder.patch_embed_3d.proj.in_channels
        features = [feature_size * 2**level for level in reversed(range(len(strides)))]
        self.stem = UnetrBasicBlock(3, channels, feature_size, 3, 1, norm_name, res_block)
        # the deepest hidden state meets the coarsest stage
        self.skips = nn.ModuleList(
            TokenUpsampling(width, features[level], strides[: level + 1], norm_name, res_block)
            for level in range(len(strides) - 1)
        )
        self.stages = nn.ModuleList(
            UnetrUpBlock(3, before, after, 3, stride, norm_name, res_block)
            for before, after, stride in zip([width, *features], features, strides, strict=False)
        )
        self.out = UnetOutBlock(3, feature_size, num_classes)
        coarser = [width] * residual_scores + features[:-1] * (deep_supervision or residual_scores)
        self.coarse_outs = nn.ModuleList(UnetOutBlock(3, channels, num_classes) for channels in coarser)
        if background_prior is not None:
            _prefer_background([*self.coarse_outs, self.out], background_prior, together=residual_scores)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Segment volumes (B, 1, D, H, W) in [-1, 1], each side a multiple of the encoder's patch.

        Raises ValueError: other axes, or sides that the patch does not divide. Returns logits (B, C, D, H, W); with
        deep supervision in training mode a list of them, the finest first, each coarser one on its stage's grid.
        """
        if image.ndim != 5:
            raise ValueError(f"expected volumes (B, 1, D, H, W), got {tuple(image.shape)}")
        return self._decode(image, *self._tokens(image))

    @at_least_float16
    def _decode(self, image: Tensor, *hidden: Tensor) -> Tensor | list[Tensor]:
        skips = [skip(state) for skip, state in zip(self.skips, hidden[-2::-1], strict=True)]
        levels = [hidden[-1]]
        for stage, skip in zip(self.stages, [*skips, self.stem(image)], strict=True):
            levels.append(stage(levels[-1], skip))
        outs = [*self.coarse_outs, self.out] if self.training or self.residual_scores else [self.out]
        scores: list[Tensor] = []
        for out, level in zip(outs, levels[-len(outs) :], strict=True):
            score = out(level)
            if self.residual_scores and scores:
                score = score + F.interpolate(scores[-1], size=score.shape[2:], mode="trilinear")
            scores.append(score)
        return scores[::-1] if self.training and self.deep_supervision else scores[-1]

    def _tokens(self, image: Tensor) -> list[Tensor]:
        """The hidden states and the last tokens on their grid, each (B, D, d, h, w)."""
        output = self.encoded(image, hidden_states=self.hidden_states)
        states = [state[:, 1:] for state in output.hidden_states]
        if self.normalize_states:
            states = [F.layer_norm(state, state.shape[-1:]) for state in states]
        return [self.on_grid(state, image) for state in (*states, output.patches)]


def _prefer_background(outs: Sequence[nn.Module], share: float, together: bool) -> None:
    """Set the biases of output blocks so that equal features give the background this share (Lin et al., 2017)."""
    if not 0 < share < 1:
        raise ValueError(f"background_prior must lie between 0 and 1, not {share!r}")
    for index, out in enumerate(outs):
        bias: Any = out.conv.conv.bias  # type: ignore[union-attr]
        with torch.no_grad():
            bias.fill_(0.0 if together and index else math.log((1 - share) / (len(bias) - 1)))
            if not (together and index):
                bias[0] = math.log(share)


def _check_hidden_states(wanted: Sequence[int], stages: int, blocks: int, patch: Sequence[int]) -> None:
    rising = list(wanted) == sorted(set(wanted))
    if len(wanted) != stages - 1 or not rising or (wanted and not 0 <= wanted[0] <= wanted[-1] < blocks):
        raise ValueError(
            f"hidden_states {tuple(wanted)}: patches of {'x'.join(map(str, patch))} are decoded in {stages} stages, "
            f"which take {stages - 1} different blocks in rising order, of 0 to {blocks - 1}"
        )
