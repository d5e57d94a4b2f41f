# SPDX-License-Identifier: Apache-2.0
"""Eq. 1's **v** beside fused attention: what it costs in time and memory, against none and against explicit attention.

Run from the repository's root: `python -m benchmarks.attention --json results/attention.json`. Three blocks of a ViT-B
over 1,297 tokens (CLS, a volume's 512 and four slices' 784), forward alone and forward with backward, in float32 and
under bfloat16 autocast. Compared are `UnifiedViT`'s blocks without **v** ("plain"), the same with it ("v"), the same
weights with the whole attention matrix ("explicit"), and MONAI's `TransformerBlock(save_attn=True)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fire
import torch
from monai.networks.blocks import TransformerBlock
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.literal import explicit_block, patch_softmax
from unimedi_components.networks.layers import Block

MAX_TIME, MAX_MEMORY, MAX_DIFFERENCE = 1.05, 1.03, 1e-5


def attention(device: str = "cpu", json: str | None = None, quick: bool = False, rounds: int = 5) -> dict[str, Any]:
    """Measure the four.

    `device` "cpu" or "cuda", `json` the result's file, `quick` small sizes and one round, `rounds` turns of each.
    """
    place = measure.set_up(device)
    batch = 16 if place.type == "cuda" else 1
    width, heads, tokens, batch = (64, 4, 65, 1) if quick else (768, 12, 1297, batch)
    blocks = nn.ModuleList(Block(width, heads) for _ in range(3)).to(place)
    monai: Any = nn.ModuleList(TransformerBlock(width, 4 * width, heads, save_attn=True) for _ in range(3)).to(place)
    x = torch.randn(batch, tokens, width, device=place)

    def fused(with_v: bool) -> Callable[[Tensor], tuple[Tensor, Any]]:
        def run(y: Tensor) -> tuple[Tensor, Any]:
            rows = []
            for block in blocks:
                y, row = block(y, return_attention=with_v)
                rows.append(row)
            return y, torch.stack(rows).mean(0) if with_v else None

        return run

    def explicit(y: Tensor) -> tuple[Tensor, Any]:
        matrices = []
        for block in blocks:
            y, matrix = explicit_block(block, y)
            matrices.append(matrix)
        return y, torch.stack([patch_softmax(matrix) for matrix in matrices]).mean(0)

    def saved(y: Tensor) -> tuple[Tensor, Any]:
        for block in monai:
            y = block(y)
        return y, torch.stack([block.attn.att_mat[:, :, 0, 1:] for block in monai]).mean((0, 2))

    kinds: dict[str, tuple[nn.Module, Any]] = {
        **{"plain": (blocks, fused(False)), "v": (blocks, fused(True))},
        **{"explicit": (blocks, explicit), "monai save_attn": (monai, saved)},
    }
    with torch.no_grad(), measure.full_precision():
        v, v_true = fused(True)(x)[1], explicit(x)[1]
    bars = {
        "v against the explicit softmax, relative": measure.at_most(
            float(((v - v_true).abs() / v_true).max()), MAX_DIFFERENCE
        )
    }
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("forward", "step"):
            runs = {}
            for name, (module, encode) in kinds.items():
                if kind == "forward":
                    runs[name] = (module, measure.forward(encode, x, dtype=dtype))
                else:
                    runs[name] = (
                        module,
                        measure.step(module, lambda encode=encode: encode(x)[0].square().mean(), dtype),
                    )
            sizes = measure.peaks(runs, place)
            times = measure.by_turns({name: run for name, (_, run) in runs.items()}, place, 1 if quick else rounds)
            about = {"pass": kind, "dtype": str(dtype).removeprefix("torch.")}
            for name in kinds:
                over = {
                    "time_over_plain": measure.ratio(times, name, "plain"),
                    "bytes_over_plain": sizes[name] / sizes["plain"],
                }
                rows.append({**about, "name": name, "seconds": times[name], "bytes": sizes[name], **over})
            title = f"v, {kind}, {about['dtype']}"
            bars[f"{title}: time"] = measure.at_most(measure.ratio(times, "v", "plain"), MAX_TIME)
            bars[f"{title}: memory"] = measure.at_most(sizes["v"] / sizes["plain"], MAX_MEMORY)
    sizes = {"tokens": tokens, "width": width, "heads": heads, "blocks": 3, "batch": batch}
    return measure.report("attention", place, json, rows, bars, quick, sizes=sizes)


if __name__ == "__main__":
    fire.Fire(attention, serialize=lambda _: None)
