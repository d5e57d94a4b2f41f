# SPDX-License-Identifier: Apache-2.0
"""UniMedI's training objective: L = L_vl + L_icl + L_pcl (paper, section 3.4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unimedi_components.errors import ConfigError
from unimedi_components.losses.contrastive import contrastive_loss
from unimedi_components.losses.distillation import distillation_loss, update_center
from unimedi_components.networks.output import UniMediOutput

__all__ = ["UniMediLoss"]


class UniMediLoss(nn.Module):
    """Weighted sum of the contrastive loss and of self-distillation on CLS and patch tokens.

    L_vl is CLIP's loss over the joint batch; L_icl and L_pcl are the DINO loss on the CLS tokens and the iBOT
    loss on the patch tokens, each with its own center. Defaults are iBOT's weights and momentum and DINO's
    temperatures; the paper gives none. The centers are buffers, updated after the loss in training mode.

    Args:
        vl_weight, icl_weight, pcl_weight: weights of the three losses.
        out_dim: number of prototypes K of the DINO head.
        student_temp: softmax temperature of the student.
        teacher_temp: the teacher's temperature in the first epoch.
        teacher_temp_end: the teacher's temperature after the warm-up.
        teacher_temp_warmup_epochs: epochs of the linear warm-up between the two.
        center_momentum: share of the old center kept at each update.
        within_modality: exclude pairs of the other modality from the contrastive pool.
        chunk_size: rows of the distillation losses computed at a time.

    Raises:
        ConfigError: a temperature, weight, momentum or chunk size outside its range.
    """

    center_cls: Tensor
    center_patch: Tensor

    def __init__(
        self,
        vl_weight: float = 1.0,
        icl_weight: float = 1.0,
        pcl_weight: float = 1.0,
        out_dim: int = 8192,
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
        if chunk_size < 1:
            raise ConfigError(f"chunk_size must be at least 1, got {chunk_size}")
        self.vl_weight, self.icl_weight, self.pcl_weight = vl_weight, icl_weight, pcl_weight
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.within_modality = within_modality
        self.chunk_size = chunk_size
        self._warmup = np.linspace(teacher_temp, teacher_temp_end, max(teacher_temp_warmup_epochs, 0)).tolist()
        self._teacher_temp_end = teacher_temp_end
        self.last: dict[str, Tensor] = {}
        self.register_buffer("center_cls", torch.zeros(out_dim))
        self.register_buffer("center_patch", torch.zeros(out_dim))
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Set the teacher's temperature for `epoch`, from 0: DINO's linear warm-up, then constant."""
        self.teacher_temp = float(self._warmup[epoch]) if epoch < len(self._warmup) else self._teacher_temp_end

    def forward(self, output: UniMediOutput, targets: Any = None) -> Tensor:
        """Loss of one batch; its unweighted parts stay, detached, in `last` ("vl", "icl", "pcl").

        Args:
            output: what the network returned. Without `student_cls` the distillation losses are left out, on
                all ranks alike; without `student_patches` this rank adds no rows to the patch loss.
            targets: ignored; the trainer passes it.

        Returns:
            Scalar, the same on every rank.

        Raises:
            ConfigError: the head's number of prototypes is not `out_dim`.
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
        icl = self._distill(output, output.student_cls, output.teacher_cls, None, self.center_cls)
        empty = output.student_cls[:0]
        student = output.student_patches if output.student_patches is not None else empty
        teacher = output.teacher_patches if output.teacher_patches is not None else empty.detach()
        pcl = self._distill(output, student, teacher, output.patch_weight, self.center_patch)
        self.last.update(icl=icl.detach(), pcl=pcl.detach())
        return loss + self.icl_weight * icl + self.pcl_weight * pcl

    def _distill(
        self, output: UniMediOutput, student: Tensor, teacher: Tensor, weight: Tensor | None, center: Tensor
    ) -> Tensor:
        assert output.student_prototypes is not None and output.teacher_prototypes is not None
        if output.student_prototypes.shape[0] != center.shape[0]:
            raise ConfigError(
                f"UniMediLoss has out_dim {center.shape[0]}, but the network's DINO head has "
                f"{output.student_prototypes.shape[0]} prototypes; give both the same out_dim"
            )
        loss = distillation_loss(
            student,
            teacher,
            output.student_prototypes,
            output.teacher_prototypes,
            center,
            self.student_temp,
            self.teacher_temp,
            weight,
            self.chunk_size,
        )
        if self.training:
            update_center(center, teacher, output.teacher_prototypes, self.center_momentum)
        return loss
