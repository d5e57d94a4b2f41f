# SPDX-License-Identifier: Apache-2.0
"""Everything that a machine with a GPU should be asked, in parts of at most nine minutes.

Run from the repository's root: `python -m benchmarks.gpu` (`make gpu`). Parts that are done are not run again, the
training goes on from its last epoch, and one that failed is tried again; so call it until it ends with 0. It ends with
3 where parts are left (`--minutes`), with 1 where parts failed, and with 2 where there is no GPU. All results lie in
one folder, `results.json` first: card, versions, commit, times, bars. `--device cpu` rehearses the chain at toy size.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fire
import torch

from unimedi_components.data.datalist import write_json
from unimedi_components.provenance import commit, provenance

CONFIGS = ("bundles/pretrain/configs/train.json", "bundles/pretrain/configs/phantom_224.json")
BENCHMARKS = ("attention", "encoder", "patch_loss", "step", "accumulation", "segmentation", "scaling", "startup")
#: Of the tests that the rehearsed device runs, see `tests/bundles/test_rehearsal.py`.
CONTRACT = "not refused and not readable and not metadata and not evaluate_reproduces"
PACKAGES = ("torch", "monai", "transformers", "pytorch-ignite", "numpy")
HARD_S, MOST_BYTES, MOST_MINUTES = 540, 60_000_000, 20
_LOG_BYTES = 200_000
_TOY: dict[str, Any] = {
    **{"datalist#phantoms": {"mimic_cxr": 24, "bimcv": 20}, "epochs": 2, "lr_scheduler#warmup_epochs": 1},
    **{"train#sampler#batch_2d": 4, "train#sampler#batch_3d": 2, "train#dataloader#num_workers": 0},
    **{"img_size": 32, "vol_size": [16, 24, 24], "size": "tiny", "network_def#encoder#depth": 1},
    "network_def#num_slices": 2,
}
Json = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One program of the whole.

    Args:
        words: of its command line, after the interpreter.
        minutes: that it takes on an H100, about.
        epochs: the file that every epoch of a training replaces; after that the part may be stopped, and goes on later.
        result: the JSON file that it leaves.
        environment: more of it.
    """

    name: str
    words: Sequence[str]
    minutes: float = 4
    epochs: Path | None = None
    result: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def parts(device: str, out: Path, work: Path) -> list[Part]:
    """All parts, in order."""
    toy = device == "cpu"
    on_device = {"UNIMEDI_TEST_DEVICE": device}
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    networks = (
        ("tests/test_waits.py", "-k", "counter") if toy else ("tests/test_waits.py", "tests/bundles/test_on_a_gpu.py")
    )
    found = [Part("tests_networks", (*pytest, *networks), 3, environment=on_device)]
    if not toy:
        contract = ("tests/bundles/test_task_contract.py", "-k", CONTRACT)
        found.append(Part("tests_bundles", (*pytest, *contract), 6, environment=on_device))
    for name in BENCHMARKS:
        file = out / f"{name}.json"
        quick = ("--quick",) if toy else ()
        found.append(
            Part(name, ("-m", f"benchmarks.{name}", "--device", device, "--json", str(file), *quick), result=file)
        )
    file = out / "data.json"
    quick = ("--patients", "6", "--repeats", "1", "--img_size", "32") if toy else ()
    found.append(Part("data", ("-m", "benchmarks.data", "--json", str(file), *quick), result=file))

    run = work / "pretrain"
    changes = {**(_TOY if toy else {}), "dataset_dir": str(work / "phantoms"), "cache_dir": str(work / "cache")}
    folders = {"device": device, "ckpt_dir": str(run / "models"), "output_dir": str(run / "eval")}
    cache = ("-m", "unimedi_components", "cache", *CONFIGS, *_flags(changes))
    found.append(Part("cache", cache, 6))
    last = run / "models" / "last.pt"
    resumed = {"resume": True} if last.is_file() else {}
    train = ("-m", "monai.bundle", "run", "--config_file", repr(list(CONFIGS)))
    found.append(Part("pretrain", (*train, *_flags({**changes, **folders, **resumed})), 8, last))
    file = out / "evaluation.json"
    evaluate = ("-m", "unimedi_components", "evaluate", str(run / "models" / "model.pt"), "--device", device)
    few = ("--patients", "8") if toy else ()
    found.append(Part("evaluate", (*evaluate, "--json", str(file), *few), 4, result=file))
    page = ("-m", "unimedi_components", "report", str(run), "--out", str(out / "page"))
    return [*found, Part("page", page, 1)]


def _flags(changes: Mapping[str, Any]) -> list[str]:
    return [word for key, value in changes.items() for word in (f"--{key}", str(value))]


