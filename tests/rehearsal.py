# SPDX-License-Identifier: Apache-2.0
"""A device that behaves as a GPU where there is none: CUDA rehearsed on a CPU build of PyTorch.

`python -m tests.rehearsal MODULE ARGS...` runs `python -m MODULE ARGS...` with the device `rehearsal:0`, and prints at
its end where the program waited for it; `pytest -p tests.rehearsal` gives the device to tests. Values are the CPU's. An
error is raised wherever tensors of two devices meet, as on CUDA, and each operator for which a GPU's queue must run dry
is counted by the line that calls it. Autocast follows CUDA's lists of operators. What it cannot tell: speed, memory,
and branches on `device.type == "cuda"`.
"""

from __future__ import annotations

import collections
import runpy
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaObj, MetaTensor
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

REPOSITORY = Path(__file__).resolve().parents[1]
NAME = "rehearsal"
#: Operators whose result, or its shape, the host must know before it goes on.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "bincount",
    "equal", "is_nonzero", "repeat_interleave", "histc_values",
}  # fmt: skip
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
#: CUDA's autocast lists (ATen/autocast_mode.h), of the operators that this project reaches.
LOWER = {
    "linear", "matmul", "mm", "mv", "bmm", "addmm", "addmv", "addbmm", "baddbmm", "chain_matmul", "einsum", "conv1d",
    "conv2d", "conv3d", "_convolution", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "scaled_dot_product_attention", "prelu",
}  # fmt: skip
FLOAT32 = {
    "softmax", "log_softmax", "layer_norm", "group_norm", "norm", "nll_loss", "nll_loss_nd", "cross_entropy_loss",
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "binary_cross_entropy_with_logits", "exp", "expm1",
    "log", "log10", "log2", "log1p", "pow", "prod", "sum", "cumsum", "cumprod", "reciprocal", "rsqrt", "cosh", "sinh",
    "tan", "acos", "asin", "softplus", "cdist", "pdist", "dist", "renorm", "logsumexp", "cosine_similarity",
    "cosine_embedding_loss", "triplet_margin_loss", "margin_ranking_loss",
}  # fmt: skip
PROMOTED = {"cat", "stack", "addcmul", "addcdiv", "atan2", "bilinear", "cross", "dot", "index_put", "scatter_add"}

waits: collections.Counter[str] = collections.Counter()


class _Module:
    """What PyTorch asks of `torch.rehearsal`."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """The CPU's generator draws."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class DeviceTensor(torch.Tensor):
    """A tensor of the rehearsed device over a tensor of the host, `host`."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        places = {"strides": host.stride(), "storage_offset": host.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, host.shape, dtype=host.dtype, device=DEVICE, **places)
        made.host = host
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __matmul__(self, other: Tensor) -> Tensor:
        # PyTorch squeezes this product in place, which a wrapper cannot follow
        return torch.mv(other.T, self) if (self.dim(), other.dim()) == (1, 2) else torch.matmul(self, other)

    def as_subclass(self, cls: type) -> Tensor:
        """Of MONAI's tensor with meta data, which cannot be a second class of this one, the one below."""
        return (MetaDeviceTensor if issubclass(cls, MetaTensor) else DeviceTensor)(self.host)

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        return _TENSOR(data, dtype=dtype or self.dtype).to(device or self.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, *args, **(kwargs or {}))


class MetaDeviceTensor(DeviceTensor, MetaTensor):
    """MONAI's MetaTensor on the rehearsed device."""

    def __init__(self, host: Tensor, source: MetaObj | None = None) -> None:
        MetaObj.__init__(self)
        if source is not None:
            self.copy_meta_from(source)

    def copy_meta_from(self, input_objs: Any, copy_attr: bool = True, keys: Any = None) -> Any:
        host = self.host  # MONAI copies or replaces all attributes
        super().copy_meta_from(input_objs, copy_attr, keys)
        self.host = host
        return self

    @staticmethod
    def __new__(cls, host: Tensor, source: MetaObj | None = None) -> Any:
        return DeviceTensor.__new__(cls, host)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))

        def kept(x: Tensor) -> Tensor:
            return MetaDeviceTensor(x.host) if isinstance(x, DeviceTensor) else MetaTensor(x, meta={})

        made = tree_map_only(Tensor, lambda x: x if isinstance(x, MetaTensor) else kept(x), result)
        rows = list(made) if isinstance(made, list | tuple) else [made]
        rows = MetaTensor.update_meta(rows, func, args, kwargs or {})
        return type(made)(rows) if type(made) in (list, tuple) else rows[0] if len(rows) == 1 else made


