# SPDX-License-Identifier: Apache-2.0
"""The chunked self-distillation loss against a loop, and its memory against the direct computation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unimedi_components.losses import balanced_center, distillation_loss, update_center

ROWS, PROTOTYPES, WIDTH = 11, 6, 4
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.05

MEASURE = """
import sys, torch
from unimedi_components.losses import distillation_loss
torch.set_num_threads(1)

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))

def rows(n):
    return torch.nn.functional.normalize(torch.randn(n, 32), dim=1)

def direct(s, t, ws, wt, c, student_temp, teacher_temp):
    target = torch.softmax((t @ wt.T - c) / teacher_temp, dim=1)
    return -(target * torch.log_softmax(s @ ws.T / student_temp, dim=1)).sum(1).mean()

torch.manual_seed(0)
n, k = int(sys.argv[2]), 65536
args = rows(n).requires_grad_(), rows(n), rows(k).requires_grad_(), rows(k), torch.zeros(k)
rows(8).sum().item()
before = status("VmRSS")
loss = {"direct": direct, "chunked": distillation_loss}[sys.argv[1]](*args, 0.1, 0.04)
loss.backward()
print(loss.item(), args[0].grad.norm().item(), args[2].grad.norm().item(), status("VmHWM") - before)
"""


def distillation_loss_reference(
    student: Tensor, teacher: Tensor, w_student: Tensor, w_teacher: Tensor, center: Tensor, weight: Tensor
) -> Tensor:
    """DINO's cross-entropy, one row and one prototype at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(student)):
        t = [((teacher[i] * w_teacher[k]).sum() - center[k]) / TEACHER_TEMP for k in range(len(center))]
        s = [(student[i] * w_student[k]).sum() / STUDENT_TEMP for k in range(len(center))]
        t_sum, s_sum = sum(v.exp() for v in t), sum(v.exp() for v in s)
        for k in range(len(center)):
            total = total - weight[i] * t[k].exp() / t_sum * (s[k].exp() / s_sum).log()
    return total / weight.sum()


def make_inputs(rows: int = ROWS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [rows, rows, PROTOTYPES, PROTOTYPES]
    features = [torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for n in sizes]
    center = 0.1 * torch.randn(PROTOTYPES, generator=generator, dtype=torch.float64)
    return [F.normalize(x, dim=1).to(dtype) for x in features] + [center.to(dtype)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, ROWS, 128])
def test_value_and_gradients_equal_the_loop(chunk_size: int, weighted: bool) -> None:
    weight = torch.linspace(0, 2, ROWS, dtype=torch.float64) if weighted else None
    results = []
    for use in ("loss", "loop"):
        inputs = [x.requires_grad_() for x in make_inputs()]
        if use == "loss":
            loss = distillation_loss(*inputs, STUDENT_TEMP, TEACHER_TEMP, weight=weight, chunk_size=chunk_size)
        else:
            loss = distillation_loss_reference(
                *inputs, torch.ones(ROWS, dtype=torch.float64) if weight is None else weight
            )
        # The factor shows that the gradient from above is used.
        (3 * loss).backward()
        results.append((inputs, loss.detach()))
    (ours, loss), (theirs, expected) = results
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    for index in (0, 2):
        torch.testing.assert_close(ours[index].grad, theirs[index].grad, atol=1e-6, rtol=1e-6)
    assert all(ours[index].grad is None for index in (1, 3, 4)), "the teacher and the center get no gradient"


def test_gradient_reaches_only_what_requires_it() -> None:
    student, teacher, w_student, w_teacher, center = make_inputs()
    w_student.requires_grad_()
    distillation_loss(student, teacher, w_student, w_teacher, center, STUDENT_TEMP, TEACHER_TEMP).backward()
    assert student.grad is None
    assert w_student.grad is not None and w_student.grad.abs().sum() > 0


