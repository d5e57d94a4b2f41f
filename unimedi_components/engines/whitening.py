# SPDX-License-Identifier: Apache-2.0
"""Data-dependent start of the two tokenizers, for training from scratch.

This is ours, not the paper's, which starts from pre-trained weights. Raw patches are dominated by a few directions
(brightness, habitus), so that a randomly initialised tokenizer hardly passes on what reports speak of. Kernels set to
the leading principal directions of real patches, scaled towards equal variance, cure it (whitening initialisation, as
in K. Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498). How far is `eps`: small ones lift
directions that hold only noise to the size of all others, and what segmentation and detection read from the tokens
drowns in it.
"""

import logging
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from unimedi_components.distributed import broadcast, rank, unwrap
from unimedi_components.engines.samples import spread_images
from unimedi_components.networks.embed import PatchEmbed

logger = logging.getLogger(__name__)

# X-rays and volumes that the statistics are of
_SAMPLES = {2: 512, 3: 256}


@torch.no_grad()
def whiten_patch_embed(embed: PatchEmbed, images: Tensor, eps: float = 0.05) -> None:
    """Set a tokenizer's kernel and bias so that the tokens of `images` have zero mean and about unit covariance.

    Args:
        embed: tokenizer with D outputs, changed in place.
        images: (B, C, H, W) or (B, C, D, H, W).
        eps: added to each eigenvalue, as a share of their mean; keeps directions that hold only noise small, so that
            large ones damp the leading directions alone.

    A patch of fewer than D values leaves the outputs beyond them as they were.
    """
    patches = embed.patches(images).flatten(0, 1).double()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    values, vectors = values.flip(0), vectors.flip(1)
    # An eigenvector's sign is arbitrary; its largest entry positive makes the result one and the same everywhere.
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    width = min(embed.proj.out_channels, len(values))
    kernel = (vectors[:, :width] / (values[:width] + eps * values.mean()).sqrt()).T
    weight = embed.proj.weight.flatten(1)
    weight[:width] = kernel.to(weight)
    embed.proj.bias[:width] = -(kernel @ mean).to(weight)


class WhitenTokenizers:
    """Before the first step of a new run, whiten both tokenizers of student and teacher on training images.

    Args:
        dataset: training data set; the first readable images of each dimension, evenly spaced over it, are used.
        position_std: standard deviation that the patches' position tables are scaled to: drawn with ViT's usual 0.02
            they would vanish beside the tokens. None leaves them.
    """

    def __init__(self, network: nn.Module, dataset: Any, eps: float = 0.05, position_std: float | None = None) -> None:
        self.network, self.dataset = unwrap(network), dataset
        self.eps, self.position_std = eps, position_std

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        encoder = self.network.encoder
        for dim, embed in ((2, encoder.patch_embed), (3, encoder.patch_embed_3d)):
            if rank() == 0 and (images := self._images(dim)) is not None:
                whiten_patch_embed(embed, images.to(embed.proj.weight.device), self.eps)
            broadcast(embed.parameters())
        if self.position_std is not None:
            with torch.no_grad():
                for table in (encoder.pos_embed[:, 1:], encoder.pos_embed_3d):
                    table.mul_(self.position_std / table.std())
        if self.network.teacher is not None:
            self.network.teacher.load_state_dict(encoder.state_dict())

    def _images(self, dim: int) -> Tensor | None:
        images = list(spread_images(self.dataset, dim, _SAMPLES[dim]))
        if len(images) < 2:
            logger.warning("the %dD tokenizer keeps its random start: fewer than two readable training images", dim)
            return None
        return torch.stack(images)
