# SPDX-License-Identifier: Apache-2.0
"""DINO / iBOT self-distillation loss computed in chunks of rows, and the centers of the teacher's logits.

The direct computation holds about five N x K matrices (logits, soft targets, log-probabilities, gradients).
Here each chunk of rows is scored, differentiated and forgotten, so what grows with N are the (N, b) gradients
alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unimedi_components.distributed import all_reduce_sum, is_distributed, world_size

__all__ = ["center_batch_mean", "distillation_loss", "update_center"]


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
        chunk_size: int,
    ) -> Tensor:
        need_rows, need_prototypes = ctx.needs_input_grad[:2]
        grad_rows = torch.empty_like(student) if need_rows else None
        grad_prototypes = torch.zeros_like(student_prototypes) if need_prototypes else None
        total = student.new_zeros(())
        for start in range(0, student.shape[0], chunk_size):
            part = slice(start, start + chunk_size)
            rows = student[part]
            target = torch.addmm(teacher_bias, teacher[part], teacher_prototypes.T, alpha=1 / teacher_temp)
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
        ctx.save_for_backward(grad_rows, grad_prototypes)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_rows, grad_prototypes = ctx.saved_tensors
        rows = None if grad_rows is None else grad_rows * grad
        prototypes = None if grad_prototypes is None else grad_prototypes * grad
        return rows, prototypes, None, None, None, None, None, None


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
) -> Tensor:
    """DINO's cross-entropy between the centered, sharpened teacher and the student, averaged over rows.

    Per row: CE(softmax((t Wt^T - center) / teacher_temp), log_softmax(s Ws^T / student_temp)). Computed in
    fp32 (float64 inputs stay float64), also under autocast, and without ever holding an N x K matrix;
    gradients reach `student` and `student_prototypes` only. In a process group the mean is over all ranks'
    rows, the value is the same on every rank, and the averaged gradient is that of the joint batch; ranks may
    have different N, also 0.

    Args:
        student, teacher: bottleneck features, (N, b).
        student_prototypes, teacher_prototypes: last-layer weights, (K, b).
        center: running mean of the teacher's logits, (K,).
        student_temp, teacher_temp: softmax temperatures.
        weight: weight of each row, (N,); the mean is then sum(weight * loss) / sum(weight). None for equal
            weights.
        chunk_size: rows at a time; 128 rows of 65,536 prototypes are 32 MiB per buffer.

    Returns:
        Scalar; zero, still connected to its inputs, if no rank has a row.

    Raises:
        ValueError: shapes do not fit together, or a chunk without rows.
    """
    _check_shapes(student, teacher, student_prototypes, teacher_prototypes, center, weight)
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
            chunk_size,
        )
    weight_sum = loss_sum.new_tensor(student.shape[0]) if row_weight is None else row_weight.sum()
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
) -> None:
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must both be (N, b)")
    shape = (center.shape[0], student.shape[1])
    for name, prototypes in (("student", student_prototypes), ("teacher", teacher_prototypes)):
        if tuple(prototypes.shape) != shape:
            raise ValueError(f"{name}_prototypes are {tuple(prototypes.shape)}, expected (K, b) = {shape}")
    if weight is not None and tuple(weight.shape) != (student.shape[0],):
        raise ValueError(f"weight is {tuple(weight.shape)}, expected (N,) = ({student.shape[0]},)")


@torch.no_grad()
def _feature_sum(teacher: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sum of the rows of all ranks, (b,), and their number."""
    rows = teacher.to(torch.promote_types(teacher.dtype, dtype))
    packed = all_reduce_sum(torch.cat([rows.sum(0), rows.new_tensor([rows.shape[0]])]))
    return packed[:-1], packed[-1]


@torch.no_grad()
def center_batch_mean(teacher: Tensor, teacher_prototypes: Tensor) -> Tensor:
    """Mean of the teacher's logits over the rows of all ranks, by linearity the logits of the mean row.

    Args:
        teacher: bottleneck features, (N, b); N may differ between ranks.
        teacher_prototypes: (K, b).

    Returns:
        (K,), in fp32 at least; zeros if no rank has a row.
    """
    with torch.autocast(teacher.device.type, enabled=False):
        total, count = _feature_sum(teacher, torch.float32)
        return teacher_prototypes.to(total.dtype) @ (total / count.clamp(min=1))


@torch.no_grad()
def update_center(center: Tensor, teacher: Tensor, teacher_prototypes: Tensor, momentum: float = 0.9) -> None:
    """Move `center` in place to momentum * center + (1 - momentum) * batch mean, as in DINO.

    Without a row on any rank it stays as it is.

    Args:
        center: (K,).
        teacher: bottleneck features, (N, b).
        teacher_prototypes: (K, b).
        momentum: share of the old center that is kept.
    """
    with torch.autocast(teacher.device.type, enabled=False):
        total, count = _feature_sum(teacher, torch.float32)
        mean = teacher_prototypes.to(total.dtype) @ (total / count.clamp(min=1))
        # A select instead of a branch on the count, which would make the GPU wait.
        center.copy_(torch.where(count > 0, center.to(mean.dtype).lerp(mean, 1 - momentum), center.to(mean.dtype)))
