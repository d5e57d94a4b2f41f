# SPDX-License-Identifier: Apache-2.0
"""Statistics of the image projection, and the profile of slab scores, as whole images give them.

This is ours, not the paper's. In training L_vl sees masked images, and batch normalisation keeps running statistics of
their features; whole images have others. What is then left in every embedding is a constant for each modality, which
search across X-rays and volumes takes for likeness. Statistics measured anew on whole training images cure it (as
"precise batch normalisation", Wu and Johnson, "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576). Slabs are ranked by
the student then, and not by its teacher.
"""

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from unimedi_components.distributed import broadcast, rank, unwrap
from unimedi_components.engines.samples import spread_images
from unimedi_components.networks.heads import ProjectionHead
from unimedi_components.networks.modality_norm import ModalityBatchNorm1d

logger = logging.getLogger(__name__)


@torch.no_grad()
def calibrate_projection(head: ProjectionHead, features: Tensor, modality: Tensor) -> None:
    """Set the running statistics of a head's batch normalisations, one after another, to those of given features.

    Args:
        head: changed in place; in evaluation mode.
        features: CLS features, (N, D).
        modality: 0 for X-rays and 1 for volumes, (N,). Statistics of a modality with fewer than two rows stay.
    """
    for norm in (module for module in head.modules() if isinstance(module, ModalityBatchNorm1d)):
        seen: list[Tensor] = []
        hook = norm.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].double()))
        head(features, modality)
        hook.remove()
        for index in range(norm.num_modalities):
            rows = seen[0] if norm.num_modalities == 1 else seen[0][modality == index]
            if len(rows) >= 2:
                norm.running_mean[index] = rows.mean(0).to(norm.running_mean)
                norm.running_var[index] = rows.var(0).to(norm.running_var)


class CalibrateProjection:
    """After the last epoch, before it is validated and saved, calibrate selection and projection on training images.

    Args:
        dataset: training data set; readable images of each dimension, evenly spaced over it, are used.
    """

    def __init__(
        self, network: nn.Module, dataset: Any, samples: tuple[int, int] = (512, 512), batch_size: int = 16
    ) -> None:
        self.network = unwrap(network)
        self.dataset, self.samples, self.batch_size = dataset, samples, batch_size

    def attach(self, engine: Engine) -> None:
        # an epoch's last step, so that no other handler of the epoch's end comes first
        ends = Events.ITERATION_COMPLETED(event_filter=lambda _, step: step % engine.state.epoch_length == 0)
        engine.add_event_handler(ends, self)

    def __call__(self, engine: Engine) -> None:
        head: ProjectionHead = self.network.image_projection
        normed = any(isinstance(module, ModalityBatchNorm1d) for module in head.modules())
        profile = getattr(self.network, "slab_profile", None)
        if (not normed and profile is None) or engine.state.epoch != engine.state.max_epochs:
            return
        if rank() == 0:
            training = self.network.training
            self.network.eval()
            if profile is not None:
                # first: it decides which slices join a volume below
                self._measure(profile)
            rows = [(self._features(batch), dim - 2) for dim in (2, 3) for batch in self._batches(dim)]
            if rows:
                modality = [torch.full((len(part),), index, device=part.device) for part, index in rows]
                calibrate_projection(head, torch.cat([part for part, _ in rows]), torch.cat(modality))
            self.network.train(training)
        broadcast([*head.buffers(), *([] if profile is None else [profile])])

    @torch.no_grad()
    def _measure(self, profile: Tensor) -> None:
        """Set `slab_profile` to the mean scores of whole training volumes."""
        network = self.network
        scores = [network.select(batch.to(profile.device), by=network.encoder)[1] for batch in self._batches(3)]
        if scores:
            mean = torch.cat(scores).mean(0)
            profile.copy_(mean / mean.mean())

    @torch.no_grad()
    def _features(self, image: Tensor) -> Tensor:
        device = next(self.network.parameters()).device
        return self.network.encode_image(image.to(device)).cls.float()

    def _batches(self, dim: int) -> Iterator[Tensor]:
        images = spread_images(self.dataset, dim, self.samples[dim - 2])
        while batch := list(islice(images, self.batch_size)):
            yield torch.stack(batch)
