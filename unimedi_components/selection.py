# SPDX-License-Identifier: Apache-2.0
"""Attentive slice selection and attention-guided masking: Eq. 1 (one layer), Eq. 2, and section 3.4 of the paper.

Letters: B batch, P patch tokens, S slabs (token layers along depth), N tokens per slab, k slices chosen.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Grid = tuple[int, int, int]


def cls_attention(q_cls: Tensor, k: Tensor, *, include_cls_key: bool = False, first: int = 1) -> Tensor:
    """Attention from the CLS query to the patch keys of one layer, averaged over heads (a term of Eq. 1).

    Eq. 1 takes the softmax over the patch keys alone. A-CLIP, whose code the paper builds on, takes it over all keys
    and then cuts the CLS key off: `include_cls_key=True`.

    Args:
        q_cls: CLS queries **q**_lh([CLS]), (B, H, C).
        k: keys of all tokens with CLS first, **K**_lh, (B, H, first + P, C).
        include_cls_key: let the CLS key take its share of the softmax.
        first: where the patches begin: after the CLS token, and after registers where there are any.

    Returns:
        (B, P) in float32; rows sum to 1 unless `include_cls_key`.
    """
    keys = k if include_cls_key else k[:, :, first:]
    # Multiply-and-reduce reads the strided keys once; a matrix product would copy them first.
    logits = (keys * q_cls.unsqueeze(2)).sum(-1, dtype=torch.promote_types(k.dtype, torch.float32))
    attention = (logits * q_cls.shape[-1] ** -0.5).softmax(-1).mean(1)
    return attention[:, first:] if include_cls_key else attention


def slice_scores(attention: Tensor, grid: Grid) -> Tensor:
    """Relevance s_i of each slab to the report: the mean of its tokens' attention (Eq. 2).

    Args:
        attention: Eq. 1's **v** of the 3D tokens, (B, P).
        grid: token grid (S, rows, columns) with S * rows * columns = P.

    Returns:
        (B, S). With a patch depth of 1 a slab is a slice and this is the paper's Eq. 2 to the letter.

    Raises:
        ValueError: the grid does not hold P tokens.
    """
    slabs, rows, columns = grid
    if slabs * rows * columns != attention.shape[1]:
        raise ValueError(
            f"a token grid of {slabs}x{rows}x{columns} does not hold {attention.shape[1]} attention values"
        )
    return attention.view(attention.shape[0], slabs, rows * columns).mean(-1)


def resample_profile(profile: Tensor, slabs: int) -> Tensor:
    """A value for each of `slabs` slabs, (slabs,), linear between those of other slabs, (S,)."""
    if len(profile) == slabs:
        return profile
    return F.interpolate(profile[None, None], size=slabs, mode="linear", align_corners=False)[0, 0]


def relative_scores(scores: Tensor, profile: Tensor, power: float) -> Tensor:
    """Slab scores over what slabs of their place usually score, to a power.

    This is ours, not the paper's: much of the attention on a volume is a fixed profile along the body, which says where
    lesions are frequent (power 0, Eq. 2) but not whether this patient has one there (power 1).

    Args:
        scores: Eq. 2's scores, (B, S).
        profile: mean scores of other volumes, (S',); interpolated where S' is not S.
        power: 0 to 1.
    """
    return scores / resample_profile(profile, scores.shape[1]).to(scores).clamp_min(1e-6) ** power


def random_scores(batch: int, slabs: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Uniform scores (B, S): their top k are k different slabs at random, the baseline of Table 7."""
    return torch.rand(batch, slabs, device=device, generator=generator)


def slab_to_slices(slabs: Tensor, patch_depth: int) -> Tensor:
    """Index of the centre slice of each slab; `slabs` is any integer tensor."""
    return slabs * patch_depth + patch_depth // 2


def select_slices(scores: Tensor, k: int, patch_depth: int, *, expand: str = "centre") -> Tensor:
    """The k slices that Eq. 2 ranks highest, in anatomical order.

    Args:
        scores: slab scores, (B, S).
        patch_depth: slices per slab.
        expand: "centre" takes the middle slice of each of the k best slabs; "repeat" ranks raw slices, where all
            slices of a slab share its score, so that the best slabs give runs of neighbours (as in the paper's Fig. 5).

    Returns:
        slice indices in ascending order, (B, k), int64.

    Raises:
        ValueError: k is below 1 or above what can be chosen, or `expand` is unknown.
    """
    slabs = scores.shape[1]
    if expand == "centre":
        _check_k(k, slabs, "slabs", slabs, patch_depth)
        return slab_to_slices(_top(scores, k), patch_depth)
    if expand == "repeat":
        _check_k(k, slabs * patch_depth, "slices", slabs, patch_depth)
        return _top(scores.repeat_interleave(patch_depth, dim=1), k)
    raise ValueError(f"expand must be 'centre' or 'repeat', not {expand!r}")


def _check_k(k: int, most: int, what: str, slabs: int, patch_depth: int) -> None:
    if not 1 <= k <= most:
        raise ValueError(
            f"cannot select k={k} slices: the volume has {most} {what} to choose from ({slabs} slabs of {patch_depth} "
            f"slices each); set num_slices (k) between 1 and {most} or use a smaller patch depth"
        )


def _top(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest in ascending order; a stable sort makes ties go to the lower index on every device."""
    if torch.onnx.is_in_onnx_export():
        # ONNX has no stable sort, and its TopK gives equal values in the order of their indices
        return scores.topk(k, dim=1).indices.sort(dim=1).values
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


def take_slices(volume: Tensor, index: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cut slices out of volumes as 2D images (bilinear resize), with their depth as a fraction.

    Args:
        volume: (B, C, D, H, W).
        index: slice indices, (B, k).
        size: height and width of the images.

    Returns:
        slices (B, k, C, *size) and the depth of their centres in [0, 1], (B, k).
    """
    batch, channels, depth, height, width = volume.shape
    where = index[:, None, :, None, None].expand(-1, channels, -1, height, width)
    slices = volume.gather(2, where).transpose(1, 2)  # (B, k, C, H, W)
    if (height, width) != tuple(size):
        flat = F.interpolate(slices.flatten(0, 1), size=tuple(size), mode="bilinear", align_corners=False)
        slices = flat.view(batch, -1, channels, *size)
    return slices, (index + 0.5) / depth


def keep_tokens(attention: Tensor, grids: Sequence[Grid], mask_ratio: float, *, block: int = 1) -> Tensor:
    """Tokens that the student keeps: the most attended ones of each segment (section 3.4).

    Args:
        attention: **v** of the teacher's pass, (B, P), segments one after another.
        grids: token grid (depth, rows, columns) of each segment: the 3D tokens, then the 2D tokens.
        mask_ratio: share of each segment that is masked, in [0, 1).
        block: pool attention over block x block tokens in the plane and keep whole blocks (A-CLIP's `block: 2`);
            the rows and columns of every grid must be multiples of it.

    Returns:
        kept token indices in ascending order, (B, K), where every segment keeps round((1 - mask_ratio) * its tokens).

    Raises:
        ValueError: ratio out of range, grids that do not hold P tokens, or a block that does not divide a grid.
    """
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"mask_ratio must be in [0, 1), not {mask_ratio}")
    sizes = [depth * rows * columns for depth, rows, columns in grids]
    if sum(sizes) != attention.shape[1]:
        raise ValueError(f"token grids {list(grids)} hold {sum(sizes)} tokens, attention has {attention.shape[1]}")
    kept, start = [], 0
    for grid, size, count in zip(grids, sizes, kept_counts(grids, mask_ratio, block=block), strict=True):
        segment = attention[:, start : start + size]
        kept.append(start + _keep_in_segment(segment, grid, count, block))
        start += size
    return torch.cat(kept, dim=1)


def kept_counts(grids: Sequence[Grid], mask_ratio: float, *, block: int = 1) -> list[int]:
    """How many tokens of each segment `keep_tokens` keeps; arguments as there."""
    blocks = [depth * rows * columns / block**2 for depth, rows, columns in grids]
    return [max(1, round((1.0 - mask_ratio) * count)) * block**2 for count in blocks]


def _keep_in_segment(attention: Tensor, grid: Grid, count: int, block: int) -> Tensor:
    depth, rows, columns = grid
    batch = attention.shape[0]
    if block == 1:
        return _top(attention, count)
    if rows % block or columns % block:
        raise ValueError(f"block {block} does not divide the token grid {rows}x{columns}")
    pooled = F.avg_pool2d(attention.view(batch, depth, rows, columns), block)
    best = _top(pooled.flatten(1), count // block**2)
    blocks = torch.zeros_like(pooled.flatten(1), dtype=torch.bool).scatter_(1, best, True).view_as(pooled)
    tokens = blocks.repeat_interleave(block, 2).repeat_interleave(block, 3).flatten(1)
    return tokens.nonzero()[:, 1].view(batch, -1)