def _line() -> str:
    """The innermost line of the project that is being run, else of the caller."""
    frames = traceback.extract_stack()[:-3]
    inside = [f for f in frames if f.filename.startswith(str(REPOSITORY)) and "/.venv" not in f.filename]
    inside = [f for f in inside if not f.filename.endswith("tests/rehearsal.py")]
    frame = (inside or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _call(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operator on the host's tensors, after the checks that CUDA makes."""
    name = func._schema.name.removeprefix("aten::")
    flat, spec = tree_flatten((args, kwargs))
    ours = [x for x in flat if isinstance(x, DeviceTensor)]
    hosts = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, DeviceTensor)]
    target = next((x for x in flat if isinstance(x, torch.device)), None)
    copies = name in {"copy_", "_to_copy"}
    by_host_index = name in INDEXED and isinstance(args[0], DeviceTensor)
    if ours and not copies and any(x.dim() or name in {"cat", "stack"} for x in hosts) and not by_host_index:
        shapes = [f"{tuple(x.shape)} {x.device}" for x in flat if isinstance(x, Tensor)]
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} of {', '.join(shapes)}")
    to_host = bool(ours) and (
        target is not None and target.type == "cpu"
        if name == "_to_copy"
        else name == "copy_" and not isinstance(args[0], DeviceTensor)
    )
    from_host = (
        bool(hosts) and copies and not to_host and (name == "copy_" or (target is not None and target.type == NAME))
    )
    blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
    masked = name in INDEXED and any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if (ours and (name in WAITING or to_host or masked or (by_host_index and hosts))) or (from_host and blocking):
        waits[f"{name} {_line()}"] += 1
    plain = [
        x.host if isinstance(x, DeviceTensor) else torch.device("cpu") if isinstance(x, torch.device) else x
        for x in flat
    ]
    host_args, host_kwargs = tree_unflatten(plain, spec)
    result = func(*host_args, **host_kwargs)
    if not (target.type == NAME if target is not None else ours) or (name == "copy_" and to_host):
        return args[0] if name == "copy_" else result
    if any(x.host.shape != x.shape for x in ours):
        raise NotImplementedError(f"{name} gives a tensor of the rehearsed device another shape")
    same = {id(x.host): x for x in ours}
    return tree_map_only(Tensor, lambda x: same[id(x)] if id(x) in same else DeviceTensor(x), result)


def _autocast(func: Any, *args: Any, **kwargs: Any) -> Any:
    """CUDA's rules of autocast, then the operator itself."""
    name, own = func._schema.name.removeprefix("aten::"), torch._C.DispatchKey.AutocastPrivateUse1
    floats = [x.dtype for x in tree_flatten((args, kwargs))[0] if isinstance(x, DeviceTensor) and x.is_floating_point()]
    wanted = None
    if name in LOWER:
        wanted = torch.get_autocast_dtype(NAME)
    elif name in FLOAT32 or (name in PROMOTED and torch.float32 in floats):
        wanted = torch.float32
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(own)):
        if wanted is not None:
            half = (torch.float16, torch.bfloat16, torch.float32)
            args, kwargs = tree_map_only(DeviceTensor, lambda x: x.to(wanted) if x.dtype in half else x, (args, kwargs))
        return func(*args, **kwargs)


def _setup() -> list[torch.library.Library]:
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(_call, "PrivateUse1")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    factories = torch.library.Library("aten", "IMPL")
    for factory in (torch.ops.aten.arange, torch.ops.aten.eye, torch.ops.aten.linspace):
        for overload in (getattr(factory, name) for name in factory.overloads() if "out" not in name):
            # PyTorch's own would resize an empty tensor, which a wrapper cannot follow
            factories.impl(overload._name, partial(_call, overload), "PrivateUse1")
    for name in sorted(LOWER | FLOAT32 | PROMOTED):
        packet = getattr(torch.ops.aten, name)
        for overload in (getattr(packet, part) for part in packet.overloads() if "out" not in part):
            factories.impl(overload._name, partial(_autocast, overload), "AutocastPrivateUse1")
    return [library, factories]


def _tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
    """`torch.tensor`, which cannot make a tensor of a device that is written in Python."""
    made = _TENSOR(data, **kwargs)
    return made if device is None else made.to(device)


def _moved(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """What MONAI's tensor with meta data becomes on the rehearsed device."""
    if any(isinstance(x, DeviceTensor) for x in tree_flatten((args, kwargs))[0]):
        return MetaDeviceTensor.__torch_function__(func, types, args, kwargs)
    return _META(cls, func, types, args, kwargs)


def _as_tensor(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    """`torch.as_tensor`, for the same reason."""
    made = data if isinstance(data, DeviceTensor) else _AS_TENSOR(data, dtype=dtype)
    return (
        made if dtype is None and device is None else made.to(device=device or made.device, dtype=dtype or made.dtype)
    )


_LIBRARIES, _TENSOR, _AS_TENSOR, _META = _setup(), torch.tensor, torch.as_tensor, MetaTensor.__torch_function__.__func__
torch.tensor, torch.as_tensor, MetaTensor.__torch_function__ = _tensor, _as_tensor, classmethod(_moved)
DEVICE = torch.device(NAME, 0)


@contextmanager
def counted() -> Iterator[collections.Counter[str]]:
    """The waits inside the block, by operator and line."""
    before = collections.Counter(waits)
    found: collections.Counter[str] = collections.Counter()
    yield found
    found.update(waits - before)


def main(words: list[str]) -> None:
    """Run a module with the device at hand, then print its waits."""
    module, sys.argv = words[0], words
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        for place, count in waits.most_common(40):
            print(f"{count:8d} waits: {place}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
