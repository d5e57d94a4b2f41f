# SPDX-License-Identifier: Apache-2.0
"""The student's masked pass, and which patch tokens of the teacher stand against it (section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from unimedi_components.networks.output import EncoderOutput
from unimedi_components.networks.unified_vit import UnifiedViT

__all__ = ["masked_pass"]


def masked_pass(
    student: UnifiedViT,
    inputs: tuple[Tensor, ...],
    keep: Tensor,
    teacher: EncoderOutput,
    *,
    drop: bool,
    loss_on: str = "all",
) -> tuple[EncoderOutput, EncoderOutput, Tensor]:
    """Run the student on masked tokens.

    Args:
        student: the encoder to run.
        inputs: its image, or volume, slices and slice positions.
        keep: patch tokens that stay visible, (B, K).
        teacher: the teacher's output on all P patch tokens.
        drop: leave masked tokens out (A-CLIP) instead of replacing them by the mask token (iBOT).
        loss_on: with the mask token, the patch tokens that are compared: "all", "masked" or "visible".

    Returns:
        the student's output and the teacher's, cut to the patch tokens that are compared, and the weight of each of
        these rows, flattened over the batch: every sample counts the same, whatever its number of tokens.
    """
    width = teacher.patches.shape[-1]
    if drop:
        out = student(*inputs, keep=keep)
        target = teacher.patches.gather(1, keep.unsqueeze(-1).expand(-1, -1, width))
        return out, EncoderOutput(teacher.cls, target), _row_weight(target)
    mask = torch.ones(teacher.patches.shape[:2], dtype=torch.bool, device=keep.device).scatter_(1, keep, False)
    out = student(*inputs, mask=mask)
    if loss_on == "all":
        return out, teacher, _row_weight(teacher.patches)
    rows = mask if loss_on == "masked" else ~mask
    compared = EncoderOutput(out.cls, out.patches[rows].view(len(rows), -1, width))
    target = teacher.patches[rows].view(len(rows), -1, width)
    return compared, EncoderOutput(teacher.cls, target), _row_weight(target)


def _row_weight(patches: Tensor) -> Tensor:
    batch, tokens = patches.shape[:2]
    return torch.full((batch * tokens,), 1.0 / tokens, device=patches.device)
