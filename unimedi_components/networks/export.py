# SPDX-License-Identifier: Apache-2.0
"""TorchScript of a network whose own code `torch.jit.script` cannot read, for `monai.bundle ckpt_export`."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

__all__ = ["ScriptableNetwork", "scriptable"]


class ScriptableNetwork(nn.Module):
    """A traced network behind a forward that `torch.jit.script` can compile.

    Args:
        traced: what `torch.jit.trace` made of the network.
    """

    def __init__(self, traced: nn.Module) -> None:
        super().__init__()
        self.network = traced

    def forward(self, image: Tensor) -> Tensor:
        """Any number of images of the size that the network was traced with, (B, 1, ...), to its output."""
        return self.network(image)


def scriptable(network: nn.Module, example: Tensor) -> ScriptableNetwork:
    """Trace a network in evaluation mode, so that `torch.jit.script` of the result works.

    Spatial sizes become constants of the traced network, the number of images does not.

    Args:
        network: left as it is; its weights are shared.
        example: images (B, C, ...) on the network's device, B at least 2.

    Returns:
        the module to script, for a network's `__prepare_scriptable__`.
    """
    # a copy, whose mode may be changed; the weights stay the network's own
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    traced_from = copy.deepcopy(network, shared).eval()
    with warnings.catch_warnings(), torch.no_grad():
        # sizes are constants on purpose; torch announces the end of TorchScript, which MONAI's export needs
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        return ScriptableNetwork(torch.jit.trace(traced_from, example, check_trace=False)).eval()
