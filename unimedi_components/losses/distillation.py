# SPDX-License-Identifier: Apache-2.0
"""DINO / iBOT self-distillation loss computed in chunks of rows, and the centers that balance the teacher's targets.

The direct computation holds about five N x K matrices (logits, soft targets, log-probabilities, gradients). Here each
chunk of rows is scored, differentiated and forgotten, so what grows with N are the (N, b) gradients alone.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unimedi_components.distributed import all_reduce_sum, is_distributed, world_size

# a few tokens in a few chunks would save little memory; of fewer rows, matrix products are slow
_FEWEST_CHUNKS, _FEWEST_ROWS = 14, 64


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over rows of weight * CE(teacher, student), differentiated while each chunk is at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        student_prototypes: Tensor,
        teacher: Tensor,
        teacher_prototypes: Tensor,
        teacher_bias: Tensor,
        teacher_temp: float,
        weight: Tensor | None,
        groups: Sequence[int],
        chunk_size: int,
    ) -> Tensor:
        need_rows, need_prototypes = ctx.needs_input_grad[:2]
        grad_rows = torch.empty_like(student) if need_rows else None
        grad_prototypes = torch.zeros_like(student_prototypes) if need_prototypes else None
        total = student.new_zeros(())
        chunk_size = min(chunk_size, max(_FEWEST_ROWS, len(student) // _FEWEST_CHUNKS))
        for bias, part in _chunks(teacher_bias, groups, chunk_size):
            rows = student[part]
            target = torch.addmm(bias, teacher[part], teacher_prototypes.T, alpha=1 / teacher_temp)
            target = torch.softmax(target, dim=1)
            log_prob = torch.log_softmax(rows @ student_prototypes.T, dim=1)
            grad_logits = log_prob.exp().sub_(target) if need_rows or need_prototypes else None
            loss = -log_prob.mul_(target).sum(1)
            total += (loss if weight is None else loss * weight[part]).sum()
            if grad_logits is None:
                continue
            scale = None if weight is None else weight[part, None]
            if grad_rows is not None:
                grad = grad_logits @ student_prototypes
                grad_rows[part] = grad if scale is None else grad * scale
            if grad_prototypes is not None:
                grad_prototypes.addmm_(grad_logits.T, rows if scale is None else rows * scale)
            # else they live on beside the next chunk's
            del target, log_prob, grad_logits
        ctx.save_for_backward(grad_rows, grad_prototypes)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_rows, grad_prototypes = ctx.saved_tensors
        rows = None if grad_rows is None else grad_rows * grad
        prototypes = None if grad_prototypes is None else grad_prototypes * grad
        return rows, prototypes, *[None] * 7


def _chunks(bias: Tensor, groups: Sequence[int], chunk_size: int) -> Iterator[tuple[Tensor, slice]]:
    """The bias and the rows of every chunk; no chunk crosses from one group into the next."""
    end = 0
    for row, size in zip(bias, groups, strict=True):
        start, end = end, end + size
        for first in range(start, end, chunk_size):
            yield row, slice(first, min(first + chunk_size, end))


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    weight: Tensor | None = None,
    chunk_size: int = 128,
    groups: Sequence[int] | None = None,
) -> Tensor:
    """DINO's cross-entropy between the centered, sharpened teacher and the student, averaged over rows.

    Per row: CE(softmax((t Wt^T - center) / teacher_temp), log_softmax(s Ws^T / student_temp)). Computed in fp32
    (float64 inputs stay float64), also under autocast, and without ever holding an N x K matrix; gradients reach
    `student` and `student_prototypes` only. In a process group the mean is over all ranks' rows, the value is the same
    on every rank, and the averaged gradient is that of the joint batch; ranks may have different N, also 0.

    Args:
        student, teacher: bottleneck features, (N, b).
        student_prototypes, teacher_prototypes: last-layer weights, (K, b).
        center: what is taken off the teacher's logits, (K,), or one row for each of `groups`, (G, K).
        weight: weight of each row, (N,); the mean is then sum(weight * loss) / sum(weight). None for equal weights.
        chunk_size: most rows at a time, fewer where N is small; 128 rows of 65,536 prototypes are 32 MiB per buffer.
        groups: how many rows each row of `center` is for, one after another; None for all rows, with one center.

    Returns:
        Scalar; zero, still connected to its inputs, if no rank has a row.
    """
    center = center if center.ndim == 2 else center[None]
    groups = [student.shape[0]] if groups is None else list(groups)
    _check_shapes(student, teacher, student_prototypes, teacher_prototypes, center, weight, groups)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    dtype = torch.promote_types(student.dtype, torch.float32)
    row_weight = None if weight is None else weight.detach().to(dtype)
    with torch.autocast(student.device.type, enabled=False):
        loss_sum = _ChunkedCrossEntropy.apply(
            student.to(dtype) / student_temp,
            student_prototypes.to(dtype),
            teacher.detach().to(dtype),
            teacher_prototypes.detach().to(dtype),
            center.detach().to(dtype) / -teacher_temp,
            teacher_temp,
            row_weight,
            groups,
            chunk_size,
        )
    # `new_full` is filled on the device, where `new_tensor` would copy from the host
    weight_sum = loss_sum.new_full((), student.shape[0]) if row_weight is None else row_weight.sum()
    totals = all_reduce_sum(torch.stack([loss_sum.detach(), weight_sum]))
    divisor = torch.where(totals[1] == 0, torch.ones_like(totals[1]), totals[1])
    if not is_distributed():
        return loss_sum / divisor
    # The joint value with this rank's share of the gradient, times the ranks that the gradients are averaged
    # over.
    return totals[0] / divisor + (loss_sum - loss_sum.detach()) * (world_size() / divisor)


def _check_shapes(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    center: Tensor,
    weight: Tensor | None,
    groups: Sequence[int],
) -> None:
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must both be (N, b)")
    shape = (center.shape[1], student.shape[1])
    for name, prototypes in (("student", student_prototypes), ("teacher", teacher_prototypes)):
        if tuple(prototypes.shape) != shape:
            raise ValueError(f"{name}_prototypes are {tuple(prototypes.shape)}, expected (K, b) = {shape}")
    if len(groups) != len(center) or sum(groups) != student.shape[0]:
        raise ValueError(f"groups of {groups} rows do not share {student.shape[0]} rows among {len(center)} centers")
    if weight is not None and tuple(weight.shape) != (student.shape[0],):
        raise ValueError(f"weight is {tuple(weight.shape)}, expected (N,) = ({student.shape[0]},)")


@torch.no_grad()
def update_center(
    center: Tensor, teacher: Tensor, teacher_prototypes: Tensor, momentum: float = 0.9, weight: Tensor | None = None
) -> None:
    """Move `center` in place to momentum * center + (1 - momentum) * mean of the teacher's logits, as in DINO.

    The mean is over the rows of all ranks; by linearity it is the logits of the mean row. Without a row on any rank
    the center stays as it is.

    Args:
        teacher: bottleneck features, (N, b); N may differ between ranks.
        weight: weight of each row, (N,), as in the loss; None for equal weights.
    """
    with torch.autocast(teacher.device.type, enabled=False):
        rows = teacher.to(torch.promote_types(teacher.dtype, torch.float32))
        weight = rows.new_ones(len(rows)) if weight is None else weight.to(rows.dtype)
        packed = all_reduce_sum(torch.cat([weight @ rows, weight.sum()[None]]))
        mean = teacher_prototypes.to(rows.dtype) @ (packed[:-1] / torch.where(packed[-1] > 0, packed[-1], 1.0))
        # A select instead of a branch on the weight, which would make the GPU wait.
        moved = center.to(mean.dtype).lerp(mean, 1 - momentum)
        center.copy_(torch.where(packed[-1] > 0, moved, center.to(mean.dtype)))


@torch.no_grad()
def balanced_center(
    center: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    teacher_temp: float,
    rounds: int = 3,
    chunk_size: int = 128,
) -> Tensor:
    """Center with which every prototype gets its share of a batch: Sinkhorn-Knopp (SwAV, DINOv2) as a center.

    Sinkhorn-Knopp scales the rows and columns of exp(logits / teacher_temp) in turn. The scale of a row is what
    softmax does anyway, and that of a column is a shift of its logits, so that the balanced assignment is
    softmax((logits - center) / teacher_temp) with the center returned here, (K,) in fp32 at least. It begins at the
    `center` given, so that a running one lets few rounds do, and never holds an N x K matrix.
    ``teacher``: bottleneck features, (N, b); N may differ between ranks, and where none has a row `center` is returned.
    """
    with torch.autocast(teacher.device.type, enabled=False):
        rows = teacher.to(torch.promote_types(teacher.dtype, torch.float32)) / teacher_temp
        prototypes = teacher_prototypes.to(rows.dtype)
        shift = center.to(rows.dtype) / -teacher_temp
        for _ in range(rounds):
            share = torch.cat([torch.zeros_like(shift), shift.new_full((1,), len(rows))])
            for part in rows.split(chunk_size) if len(rows) else ():
                share[:-1] += torch.softmax(torch.addmm(shift, part, prototypes.T), dim=1).sum(0)
            share = all_reduce_sum(share)
            # A prototype that no row is near gets a finite lift; without rows nothing moves.
            step = torch.log(share[:-1] * (len(shift) / share[-1].clamp(min=1)) + 1e-8)
            shift = shift - torch.where(share[-1] > 0, step, torch.zeros_like(step))
        # softmax ignores a common shift; without one the running center stays bounded
        return (shift - shift.mean()) * -teacher_temp
