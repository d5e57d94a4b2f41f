# SPDX-License-Identifier: Apache-2.0
"""A tiny pre-training run, made once for all tests of the bundles, and the means to start further ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from torch import nn

from tests.common import REPOSITORY
from unimedi_components.data.datalist import write_json
from unimedi_components.data.phantom import write_phantom
from unimedi_components.data.vocabulary import build_wordpiece
from unimedi_components.networks import (
    SETRPUP,
    ImageClassifier,
    ProjectionHead,
    ReportEncoder,
    UnifiedViT,
    UniMedI,
    ViTDet,
    load_tokenizer,
    network_card,
)
from unimedi_components.networks.pretrained import make_card, student_state
from unimedi_components.networks.unetr import UnifiedUNETR

CONFIGS = REPOSITORY / "bundles" / "pretrain" / "configs"
#: "cuda" or, with `pytest -p tests.rehearsal`, "rehearsal" runs these tests on a GPU or a rehearsed one.
DEVICE = os.environ.get("UNIMEDI_TEST_DEVICE", "cpu")
EPOCHS = 3
TINY = {
    "datalist#phantoms": {"mimic_cxr": 36, "bimcv": 36},
    "train#sampler#batch_2d": 4,
    "train#sampler#batch_3d": 4,
    "epochs": EPOCHS,
    "device": DEVICE,
    # The default rounds to bfloat16 on CPUs that have it, so that other batch shapes give other digits.
    "matmul_precision": "highest",
    "img_size": 32,
    "vol_size": [16, 24, 24],
    "network_def#dino_head#out_dim": 64,
    "network_def#encoder#embed_dim": 32,
    "network_def#encoder#depth": 2,
    "network_def#encoder#num_heads": 2,
    "network_def#report_encoder#config#hidden_size": 32,
    "network_def#report_encoder#config#num_hidden_layers": 1,
}


@dataclass(frozen=True)
class Run:
    """Where a run reads and writes."""

    root: Path
    data: Path

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def eval(self) -> Path:
        return self.root / "eval"

    @property
    def folders(self) -> dict[str, str]:
        """Overrides that keep the run out of the repository."""
        return {
            "dataset_dir": str(self.data / "phantom"),
            "cache_dir": str(self.data / "cache"),
            "ckpt_dir": str(self.models),
            "output_dir": str(self.eval),
        }

    @property
    def overrides(self) -> dict[str, Any]:
        """Overrides of train.json for a run of seconds."""
        return {**TINY, **self.folders}

    def metrics(self) -> dict[str, Any]:
        return json.loads((self.eval / "metrics.json").read_text())

    def last(self) -> dict[str, Any]:
        return torch.load(self.models / "last.pt", weights_only=True)


def environment() -> dict[str, str]:
    """For a program of one thread, which computes the same as any other of one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def words(config_file: Any, overrides: Mapping[str, Any]) -> list[str]:
    """The command line of `monai.bundle run` after the interpreter."""
    config = str(config_file) if not isinstance(config_file, list) else repr([str(file) for file in config_file])
    flags = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    return ["-m", "monai.bundle", "run", "--config_file", config, *flags]


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m monai.bundle run` (or another launcher) and return what it printed."""

    def run(config_file: Any, overrides: Mapping[str, Any], cwd: Path, launcher: tuple[str, ...] = ()) -> Any:
        return subprocess.run(
            [sys.executable, *launcher, *words(config_file, overrides)],
            cwd=cwd,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


@pytest.fixture(scope="session")
def started() -> Callable[..., subprocess.Popen[str]]:
    """Start `python -m monai.bundle run` (or another launcher) with its output in a file, to be killed."""

    def start(
        config_file: Any, overrides: Mapping[str, Any], cwd: Path, log: Path, launcher: tuple[str, ...] = ()
    ) -> Any:
        with open(log, "w") as stream:
            program = [sys.executable, "-u", *launcher, *words(config_file, overrides)]
            return subprocess.Popen(program, cwd=cwd, env=environment(), stdout=stream, stderr=subprocess.STDOUT)

    return start


@pytest.fixture(scope="session")
def bundle_words() -> Callable[[Any, Mapping[str, Any]], list[str]]:
    """The command line of `monai.bundle run` after the interpreter, from config files and overrides."""
    return words


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, command: Any) -> Run:
    """A finished run of three epochs: the user's own line from the repository's root, in a size of seconds."""
    base = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist have folders side by side: the first one that asks trains for all.
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    run = Run(base / "bundle-run", base / "bundle-data")
    with FileLock(base / "bundle-run.lock"):
        done = run.root / "done"
        if not done.is_file():
            result = command("bundles/pretrain/configs/train.json", run.overrides, REPOSITORY)
            assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
            done.write_text(result.stdout + result.stderr)
    return run


@pytest.fixture
def new_run(trained: Run, tmp_path: Path) -> Run:
    """Folders of a further run over the same phantoms."""
    return Run(tmp_path / "run", trained.data)


@pytest.fixture
def empty_run(tmp_path: Path) -> Run:
    """Folders of a run over phantoms of its own."""
    return Run(tmp_path / "run", tmp_path / "data")


@pytest.fixture(scope="session")
def configs() -> Path:
    return CONFIGS


# Sizes and rates of runs of seconds; losses rise and fall at these rates, so that the best epoch is not the last.
ENCODER = {"img_size": 32, "vol_size": [8, 24, 24], "patch_size": 16, "patch_size_3d": [4, 12, 12]}
ENCODER |= {"embed_dim": 16, "depth": 1, "num_heads": 2}
# keyword -> id of the configs
SHORT = {"batch_size": "train#dataloader#batch_size", "bootstrap": "evaluation#bootstrap", "lr": "optimizer#lr"}
SHORT |= {"data_set": "data#datalist#dataset", "phantoms": "data#datalist#phantoms", "patience": "train#run#patience"}
SHORT |= {"variant": "network_def#variant", "widths": "network_def#widths"}
PHANTOMS = {"chexpert": 32, "covidx": 18, "cc_ccii": 18, "rsna": 40, "bcv": 5, "amos": 5}
PROBE = {"epochs": 4, "recipe#probe#lr": 0.5, "recipe#probe#weight_decay": 0.0}
MASKS = {"epochs": 4, "preprocessing#film#size": 48, "widths": [8, 8, 4]}
BOXES = {"epochs": 4, "img_size": 48, "network_def#width": 8, "network_def#score_threshold": 0.6, "lr": 0.01}
ORGANS = {"epochs": 2, "vol_size": [8, 24, 24], "network_def#hidden_states": [0, 1], "network_def#feature_size": 4}
ORGANS |= {"train#repeated#steps": 6, "evaluation#figures": 1}
CURVES = {"roc.png", "confusion.png"}
#: Bundle -> its data set, sizes of its encoder, overrides, and figures of its evaluation.
TASK_BUNDLES: dict[str, tuple[str, dict[str, Any], dict[str, Any], set[str]]] = {
    "chest_xray_classification": ("chexpert", {}, {**PROBE, "preprocessing#xray#size": 32}, CURVES),
    "chest_ct_classification": ("cc_ccii", {}, {**PROBE, "vol_size": [8, 24, 24]}, CURVES),
    "chest_xray_segmentation": ("rsna", {"patch_size": 8}, MASKS, {"masks.png"}),
    "chest_xray_detection": ("rsna", {"patch_size": 8}, BOXES, {"precision_recall.png", "boxes.png"}),
    "abdomen_ct_segmentation": ("bcv", {"depth": 2}, ORGANS, {"img0032.png"}),
}


class TaskBundle:
    """A task bundle over small phantoms and a tiny pre-trained encoder, which all bundles and workers share."""

    def __init__(self, name: str, data: Path) -> None:
        self.name, self.data, self.device = name, data, DEVICE
        self.configs = REPOSITORY / "bundles" / name / "configs"
        self.data_set, sizes, self.changes, self.figures = TASK_BUNDLES[name]
        self.sizes = {**ENCODER, **sizes}
        self.encoder = data / f"{name}-encoder" / "model.pt"
        self._finished: dict[Path, ConfigWorkflow] = {}

    def prepare(self) -> None:
        """Make the phantoms and the encoder where they are not there."""
        for name in (self.data_set, *{"chexpert": ["covidx"], "bcv": ["amos"]}.get(self.data_set, [])):
            if not (self.data / f"{name}.done").is_file():
                write_phantom(name, self.data / name, PHANTOMS[name], workers=0, progress=False)
                (self.data / f"{name}.done").touch()
        if not self.encoder.with_name("model.json").is_file():
            self.encoder.parent.mkdir(exist_ok=True)
            torch.manual_seed(0)
            encoder = UnifiedViT(**self.sizes)
            torch.save(encoder.state_dict(), self.encoder)
            card = {"format": 1, "encoder": encoder.hparams}
            self.encoder.with_name("model.json").write_text(json.dumps(card))

    def overrides(self, folder: Path, **changes: Any) -> dict[str, Any]:
        """Of train.json, for a run of seconds that writes to `folder`."""
        name = changes.get("data_set", self.data_set)
        places = {"dataset_dir": self.data / name, "cache_dir": self.data / f"{self.name}-cache"}
        places |= {"datalist_file": folder / "data.json", "encoder_weights": self.encoder}
        places |= {"ckpt_dir": folder / "models", "output_dir": folder / "eval"}
        small = {"size": self.sizes, "device": DEVICE, "bootstrap": 20, "phantoms": PHANTOMS[name]}
        given = {**small, **self.changes, **{key: str(path) for key, path in places.items()}, **changes}
        return {SHORT.get(key, key): value for key, value in given.items()}

    def files(self, *names: str) -> list[str]:
        """Configs by name."""
        return [str(self.configs / f"{name}.json") for name in names]

    def workflow(self, changes: dict[str, Any], *names: str, kind: str = "train") -> ConfigWorkflow:
        """An initialized workflow of configs."""
        made = ConfigWorkflow(self.files(*names), workflow_type=kind, logging_file=False, **changes)
        made.initialize()
        return made

    def train(self, folder: Path, *overlays: str, **changes: Any) -> ConfigWorkflow:
        """A finished run."""
        made = self.workflow(self.overrides(folder, **changes), "train", *overlays)
        made.run()
        made.finalize()
        return made

    def finished(self) -> tuple[Path, ConfigWorkflow]:
        """Folder and workflow of the default run, trained once by each worker."""
        if not self._finished:
            folder = self.data / f"{self.name}-run-{os.getpid()}"
            self._finished[folder] = self.train(folder)
        return next(iter(self._finished.items()))

    def interrupted(self, folder: Path, epoch: int, *overlays: str, **changes: Any) -> None:
        """A run that something ends after some epochs."""

        class Stop(Exception):
            pass

        def stop(engine: Any) -> None:
            raise Stop

        made = self.workflow(self.overrides(folder, **changes), "train", *overlays)
        made.parser.get_parsed_content("train#trainer").add_event_handler(Events.EPOCH_COMPLETED(once=epoch), stop)
        with pytest.raises(Exception) as caught:
            made.run()
        assert isinstance(caught.value, Stop) or isinstance(caught.value.__cause__, Stop)


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Where two checkpoints differ."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [place]
    if isinstance(a, dict) and isinstance(b, dict):
        names = [*a, *(name for name in b if name not in a)]
        return [found for name in names for found in differences(a.get(name), b.get(name), f"{place}/{name}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{place}/{i}")]
    return [] if a == b else [f"{place}: {a!r} {b!r}"]


@pytest.fixture(scope="session")
def checkpoint_differences() -> Callable[[Any, Any], list[str]]:
    return differences


@pytest.fixture(scope="session")
def task_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TaskBundle]:
    """A task bundle by name, ready to train."""
    base = tmp_path_factory.getbasetemp()
    base = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "task-bundles"
    base.mkdir(exist_ok=True)
    made: dict[str, TaskBundle] = {}

    def get(name: str) -> TaskBundle:
        if name not in made:
            made[name] = TaskBundle(name, base)
            with FileLock(base.with_suffix(".lock")):
                made[name].prepare()
        return made[name]

    return get


@pytest.fixture(scope="module")
def bundle(request: pytest.FixtureRequest, task_bundle: Any) -> TaskBundle:
    """The task bundle that the test module names in BUNDLE."""
    return task_bundle(request.module.BUNDLE)


@pytest.fixture(scope="module")
def finished(bundle: TaskBundle) -> tuple[Path, ConfigWorkflow]:
    """Folder and workflow of its default run."""
    return bundle.finished()


def untrained_task(name: str, sizes: dict[str, Any], outputs: int) -> tuple[nn.Module, list[str], dict[str, Any]]:
    """A small task network with its label names and the preparation of its images."""
    encoder, labels = UnifiedViT(**sizes), ["background", *(f"label {i}" for i in range(1, outputs))]
    film = {"film": {"size": sizes["img_size"]}}
    if name == "abdomen_ct_segmentation":
        organs = {"spatial_size": sizes["vol_size"], "spacing": None, "window": (-175, 250), "num_classes": outputs}
        network = UnifiedUNETR(encoder, outputs, hidden_states=(0, 1), feature_size=4)
        return network, labels, {"organs": organs}
    if name == "chest_xray_segmentation":
        return SETRPUP(encoder, widths=(8, 8, 4)), ["background", "pneumonia"], film
    if name == "chest_xray_detection":
        return ViTDet(encoder, 1, width=16), ["background", "pneumonia"], film
    dim, preparation = (3, "ct") if "ct" in name else (2, "xray")
    return ImageClassifier(encoder, outputs, dim), labels, {preparation: {}}


def write_untrained(name: str, models: Path, sizes: dict[str, Any], outputs: int = 3) -> None:
    """What a bundle's training leaves in `models`, of a small network with random weights.

    Args:
        name: of the bundle; retrieval carries what pre-training leaves.
        models: folder to make.
        sizes: of the encoder.
        outputs: classes, or dimensions of the common space.
    """
    models.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        if name not in ("pretrain", "report_retrieval"):
            network, labels, preprocessing = untrained_task(name, sizes, outputs)
            torch.save(network.state_dict(), models / "model.pt")
            write_json(network_card(network, "any", labels, preprocessing), models / "model.json")
            return
        tokenizer = load_tokenizer(build_wordpiece(["clear lungs.", "large effusion."], models / "report_encoder", 60))
        width = sizes["embed_dim"]
        reports = ReportEncoder(config={"hidden_size": width, "num_hidden_layers": 1, "vocab_size": len(tokenizer)})
        heads = (ProjectionHead(width, 16, outputs, norm="batch_per_modality") for _ in range(2))
        towers = UniMedI(
            UnifiedViT(**sizes), reports, *heads, selector="student", self_distillation=False, num_slices=2
        ).eval()
        for parameter in towers.parameters():
            nn.init.normal_(parameter, std=0.2)
    preprocessing = {"xray": {"size": sizes["img_size"]}, "ct": {"spatial_size": sizes["vol_size"]}}
    torch.save(towers.encoder.state_dict(), models / "model.pt")
    torch.save(student_state(towers), models / "unimedi.pt")
    write_json(make_card(towers, preprocessing), models / "model.json")


@pytest.fixture(scope="session")
def write_weights() -> Callable[..., None]:
    return write_untrained
