# SPDX-License-Identifier: Apache-2.0
"""The paper's recipe at its size on two CPU ranks, killed and resumed, beside a run that nothing interrupts.

Run from the repository's root: `python -m benchmarks.resume WORK --json results/resume.json`. ViT-B with a BERT of
BioClinicalBERT's size, both with random weights, on phantoms in the layouts of MIMIC-CXR and BIMCV, by the line of
`docs/multi-gpu.md`: two gloo processes with 2 X-rays and 1 volume each, by default four epochs of five steps. The
second run gets SIGKILL in the third epoch and goes on with `--resume True`. The bar: values of `last.pt`
(weights, teacher, optimizer, generators) and metrics that differ.
"""

import hashlib
import json as json_module
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fire
import torch
from transformers import BertConfig, BertModel

from unimedi_components.data.datalist import write_json
from unimedi_components.data.phantom import write_phantom
from unimedi_components.data.vocabulary import build_wordpiece
from unimedi_components.networks import create_encoder
from unimedi_components.provenance import provenance

REPOSITORY = Path(__file__).resolve().parents[1]
_STEP = re.compile(r"Epoch: (\d+)/\d+, Iter: (\d+)/(\d+) -- loss: (\S+)")
#: Each step's loss in the log, by which the kill is timed.
_TALKATIVE = {"_target_": "monai.handlers.StatsHandler", "tag_name": "loss", "output_transform": "$lambda x: x['loss']"}


def resume(
    work: str, json: str | None = None, xray_patients: int = 22, epochs: int = 4, kill: str = "3.2", quick: bool = False
) -> dict[str, Any]:
    """Run both, and compare them.

    Args:
        work: folder for data, weights and logs.
        json: file for the result.
        xray_patients: of whom a tenth is held out; 20 X-rays are five steps.
        epochs: of the run, of which two warm up.
        kill: EPOCH.STEP after which the second run is killed.
        quick: a small network, for trying.
    """
    folder = Path(work).resolve()
    _write(folder / "data", xray_patients)
    whole, log = _train(folder, "whole", epochs, quick)
    states = {"whole": _state(folder)}
    shutil.rmtree(folder / "run")
    killed, _ = _train(folder, "killed", epochs, quick, tuple(int(number) for number in str(kill).split(".")))
    resumed, said = _train(folder, "resumed", epochs, quick, resume=True)
    states["resumed"] = _state(folder)
    keys = states["whole"].keys() | states["resumed"].keys()
    differ = sorted(key for key in keys if states["whole"].get(key) != states["resumed"].get(key))
    losses = {"whole": _losses(log), "resumed": _losses(said)}
    result = {
        **provenance(),
        "steps": len(losses["whole"]),
        "resumed": re.findall(r"resumed after epoch \d+ of \d+", said)[:1],
        "seconds": {"whole": whole, "killed": killed, "resumed": resumed},
        "losses": losses,
        "values": len(keys),
        "differ": differ[:20],
        "bars": [{"name": "values that differ", "value": len(differ), "limit": 0, "holds": not differ}],
    }
    if json is not None:
        write_json(result, json)
    print(json_module.dumps(result, indent=1))
    return result


def _write(data: Path, xray_patients: int) -> None:
    """Phantoms, a report encoder with its vocabulary, and ImageNet's weights as timm has them, of random numbers."""
    for layout, patients in (("mimic_cxr", xray_patients), ("bimcv", 12)):
        write_phantom(layout, data / layout, patients, workers=0, progress=False)
    if (data / "vit_b.pt").is_file():
        return
    torch.manual_seed(0)
    reports = [path.read_text(encoding="utf-8") for path in sorted((data / "mimic_cxr").rglob("*.txt"))]
    build_wordpiece(reports, data / "bert", 28996)
    BertModel(BertConfig(vocab_size=28996)).save_pretrained(data / "bert")
    own = ("3d", "segment", "depth", "mask_token")
    state = create_encoder(size="vit_b16").state_dict()
    state = {name: value for name, value in state.items() if not any(word in name for word in own)}
    # a ViT of RGB images
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].repeat(1, 3, 1, 1) / 3
    torch.save(state, data / "vit_b.pt")


def _words(folder: Path, epochs: int, quick: bool, **changes: Any) -> list[str]:
    """The page's line for one machine, with two ranks, files in the place of downloads, and each step in the log."""
    page = (REPOSITORY / "docs" / "multi-gpu.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^torchrun --standalone (.*?)\n```", page, re.S | re.M)
    words = shlex.split(line.replace("--nproc_per_node=8", "--nproc_per_node=2"))
    write_json({"+train#handlers": [_TALKATIVE]}, folder / "talkative.json")
    files = words.index("--config_file") + 1
    words[files] = words[files].replace("]", f",{str(folder / 'talkative.json')!r}]")
    data, run = folder / "data", folder / "run"
    changes |= {
        **{"encoder_weights": data / "vit_b.pt", "report_model": data / "bert", "data_dir": data},
        **{"train#sampler#batch_2d": 2, "train#sampler#batch_3d": 1, "train#dataloader#num_workers": 0},
        **{"epochs": epochs, "lr_scheduler#warmup_epochs": 2},
        **{"ckpt_dir": run / "models", "output_dir": run / "eval"},
    }
    if quick:
        changes |= {"encoder_weights": "none", "size": "vit_s16", "img_size": 32, "vol_size": [16, 32, 32]}
    flags = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", *words, *flags]


def _train(
    folder: Path, name: str, epochs: int, quick: bool, kill: tuple[int, ...] | None = None, **changes: Any
) -> tuple[float, str]:
    """Run the line, or kill it once its log shows a step; the seconds and the log."""
    log, begun = folder / f"{name}.log", time.monotonic()
    paths = os.pathsep.join(filter(None, (str(REPOSITORY), os.getenv("PYTHONPATH"))))
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    with open(log, "wb") as stream:
        words = _words(folder, epochs, quick, **changes)
        process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=variables)
        while process.poll() is None:
            time.sleep(0.2)
            steps = [tuple(map(int, step[:2])) for step in _STEP.findall(log.read_text(errors="replace"))]
            if kill is not None and steps and steps[-1] >= kill:
                for pid in (process.pid, *_children(process.pid)):
                    os.kill(pid, signal.SIGKILL)
                process.wait()
    said = log.read_text(errors="replace")
    if process.returncode != (0 if kill is None else -signal.SIGKILL):
        raise SystemExit(f"{name} ended with {process.returncode}, see {log}:\n{said[-2000:]}")
    return round(time.monotonic() - begun, 1), said


def _losses(log: str) -> list[list[float]]:
    """Epoch, step and loss of each step, which both ranks say."""
    said = {(int(epoch), int(step), float(loss)) for epoch, step, _, loss in _STEP.findall(log)}
    return [list(step) for step in sorted(said)]


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _state(folder: Path) -> dict[str, Any]:
    """What a run left, by name: hashes of tensors, and all other values."""
    last = torch.load(folder / "run" / "models" / "last.pt", weights_only=True, mmap=True)
    metrics = json_module.loads((folder / "run" / "eval" / "metrics.json").read_text(encoding="utf-8"))
    return dict(_leaves({"last": last, "metrics": metrics}, ""))


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        yield place, [str(value.dtype), list(value.shape), hashlib.blake2b(raw).hexdigest()]
    elif isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in pairs:
            yield from _leaves(part, f"{place}/{key}")
    else:
        yield place, value


if __name__ == "__main__":
    fire.Fire(resume, serialize=lambda _: None)
