# SPDX-License-Identifier: Apache-2.0
"""UniMedI's training objective: L = L_vl + L_icl + L_pcl (paper, section 3.4)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unimedi_components.errors import ConfigError
from unimedi_components.losses.contrastive import contrastive_loss
from unimedi_components.losses.distillation import balanced_center, distillation_loss, update_center
from unimedi_components.networks.output import UniMediOutput

TARGETS = ("sinkhorn", "center")
# X-ray, volume; and for patch tokens X-ray, volume, slice
_CLS_GROUPS, _PATCH_GROUPS = 2, 3


class UniMediLoss(nn.Module):
    """Weighted sum of the contrastive loss and of self-distillation on CLS and patch tokens.

    L_vl is CLIP's loss over the joint batch; L_icl and L_pcl are the DINO loss on the CLS tokens and the iBOT loss on
    the patch tokens. Defaults are iBOT's weights and momentum and DINO's temperatures; the paper gives none. What is
    taken off the teacher's logits before its softmax decides whether the targets tell images apart: "center" is DINO's,
    one moving mean for CLS and one for patch tokens, and both modalities then share few prototypes; "sinkhorn" balances
    the prototypes over the batch for X-rays, volumes and slices each (SwAV, DINOv2). The centers are buffers that
    follow the batches in training mode. Raises ConfigError: a temperature, weight, momentum or chunk size outside its
    range.

    Args:
        sinkhorn_rounds: rounds of Sinkhorn-Knopp from the running center on.
        teacher_temp: the teacher's temperature in the first epoch.
        teacher_temp_warmup_epochs: epochs of the linear warm-up between the two.
        center_momentum: share of the old center kept at each update.
        within_modality: contrast within each modality, both counting the same, see `contrastive_loss`.
    """

    center_cls: Tensor
    center_patch: Tensor

    def __init__(
        self,
        vl_weight: float = 1.0,
        icl_weight: float = 1.0,
        pcl_weight: float = 1.0,
        out_dim: int = 8192,
        targets: str = "sinkhorn",
        sinkhorn_rounds: int = 3,
        student_temp: float = 0.1,
        teacher_temp: float = 0.04,
        teacher_temp_end: float = 0.07,
        teacher_temp_warmup_epochs: int = 30,
        center_momentum: float = 0.9,
        within_modality: bool = False,
        chunk_size: int = 128,
    ) -> None:
        super().__init__()
        if min(vl_weight, icl_weight, pcl_weight) < 0:
            raise ConfigError(f"loss weights must not be negative, got {vl_weight}, {icl_weight}, {pcl_weight}")
        if min(student_temp, teacher_temp, teacher_temp_end) <= 0:
            raise ConfigError("student_temp, teacher_temp and teacher_temp_end must be above 0")
        if not 0 <= center_momentum <= 1:
            raise ConfigError(f"center_momentum must lie in [0, 1], got {center_momentum}")
        if min(chunk_size, sinkhorn_rounds) < 1:
            raise ConfigError(
                f"chunk_size and sinkhorn_rounds must be at least 1, got {chunk_size} and {sinkhorn_rounds}"
            )
        if targets not in TARGETS:
            raise ConfigError(f"targets is {targets!r}; use one of {', '.join(TARGETS)}")
        self.vl_weight, self.icl_weight, self.pcl_weight = vl_weight, icl_weight, pcl_weight
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.within_modality = within_modality
        self.chunk_size = chunk_size
        self.targets, self.sinkhorn_rounds = targets, sinkhorn_rounds
        self._warmup = np.linspace(teacher_temp, teacher_temp_end, max(teacher_temp_warmup_epochs, 0)).tolist()
        self._teacher_temp_end = teacher_temp_end
        self.last: dict[str, Tensor] = {}
        grouped = targets == "sinkhorn"
        self.register_buffer("center_cls", torch.zeros(_CLS_GROUPS if grouped else 1, out_dim))
        self.register_buffer("center_patch", torch.zeros(_PATCH_GROUPS if grouped else 1, out_dim))
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Set the teacher's temperature for `epoch`, from 0: DINO's linear warm-up, then constant."""
        self.teacher_temp = float(self._warmup[epoch]) if epoch < len(self._warmup) else self._teacher_temp_end

    def get_extra_state(self) -> dict[str, float]:
        """The teacher's temperature, which the targets of a finished run are computed with."""
        return {"teacher_temp": self.teacher_temp}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.teacher_temp = state["teacher_temp"]

    def forward(self, output: UniMediOutput, targets: Any = None) -> Tensor:
        """Loss of one batch; its unweighted parts stay, detached, in `last` ("vl", "icl", "pcl").

        ``output``: what the network returned. Without `student_cls` the distillation losses are left out, on all ranks
        alike; without `student_patches` this rank adds no rows to the patch loss. Raises ConfigError: the head's number
        of prototypes is not `out_dim`.

        Returns:
            Scalar, the same on every rank.
        """
        loss = contrastive_loss(
            output.image_embed,
            output.text_embed,
            output.logit_scale,
            modality=output.modality,
            within_modality=self.within_modality,
        )
        self.last = {"vl": loss.detach()}
        loss = self.vl_weight * loss
        if output.student_cls is None:
            return loss
        assert output.teacher_cls is not None
        icl = self._distill(output, output.student_cls, output.teacher_cls, None, self.center_cls, output.cls_groups)
        empty = output.student_cls[:0]
        student = output.student_patches if output.student_patches is not None else empty
        teacher = output.teacher_patches if output.teacher_patches is not None else empty.detach()
        pcl = self._distill(output, student, teacher, output.patch_weight, self.center_patch, output.patch_groups)
        self.last.update(icl=icl.detach(), pcl=pcl.detach())
        return loss + self.icl_weight * icl + self.pcl_weight * pcl

    def _distill(
        self,
        output: UniMediOutput,
        student: Tensor,
        teacher: Tensor,
        weight: Tensor | None,
        running: Tensor,
        groups: tuple[int, ...] | None,
    ) -> Tensor:
        assert output.student_prototypes is not None and output.teacher_prototypes is not None
        if output.student_prototypes.shape[0] != running.shape[1]:
            raise ConfigError(
                f"UniMediLoss has out_dim {running.shape[1]}, but the network's DINO head has "
                f"{output.student_prototypes.shape[0]} prototypes; give both the same out_dim"
            )
        prototypes = output.teacher_prototypes
        center = running
        if self.targets == "center" or groups is None:
            center, groups = running[:1], (len(student),)
        if self.targets == "sinkhorn":
            parts = zip(center, teacher.split(groups), strict=True)
            temp, rounds, size = self.teacher_temp, self.sinkhorn_rounds, self.chunk_size
            center = torch.stack([balanced_center(row, part, prototypes, temp, rounds, size) for row, part in parts])
        loss = distillation_loss(
            student,
            teacher,
            output.student_prototypes,
            prototypes,
            center,
            self.student_temp,
            self.teacher_temp,
            weight,
            self.chunk_size,
            groups,
        )
        if self.training and self.targets == "center":
            update_center(running[0], teacher, prototypes, self.center_momentum, weight)
        elif self.training:
            running[: len(center)].lerp_(center.to(running.dtype), 1 - self.center_momentum)
        return loss

    @torch.no_grad()
    def targets_of(self, teacher: Tensor, prototypes: Tensor, group: int, patches: bool = False) -> Tensor:
        """What the teacher asks of single samples: softmax((logits - running center) / teacher_temp), (N, K).

        In training "sinkhorn" balances over the batch, which would tell samples apart where the features do not; the
        running center does not know the samples, so that this says what the features hold.
        ``teacher``: bottleneck features of one kind of token, (N, b). ``prototypes``: the teacher's, (K, b).
        ``group``: 0 for X-rays, 1 for volumes, 2 for the patch tokens of slices.
        """
        center = (self.center_patch if patches else self.center_cls)[group if self.targets == "sinkhorn" else 0]
        return torch.softmax((teacher.float() @ prototypes.float().T - center) / self.teacher_temp, dim=1)
