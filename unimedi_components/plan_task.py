# SPDX-License-Identifier: Apache-2.0
"""What the training of a task needs: its own step, run on tensors without values and counted by torch."""

from copy import deepcopy
from pydoc import locate
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unimedi_components.data.catalogue import DATASETS
from unimedi_components.engines import amp_dtype
from unimedi_components.errors import ConfigError
from unimedi_components.networks import UnifiedViT, encoder_sizes
from unimedi_components.plan import Needs, StepCost, state_bytes

aten = torch.ops.aten


class TaskStep:
    """The training step of a task bundle's config, for any number of images.

    Raises ConfigError: not the config of a task's training.
    """

    # the type of mixed precision; decoders keep float32 beside bfloat16, and take more memory
    half = torch.bfloat16

    def __init__(self, config: dict[str, Any]) -> None:
        self._counts: dict[Any, list[tuple[float, ...]]] = {}
        self.parser = ConfigParser(deepcopy(config))
        if any(id_ not in self.parser for id_ in ("network_def", "freeze_encoder", "train#dataloader#batch_size")):
            raise ConfigError(
                "plan reads the configs of pre-training and of the tasks' trainings: train.json, overlays"
            )
        # weights are not read, and what a config takes from them is that of its size
        with torch.device("meta"):
            self.network = self._network()
        self.fake = FakeTensorMode()
        with self.fake:
            _without_values(self.network)
        self.volumes = "film" not in config["preprocessing"] and "xray" not in config["preprocessing"]
        self.frozen = bool(self.parser.get_parsed_content("freeze_encoder"))
        #: Whether the frozen encoder runs once over all images, before the first step.
        self.once = self.frozen and "train#features" in self.parser

    def _network(self) -> Any:
        definition = self.parser["network_def"]
        kwargs = {
            name: self.parser.get_parsed_content(f"network_def#{name}")
            for name in definition
            if name not in ("_target_", "encoder")
        }
        sizes = {k: v for k, v in definition["encoder"].items() if k not in ("_target_", "weights", "size")}
        encoder = UnifiedViT(**encoder_sizes(self.parser.get_parsed_content("size"), **sizes))
        kind: Any = locate(definition["_target_"])
        return kind(encoder, **kwargs).train()

    @property
    def image_size(self) -> tuple[int, ...]:
        """Of a training image: (H, W) or (D, H, W)."""
        if self.volumes:
            return tuple(self.parser.get_parsed_content("vol_size"))
        prepared = self.parser.get_parsed_content("preprocessing")
        return (int(next(prepared[name]["size"] for name in ("film", "xray") if name in prepared)),) * 2

    def cost(self, images: int, amp: bool = True) -> StepCost:
        """Of a step over some images; of the head alone where the encoder runs once."""
        # a step is linear in its images, and a norm over a batch needs two
        key = amp, self.half
        if key not in self._counts:
            self._counts[key] = [self._counted(count, amp) for count in (2, 3)]
        few, more = self._counts[key]
        flops, convolved, kept, largest = (a + (images - 2) * (b - a) for a, b in zip(few, more, strict=True))
        # autocast's halved weights are counted with the weights
        halved = state_bytes(self.network) - state_bytes(self.network, amp=False) if amp else 0.0
        # decoders alone convolve: the encoder's patches are one matrix product
        float32 = convolved if amp and self.half is torch.bfloat16 else 0.0
        return StepCost(flops, max(kept - halved, 0.0), 2.0 * largest, float32)

    def encoding(self) -> float:
        """FLOPs of the encoder alone over one image."""
        with self.fake, torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.network.features(torch.zeros(1, 1, *self.image_size))
        return float(counter.get_total_flops())

    def _counted(self, images: int, amp: bool) -> tuple[float, float, float, float]:
        """FLOPs, those of convolutions, bytes that autograd keeps, and those of the largest tensor among them."""
        parameters = {tensor.untyped_storage()._cdata for tensor in self.network.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                kept[storage._cdata] = storage  # held, so that no name comes twice
            return tensor

        with self.fake:
            # the fused kernel of the CPU keeps what a GPU's keeps, but is not counted
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                self._objective(images).backward()
            hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
            with hooks, torch.autocast("cpu", self.half, enabled=amp):
                self._objective(images)
        sizes = [storage.nbytes() for storage in kept.values()]
        flops = counter.get_flop_counts()["Global"]
        convolutions = sum(flops.get(op, 0) for op in (aten.convolution, aten.convolution_backward))
        return sum(flops.values()), convolutions, float(sum(sizes)), float(max(sizes, default=0))

    def _objective(self, images: int) -> Tensor:
        network = self.network
        if self.once:
            # features in an image's place, as `FeatureDataset` gives them
            width = network.head.in_features
            return network(torch.zeros(images, width)).sum()
        image = torch.zeros(images, 1, *self.image_size)
        if network.kind == "vitdet":
            # matching boxes asks for values
            return torch.stack([x.sum() for maps in network.head_maps(image).values() for x in maps]).sum()
        scores = network(image)
        # the losses look at their values; this keeps softmax and its logarithm, as they do
        rows = scores if isinstance(scores, list) else [scores]
        return torch.stack([x.float().sigmoid().log().sum() for x in rows]).sum()


def _without_values(network: nn.Module) -> None:
    """Move a network from "meta" to tensors that are of the CPU to every operator, and take no memory either."""
    for module in network.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def task_needs(
    config: dict[str, Any], gpus: int, xrays: int | None, cts: int | None, half: torch.dtype = torch.bfloat16
) -> Needs:
    """What `describe` prints of a task's training; `half` is the card's own type of mixed precision."""
    step = TaskStep(config)
    parser, named = step.parser, step.parser.get_parsed_content("amp")
    step.half, amp = half if named in ("auto", True) else amp_dtype(named), named is not False
    batch = int(parser.get_parsed_content("train#dataloader#batch_size"))
    images, source = (cts if step.volumes else xrays), "as given"
    if images is None:
        count, source = _published(parser["data#datalist"], "cts" if step.volumes else "xrays")
        share = float(parser.get_parsed_content("label_fraction", default=1.0))
        images = max(1, round(share * count))
        source += f", of which label_fraction takes {share:g}" if share != 1 else ""
    name = "volumes" if step.volumes else "X-rays"
    if "iterations" in parser:
        steps, schedule = int(parser.get_parsed_content("iterations")), "as `iterations` says"
    else:
        epochs, each = int(parser.get_parsed_content("epochs")), max(1, images // (batch * gpus))
        steps, schedule = epochs * each, f"{epochs} epochs of {each}"
    values = float(torch.Size(step.image_size).numel())
    network: nn.Module = step.network
    return Needs(
        network=network,
        amp=amp,
        cost=lambda times: step.cost(times, amp),
        times=batch,
        shown=lambda times: f"{times} {name}",
        steps=steps,
        schedule=schedule,
        once=images * step.encoding() if step.once else 0.0,
        # what is kept of an image before its crop may be larger
        cache=(images * values, f"{images} {name}"),
        data=f"{images} {name} to train on, {source}",
    )


def _published(datalist: dict[str, Any], option: str) -> tuple[int, str]:
    """How many images a config trains on before anything is read, and what that is taken from."""
    phantoms, name = datalist.get("phantoms"), datalist.get("dataset")
    if isinstance(phantoms, int):
        return phantoms, f"the {phantoms} phantoms of the config before their split"
    if name in DATASETS and (sizes := DATASETS[name].training):
        count = next((sizes[value] for value in map(str, datalist.values()) if value in sizes), sizes[""])
        return count, f"as {name} is published (another number: --{option})"
    return 10_000, f"assumed: give --{option}"
