# SPDX-License-Identifier: Apache-2.0
"""What the networks of all tasks share: the unified encoder, frozen or fine-tuned, and how they are built again."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from unimedi_components.networks.export import scriptable
from unimedi_components.networks.layers import arguments
from unimedi_components.networks.output import EncoderOutput
from unimedi_components.networks.unified_vit import UnifiedViT


def at_least_float16(decode: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method, of maps alone, compute in float32 where autocast is to bfloat16.

    Norms after convolutions take most of a gradient away again, so that bfloat16's 8 bits turn what is left by up to 20
    degrees in single tensors; float16 has 11 bits, and TF32, in which a GPU convolves float32, as well.
    """

    @functools.wraps(decode)
    def run(self: nn.Module, *maps: Tensor) -> Any:
        kind = maps[0].device.type
        if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) != torch.bfloat16:
            return decode(self, *maps)
        with torch.autocast(kind, enabled=False):
            return decode(self, *(x.float() for x in maps))

    return run


class TaskNetwork(nn.Module):
    """A decoder or head over the unified encoder; a subclass names its `kind` and `spatial_dims`, see `networks.cards`.

    ``scope``: of the subclass, `locals()` on its constructor's first line; all but the encoder become `hparams`.
    """

    kind: str
    spatial_dims = 2
    encoder: UnifiedViT

    def __init__(self, scope: Mapping[str, Any]) -> None:
        super().__init__()
        self.hparams = arguments(scope)
        self.card: dict[str, Any] = {}
        self.freeze_encoder: bool = self.hparams["freeze_encoder"]

    def hold(self, encoder: UnifiedViT) -> None:
        """Take the encoder as a part, without gradient and in evaluation mode if it is frozen."""
        self.encoder = encoder
        if self.freeze_encoder:
            encoder.requires_grad_(False).eval()
            return
        # DDP waits for a gradient of every parameter that may have one
        for parameter in self.unused():
            parameter.requires_grad_(False)

    def unused(self) -> list[nn.Parameter]:
        """Parameters of the encoder that this task never reads."""
        encoder = self.encoder
        if self.spatial_dims == 2:
            tables = [encoder.mask_token, encoder.pos_embed_3d, encoder.segment_embed, encoder.depth_embed]
            return [*tables, *encoder.patch_embed_3d.parameters()]
        return [encoder.mask_token, *encoder.patch_embed.parameters(), encoder.depth_embed]

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all parts, but of a frozen encoder."""
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()
        return self

    def encoded(self, image: Tensor, **options: Any) -> EncoderOutput:
        """The encoder's output; without gradient if it is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            return self.encoder(image, **options)

    def on_grid(self, tokens: Tensor, image: Tensor) -> Tensor:
        """Patch tokens (B, P, D) as maps (B, D, h, w) of X-rays or (B, D, d, h, w) of volumes."""
        grid = self.encoder.token_grids(image)[0]
        return tokens.transpose(1, 2).unflatten(2, grid if image.ndim == 5 else grid[1:])

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script`, and so `monai.bundle ckpt_export`, compiles in place of this network."""
        return scriptable(self)
