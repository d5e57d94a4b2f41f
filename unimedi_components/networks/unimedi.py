# SPDX-License-Identifier: Apache-2.0
"""UniMedI: student, EMA teacher and report encoder over one mixed batch of X-rays and volumes (section 3).

Letters: B2 X-rays, B3 volumes, B = B2 + B3, P patch tokens, k slices, D width, b DINO bottleneck.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unimedi_components import selection
from unimedi_components.distributed import all_reduce_sum
from unimedi_components.networks.heads import DINOHead, ProjectionHead
from unimedi_components.networks.masking import MODALITIES, Compared, compare, masked_pass
from unimedi_components.networks.micro_batches import in_micro_batches
from unimedi_components.networks.output import EncoderOutput, ImageFeatures, UniMediOutput
from unimedi_components.networks.report_encoder import ReportEncoder
from unimedi_components.networks.unified_vit import UnifiedViT, compiled_forward

# of the running mean of slab scores: it follows the selector, which learns quickly
_PROFILE_MOMENTUM = 0.9


@dataclass(frozen=True)
class _View:
    """One modality's share of a step: the student's CLS, and what distillation compares."""

    cls: Tensor
    compared: list[Compared] = field(default_factory=list)
    selected: Tensor | None = None
    scores: Tensor | None = None


class UniMedI(nn.Module):
    """Image-report pre-training network: L_vl's two towers and the self-distillation pair.

    A volume goes three ways: the selector scores its slabs (Eq. 1 and 2, no gradient), the k best slices join it as 2D
    images, and teacher and student encode volume and slices together, the student masked where the teacher attends
    least. An X-ray skips the selection. The ablation of Table 7 is `self_distillation=False, selector="random"` (VL),
    `selector="random"` (VL + SD) and the defaults (VL + SD + Attn); `pseudo_pairs=False` trains both dimensions jointly
    without slices (Fig. 2b); 2D only and 3D only are a matter of the batches. Raises ValueError: an unknown option, or
    options that cannot work together.

    Args:
        dino_head: head shared by CLS and patch tokens; None only without self-distillation.
        num_slices: k of section 3.2.
        selector: "teacher", "student" or "random".
        expand: see `selection.select_slices`.
        profile_power: rank slabs by `selection.relative_scores` to this power, over a running mean of the scores of
            training volumes (`slab_profile`, mean 1); 0 ranks by Eq. 2 itself.
        pseudo_pairs: feed the selected slices beside the volume.
        self_distillation: compute what L_icl and L_pcl need.
        mask_ratio: share of tokens masked for the student, per segment.
        mask_mode: "mask_token" replaces masked tokens, "drop" leaves them out (about half the cost at ratio 0.5).
        mask_block: see `selection.keep_tokens`.
        patch_loss_on: "all", "masked" or "visible" patch tokens; "drop" sees the visible ones only.
        segment_dropout: share of the volumes whose student sees one segment of the pseudo-pair alone, half of them the
            volume and half the slices, while the teacher sees both: "recover 2D images from 3D ones and vice versa".
        vl_on_full: take L_vl from a second, unmasked student pass (about twice the cost) instead of the masked one:
            True, or "image2d" or "image3d" for one modality alone.
        init_temperature: start of the learnable temperature of L_vl.
        learn_temperature: False keeps it fixed (MGCA).
        accumulation: run the encoders on this many parts of the batch, one after another, and the heads and losses on
            all of it: the same gradients with the activations of one part, see `in_micro_batches`.
        compile: compile the vision encoders' training passes with `torch.compile`, one graph for each shape; a
            backend's name instead of True chooses it.
    """

    slab_profile: Tensor

    def __init__(
        self,
        encoder: UnifiedViT,
        report_encoder: ReportEncoder,
        image_projection: ProjectionHead,
        text_projection: ProjectionHead,
        dino_head: DINOHead | None = None,
        *,
        num_slices: int = 4,
        selector: str = "teacher",
        expand: str = "centre",
        profile_power: float = 0.0,
        pseudo_pairs: bool = True,
        self_distillation: bool = True,
        mask_ratio: float = 0.5,
        mask_mode: str = "mask_token",
        mask_block: int = 1,
        patch_loss_on: str | None = None,
        segment_dropout: float = 0.0,
        vl_on_full: bool | str = False,
        init_temperature: float = 0.07,
        learn_temperature: bool = True,
        accumulation: int = 1,
        compile: bool | str = False,
    ) -> None:
        super().__init__()
        patch_loss_on = patch_loss_on or ("visible" if mask_mode == "drop" else "all")
        _one_of("selector", selector, ("teacher", "student", "random"))
        _one_of("mask_mode", mask_mode, ("mask_token", "drop"))
        _one_of("patch_loss_on", patch_loss_on, ("all", "masked", "visible"))
        if not isinstance(vl_on_full, bool):
            _one_of("vl_on_full", vl_on_full, MODALITIES)
        if mask_mode == "drop" and patch_loss_on != "visible":
            raise ValueError(
                f"mask_mode 'drop' leaves only visible tokens; patch_loss_on={patch_loss_on!r} needs 'mask_token'"
            )
        for name, value in (("segment_dropout", segment_dropout), ("profile_power", profile_power)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], not {value}")
        if accumulation < 1:
            raise ValueError(f"accumulation must be at least 1, not {accumulation}")
        head = dino_head if self_distillation else None
        if self_distillation and head is None:
            raise ValueError("self_distillation needs a dino_head")
        # fails here, not in the first step, when the volume has fewer slabs than slices wanted
        slabs = torch.zeros(1, encoder.grid_3d[0])
        selection.select_slices(slabs, num_slices, encoder.patch_depth, expand=expand)
        self.encoder, self.report_encoder = encoder, report_encoder
        self.image_projection, self.text_projection = image_projection, text_projection
        self.num_slices, self.selector, self.expand, self.pseudo_pairs = (num_slices, selector, expand, pseudo_pairs)
        self.profile_power = profile_power
        if profile_power:
            self.register_buffer("slab_profile", torch.ones(encoder.grid_3d[0]))
        self.self_distillation = self_distillation
        self.mask_ratio, self.mask_mode, self.mask_block = mask_ratio, mask_mode, mask_block
        self.patch_loss_on, self.segment_dropout, self.vl_on_full = patch_loss_on, segment_dropout, vl_on_full
        self.accumulation = accumulation
        # compiled is the function and not the modules, whose names in checkpoints therefore stay
        self._compiled = compiled_forward(compile) if compile else None
        scale = torch.tensor(math.log(1.0 / init_temperature))
        self.log_temperature = nn.Parameter(scale, requires_grad=learn_temperature)
        self.dino_head = head
        needs_teacher = self_distillation or (pseudo_pairs and selector == "teacher")
        self.teacher = copy.deepcopy(encoder).requires_grad_(False) if needs_teacher else None
        self.teacher_head = None if head is None else copy.deepcopy(head).requires_grad_(False)

    @property
    def logit_scale(self) -> Tensor:
        return self.log_temperature.exp()

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """After an optimizer step keep 1 / temperature in [1, 100], as CLIP: a clamp in the loss ends its gradient."""
        self.log_temperature.clamp_(0.0, math.log(100.0))

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student: t <- momentum * t + (1 - momentum) * s."""
        pairs = [(self.teacher, self.encoder), (self.teacher_head, self.dino_head)]
        for teacher, student in pairs:
            if teacher is not None and student is not None:
                torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1.0 - momentum)

    def forward(self, batch: Mapping[str, Any]) -> UniMediOutput:
        """One mixed batch to everything that the losses need; in evaluation mode unmasked and without distillation.

        ``batch``: "image2d" (B2, C, H, W) and/or "image3d" (B3, C, D, H, W), "input_ids" and "attention_mask" (B, T)
        with the X-rays' reports before the volumes'. Raises ValueError: no image at all, or a number of reports that is
        not the number of images.

        Returns:
            `UniMediOutput` with rows in the order of the reports.
        """
        views = {name: self._view(batch[name]) for name in MODALITIES if batch.get(name) is not None}
        if not views:
            raise ValueError("a batch needs 'image2d' or 'image3d'")
        cls = torch.cat([view.cls for view in views.values()])
        if len(cls) != len(batch["input_ids"]):
            raise ValueError(f"the batch has {len(cls)} images but {len(batch['input_ids'])} reports")
        modality = torch.cat(
            [torch.full((len(view.cls),), MODALITIES.index(name), device=cls.device) for name, view in views.items()]
        )
        words = (batch["input_ids"], batch["attention_mask"])
        text = in_micro_batches(self.report_encoder, self.accumulation, *words)
        image_embed = self.image_projection(cls, modality) + self._unused(views)
        volume = views.get("image3d")
        if self.training and self.profile_power and self.selector != "random":
            self._follow_profile(volume.scores if volume else None)
        return UniMediOutput(
            image_embed=image_embed,
            text_embed=self.text_projection(text, modality),
            logit_scale=self.logit_scale,
            modality=modality,
            selected=volume.selected if volume else None,
            slice_scores=volume.scores if volume else None,
            **self._distillation(views),
        )

    def encode_image(self, image: Tensor, use_slices: bool = True) -> ImageFeatures:
        """Features of whole, unmasked images, with the student as the selector.

        Args:
            image: X-rays (B, C, H, W) or volumes (B, C, D, H, W).
            use_slices: let a volume's selected slices join it, as in pre-training; False encodes the volume alone.
        """
        volume = image.ndim == 5
        grid = self.encoder.token_grids(image)[0]
        selected = scores = joint = None
        out = self.encoder(image, return_attention=True)
        attention = out.attention
        if volume:
            assert attention is not None
            scores = self._ranked(selection.slice_scores(attention, grid))
            selected = selection.select_slices(scores, self.num_slices, self.encoder.patch_depth, expand=self.expand)
            if use_slices and self.pseudo_pairs:
                out = self.encoder(image, *self.take_slices(image, selected), return_attention=True)
                joint = out.attention
        # not len(image), which a trace would keep as a constant
        modality = torch.full((image.shape[0],), int(volume), device=image.device)
        return ImageFeatures(out.cls, self.image_projection(out.cls, modality), selected, scores, attention, joint)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor, modality: Tensor) -> Tensor:
        """Projected report embeddings (B, E), not normalised; `modality` is 0 for X-ray and 1 for CT reports, (B,)."""
        return self.text_projection(self.report_encoder(input_ids, attention_mask), modality)

    @torch.no_grad()
    def select(self, volume: Tensor, by: UnifiedViT | None = None) -> tuple[Tensor, Tensor]:
        """Slices that the selector, or the encoder `by`, chooses and the slab scores of Eq. 2: (B3, k) and (B3, S)."""
        grid = self.encoder.token_grids(volume)[0]
        if by is None and (self.selector == "random" or self.num_slices == 0):
            scores = ranked = selection.random_scores(len(volume), grid[0], volume.device)
        else:
            selector = by or (self.teacher if self.selector == "teacher" else self.encoder)
            assert selector is not None
            attention = self._run(selector, volume, return_attention=True).attention
            assert attention is not None
            scores = selection.slice_scores(attention, grid)
            # what autocast cast here without a history would leave the student's own pass without a gradient
            torch.clear_autocast_cache()
            ranked = self._ranked(scores)
        return selection.select_slices(ranked, self.num_slices, self.encoder.patch_depth, expand=self.expand), scores

    def _ranked(self, scores: Tensor) -> Tensor:
        """What the k best slabs are chosen by: the scores of Eq. 2, or those over their usual profile."""
        if not self.profile_power:
            return scores
        return selection.relative_scores(scores, self.slab_profile, self.profile_power)

    @torch.no_grad()
    def _follow_profile(self, scores: Tensor | None) -> None:
        """Move `slab_profile` towards the mean scores of a step's volumes on all ranks, of which some may have none."""
        profile = self.slab_profile
        own = profile.new_zeros(len(profile)) if scores is None else scores.to(profile).sum(0)
        total = all_reduce_sum(selection.resample_profile(own, len(profile)))
        # without a question to the GPU: no volume anywhere leaves the profile as it is
        mean = total.mean()
        profile.lerp_(total / mean.clamp_min(1e-12), (1.0 - _PROFILE_MOMENTUM) * (mean > 0))

    def take_slices(self, volume: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return selection.take_slices(volume, index, self.encoder.img_size)

    def _run(self, encoder: UnifiedViT, *inputs: Tensor, **options: Any) -> EncoderOutput:
        """A pass of student, teacher or selector: in parts and, in training, compiled where asked for."""
        run = partial(self._compiled, encoder) if self._compiled is not None and self.training else encoder
        return in_micro_batches(run, self.accumulation, *inputs, **options)

    def _view(self, image: Tensor) -> _View:
        """Teacher and student passes of one modality."""
        inputs: tuple[Tensor, ...] = (image,)
        selected = scores = None
        if image.ndim == 5 and self.pseudo_pairs:
            selected, scores = self.select(image)
            inputs = (image, *self.take_slices(image, selected))
        if not (self.self_distillation and self.training):
            return _View(cls=self._run(self.encoder, *inputs).cls, selected=selected, scores=scores)
        assert self.teacher is not None
        with torch.no_grad():
            teacher = self._run(self.teacher, *inputs, return_attention=True)
        compared = self._masked(inputs, teacher)
        if self.vl_on_full in (True, MODALITIES[image.ndim - 4]):
            cls = self._run(self.encoder, *inputs).cls
        else:
            cls = torch.cat([part.student.cls for part in compared])
        return _View(cls, compared, selected, scores)

    def _masked(self, inputs: tuple[Tensor, ...], teacher: EncoderOutput) -> list[Compared]:
        """The student's masked passes over one modality, consecutive samples in each."""
        assert teacher.attention is not None
        grids = self.encoder.token_grids(*inputs[:2])
        keep = selection.keep_tokens(teacher.attention, grids, self.mask_ratio, block=self.mask_block)
        alone = int(len(keep) * self.segment_dropout / 2) if len(grids) > 1 else 0
        options: dict[str, Any] = {"mask_ratio": self.mask_ratio, "block": self.mask_block}
        options |= {"drop": self.mask_mode == "drop", "loss_on": self.patch_loss_on}
        student = partial(self._run, self.encoder)
        compared, start = [], 0
        for segment, count in ((0, alone), (1, alone), (None, len(keep) - 2 * alone)):
            if count == 0:
                continue
            rows = slice(start, start + count)
            start += count
            part = EncoderOutput(teacher.cls[rows], teacher.patches[rows])
            shown = tuple(tensor[rows] for tensor in inputs)
            compared.append(masked_pass(student, shown, keep[rows], part, grids, segment=segment, **options))
        return compared

    def _distillation(self, views: Mapping[str, _View]) -> dict[str, Any]:
        """What the self-distillation losses compare over all modalities; empty in evaluation mode."""
        if self.dino_head is None or self.teacher_head is None or not self.training:
            return {}
        return compare({name: view.compared for name, view in views.items()}, self.dino_head, self.teacher_head)

    def _unused(self, views: Mapping[str, _View]) -> Tensor:
        """Zero that touches the parameters which this batch leaves out, so that DDP finds a gradient for each."""
        encoder = self.encoder
        idle = []
        if "image2d" not in views and not self.pseudo_pairs:
            idle += [*encoder.patch_embed.parameters()]
        if "image3d" not in views:
            idle += [*encoder.patch_embed_3d.parameters(), encoder.pos_embed_3d]
        if "image3d" not in views or not self.pseudo_pairs:
            idle += [encoder.segment_embed, encoder.depth_embed]
        if not self.self_distillation or self.mask_mode == "drop":
            idle += [encoder.mask_token]
        return sum((p.flatten()[0] * 0.0 for p in idle), encoder.cls_token.new_zeros(()))


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
