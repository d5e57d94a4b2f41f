# SPDX-License-Identifier: Apache-2.0
"""TorchScript of a network whose own code `torch.jit.script` cannot read, for `monai.bundle ckpt_export`."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ScriptableNetwork(nn.Module):
    """A traced network behind a forward that `torch.jit.script` can compile."""

    def __init__(self, traced: nn.Module) -> None:
        super().__init__()
        self.network = traced

    def forward(self, image: Tensor) -> Tensor:
        """Any number of images of the size that the network was traced with, (B, 1, ...), to its output."""
        return self.network(image)


class ScriptableByDimension(nn.Module):
    """Two traces of a network that takes X-rays and volumes, behind a forward that `torch.jit.script` can compile."""

    def __init__(self, two_d: nn.Module, three_d: nn.Module) -> None:
        super().__init__()
        self.two_d, self.three_d = two_d, three_d

    def forward(self, image: Tensor) -> Tensor:
        """X-rays (B, 1, H, W) or volumes (B, 1, D, H, W) of the sizes that were traced, to the network's output."""
        if image.dim() == 4:
            return self.two_d(image)
        return self.three_d(image)


def scriptable(network: Any) -> ScriptableNetwork:
    """The module to script, for the `__prepare_scriptable__` of a task's network."""
    return ScriptableNetwork(trace(network, example(network))).eval()


def example(network: Any) -> Tensor:
    """Two empty images (2, C, ...) such as a task's network is fed with, on its device."""
    encoder = network.encoder
    size = encoder.img_size if network.spatial_dims == 2 else encoder.vol_size
    # what X-rays are prepared to for masks, which need not be the size of the pre-training
    side = network.card.get("preprocessing", {}).get("film", {}).get("size")
    size = size if side is None else (side, side)
    return torch.zeros(2, encoder.patch_embed.proj.in_channels, *size, device=encoder.cls_token.device)


def trace(network: nn.Module, example: Tensor, leave_out: Sequence[str] = ()) -> nn.Module:
    """Trace a network in evaluation mode, so that `torch.jit.script` of what calls the result works.

    Spatial sizes become constants of the traced network, the number of images does not.

    Args:
        network: left as it is; its weights are shared.
        leave_out: submodules that its `forward` does not use.
    """
    # a copy, whose mode and parts may be changed; the weights stay the network's own
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    traced_from = copy.deepcopy(network, shared).eval()
    for name in leave_out:
        scope, _, part = name.rpartition(".")
        setattr(traced_from.get_submodule(scope), part, None)
    with warnings.catch_warnings(), torch.no_grad():
        # sizes are constants on purpose; torch announces the end of TorchScript, which MONAI's export needs
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(traced_from, example, check_trace=False)
