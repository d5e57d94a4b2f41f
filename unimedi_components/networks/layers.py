# SPDX-License-Identifier: Apache-2.0
"""Transformer blocks with timm's parameter names, fused attention, and Eq. 1 read out beside it.

Letters: B batch, N tokens (1 CLS + P patches), H heads, C channels per head, D = H * C.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimedi_components.selection import cls_attention


class Attention(nn.Module):
    """Multi-head self-attention through `scaled_dot_product_attention`.

    Parameter names and behaviour match timm's `Attention` (`qkv`, `proj`). The attention matrix is never formed; the
    CLS row that Eq. 1 needs is computed from the CLS query alone, at the cost of one multiply-and-reduce.
    ``num_heads``: heads H; must divide `dim`. Raises ValueError: `dim` is not a multiple of `num_heads`.
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        *,
        return_attention: bool = False,
        include_cls_key: bool = False,
        first: int = 1,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, N, D), CLS first, to (B, N, D), and the head-averaged CLS attention (B, P) in float32 or None.

        ``return_attention``: also give this layer's term of Eq. 1. ``rope``: cosine and sine of the angles that queries
        and keys are turned by, (1 or B, 1, N, C).
        """
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, N, C)
        if rope is not None:
            q, k = (_turned(part, *rope) for part in (q, k))
        out = F.scaled_dot_product_attention(q, k, v)
        options: dict[str, Any] = {"include_cls_key": include_cls_key, "first": first}
        attention = cls_attention(q[:, :, 0], k, **options) if return_attention else None
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim)), attention


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channel i and i + C / 2 are a plane's coordinates."""
    low, high = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-high, low], -1) * sin.to(x.dtype)


class Mlp(nn.Module):
    """Two linear layers with GELU or OpenAI's `quick_gelu`; parameter names match timm's `Mlp` (`fc1`, `fc2`)."""

    def __init__(self, dim: int, hidden_dim: int, act_layer: str = "gelu") -> None:
        super().__init__()
        if act_layer not in ("gelu", "quick_gelu"):
            raise ValueError(f"act_layer must be gelu or quick_gelu, not {act_layer!r}")
        self.quick = act_layer == "quick_gelu"
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden) if self.quick else F.gelu(hidden))


class Block(nn.Module):
    """Pre-norm transformer block of width D; parameter names match timm's `Block`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        act_layer: str = "gelu",
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer)

    def forward(self, x: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, N, D) to (B, N, D), and this layer's term of Eq. 1, (B, P) or None; options of `Attention`."""
        mixed, attention = self.attn(self.norm1(x), **options)
        x = x + mixed
        return x + self.mlp(self.norm2(x)), attention


def arguments(scope: Mapping[str, Any]) -> dict[str, Any]:
    """A constructor's arguments, from `locals()` before its other names, without networks; for a card."""
    return {name: v for name, v in scope.items() if name != "__class__" and not isinstance(v, nn.Module)}


def init_vit_weights(module: nn.Module) -> None:
    """Initialise as timm's ViT does: linear weights truncated normal with std 0.02, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        torch.nn.init.ones_(module.weight)
        torch.nn.init.zeros_(module.bias)
