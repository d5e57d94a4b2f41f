# SPDX-License-Identifier: Apache-2.0
"""A tiny network with random weights, an index over a few files, and the makers of files that are uploaded."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from transformers import AutoTokenizer

from tests.common import randomised
from unimedi_components.data.phantom.dicom import Tag, write_dicom
from unimedi_components.data.vocabulary import build_wordpiece
from unimedi_components.networks import ProjectionHead, ReportEncoder, UnifiedViT, UniMedI
from unimedi_components.networks.pretrained import make_card, student_state
from unimedi_components.retrieval import Embedder, EmbeddingIndex, Embeddings, PromptSet, load_prompts
from unimedi_components.serve import Analyser, Limits, create_app

REPOSITORY = Path(__file__).resolve().parents[2]
XRAY_SIZE, CT_SIZE = 32, (16, 24, 24)
PREPROCESSING = {
    "xray": {"size": XRAY_SIZE},
    "ct": {"spatial_size": CT_SIZE, "window": (-1000, 1000)},
    "max_length": 32,
}
UID = "1.2.826.0.1.3680043.2.1125.7"
AXIAL = "1\\0\\0\\0\\1\\0"


class Files:
    """Makers of files in a folder, each different from call to call unless it says otherwise."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.rng = folder, np.random.default_rng(seed)
        folder.mkdir(parents=True, exist_ok=True)

    def film(self, height: int = 90, width: int = 70) -> np.ndarray:
        """Grey values of a smooth picture."""
        rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
        shade = np.sin(self.rng.uniform(2, 9) * rows + self.rng.uniform(0, 3)) * np.cos(
            self.rng.uniform(2, 9) * columns
        )
        return (127 + 100 * shade + self.rng.normal(0, 4, (height, width))).clip(0, 255).astype(np.uint8)

    def photo(self, height: int = 90, width: int = 70) -> np.ndarray:
        """A colourful picture."""
        return np.stack([self.film(height, width), self.film(height, width), 255 - self.film(height, width)], -1)

    def picture(self, name: str, pixels: np.ndarray | None = None, **options: Any) -> Path:
        path = self.folder / name
        Image.fromarray(self.film() if pixels is None else pixels).save(path, **options)
        return path

    def voxels(self, shape: Sequence[int] = (30, 28, 26)) -> np.ndarray:
        """Air with a body of soft tissue, in Hounsfield units."""
        volume = self.rng.normal(-900, 20, shape)
        x, y, z = (int(size) for size in shape[:3])
        low = int(self.rng.integers(2, 8))
        volume[low : x - 4, low : y - 3] = self.rng.normal(40, 20, volume[low : x - 4, low : y - 3].shape)
        volume[x // 2 - 4 : x // 2, :, z // 3 : z // 2] -= 400
        return volume.astype(np.int16)

    def nifti(self, name: str, voxels: np.ndarray | None = None, affine: Any = None) -> Path:
        path = self.folder / name
        values = self.voxels() if voxels is None else voxels
        nib.save(nib.Nifti1Image(values, np.diag([9, 9, 8, 1.0]) if affine is None else affine), path)
        return path

    def dicom(self, name: str, pixels: np.ndarray | None = None, modality: str = "DX", **options: Any) -> Path:
        """Options: `series`, `position` (mm along z), `photometric`, and `more` tags."""
        path = self.folder / name
        pixels = self.film().astype(np.uint16) * 16 if pixels is None else pixels
        series = options.get("series", "1")
        tags: dict[Tag, tuple[str, str]] = {
            (0x0008, 0x0016): ("UI", "1.2.840.10008.5.1.4.1.1.2" if modality == "CT" else "1.2.840.10008.5.1.4.1.1.1"),
            (0x0008, 0x0018): ("UI", f"{UID}.{series}.{zlib.crc32(f'{name} {series}'.encode())}"),
            (0x0008, 0x0060): ("CS", modality),
            (0x0008, 0x103E): ("LO", f"series {series}"),
            (0x0020, 0x000D): ("UI", UID),
            (0x0020, 0x000E): ("UI", f"{UID}.{series}"),
        }
        if (position := options.get("position")) is not None:
            tags |= {
                (0x0020, 0x0032): ("DS", f"0\\0\\{position:g}"),
                (0x0020, 0x0037): ("DS", AXIAL),
                (0x0028, 0x0030): ("DS", "9\\9"),
                (0x0028, 0x1052): ("DS", "-1024"),
                (0x0028, 0x1053): ("DS", "1"),
            }
        write_dicom(path, pixels, options.get("photometric", "MONOCHROME2"), {**tags, **options.get("more", {})})
        return path

    def series(self, stem: str = "slice", count: int = 24, step: float = 8, **options: Any) -> list[Path]:
        """A CT series, its files in another order than its slices."""
        volume = options.pop("volume", None)
        stored = ((self.voxels((30, 28, count)) if volume is None else volume) + 1024).astype(np.uint16)
        names = self.rng.permutation(count)
        return [
            self.dicom(f"{stem}{names[z]:03d}.dcm", stored[:, :, z].T.copy(), "CT", position=step * z, **options)
            for z in range(count)
        ]

    def zipped(self, name: str, members: dict[str, bytes | Path], method: int = zipfile.ZIP_DEFLATED) -> Path:
        path = self.folder / name
        with zipfile.ZipFile(path, "w", method) as content:
            for member, data in members.items():
                content.writestr(member, data.read_bytes() if isinstance(data, Path) else data)
        return path

    def raw(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "files")


@pytest.fixture(scope="session")
def prompts() -> dict[int, PromptSet]:
    return {
        2: load_prompts("chest_xray").select(["edema", "pleural effusion"]),
        3: load_prompts("chest_ct").select(["edema"]),
    }


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a pre-training run leaves, of a network whose weights are random."""
    folder = tmp_path_factory.mktemp("serve") / "models"
    texts = [text for name in ("chest_xray", "chest_ct") for sides in load_prompts(name).findings.values()
             for side in sides.values() for text in side]  # fmt: skip
    build_wordpiece(texts, folder / "report_encoder", 400)
    tokenizer = AutoTokenizer.from_pretrained(folder / "report_encoder")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = {"patch_size": 8, "patch_size_3d": (4, 8, 8), "embed_dim": 32, "depth": 2, "num_heads": 2}
        config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(tokenizer)}
        heads = ProjectionHead(32, 48, 16), ProjectionHead(32, None, 16)
        encoder = UnifiedViT(XRAY_SIZE, CT_SIZE, **sizes)
        network = UniMedI(encoder, ReportEncoder(config=config), *heads, self_distillation=False, num_slices=2)
        randomised(network, 0.15)
    torch.save(encoder.state_dict(), folder / "model.pt")
    torch.save(student_state(network), folder / "unimedi.pt")
    (folder / "model.json").write_text(json.dumps(make_card(network, PREPROCESSING, phantom_seed=None)))
    return folder / "model.pt"


@pytest.fixture(scope="session")
def embedder(checkpoint: Path) -> Embedder:
    return Embedder(checkpoint, "cpu")


@pytest.fixture(scope="session")
def index(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingIndex:
    """Three X-rays and two volumes with reports; two X-rays share theirs."""
    root = tmp_path_factory.mktemp("indexed")
    made = Files(root, seed=11)
    items: list[dict[str, Any]] = [
        {"id": f"x{i}", "dim": 2, "image": made.picture(f"x{i}.png").name, "report": text}
        for i, text in enumerate(("clear lungs.", "large pleural effusion.", "clear lungs."))
    ]
    items += [
        {"id": f"v{i}", "dim": 3, "image": made.nifti(f"v{i}.nii").name, "report": f"edema <b>number {i}</b>."}
        for i in range(2)
    ]
    images = embedder.items(items, root, progress=False)
    return EmbeddingIndex(Embeddings.join([images, embedder.reports(items)]))


@pytest.fixture(scope="session")
def analyser(embedder: Embedder, prompts: dict[int, PromptSet], index: EmbeddingIndex) -> Analyser:
    return Analyser(embedder, prompts, index)


@pytest.fixture(scope="session")
def client(analyser: Analyser) -> Iterator[TestClient]:
    """The application without sockets, with limits that are easily reached."""
    limits = Limits(upload_bytes=2 * 2**20, files=40, pixels=4_000_000, voxels=2_000_000)
    with TestClient(create_app(analyser, limits), base_url="http://127.0.0.1", raise_server_exceptions=False) as made:
        yield made


@pytest.fixture
def upload(client: TestClient) -> Any:
    """Upload files by path, or (name, content) pairs; the answer's status and JSON."""

    def post(*given: Path | tuple[str, bytes]) -> tuple[int, dict[str, Any]]:
        pairs = [(one.name, one.read_bytes()) if isinstance(one, Path) else one for one in given]
        answer = client.post("/api/analyse", files=[("files", (name, io.BytesIO(data))) for name, data in pairs])
        return answer.status_code, answer.json()

    return post


@pytest.fixture(autouse=True)
def nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test ends with an empty folder of temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield
    assert os.listdir(folder) == []


@pytest.fixture
def started(checkpoint: Path, tmp_path: Path) -> Iterator[Any]:
    """Start the command with more words; the process, its address and the folder of its temporary files."""
    processes: list[subprocess.Popen[str]] = []

    def start(*words: str) -> tuple[subprocess.Popen[str], str, Path]:
        folder = tmp_path / "server-temporary"
        folder.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(folder)}
        command = [sys.executable, "-m", "unimedi_components", "serve", "--checkpoint", str(checkpoint)]
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([*command, "--port", "0", "--device", "cpu", *words], env=environment, **options)
        processes.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.fullmatch(r"UniMedI is at (http://\S+) \(Ctrl-C ends it\)\n", line)
        assert match, line + (process.stderr.read() if process.stderr else "")
        return process, match[1], folder

    yield start
    for process in processes:
        process.kill()
        process.communicate()
