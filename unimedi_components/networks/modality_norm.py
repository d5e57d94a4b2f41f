# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation with statistics per modality, synchronised over ranks.

This is ours, not the paper's: X-rays' and volumes' features differ by far more than studies do, so with joint
statistics the contrastive loss first learns the modality, and training both from scratch stays on a plateau.
"""

import torch
from torch import Tensor, nn

from unimedi_components.distributed import gather_with_grad


class ModalityBatchNorm1d(nn.Module):
    """`nn.BatchNorm1d` that normalises the rows of each modality by their own mean and variance.

    In training the statistics are those of all ranks' rows, whatever each rank holds of a modality, and their gradient
    crosses ranks as in `nn.SyncBatchNorm`, on CPU too. A modality with fewer than two rows over all ranks has no
    variance: its running statistics are used for these rows and left as they are. The affine is shared.

    Args:
        num_modalities: number of statistics M; 1 is plain synchronised batch normalisation.
        scale: divide by the standard deviation; False only takes the mean off.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    momentum = 0.1

    def __init__(
        self, num_features: int, num_modalities: int = 2, affine: bool = True, eps: float = 1e-5, scale: bool = True
    ) -> None:
        super().__init__()
        self.num_features, self.num_modalities, self.eps, self.scale = num_features, num_modalities, eps, scale
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_modalities, num_features))
        self.register_buffer("running_var", torch.ones(num_modalities, num_features))
        self.register_buffer("num_batches_tracked", torch.zeros(num_modalities, dtype=torch.int64))

    def extra_repr(self) -> str:
        return f"{self.num_features}, num_modalities={self.num_modalities}, affine={self.weight is not None}"

    def forward(self, x: Tensor, modality: Tensor | None = None) -> Tensor:
        """Rows (B, C), which may be none, each normalised by the statistics of its modality, in their own type.

        ``modality``: index of each row's modality, (B,); not needed with one modality.
        Raises ValueError: it is missing or has not one entry per row.
        """
        if self.num_modalities == 1:
            modality = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        if modality is None or modality.shape != x.shape[:1]:
            raise ValueError(f"normalisation per modality needs the modality of each of the {x.shape[0]} rows")
        with torch.autocast(x.device.type, enabled=False):
            rows = x.to(torch.promote_types(x.dtype, self.running_mean.dtype))
            if self.training:
                mean, var = self._training_statistics(rows, modality)
            else:
                mean, var = self.running_mean, self.running_var
            out = rows - mean[modality]
            if self.scale:
                out = out * torch.rsqrt(var + self.eps)[modality]
            if self.weight is not None and self.bias is not None:
                out = out * self.weight + self.bias
        return out.to(x.dtype)

    def _training_statistics(self, x: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance per modality over all ranks, (M, C) each; updates the running ones."""
        member = (modality[:, None] == torch.arange(self.num_modalities, device=x.device)).to(x.dtype)
        count = member.sum(0)[:, None]
        mean = member.T @ x / count.clamp(min=1)
        spread = member.T @ (x - mean[modality]).square()
        # Each rank's centered moments, combined as by Chan et al.: exact where E[x^2] - E[x]^2 would cancel.
        parts = gather_with_grad(torch.cat([mean, spread, count], dim=1)[None], equal_sizes=True)
        means, spreads, counts = parts.split([self.num_features, self.num_features, 1], dim=2)
        count = counts.sum(0)
        mean = (counts * means).sum(0) / count.clamp(min=1)
        spread = (spreads + counts * (means - mean).square()).sum(0)
        enough = count >= 2
        self._update_running(mean, spread / (count - 1).clamp(min=1), enough)
        var = spread / count.clamp(min=1)
        return torch.where(enough, mean, self.running_mean), torch.where(enough, var, self.running_var)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, unbiased_var: Tensor, enough: Tensor) -> None:
        for running, batch in ((self.running_mean, mean), (self.running_var, unbiased_var)):
            step = (batch - running) * self.momentum
            running += torch.where(enough, step, torch.zeros_like(step)).to(running.dtype)
        self.num_batches_tracked += enough.flatten()
