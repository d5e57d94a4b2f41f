# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of networks share: runs by turns, peaks of memory, the rate of matrix products, and the report.

Times are CPU time of this process on one thread, or CUDA events on a GPU. Runs that are compared alternate in one
process (A/B/A/B), and a ratio is taken within each round, so that a busy machine slows both sides of it.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

__all__ = [
    "Product",
    "Run",
    "at_least",
    "at_most",
    "by_turns",
    "forward",
    "full_precision",
    "peak",
    "peaks",
    "ratio",
    "report",
    "set_up",
    "spread",
    "step",
]

Run = Callable[[], Any]
_PACKAGES = ("torch", "monai", "transformers", "timm")


def set_up(device: str, matmul_precision: str = "medium") -> torch.device:
    """One thread, a seed, and the precision of float32 products that training has; the device."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision(matmul_precision)
    torch.set_num_threads(1)
    return torch.device(device)


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products without TF32 or bfloat16, for comparing values."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def forward(module: Callable[..., Any], *inputs: Tensor, dtype: torch.dtype = torch.float32, **options: Any) -> Run:
    """A run of the forward pass alone; `dtype` is autocast's."""

    def run() -> None:
        with torch.no_grad(), _autocast(inputs[0].device, dtype):
            module(*inputs, **options)

    return run


def step(module: torch.nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype = torch.float32) -> Run:
    """A run of forward and backward into fresh gradients of `module`; `dtype` is autocast's."""

    def run() -> None:
        module.zero_grad(set_to_none=True)
        with _autocast(next(module.parameters()).device, dtype):
            value = loss()
        value.backward()

    return run


def _autocast(device: torch.device, dtype: torch.dtype) -> Any:
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype != torch.float32)


def by_turns(runs: Mapping[str, Run], device: torch.device, rounds: int, least: float = 0.3) -> dict[str, list[float]]:
    """Seconds of each run in each round.

    Args:
        runs: by name, in the order of their turns; `peaks` has run them before.
        device: whose clock counts.
        rounds: turns of each run.
        least: seconds of a turn; shorter runs are repeated in it, by what they take in a round that does not count. A
            single round is for trying, and repeats nothing.
    """
    least = least if rounds > 1 else 0.0
    first = {name: _seconds(run, device, 1) for name, run in runs.items()}
    if min(first.values()) >= least:
        counts, times = dict.fromkeys(runs, 1), {name: [seconds] for name, seconds in first.items()}
    else:
        counts = {name: max(1, min(50, round(least / max(seconds, 1e-6)))) for name, seconds in first.items()}
        times = {name: [] for name in runs}
    while len(next(iter(times.values()))) < rounds:
        for name, run in runs.items():
            times[name].append(_seconds(run, device, counts[name]))
    return times


def _seconds(run: Run, device: torch.device, count: int) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / count
    begun = time.process_time()
    for _ in range(count):
        run()
    return (time.process_time() - begun) / count


def peak(run: Run, device: torch.device) -> int:
    """The most bytes that a run allocates at a time, beyond those that were there.

    On a CPU torch's profiler sees every tensor come and go; what oneDNN keeps for itself it does not see.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    found: Any = profiled.profiler
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum([0, *sizes]).max())


def peaks(runs: Mapping[str, tuple[torch.nn.Module, Run]], device: torch.device) -> dict[str, int]:
    """`peak` of each run; a module's gradients are gone before and count as the run's."""
    found = {}
    for name, (module, run) in runs.items():
        module.zero_grad(set_to_none=True)
        found[name] = peak(run, device)
        module.zero_grad(set_to_none=True)
    return found


class Product:
    """The fastest of some matrix products of a ViT's sizes: what a rate is a share of.

    Args:
        device: that multiplies.
        dtype: of both matrices.
        small: one small size, for tests.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, small: bool = False) -> None:
        shapes = [(256, 256, 256)] if small else [(2048, 768, 3072), (2048, 3072, 768), (2048, 2048, 2048)]
        if device.type == "cuda":
            shapes += [(16384, 768, 3072), (8192, 8192, 8192)]
        best = 0.0
        for rows, inner, columns in shapes:
            a, b = (torch.randn(shape, device=device, dtype=dtype) for shape in ((rows, inner), (inner, columns)))
            a @ b
            flops, seconds = 2.0 * rows * inner * columns, by_turns({"": lambda a=a, b=b: a @ b}, device, 3, 0.1)[""]
            if flops / min(seconds) > best:
                best, self.flops, self.shape, self._pair = flops / min(seconds), flops, (rows, inner, columns), (a, b)

    def __call__(self) -> Tensor:
        return self._pair[0] @ self._pair[1]

    def share(self, times: Mapping[str, Sequence[float]], name: str, flops: float, product: str) -> dict[str, float]:
        """Rate of the run `name` of `flops`, over that of the run `product` of this product, in the same rounds."""
        pairs = zip(times[name], times[product], strict=True)
        return spread([flops / own / (self.flops / rate) for own, rate in pairs])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median over the rounds, and the interval that holds all of them."""
    return {"median": float(np.median(values)), "least": min(values), "most": max(values)}


def ratio(times: Mapping[str, Sequence[float]], name: str, over: str) -> dict[str, float]:
    """Time of a run over that of another one, within each round."""
    return spread([a / b for a, b in zip(times[name], times[over], strict=True)])


def at_most(value: float | Mapping[str, float], limit: float) -> dict[str, Any]:
    """A bar that a number, or the median of a spread, may not exceed."""
    return _bar(value, limit, 1)


def at_least(value: float | Mapping[str, float], limit: float) -> dict[str, Any]:
    """A bar that a number, or the median of a spread, must reach."""
    return _bar(value, limit, -1)


def _bar(value: float | Mapping[str, float], limit: float, sign: int) -> dict[str, Any]:
    interval = {"least": value["least"], "most": value["most"]} if isinstance(value, Mapping) else {}
    number = value["median"] if isinstance(value, Mapping) else value
    return {"value": number, **interval, "limit": limit, "holds": bool(sign * number <= sign * limit)}


def report(
    name: str,
    device: torch.device,
    out: str | None,
    rows: Sequence[Mapping[str, Any]],
    bars: Mapping[str, Mapping[str, Any]],
    quick: bool = False,
    **facts: Any,
) -> dict[str, Any]:
    """Print a benchmark's result as JSON, write it to `out`, and return it.

    Args:
        name: of the benchmark.
        device: that it ran on.
        out: file, or None.
        rows: raw seconds, bytes and rates.
        bars: by name, of `at_most` and `at_least`.
        quick: a run at the smallest sizes, whose bars of time and memory say nothing.
        facts: more that belongs to the result, as the sizes.
    """
    gpu = device.type == "cuda"
    machine: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if gpu else device.type,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "clock": "CUDA events" if gpu else "CPU time of the process",
        "memory": "max_memory_allocated" if gpu else "peak of allocated tensors, by torch.profiler",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "python": platform.python_version(),
        **({"cuda": torch.version.cuda} if gpu else {}),
        **{package: found for package in _PACKAGES if (found := _version(package)) is not None},
        "torch": torch.__version__,  # with its build, which an index's file does not name
    }
    result = {
        "benchmark": name,
        "quick": quick,
        "machine": machine,
        **facts,
        "rows": list(rows),
        "bars": [{"name": title, **bar} for title, bar in bars.items()],
    }
    text = json.dumps(result, indent=1)
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(text + "\n", encoding="utf-8")
    print(text)
    return result


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
