# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation of feature maps with the statistics of all ranks' images, on CPU too."""

import torch
from torch import Tensor, nn

from unimedi_components.distributed import all_reduce_sum_with_grad, is_distributed


class SharedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that in training on several ranks normalises by the statistics of all ranks' images.

    `nn.SyncBatchNorm` does this on GPUs alone. Each rank's gradient crosses ranks as there, batches of the ranks may
    differ in size, and the running statistics stay equal on all ranks, so that `DistributedDataParallel` needs no
    `broadcast_buffers`. On one rank it is `nn.BatchNorm2d` itself.

    Example:
        >>> SharedBatchNorm2d(4)(torch.zeros(2, 4, 3, 3)).shape
        torch.Size([2, 4, 3, 3])
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not is_distributed():
            return super().forward(input)
        self._check_input_dim(input)
        with torch.autocast(input.device.type, enabled=False):
            x = input.float()
            count = torch.tensor([x.numel() / self.num_features], device=x.device)
            sums = all_reduce_sum_with_grad(torch.cat([x.sum((0, 2, 3)), count.to(x.dtype)]))
            total = sums[-1]
            mean = sums[:-1] / total
            centred = x - mean[:, None, None]
            # squares of what is left after the mean: E[x^2] - E[x]^2 would cancel
            var = all_reduce_sum_with_grad(centred.square().sum((0, 2, 3))) / total
            self._update(mean.detach(), var.detach() * total / (total - 1).clamp(min=1))
            out = centred * torch.rsqrt(var + self.eps)[:, None, None]
            if self.affine:
                out = out * self.weight[:, None, None] + self.bias[:, None, None]
        return out.to(input.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, unbiased_var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        step = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean += (mean - self.running_mean) * step
        self.running_var += (unbiased_var - self.running_var) * step
