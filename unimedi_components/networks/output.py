# SPDX-License-Identifier: Apache-2.0
"""Named results of the networks, so that nothing is left behind as state on a module."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EncoderOutput:
    """What `UnifiedViT` returns. B batch, P patch tokens kept, D width.

    Args:
        cls: CLS token after the final norm, (B, D).
        patches: patch tokens after the final norm, 3D tokens before the 2D tokens of each slice, (B, P, D).
        attention: Eq. 1's **v**, CLS-to-patch attention averaged over layers and heads, (B, P), if asked for.
    """

    cls: Tensor
    patches: Tensor
    attention: Tensor | None = None
    hidden_states: tuple[Tensor, ...] = ()


# for torch.export, whose programs return what the network does
torch.export.register_dataclass(EncoderOutput, serialized_type_name="unimedi_components.EncoderOutput")


@dataclass(frozen=True)
class ImageFeatures:
    """What `UniMedI.encode_image` returns for B images of one kind.

    Args:
        cls: CLS features before the projection, (B, D).
        embed: projected features, (B, E), not normalised.
        selected: slices chosen for each volume, (B, k); None for X-rays.
        scores: what slabs are ranked by, (B, S): Eq. 2's scores, over their usual profile where the network was trained
            with `profile_power`; None for X-rays.
        attention: Eq. 1's **v** of the image's own tokens, (B, P).
        joint_attention: Eq. 1's **v** of a volume's tokens and behind them its slices', (B, P + k * P2); None where no
            slices joined.
    """

    cls: Tensor
    embed: Tensor
    selected: Tensor | None = None
    scores: Tensor | None = None
    attention: Tensor | None = None
    joint_attention: Tensor | None = None


@dataclass(frozen=True)
class UniMediOutput:
    """What `UniMedI` returns for one mixed batch; the losses take this object.

    Rows are ordered: the B2 X-rays first, then the B3 volumes; B = B2 + B3.

    Args:
        image_embed: projected image CLS, (B, E), not normalised.
        text_embed: projected report CLS, (B, E), not normalised.
        logit_scale: exponentiated learnable temperature's inverse, scalar.
        modality: 0 for 2D rows and 1 for 3D rows, (B,).
        student_cls, teacher_cls: unit-norm DINO bottleneck features of the CLS tokens, (B, b); None without
            self-distillation.
        student_patches, teacher_patches: the same for the patch tokens in the loss, flattened over batch, (N, b).
        patch_weight: weight of each patch row, (N,); None for equal weights.
        cls_groups: how many of the CLS rows are X-rays and volumes, in this order.
        patch_groups: how many of the patch rows are of X-rays, volumes and slices, in this order.
        student_prototypes, teacher_prototypes: unit-norm last-layer weights of the DINO heads, (K, b).
        selected: indices of the slices chosen for each volume, (B3, k), or None.
        slice_scores: Eq. 2 scores of each slab, (B3, S), or None.
    """

    image_embed: Tensor
    text_embed: Tensor
    logit_scale: Tensor
    modality: Tensor
    student_cls: Tensor | None = None
    teacher_cls: Tensor | None = None
    student_patches: Tensor | None = None
    teacher_patches: Tensor | None = None
    patch_weight: Tensor | None = None
    cls_groups: tuple[int, ...] | None = None
    patch_groups: tuple[int, ...] | None = None
    student_prototypes: Tensor | None = None
    teacher_prototypes: Tensor | None = None
    selected: Tensor | None = None
    slice_scores: Tensor | None = None
