# SPDX-License-Identifier: Apache-2.0
"""What the targets of a run's self-distillation tell apart, measured with its teacher on images of a datalist."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unimedi_components.engines.checkpoint import LAST
from unimedi_components.engines.target_information import COLLAPSED
from unimedi_components.errors import CheckpointError
from unimedi_components.loading import ImageLoader
from unimedi_components.losses.pretrain import UniMediLoss
from unimedi_components.metrics.information import TargetInformation
from unimedi_components.networks.heads import DINOHead
from unimedi_components.networks.masking import KINDS
from unimedi_components.networks.pretrained import Pretrained
from unimedi_components.networks.unified_vit import UnifiedViT
from unimedi_components.networks.unimedi import UniMedI
from unimedi_components.networks.weights import load_strict
from unimedi_components.retrieval.embedder import make_dataset


@dataclass(frozen=True)
class Teacher:
    """What makes a run's targets: the EMA encoder with its head, the loss's centers, and who selects slices."""

    encoder: UnifiedViT
    head: DINOHead
    loss: UniMediLoss
    network: UniMedI

    @torch.no_grad()
    def targets(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Targets of X-rays or volumes (B, ...): of CLS tokens (B, K), and of the image's patch tokens (B, P, K)."""
        group = image.ndim - 4
        inputs: tuple[Tensor, ...] = (image,)
        if group == 1 and self.network.pseudo_pairs:
            selected, _ = self.network.select(image, self.encoder)
            inputs = (image, *self.network.take_slices(image, selected))
        out = self.encoder(*inputs)
        depth, rows, columns = self.encoder.token_grids(image)[0]
        patches = out.patches[:, : depth * rows * columns]
        cls = self._targets(out.cls, KINDS[group], group, False)
        return cls, self._targets(patches.flatten(0, 1), KINDS[2 + group], group, True).view(*patches.shape[:2], -1)

    def _targets(self, rows: Tensor, kind: str, group: int, patches: bool) -> Tensor:
        index = torch.full((len(rows),), KINDS.index(kind), device=rows.device)
        return self.loss.targets_of(self.head(rows, index), self.head.prototypes, group, patches)


def load_teacher(pretrained: Pretrained) -> Teacher | None:
    """The teacher of the run that a checkpoint is of, from `last.pt` beside it; None without one.

    Raises CheckpointError: `last.pt` is damaged or of another network.
    """
    path = pretrained.path.with_name(LAST)
    if "dino_head" not in pretrained.card or not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state, centers = content["network"], content["loss"]
        sinkhorn = len(centers["center_cls"]) > 1
        loss = UniMediLoss(out_dim=centers["center_cls"].shape[1], targets="sinkhorn" if sinkhorn else "center")
        loss.load_state_dict(centers)
    except Exception as error:  # torch raises many kinds for a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: cannot be read as a training state ({reason}); train again") from error
    device = next(pretrained.network.parameters()).device
    encoder, head = UnifiedViT(**pretrained.card["encoder"]), DINOHead(**pretrained.card["dino_head"])
    for module, prefix in ((encoder, "teacher."), (head, "teacher_head.")):
        part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        load_strict(module, part, str(path))
        module.to(device).eval()
    return Teacher(encoder, head, loss.to(device).eval(), pretrained.network)


def self_distillation_metrics(
    pretrained: Pretrained, items: Sequence[dict[str, Any]], root: str | Path, cache_dir: str | Path | None = None
) -> dict[str, Any]:
    """Information of the self-distillation targets on a datalist's images, in nats; see `metrics.information`.

    Returns:
        for CLS and patch tokens and each dimension "sd_cls_information_2d" (for patches given the position, which
        "sd_patch_information_any_position_2d" is not), "sd_cls_entropy_2d", "sd_cls_marginal_entropy_2d" and
        "sd_cls_prototypes_2d"; "sd_collapsed", whether the CLS targets of a dimension carry less than `COLLAPSED`
        nats. Empty for a run without self-distillation, or without `last.pt`.
    """
    teacher = load_teacher(pretrained)
    if teacher is None:
        return {}
    found = {(kind, dim): TargetInformation() for dim in (2, 3) for kind in ("cls", "patch")}
    device = next(pretrained.network.parameters()).device
    for batch in ImageLoader(make_dataset(pretrained, items, root, cache_dir), (32, 16), allow_empty=True):
        image = batch["image"].to(device)
        for kind, part in zip(("cls", "patch"), teacher.targets(image), strict=True):
            found[kind, image.ndim - 2].add(part)
    result: dict[str, Any] = {}
    for (kind, dim), targets in found.items():
        if not targets.count:
            continue
        values = targets.result()
        result[f"sd_{kind}_information_{dim}d"] = values.given_position
        if kind == "patch":
            result[f"sd_patch_information_any_position_{dim}d"] = values.information
        result[f"sd_{kind}_entropy_{dim}d"] = values.entropy
        result[f"sd_{kind}_marginal_entropy_{dim}d"] = values.marginal_entropy
        result[f"sd_{kind}_prototypes_{dim}d"] = values.prototypes
    cls = [result[key] for key in ("sd_cls_information_2d", "sd_cls_information_3d") if key in result]
    return {**result, "sd_collapsed": bool(cls) and min(cls) < COLLAPSED}
