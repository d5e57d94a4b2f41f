# SPDX-License-Identifier: Apache-2.0
"""The vision encoder E_v: one transformer that reads 2D images, 3D volumes, and volumes with their selected slices.

Letters: B batch, P patch tokens, N = 1 + P, D width, k slices, S slabs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unimedi_components.networks.embed import (
    PatchEmbed,
    interpolate_depth,
    resample_pos_embed_2d,
    resample_pos_embed_3d,
    rotary_angles,
    to_tuple,
)
from unimedi_components.networks.hub import HubEncoder
from unimedi_components.networks.layers import Block, arguments, init_vit_weights
from unimedi_components.networks.output import EncoderOutput

_IN_CARD = (*("in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "norm_eps", "include_cls_key"),)


class UnifiedViT(HubEncoder):
    """Vision transformer with tokenizers T_2D and T_3D over one shared backbone (sections 3.1 to 3.3).

    The 2D half has timm's parameter names (`cls_token`, `pos_embed`, `patch_embed.proj`, `blocks.*`, `norm`), so that
    ViT weights load by name. The 3D half adds `patch_embed_3d.proj` and `pos_embed_3d`; pseudo-pairs add
    `segment_embed` (volume, slice) and `depth_embed` (one row per slab), both zero at the start, so that a new network
    treats a slice as the 2D image that the paper regards it as. Position tables are resampled to the grid of the input.
    Raises ValueError: a size that its patch does not divide, an `embed_dim` that `num_heads` does not divide, or heads
    whose channels 4 does not divide with `rope`.

    Args:
        img_size: height and width that `pos_embed` is made for.
        vol_size: depth, height and width that `pos_embed_3d` is made for.
        in_chans: image channels, 1 for grey images.
        reg_tokens: register tokens between CLS and patches, as DINOv2's _reg models have; nothing of them is returned.
        pre_norm: a layer norm before the first block, `norm_pre`, as CLIP has it.
        act_layer: of the MLPs, "gelu", or "quick_gelu" as OpenAI's CLIP.
        rope: turn queries and keys by their place in the plane, as DINOv3, beside what the position tables add;
            `rope_periods` are its periods.
        include_cls_key: let the CLS key share in Eq. 1's softmax, as A-CLIP's code does; the paper's equation does not.
        grad_checkpointing: recompute the blocks in the backward pass instead of storing what is in them (timm's name).

    Raises:
        ValueError: a width, depth or number of heads below 1, a size that its patch does not divide, an `embed_dim`
    Example:
        >>> encoder = UnifiedViT(img_size=32, vol_size=(8, 32, 32), embed_dim=24, depth=2, num_heads=2)
        >>> encoder(torch.zeros(1, 1, 8, 32, 32), return_attention=True).attention.shape
        torch.Size([1, 8])
    """

    rope_periods: Tensor | None

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        vol_size: Sequence[int] = (32, 128, 128),
        *,
        patch_size: int | Sequence[int] = 16,
        patch_size_3d: Sequence[int] = (4, 16, 16),
        in_chans: int = 1,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        reg_tokens: int = 0,
        pre_norm: bool = False,
        act_layer: str = "gelu",
        rope: bool = False,
        include_cls_key: bool = False,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if min(embed_dim, depth, num_heads) < 1:
            raise ValueError(f"embed_dim {embed_dim}, depth {depth} and num_heads {num_heads} must be at least 1")
        given = arguments(locals())
        sizes = {"img_size": 2, "vol_size": 3, "patch_size": 2, "patch_size_3d": 3}
        self.hparams = {name: to_tuple(given[name], length, name) for name, length in sizes.items()}
        self.hparams |= {name: given[name] for name in _IN_CARD}
        # cards of networks without these say nothing of them
        self.hparams |= {name: given[name] for name in ("reg_tokens", "pre_norm", "rope") if given[name]}
        self.hparams |= {"act_layer": act_layer} if act_layer != "gelu" else {}
        self.img_size, self.vol_size = self.hparams["img_size"], self.hparams["vol_size"]
        self.embed_dim = self.num_features = embed_dim
        self.num_heads = num_heads
        self.include_cls_key = include_cls_key
        self.grad_checkpointing = grad_checkpointing
        self.patch_embed = PatchEmbed(self.hparams["patch_size"], in_chans, embed_dim)
        self.patch_embed_3d = PatchEmbed(self.hparams["patch_size_3d"], in_chans, embed_dim)
        self.grid_2d = self.patch_embed.grid(self.img_size)
        self.grid_3d = self.patch_embed_3d.grid(self.vol_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.grid_2d), embed_dim))
        self.pos_embed_3d = nn.Parameter(torch.zeros(1, math.prod(self.grid_3d), embed_dim))
        self.segment_embed = nn.Parameter(torch.zeros(1, 2, embed_dim))
        self.depth_embed = nn.Parameter(torch.zeros(1, self.grid_3d[0], embed_dim))
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.norm_pre = nn.LayerNorm(embed_dim, eps=norm_eps) if pre_norm else None
        channels = embed_dim // num_heads
        if rope and channels % 4:
            raise ValueError(f"rotary positions need heads of 4, 8, ... channels, not {channels}")
        self.register_buffer("rope_periods", 100 ** torch.arange(0, 1, 4 / channels) if rope else None)
        options: dict[str, Any] = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "norm_eps": norm_eps}
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, **options, act_layer=act_layer) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        for table in (self.cls_token, self.mask_token, self.pos_embed, self.pos_embed_3d, self.reg_token):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
        self.apply(init_vit_weights)

    @property
    def patch_depth(self) -> int:
        """Slices of a slab."""
        return self.patch_embed_3d.patch_size[0]

    def token_grids(self, image: Tensor, slices: Tensor | None = None) -> list[tuple[int, int, int]]:
        """Token grid (depth, rows, columns) of each segment of an input: the image, then the slices if any."""
        if image.ndim == 4:
            rows, columns = self.patch_embed.grid(image.shape[2:])
            return [(1, rows, columns)]
        slabs, rows, columns = self.patch_embed_3d.grid(image.shape[2:])
        grids = [(slabs, rows, columns)]
        if slices is not None:
            rows, columns = self.patch_embed.grid(slices.shape[-2:])
            grids.append((slices.shape[1], rows, columns))
        return grids

    def forward(
        self,
        image: Tensor,
        slices: Tensor | None = None,
        slice_position: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        keep: Tensor | None = None,
        return_attention: bool = False,
        hidden_states: Sequence[int] = (),
    ) -> EncoderOutput:
        """Encode images, volumes, or volumes with their slices.

        Raises ValueError: wrong number of axes or channels, slices without positions, or a size that its patch does not
        divide.

        Args:
            image: X-rays (B, C, H, W) or volumes (B, C, D, H, W) with D from inferior to superior, in [-1, 1].
            slices: selected slices regarded as 2D images, (B, k, C, H, W); volumes only.
            slice_position: where each slice lies, as a fraction of the depth in [0, 1], (B, k).
            mask: patch tokens to replace by the mask token, bool (B, P).
            keep: indices of the patch tokens to keep, the others are dropped before the first block, int64 (B, K).
            return_attention: also compute Eq. 1's **v** over all layers and heads.
            hidden_states: indices of the blocks whose outputs are wanted, 0 for the first.

        Returns:
            `EncoderOutput`; P counts the kept tokens.
        """
        tokens, position = self._tokenize(image, slices, slice_position)
        if mask is not None:
            tokens = torch.where(mask.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        x = tokens + position
        if keep is not None:
            x = x.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        first = self.cls_token + self.pos_embed[:, :1]
        if self.reg_token is not None:
            first = torch.cat([first, self.reg_token], 1)
        x = torch.cat([first.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        rope: tuple[Tensor, Tensor] | None = None
        if self.rope_periods is not None:
            angles = rotary_angles(self.rope_periods, self.token_grids(image, slices))
            angles = angles.unsqueeze(0) if keep is None else angles[keep]
            angles = F.pad(angles, (0, 0, first.shape[1], 0)).unsqueeze(1)  # tokens without a place are not turned
            rope = angles.cos(), angles.sin()
        return self._encode(x, first.shape[1], rope, return_attention, set(hidden_states))

    def _tokenize(self, image: Tensor, slices: Tensor | None, slice_position: Tensor | None) -> tuple[Tensor, Tensor]:
        """Patch tokens (B, P, D) and their position embeddings (1 or B, P, D), kept apart for masking."""
        if image.ndim not in (4, 5):
            raise ValueError(
                f"expected images (B, C, H, W) or volumes (B, C, D, H, W), got a tensor of shape {tuple(image.shape)}"
            )
        channels = self.patch_embed.proj.in_channels
        if image.shape[1] != channels:
            raise ValueError(f"the encoder reads {channels} channel(s), the image has {image.shape[1]}")
        if image.ndim == 4:
            return self.patch_embed(image), self._position_2d(image.shape[2:])
        grid = self.patch_embed_3d.grid(image.shape[2:])
        tokens = self.patch_embed_3d(image)
        position = resample_pos_embed_3d(self.pos_embed_3d, self.grid_3d, grid) + self.segment_embed[:, :1]
        if slices is None:
            return tokens, position
        if slice_position is None:
            raise ValueError("slices need slice_position, their depth as a fraction of the volume")
        # not len(): a traced network must take any number of images
        batch = slices.shape[0]
        slice_tokens = self.patch_embed(slices.flatten(0, 1)).view(batch, -1, self.embed_dim)
        place = self._position_2d(slices.shape[-2:]).unsqueeze(1)  # (1, 1, n, D)
        depth = interpolate_depth(self.depth_embed, slice_position).unsqueeze(2)  # (B, k, 1, D)
        slice_place = (place + depth).flatten(1, 2) + self.segment_embed[:, 1:]
        return torch.cat([tokens, slice_tokens], 1), torch.cat([position.expand(batch, -1, -1), slice_place], 1)

    def _position_2d(self, size: Sequence[int]) -> Tensor:
        return resample_pos_embed_2d(self.pos_embed[:, 1:], self.grid_2d, self.patch_embed.grid(size))

    def _encode(
        self, x: Tensor, first: int, rope: tuple[Tensor, Tensor] | None, return_attention: bool, wanted: set[int]
    ) -> EncoderOutput:
        def without_registers(x: Tensor) -> Tensor:
            return x if first == 1 else torch.cat([x[:, :1], x[:, first:]], 1)

        options: dict[str, Any] = {"return_attention": return_attention, "include_cls_key": self.include_cls_key}
        options |= {"first": first, "rope": rope}
        if self.norm_pre is not None:
            x = self.norm_pre(x)
        attention: Tensor | None = None
        hidden: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x, row = checkpoint(block, x, use_reentrant=False, **options)
            else:
                x, row = block(x, **options)
            if row is not None:
                attention = row if attention is None else attention + row
            if index in wanted:
                hidden.append(without_registers(x))
        x = without_registers(self.norm(x))
        if attention is not None:
            attention = attention / len(self.blocks)
        return EncoderOutput(cls=x[:, 0], patches=x[:, 1:], attention=attention, hidden_states=tuple(hidden))


def compiled_forward(backend: bool | str = True) -> Callable[..., EncoderOutput]:
    """`UnifiedViT.forward` by `torch.compile`: takes an encoder and its inputs, one graph for each of their shapes.

    ``backend``: of torch.compile; True for Inductor, which needs a C++ compiler, on a GPU Triton.
    """
    import torch._dynamo.config as settings  # costs a second

    # a step has up to nine kinds of pass: of teacher, student and selector, in 2D and 3D, of segments alone
    settings.recompile_limit = max(settings.recompile_limit, 32)
    # cutting graphs at DistributedDataParallel's buckets does not go with checkpointing
    settings.optimize_ddp = False
    name = "inductor" if backend is True else str(backend)
    return torch.compile(UnifiedViT.forward, dynamic=False, backend=name)
