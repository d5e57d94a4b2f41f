# SPDX-License-Identifier: Apache-2.0
"""The student's masked pass, and which tokens of the teacher stand against it (section 3.4)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unimedi_components.networks.heads import DINOHead
from unimedi_components.networks.output import EncoderOutput
from unimedi_components.selection import Grid, kept_counts

MODALITIES = ("image2d", "image3d")
# Kinds of token that the distillation head centers and the loss balances each for itself.
KINDS = ("image2d_cls", "image3d_cls", "image2d_patches", "image3d_patches", "slices_patches")


@dataclass(frozen=True)
class Compared:
    """What the distillation losses compare for some samples of one modality: outputs with those patch tokens alone.

    ``segments``: how many of the P' tokens are of each segment, one after another.
    """

    student: EncoderOutput
    teacher: EncoderOutput
    segments: tuple[int, ...]

    @property
    def weight(self) -> Tensor:
        """Weight of each patch token, (B, P', 1): every sample counts the same, whatever its number of tokens."""
        shape = self.student.patches.shape
        return torch.full((*shape[:2], 1), 1.0 / shape[1], device=self.student.patches.device)


def masked_pass(
    student: Callable[..., EncoderOutput],
    inputs: tuple[Tensor, ...],
    keep: Tensor,
    teacher: EncoderOutput,
    grids: Sequence[Grid],
    mask_ratio: float,
    *,
    drop: bool,
    block: int = 1,
    loss_on: str = "all",
    segment: int | None = None,
) -> Compared:
    """Run the student on masked tokens.

    Args:
        student: runs the encoder.
        inputs: its image, or volume, slices and slice positions.
        keep: patch tokens that stay visible, (B, K).
        grids: token grid of each segment of the P tokens.
        mask_ratio, block: with which `keep` was chosen, see `selection.keep_tokens`.
        drop: leave masked tokens out (A-CLIP) instead of replacing them by the mask token (iBOT).
        loss_on: with the mask token, the patch tokens that are compared: "all", "masked" or "visible".

    Returns:
        the student's output and the teacher's on the patch tokens that are compared.
    """
    sizes = [math.prod(grid) for grid in grids]
    kept = kept_counts(grids, mask_ratio, block=block)
    shown = range(len(grids)) if segment is None else [segment]
    counts = {"visible": kept, "all": sizes, "masked": [a - b for a, b in zip(sizes, kept, strict=True)]}[loss_on]
    segments = tuple(count if i in shown else 0 for i, count in enumerate(counts))
    if segment is not None:
        keep = keep.split(kept, dim=1)[segment]
    width = teacher.patches.shape[-1]
    if drop:
        out = student(*inputs, keep=keep)
        target = teacher.patches.gather(1, keep.unsqueeze(-1).expand(-1, -1, width))
        return Compared(out, EncoderOutput(teacher.cls, target), segments)
    mask = torch.ones(teacher.patches.shape[:2], dtype=torch.bool, device=keep.device).scatter_(1, keep, False)
    target, seen = teacher.patches, None
    if segment is not None:
        start = sum(sizes[:segment])
        seen = torch.arange(start, start + sizes[segment], device=keep.device).expand(len(keep), -1)
        target = target[:, start : start + sizes[segment]]
    out = student(*inputs, mask=mask, keep=seen)
    if loss_on == "all":
        return Compared(out, EncoderOutput(teacher.cls, target), segments)
    rows = mask if seen is None else mask.gather(1, seen)
    rows = rows if loss_on == "masked" else ~rows
    compared = EncoderOutput(out.cls, out.patches[rows].view(len(rows), -1, width))
    return Compared(compared, EncoderOutput(teacher.cls, target[rows].view(len(rows), -1, width)), segments)


def compare(compared: Mapping[str, Sequence[Compared]], head: DINOHead, teacher_head: DINOHead) -> dict[str, Any]:
    """DINO bottleneck features of CLS and patch tokens, rows in the order of `KINDS`.

    ``compared``: the masked passes of each of `MODALITIES`.

    Returns:
        the fields of `UniMediOutput` from `student_cls` to `teacher_prototypes`.
    """
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {kind: [] for kind in KINDS}
    for name, part in ((name, part) for name, parts in compared.items() for part in parts):
        found[f"{name}_cls"].append((part.student.cls, part.teacher.cls, part.weight[:, 0]))
        triple = (part.student.patches, part.teacher.patches, part.weight)
        segments = zip(*(tensor.split(part.segments, dim=1) for tensor in triple), strict=True)
        for kind, rows in zip((name, "slices"), segments, strict=False):
            student, teacher, weight = (tensor.flatten(0, 1) for tensor in rows)
            found[f"{kind}_patches"].append((student, teacher, weight))
    result: dict[str, Any] = {}
    for name, groups, kinds in (("cls", "cls_groups", KINDS[:2]), ("patches", "patch_groups", KINDS[2:])):
        sizes = tuple(sum(len(rows[0]) for rows in found[kind]) for kind in kinds)
        columns = zip(*(rows for kind in kinds for rows in found[kind]), strict=True)
        student, teacher, weight = (torch.cat(column) for column in columns)
        parts = [
            torch.full((size,), KINDS.index(kind), device=student.device)
            for kind, size in zip(kinds, sizes, strict=True)
        ]
        result[f"student_{name}"] = head(student, torch.cat(parts))
        with torch.no_grad():
            result[f"teacher_{name}"] = teacher_head(teacher, torch.cat(parts))
        result |= {groups: sizes, "patch_weight": weight.flatten()}
    with torch.no_grad():
        result["teacher_prototypes"] = teacher_head.prototypes
    return {**result, "student_prototypes": head.prototypes}
