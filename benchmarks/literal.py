# SPDX-License-Identifier: Apache-2.0
"""The paper's step to the letter, the reference of `benchmarks.step`: all explicit, on the network's own weights.

Attention matrices are formed and kept, and Eq. 1 is read from them. The student runs twice, on the whole image for L_vl
(section 3.3) and masked for the distillation (3.4), where masked tokens are replaced. DINO's loss is taken of all
tokens x prototypes at once. The one thing that is not to the letter: mask and targets come from a single pass of the
teacher, as in A-CLIP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimedi_components import selection
from unimedi_components.losses.contrastive import contrastive_loss
from unimedi_components.networks import UnifiedViT, UniMedI

__all__ = ["LiteralStep", "explicit_block", "patch_softmax"]


def explicit_block(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A block of `UnifiedViT` with its attention matrix: tokens (B, N, D) to tokens and (B, H, N, N)."""
    attn = block.attn
    batch, tokens, dim = x.shape
    qkv = attn.qkv(block.norm1(x)).view(batch, tokens, 3, attn.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    matrix = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    x = x + attn.proj((matrix @ v).transpose(1, 2).reshape(batch, tokens, dim))
    return x + block.mlp(block.norm2(x)), matrix


def patch_softmax(matrix: Tensor) -> Tensor:
    """A layer's term of Eq. 1, (B, P): what the CLS row of (B, H, N, N) gives the patches, normalised over them."""
    row = matrix[:, :, 0, 1:].float()
    return (row / row.sum(-1, keepdim=True)).mean(1)


def _encode(
    encoder: UnifiedViT, inputs: tuple[Tensor, ...], mask: Tensor | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """CLS, patch tokens, and the attention matrices of all layers."""
    tokens, position = encoder._tokenize(*(*inputs, None, None)[:3])
    if mask is not None:
        tokens = torch.where(mask.unsqueeze(-1), encoder.mask_token.to(tokens.dtype), tokens)
    cls = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(tokens), -1, -1)
    x, matrices = torch.cat([cls, tokens + position], dim=1), []
    for block in encoder.blocks:
        x, matrix = explicit_block(block, x)
        matrices.append(matrix)
    x = encoder.norm(x)
    return x[:, 0], x[:, 1:], matrices


class LiteralStep(nn.Module):
    """Loss of a batch with the weights of a `UniMedI` without `center_kinds`.

    Args:
        network: in training mode; `mask_ratio` and `num_slices` are its own.
        student_temp, teacher_temp: DINO's temperatures.
    """

    def __init__(self, network: UniMedI, student_temp: float = 0.1, teacher_temp: float = 0.04) -> None:
        super().__init__()
        self.network, self.temps = network, (student_temp, teacher_temp)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Sum of L_vl, L_icl and L_pcl, the centers at zero."""
        net = self.network
        seen, student, teacher, weights = [], [], [], []
        for name in ("image2d", "image3d"):
            inputs = self._pair(batch[name])
            with torch.no_grad():
                cls, patches, matrices = _encode(net.teacher, inputs)
            teacher.append((cls, patches))
            mask = self._mask(inputs, matrices)
            del matrices
            student.append(_encode(net.encoder, inputs, mask)[:2])
            seen.append(_encode(net.encoder, inputs)[0])
            weights.append(torch.full(patches.shape[:2], 1 / patches.shape[1], device=cls.device).flatten())
        modality = torch.cat([torch.full((len(rows),), i, device=rows.device) for i, rows in enumerate(seen)])
        words = net.report_encoder(batch["input_ids"], batch["attention_mask"])
        images = net.image_projection(torch.cat(seen), modality)
        loss = contrastive_loss(images, net.text_projection(words, modality), net.logit_scale)
        loss = loss + self._dino(*(torch.cat([part[0] for part in side]) for side in (student, teacher)))
        rows = (torch.cat([part[1].flatten(0, 1) for part in side]) for side in (student, teacher))
        return loss + self._dino(*rows, torch.cat(weights))

    @torch.no_grad()
    def _pair(self, image: Tensor) -> tuple[Tensor, ...]:
        """An X-ray alone, or a volume with the slices that Eq. 1 and 2 choose."""
        if image.ndim == 4:
            return (image,)
        net, grid = self.network, self.network.encoder.token_grids(image)[0]
        v = torch.stack([patch_softmax(matrix) for matrix in _encode(net.teacher, (image,))[2]]).mean(0)
        scores = selection.slice_scores(v, grid)
        index = selection.select_slices(scores, net.num_slices, net.encoder.patch_depth)
        return (image, *net.take_slices(image, index))

    def _mask(self, inputs: tuple[Tensor, ...], matrices: list[Tensor]) -> Tensor:
        """True for the tokens of each segment that the teacher attends least, (B, P)."""
        v = torch.stack([patch_softmax(matrix) for matrix in matrices]).mean(0)
        grids = self.network.encoder.token_grids(*inputs[:2])
        parts = v.split([math.prod(grid) for grid in grids], dim=1)
        kept = selection.kept_counts(grids, self.network.mask_ratio)
        ranks = [part.argsort(dim=1, descending=True, stable=True).argsort(dim=1) for part in parts]
        return torch.cat([rank >= count for rank, count in zip(ranks, kept, strict=True)], dim=1)

    def _dino(self, student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
        net = self.network
        logits = F.linear(net.dino_head(student), net.dino_head.prototypes) / self.temps[0]
        with torch.no_grad():
            scores = F.linear(net.teacher_head(teacher), net.teacher_head.prototypes)
            targets = (scores / self.temps[1]).softmax(-1)
        loss = -(targets * logits.log_softmax(-1)).sum(-1)
        return loss.mean() if weight is None else (loss * weight).sum() / weight.sum()
