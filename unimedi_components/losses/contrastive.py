# SPDX-License-Identifier: Apache-2.0
"""Image-report contrastive loss over a mixed 2D and 3D batch (paper's L_vl, section 3.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from unimedi_components.distributed import gather_with_grad


def contrastive_loss(
    image_embed: Tensor,
    text_embed: Tensor,
    logit_scale: Tensor | float,
    gather: bool = True,
    modality: Tensor | None = None,
    within_modality: bool = False,
) -> Tensor:
    """CLIP's symmetric cross-entropy between images and their reports.

    Embeddings are L2-normalised here and gathered over ranks with gradient, so every rank returns the loss of
    the joint batch. Computed in fp32 (float64 inputs stay float64), also under autocast.

    Args:
        image_embed: (B, E); B may differ between ranks.
        text_embed: (B, E), row i belongs to image i.
        logit_scale: scalar that multiplies the cosine similarities, 1 / temperature.
        gather: pool the pairs of all ranks (A-CLIP) instead of this rank's alone (MGCA).
        modality: 0 for 2D rows and 1 for 3D rows, (B,); used only with `within_modality`.
        within_modality: contrast X-rays with X-rays' reports and CTs with CTs' only; the two losses then count the
            same, whatever their shares of the batch.

    Returns:
        Scalar; zero, still connected to its inputs, if no rank has a pair.
    """
    if image_embed.shape != text_embed.shape:
        raise ValueError(f"image_embed {tuple(image_embed.shape)} and text_embed {tuple(text_embed.shape)} differ")
    if within_modality and modality is None:
        raise ValueError("within_modality=True needs the modality of each row; pass modality")
    dtype = torch.promote_types(torch.promote_types(image_embed.dtype, text_embed.dtype), torch.float32)
    with torch.autocast(image_embed.device.type, enabled=False):
        image = F.normalize(image_embed.to(dtype), dim=-1)
        text = F.normalize(text_embed.to(dtype), dim=-1)
        columns = [image, text]
        if modality is not None and within_modality:
            columns.append(modality.to(dtype)[:, None])
        # One exchange for all three: fewer collectives, and one order of them on every rank.
        rows = torch.cat(columns, dim=1)
        if gather:
            rows = gather_with_grad(rows)
        width = image.shape[1]
        logits = logit_scale * (rows[:, :width] @ rows[:, width : 2 * width].T)
        if logits.shape[0] == 0:
            return rows.sum() * logit_scale
        target = torch.arange(logits.shape[0], device=logits.device)
        if not within_modality:
            return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        kind = rows[:, -1].detach()
        same = kind[:, None] == kind[None, :]
        logits = logits.masked_fill(~same, float("-inf"))
        both = F.cross_entropy(logits, target, reduction="none") + F.cross_entropy(logits.T, target, reduction="none")
        weight = 1 / same.sum(1)
        return (both * weight).sum() / (2 * weight.sum())
