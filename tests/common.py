# SPDX-License-Identifier: Apache-2.0
"""What tests of several folders call; fixtures stand in the folders' conftest.py.

Programs of two ranks import it too, so that what takes long to import is imported where it is needed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)

REPOSITORY = Path(__file__).resolve().parents[1]
SPLITS = ("training", "validation", "test")
#: Of an encoder of milliseconds.
SIZES: dict[str, Any] = {"img_size": 32, "vol_size": (8, 32, 32), "patch_size": 8, "patch_size_3d": (4, 8, 8)}
SIZES |= {"embed_dim": 24, "depth": 2, "num_heads": 2}


def read(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text())


def rows(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    """The rows of a table."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def run_bundle(files: Path | list[Path], kind: str, start: bool = True, **overrides: Any) -> Any:
    """A workflow over config files, initialised and, but for `start`, run to its end."""
    from monai.bundle import ConfigWorkflow

    names = [str(file) for file in (files if isinstance(files, list) else [files])]
    made = ConfigWorkflow(names, workflow_type=kind, logging_file=False, **overrides)
    made.initialize()
    if start:
        made.run()
        made.finalize()
    return made


def own_inference(bundle: Path, source: Path, out: Path) -> Path:
    """The folder of what a bundle's inference.json writes by itself."""
    options = {"bundle_root": str(bundle), "inputs": str(source), "output_dir": str(out), "figures": False}
    run_bundle(bundle / "configs" / "inference.json", "inference", device="cpu", **options)
    return out


def fault_of(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """What the user is told where a call fails: the fault behind MONAI's exception, one line."""
    from unimedi_components.bundle import user_fault

    with pytest.raises(Exception) as caught:
        call(*arguments, **options)
    message = user_fault(caught.value)
    assert message is not None and "\n" not in message, caught.value
    return message


def torch_switches() -> list[Callable[[], Any]]:
    """Calls that put torch's switches of the whole process back to what they are now."""
    cuda, cudnn, sure = torch.backends.cuda, torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    return [
        partial(cuda.enable_flash_sdp, cuda.flash_sdp_enabled()),
        partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()),
        partial(torch.use_deterministic_algorithms, sure),
        partial(setattr, cudnn, "deterministic", cudnn.deterministic),
        partial(setattr, cudnn, "benchmark", cudnn.benchmark),
    ]


@contextmanager
def process_kept() -> Iterator[None]:
    """Puts back what a run changes for the whole process."""
    import monai

    root, path, switches = logging.getLogger(), sys.path[:], torch_switches()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:], sys.path[:] = handlers, path
        root.setLevel(level)
        monai.utils.set_determinism(None)
        for switch in switches:
            switch()


def last(folder: Path) -> dict[str, Any]:
    """The checkpoint that a task's run resumes from."""
    return torch.load(folder / "models" / "last.ckpt", weights_only=True)


def digests(root: Path) -> dict[str, str]:
    """Hashes of the files below a folder by their paths."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def phantom(layout: str, patients: int, seed: int) -> Any:
    """A fixture: the folder of a layout, written once for all tests that read it."""
    return pytest.fixture(scope="module")(lambda phantom_folder: phantom_folder(layout, patients, seed))


def truth_of(root: Path) -> dict[str, Any]:
    """The studies of a phantom's truth.json."""
    return read(root / "truth.json")["studies"]


def items_of(datalist: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The items of all splits by id."""
    return {item["id"]: item for split in SPLITS for item in datalist[split]}


def randomised(network: Network, spread: float = 0.1) -> Network:
    """The network with all of its parameters random, zero-initialised ones and norms too."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return network


def on_two_ranks(program: str, folder: Path, *arguments: str) -> list[Any]:
    """What two processes save to ``<rank>.pt`` that run `program` with a rank, the folder and further arguments."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, program, str(rank), str(folder), *arguments] for rank in range(2)]
    programs = [subprocess.Popen(command, env=environment) for command in commands]
    assert [program.wait(300) for program in programs] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def write_ct_slice(path: Path, image: Any, number: int) -> None:
    """An ITK image (1, H, W) as the instance of that number of one CT series."""
    import itk

    tags = image.GetMetaDataDictionary()
    tags["0008|0060"], tags["0008|0018"] = "CT", f"1.2.3.{number}"
    tags["0020|000d"], tags["0020|000e"], tags["0020|0013"] = "1.2.4", "1.2.5", str(number)
    writer = itk.ImageFileWriter[type(image)].New(Input=image, FileName=str(path))
    image_io = itk.GDCMImageIO.New()
    image_io.KeepOriginalUIDOn()
    writer.SetImageIO(image_io)
    writer.Update()


def write_radiograph(path: Path, pixels: np.ndarray, photometric: bytes, bits: int = 16) -> None:
    """A digital radiograph, explicit little-endian, whose series and instance are named after the file."""

    def element(group: int, number: int, vr: bytes, value: bytes) -> bytes:
        value += b" " * (len(value) % 2)
        size = struct.pack("<HI", 0, len(value)) if vr == b"OW" else struct.pack("<H", len(value))
        return struct.pack("<HH", group, number) + vr + size + value

    us = struct.Struct("<H").pack
    meta = element(2, 0x10, b"UI", b"1.2.840.10008.1.2.1\0")
    body = element(8, 0x16, b"UI", b"1.2.840.10008.5.1.4.1.1.1.1") + element(8, 0x18, b"UI", path.stem.encode())
    body += element(8, 0x60, b"CS", b"DX") + element(0x20, 0xE, b"UI", path.stem.encode())
    body += element(0x28, 2, b"US", us(1)) + element(0x28, 4, b"CS", photometric)
    numbers = {0x10: pixels.shape[0], 0x11: pixels.shape[1], 0x100: 16, 0x101: bits, 0x102: bits - 1, 0x103: 0}
    body += b"".join(element(0x28, number, b"US", us(value)) for number, value in numbers.items())
    body += element(0x7FE0, 0x10, b"OW", pixels.astype("<u2").tobytes())
    path.write_bytes(bytes(128) + b"DICM" + element(2, 0, b"UL", struct.pack("<I", len(meta))) + meta + body)