def test_without_gradient_the_value_is_the_same() -> None:
    inputs = [x.requires_grad_() for x in make_inputs()]
    loss = distillation_loss(*inputs, STUDENT_TEMP, TEACHER_TEMP, chunk_size=4)
    with torch.no_grad():
        silent = distillation_loss(*inputs, STUDENT_TEMP, TEACHER_TEMP, chunk_size=4)
    assert not silent.requires_grad
    assert silent.item() == pytest.approx(loss.item(), abs=1e-12)


def test_many_prototypes_in_fp32_keep_five_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, prototypes = (
        F.normalize(torch.randn(n, 8, generator=generator, dtype=torch.float64), dim=1) for n in (5, 65536)
    )
    inputs = (rows, rows, prototypes, prototypes, torch.zeros(65536, dtype=torch.float64))
    exact = distillation_loss(*inputs, 0.1, 0.04)
    single = distillation_loss(*(x.float() for x in inputs), 0.1, 0.04)
    assert single.item() == pytest.approx(exact.item(), rel=1e-5)


def test_computed_in_fp32_under_autocast() -> None:
    inputs = make_inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = distillation_loss(*inputs, STUDENT_TEMP, TEACHER_TEMP)
        center = balanced_center(inputs[4], inputs[1], inputs[3], TEACHER_TEMP)
    assert loss.dtype == torch.float32
    expected = distillation_loss(*make_inputs(), STUDENT_TEMP, TEACHER_TEMP)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(center, balanced_center(inputs[4], inputs[1], inputs[3], TEACHER_TEMP))


@pytest.mark.parametrize("weighted", [False, True])
def test_no_rows_is_a_connected_zero(weighted: bool) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(rows=0)]
    weight = torch.zeros(0) if weighted else None
    loss = distillation_loss(*inputs, STUDENT_TEMP, TEACHER_TEMP, weight=weight)
    loss.backward()
    assert loss.item() == 0.0
    assert inputs[0].grad is not None and inputs[0].grad.shape == (0, WIDTH)
    assert inputs[2].grad is not None and inputs[2].grad.abs().sum() == 0


def test_all_weights_zero_is_zero() -> None:
    loss = distillation_loss(*make_inputs(), STUDENT_TEMP, TEACHER_TEMP, weight=torch.zeros(ROWS))
    assert loss.item() == 0.0


def test_bad_shapes() -> None:
    student, teacher, w_student, w_teacher, center = make_inputs()
    with pytest.raises(ValueError, match=r"\(N, b\)"):
        distillation_loss(student[:3], teacher, w_student, w_teacher, center, 0.1, 0.1)
    with pytest.raises(ValueError, match="teacher_prototypes"):
        distillation_loss(student, teacher, w_student, w_teacher[:2], center, 0.1, 0.1)
    with pytest.raises(ValueError, match="weight"):
        distillation_loss(student, teacher, w_student, w_teacher, center, 0.1, 0.1, weight=torch.ones(2))
    with pytest.raises(ValueError, match="chunk_size"):
        distillation_loss(student, teacher, w_student, w_teacher, center, 0.1, 0.1, chunk_size=0)


def test_center_equals_the_mean_of_the_logits() -> None:
    _, teacher, _, prototypes, center = make_inputs()
    logits = torch.stack([prototypes @ row for row in teacher])
    expected = 0.9 * center + 0.1 * logits.mean(0)
    update_center(center, teacher, prototypes, momentum=0.9)
    torch.testing.assert_close(center, expected)


def test_center_is_weighted_as_the_loss() -> None:
    _, teacher, _, prototypes, center = make_inputs()
    weight = torch.arange(1.0, len(teacher) + 1)
    logits = torch.stack([prototypes @ row for row in teacher])
    expected = 0.8 * center + 0.2 * (weight[:, None] * logits).sum(0) / weight.sum()
    update_center(center, teacher, prototypes, momentum=0.8, weight=weight)
    torch.testing.assert_close(center, expected)


