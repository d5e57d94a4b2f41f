# SPDX-License-Identifier: Apache-2.0
"""Segmentation of X-rays: SETR's progressive upsampling over the patch tokens of the unified encoder.

Zheng et al., *Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective with Transformers*, CVPR 2021,
in the form that MGCA gave it, which the paper follows (S7.2), or in its own.

Letters: B batch, D width, C classes, h and w rows and columns of tokens.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from unimedi_components.networks.shared_norm import SharedBatchNorm2d
from unimedi_components.networks.task_network import TaskNetwork, at_least_float16
from unimedi_components.networks.token_upsampling import upsampling_strides
from unimedi_components.networks.unified_vit import UnifiedViT

VARIANTS = ("mgca", "original")
_AUXILIARY_WIDTH = 256


class SETRPUP(TaskNetwork):
    """Progressive upsampling decoder: a stage of convolution and bilinear upsampling per factor of the patch size.

    - `variant="mgca"`: a linear layer on the tokens, then stages of [3 x 3 convolution, batch norm, ReLU, upsampling],
      of 512, 256, 128 and 64 channels for 16-pixel patches, and a 3 x 3 convolution to the classes.
    - `variant="original"`: layer norm on the tokens, stages of 256 channels each, and a 1 x 1 convolution to the
      classes; auxiliary heads on earlier blocks in training, where `auxiliary` names them.

    Args:
        encoder: its patch tokens after the final norm are decoded.
        num_classes: outputs C, each against the background by a sigmoid.
        widths: channels of each stage; None takes the variant's, halved from 512 on (mgca) or 256 (original).
        auxiliary: indices of the encoder's blocks whose tokens get a head of their own in training ("original").
        align_corners: of the upsampling; None takes the variant's, True for mgca.

    Raises:
        ValueError: no classes, an unknown variant, a patch size that is no product of 2s and 3s, another number of
            widths than of stages, or auxiliary heads on blocks that are not there or in MGCA's variant.

    Example:
        >>> encoder = UnifiedViT(img_size=32, vol_size=(8, 32, 32), embed_dim=24, depth=2, num_heads=2)
        >>> SETRPUP(encoder, widths=(16, 8, 8, 4))(torch.zeros(2, 1, 32, 48)).shape
        torch.Size([2, 1, 32, 48])
    """

    kind = "setr_pup"

    def __init__(
        self,
        encoder: UnifiedViT,
        num_classes: int = 1,
        *,
        freeze_encoder: bool = True,
        variant: str = "mgca",
        widths: Sequence[int] | None = None,
        auxiliary: Sequence[int] = (),
        align_corners: bool | None = None,
    ) -> None:
        super().__init__(locals())
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {num_classes}")
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, not {variant!r}")
        factors = upsampling_strides(encoder.patch_embed.patch_size)
        for size, own in zip(encoder.patch_embed.patch_size, zip(*factors, strict=True), strict=True):
            if max(own) > 3:
                raise ValueError(
                    f"SETR-PUP upsamples in stages of 2 and 3, so a patch of {size} pixels cannot be decoded; give an "
                    "encoder whose patch size is a product of 2s and 3s, such as 8, 12 or 16"
                )
        if widths is None:
            widths = [max(512 >> i, 8) if variant == "mgca" else 256 for i in range(len(factors))]
        if len(widths) != len(factors) or any(width < 1 for width in widths):
            raise ValueError(
                f"widths {list(widths)}: a patch of {tuple(encoder.patch_embed.patch_size)} pixels needs "
                f"{len(factors)} stages, so give {len(factors)} positive numbers of channels"
            )
        _check_auxiliary(auxiliary, variant, len(encoder.blocks))
        corners = variant == "mgca" if align_corners is None else align_corners
        self.hparams |= {"widths": [int(width) for width in widths], "align_corners": corners}
        self.hparams["auxiliary"] = [int(index) for index in auxiliary]
        self.hold(encoder)
        dim = encoder.embed_dim
        self.tokens: nn.Module = nn.Linear(dim, dim) if variant == "mgca" else nn.LayerNorm(dim, eps=1e-6)
        sizes = zip([dim, *widths[:-1]], widths, factors, strict=True)
        self.stages = nn.Sequential(*(_stage(before, after, factor, corners) for before, after, factor in sizes))
        kernel = 3 if variant == "mgca" else 1
        self.head = nn.Conv2d(widths[-1], num_classes, kernel, padding=kernel // 2)
        self.auxiliary = nn.ModuleList(_AuxiliaryHead(dim, num_classes, corners) for _ in auxiliary)

    def features(self, image: Tensor) -> list[Tensor]:
        """Maps (B, D, h, w) of the last tokens, then of each auxiliary block; no gradient if the encoder is frozen."""
        blocks = self.hparams["auxiliary"] if self.training else ()
        output = self.encoded(image, hidden_states=blocks)
        # hidden states come by rising block, whatever order they were asked for in
        state_of = dict(zip(sorted(blocks), output.hidden_states, strict=True))
        tokens = [output.patches, *(state_of[block][:, 1:] for block in blocks)]
        return [self.on_grid(found, image) for found in tokens]

    @at_least_float16
    def _decode(self, last: Tensor, *earlier: Tensor) -> list[Tensor]:
        """Logits on the grid of the image, of the stages and of each auxiliary head."""
        found = self.tokens(last.movedim(1, -1)).movedim(-1, 1)
        # half precision is too coarse for probabilities
        logits = self.head(self.stages(found)).float()
        # only in training are there earlier blocks
        return [logits, *(head(x, logits.shape[2:]) for x, head in zip(earlier, self.auxiliary, strict=False))]

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Segment X-rays (B, 1, H, W) in [-1, 1], each side a multiple of the patch's.

        Raises ValueError: not a batch of 2D images, or a size that the patch does not divide. Returns logits (B, C, H,
        W); in training with auxiliary heads a list of them, the auxiliary ones last.
        """
        if image.ndim != 4:
            raise ValueError(f"expected X-rays (B, 1, H, W), got {tuple(image.shape)}")
        logits = self._decode(*self.features(image))
        return logits if len(logits) > 1 else logits[0]


