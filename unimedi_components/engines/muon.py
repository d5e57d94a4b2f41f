# SPDX-License-Identifier: Apache-2.0
"""Muon for the matrices inside a network beside AdamW for all else; why it is the default, docs/paper.md says."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: Coefficients of the quintic of Jordan et al. (2024), steepest at zero; torch's `Muon` has the same.
_A, _B, _C = 3.4445, -4.775, 2.0315


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly orthogonal matrices of the same singular vectors, by Newton-Schulz iterations.

    Each singular value s of M / |M|_F becomes f(...f(s)) with f(s) = 3.4445 s - 4.775 s^3 + 2.0315 s^5: 0.7 to 1.2 but
    for the smallest. In bfloat16 on a GPU; on a CPU in the type given, where bfloat16 is many times slower.

    Args:
        matrices: (N, rows, columns).
        steps: iterations.

    Returns:
        The shape and type of `matrices`.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return (x.mT if tall else x).to(matrices.dtype)


def hidden_matrices(network: nn.Module) -> list[Tensor]:
    """Trainable weights of the linear layers inside a network: none of its tokenizers, embeddings and DINO head."""
    linear = [(name.split("."), m) for name, m in network.named_modules() if isinstance(m, nn.Linear)]
    return [module.weight for name, module in linear if module.weight.requires_grad and "dino_head" not in name]


class MuonAdamW(torch.optim.Optimizer):
    """AdamW, but Muon for groups with "muon": momentum whose singular values are made equal (Jordan et al., 2024).

    An update has the root mean square of AdamW's (0.2 lr, Liu et al., arXiv 2502.16982). `torch.optim.Muon` does the
    same to one matrix after the other and in bfloat16; here matrices of one shape go together.

    Args:
        groups: of parameters; those with "muon": True hold matrices alone.
        lr: where a group has none of its own.
        momentum: of Muon, in Nesterov's form.
        kwargs: further arguments of `torch.optim.AdamW`.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], lr: float, momentum: float = 0.95, **kwargs: Any) -> None:
        rest = [dict(group) for group in groups if not group.get("muon")]
        self._adamw = torch.optim.AdamW(rest, lr=lr, **kwargs)
        hidden = [dict(group) for group in groups if group.get("muon")]
        super().__init__([*self._adamw.param_groups, *hidden], {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # the state is one, so that it is saved, loaded and moved as any optimizer's
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in self.param_groups if not group.get("muon")]
        self._adamw.step()
        for group in self.param_groups:
            if group.get("muon"):
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: Mapping[str, Any]) -> None:
        alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike[parameter.shape, parameter.dtype, parameter.device].append(parameter)
        lr, momentum = group["lr"], group["momentum"]
        for (shape, *_), parameters in alike.items():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            torch._foreach_lerp_(buffers, gradients, 1 - momentum)
            updates = orthogonalize(torch.stack(torch._foreach_lerp(gradients, buffers, momentum)))
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
            torch._foreach_add_(parameters, list(updates.unbind()), alpha=-0.2 * lr * max(shape) ** 0.5)