def sinkhorn_reference(teacher: Tensor, prototypes: Tensor, temp: float, rounds: int) -> Tensor:
    """Sinkhorn-Knopp on the whole matrix: rows to 1, then columns to their share, `rounds` times, and rows last."""
    q = torch.exp(teacher @ prototypes.T / temp)
    for _ in range(rounds):
        q = q / q.sum(1, keepdim=True)
        q = q / q.sum(0, keepdim=True) * len(q) / q.shape[1]
    return q / q.sum(1, keepdim=True)


@pytest.mark.parametrize(("rounds", "chunk_size"), [(1, 4), (3, 128), (3, 3)])
def test_balanced_center_is_sinkhorn_knopp(rounds: int, chunk_size: int) -> None:
    _, teacher, _, prototypes, _ = make_inputs()
    start = torch.zeros(PROTOTYPES, dtype=teacher.dtype)
    center = balanced_center(start, teacher, prototypes, TEACHER_TEMP, rounds, chunk_size)
    found = torch.softmax((teacher @ prototypes.T - center) / TEACHER_TEMP, 1)
    torch.testing.assert_close(found, sinkhorn_reference(teacher, prototypes, TEACHER_TEMP, rounds), atol=1e-5, rtol=0)
    assert center.mean().item() == pytest.approx(0, abs=1e-6)


def test_balanced_center_converges_to_equal_shares_from_any_start() -> None:
    _, teacher, _, prototypes, center = make_inputs()
    for start in (center, center * 3):
        found = balanced_center(start, teacher, prototypes, TEACHER_TEMP, rounds=300)
        share = torch.softmax((teacher @ prototypes.T - found) / TEACHER_TEMP, 1).mean(0)
        torch.testing.assert_close(share, torch.full_like(share, 1 / PROTOTYPES), atol=1e-4, rtol=0)


def test_balanced_center_without_rows_stays() -> None:
    _, teacher, _, prototypes, center = make_inputs()
    center = center - center.mean()
    torch.testing.assert_close(balanced_center(center, teacher[:0], prototypes, TEACHER_TEMP), center)


def test_groups_are_scored_with_a_center_each() -> None:
    student, teacher, w_student, w_teacher, center = make_inputs()
    centers = torch.stack([center, center.flip(0)])
    weight = torch.rand(ROWS, dtype=student.dtype, generator=torch.Generator().manual_seed(3))
    options = {"student_temp": STUDENT_TEMP, "teacher_temp": TEACHER_TEMP, "chunk_size": 3}
    loss = distillation_loss(student, teacher, w_student, w_teacher, centers, **options, weight=weight, groups=(4, 7))
    total = sum(
        distillation_loss(student[rows], teacher[rows], w_student, w_teacher, row, **options, weight=weight[rows])
        * weight[rows].sum()
        for rows, row in ((slice(4), centers[0]), (slice(4, None), centers[1]))
    )
    torch.testing.assert_close(loss, total / weight.sum())
    with pytest.raises(ValueError, match="groups"):
        distillation_loss(student, teacher, w_student, w_teacher, centers, **options, groups=(4, 6))


def test_center_without_rows_stays() -> None:
    _, teacher, _, prototypes, center = make_inputs()
    before = center.clone()
    update_center(center, teacher[:0], prototypes)
    assert torch.equal(center, before)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's record of peak memory")
@pytest.mark.parametrize(("tokens", "share"), [(3500, 0.15), (900, 0.3)])
def test_peak_memory_is_a_small_share_of_the_direct_computation(tokens: int, share: float) -> None:
    """All tokens and 65,536 prototypes, forward and backward, each in a process of its own."""
    results = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    for kind in ("direct", "chunked"):
        command = [sys.executable, "-c", MEASURE, kind, str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        results[kind] = [float(value) for value in done.stdout.split()]
    assert results["chunked"][:3] == pytest.approx(results["direct"][:3], rel=1e-4)
    # At least two N x K matrices: the direct computation was really made.
    assert results["direct"][3] > 2 * tokens * 65536 * 4 / 2**20
    assert results["chunked"][3] < share * results["direct"][3]