def _check_auxiliary(auxiliary: Sequence[int], variant: str, blocks: int) -> None:
    if auxiliary and variant != "original":
        raise ValueError(f"auxiliary heads belong to variant 'original'; variant {variant!r} has none")
    if any(not 0 <= index < blocks for index in auxiliary) or len(set(auxiliary)) != len(auxiliary):
        raise ValueError(f"auxiliary {list(auxiliary)} must name different blocks from 0 to {blocks - 1}")


def _stage(before: int, after: int, factor: tuple[int, ...], align_corners: bool) -> nn.Sequential:
    # a bias before batch norm does nothing, but Adam would turn the rounding errors of its gradient into steps
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        SharedBatchNorm2d(after),
        nn.ReLU(),
        nn.Upsample(scale_factor=factor, mode="bilinear", align_corners=align_corners),
    )


class _AuxiliaryHead(nn.Module):
    """SETR's auxiliary head: layer norm, a 3 x 3 convolution with batch norm and ReLU, a classifier, resized."""

    def __init__(self, dim: int, num_classes: int, align_corners: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.stage = nn.Sequential(
            nn.Conv2d(dim, _AUXILIARY_WIDTH, 3, padding=1, bias=False), SharedBatchNorm2d(_AUXILIARY_WIDTH), nn.ReLU()
        )
        self.head = nn.Conv2d(_AUXILIARY_WIDTH, num_classes, 1)
        self.align_corners = align_corners

    def forward(self, tokens: Tensor, size: Sequence[int]) -> Tensor:
        normed = self.norm(tokens.movedim(1, -1)).movedim(-1, 1)
        logits = self.head(self.stage(normed))
        return F.interpolate(logits, list(size), mode="bilinear", align_corners=self.align_corners)