def gpu(
    device: str = "cuda",
    out: str = "results/gpu",
    work: str = "results/gpu_work",
    minutes: float | None = None,
    part_minutes: float = 8,
    only: Any = None,
) -> None:
    """Run what is not done yet.

    Args:
        device: "cuda", or "cpu" for a rehearsal at toy size.
        out: folder for the results, of at most 60 MB.
        work: folder for phantoms, cache and weights.
        minutes: after which no part is begun and the running one is stopped; by default none.
        part_minutes: after which a training is stopped at the end of its epoch; any part is ended after nine.
        only: names of parts, with commas between them.
    """
    if device != "cpu" and not torch.cuda.is_available():
        print(
            f"error: torch {torch.__version__} finds no GPU; 'make gpu GPU=cpu' rehearses without one", file=sys.stderr
        )
        raise SystemExit(2)
    results, begun = Path(out), time.monotonic()
    results.mkdir(parents=True, exist_ok=True)
    every = parts(device, results, Path(work))
    names = [part.name for part in every] if only is None else only.split(",") if isinstance(only, str) else list(only)
    if unknown := set(names) - {part.name for part in every}:
        raise SystemExit(f"unknown parts {sorted(unknown)}; there are {', '.join(part.name for part in every)}")
    chosen = [part for part in every if part.name in names]
    ran = 0
    for part in chosen:
        if _record(results, part).get("code") == 0:
            continue
        left = HARD_S if minutes is None else 60 * minutes - (time.monotonic() - begun)
        if left <= 0 or (ran and left < 60 * part.minutes and part.epochs is None):
            break
        ran += 1
        print(f"{part.name}: python {shlex.join(part.words)}", flush=True)
        hard = min(HARD_S, left)
        code, seconds = _run(part, results, min(60 * part_minutes, hard - 60), hard)
        before = _record(results, part).get("seconds", 0) if part.epochs else 0
        record = {"command": shlex.join(["python", *part.words]), "code": code, "seconds": round(before + seconds, 1)}
        write_json({**record, "commit": commit()}, _place(results, part))
        end = {0: "done", None: "stopped"}.get(code, f"failed ({code}), see {_log(results, part)}")
        print(f"{part.name}: {end} after {seconds:.0f} s", flush=True)
        _summarise(results, Path(work), chosen, device)
    records = {part.name: _record(results, part).get("code", "not run") for part in chosen}
    failed = [name for name, code in records.items() if code not in (0, None, "not run")]
    waiting = [name for name, code in records.items() if code in (None, "not run")]
    _check_size(results)
    print(f"{results / 'results.json'}: {len(chosen) - len(failed) - len(waiting)} of {len(chosen)} parts done")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    if waiting:
        print(f"left, call again: {', '.join(waiting)}", file=sys.stderr)
    if failed or waiting:
        raise SystemExit(3 if waiting else 1)


def _place(results: Path, part: Part) -> Path:
    return results / "parts" / f"{part.name}.json"


def _log(results: Path, part: Part) -> Path:
    return results / "logs" / f"{part.name}.log"


def _record(results: Path, part: Part) -> Json:
    return _read(_place(results, part))


def _read(path: Path) -> Json:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _run(part: Part, results: Path, soft: float, hard: float) -> tuple[int | None, float]:
    """Run a part.

    Args:
        soft: seconds after which a training is stopped at the end of its epoch.
        hard: seconds after which any part is ended.

    Returns:
        its exit code, None for what the call's end or a training's turn stopped, and the seconds.
    """
    log, begun = _log(results, part), time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (os.getcwd(), os.getenv("PYTHONPATH"))))}
    with open(log, "ab" if part.epochs else "wb") as stream:
        process = subprocess.Popen(
            [sys.executable, *part.words],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**environment, **part.environment},
            start_new_session=True,
        )
        saved = _saved(part)
        stopped = False
        try:
            while process.poll() is None:
                time.sleep(0.1)
                seconds, now = time.monotonic() - begun, _saved(part)
                stopped = seconds > hard or (seconds > soft and now != saved)
                if stopped:
                    break
                saved = now if seconds <= soft else saved
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM if process.poll() is None else signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    log.write_bytes(log.read_bytes()[-_LOG_BYTES:])
    code = None if stopped and (part.epochs or hard < HARD_S) else process.returncode
    return code, time.monotonic() - begun


def _saved(part: Part) -> int:
    """When the last epoch was saved."""
    return part.epochs.stat().st_mtime_ns if part.epochs and part.epochs.is_file() else 0


def _summarise(results: Path, work: Path, chosen: Sequence[Part], device: str) -> None:
    """Write `results.json`, and put the training's numbers and figures beside it."""
    ran = work / "pretrain" / "eval"
    for file in (*ran.glob("*.png"), *ran.glob("*.json"), *ran.glob("run.log")):
        (results / "pretrain").mkdir(exist_ok=True)
        shutil.copy2(file, results / "pretrain" / file.name)
    records = {part.name: _record(results, part) for part in chosen if _record(results, part)}
    bars = []
    for part in chosen:
        if part.result is not None:
            bars += [{"part": part.name, **bar} for bar in _read(part.result).get("bars", [])]
    if records.get("pretrain", {}).get("code") == 0 and device != "cpu":
        spent = records["pretrain"]["seconds"] / 60
        bar = {"name": "minutes of pre-training", "value": spent, "limit": MOST_MINUTES, "holds": spent <= MOST_MINUTES}
        bars.append({"part": "pretrain", **bar})
    versions = {name: importlib.metadata.version(name) for name in PACKAGES} | {"torch": torch.__version__}
    write_json(
        {**provenance(), "device": _card(device), "versions": versions, "parts": records, "bars": bars},
        results / "results.json",
    )


def _card(device: str) -> Json:
    if device == "cpu":
        return {"name": "CPU, at toy size"}
    about = torch.cuda.get_device_properties(0)
    card = {"name": about.name, "memory_gib": round(about.total_memory / 2**30, 1), "count": torch.cuda.device_count()}
    return {**card, "capability": f"{about.major}.{about.minor}", "cuda": torch.version.cuda, "cudnn": _cudnn()}


def _cudnn() -> int | None:
    return torch.backends.cudnn.version()


def _check_size(results: Path) -> None:
    sizes = {file: file.stat().st_size for file in results.rglob("*") if file.is_file()}
    if sum(sizes.values()) > MOST_BYTES:
        largest = sorted(sizes, key=lambda file: -sizes[file])[:3]
        named = ", ".join(f"{file} ({sizes[file] / 1e6:.0f} MB)" for file in largest)
        raise SystemExit(f"error: {results} has more than {MOST_BYTES / 1e6:.0f} MB; the largest files are {named}")


if __name__ == "__main__":
    fire.Fire(gpu)
