# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m unimedi_components COMMAND`` (or ``unimedi COMMAND``)."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fire

from unimedi_components import __version__
from unimedi_components.errors import CheckpointError, ConfigError, DataError

__all__ = ["main"]


def phantom(layout: str, out: str, patients: int = 200, seed: int = 0, workers: int | None = None) -> None:
    """Write a synthetic data set to disk in a real data set's own layout.

    The truth (labels, lesion slices, masks, boxes) goes into truth.json at OUT's root. Same seed, same bytes.

    Args:
        layout: the data set whose layout is written, such as mimic_cxr or bimcv, or all (one folder each in OUT).
        out: the folder to write to.
        patients: number of patients.
        seed: seed of all that is random.
        workers: processes that make the patients; by default as many as there are cores.
    """
    from unimedi_components.data.phantom import LAYOUTS, write_phantom

    _whole_number("patients", patients, 1)
    _whole_number("seed", seed, 0)
    if workers is not None:
        _whole_number("workers", workers, 1)
    folders = {str(layout): str(out)}
    if layout == "all":
        folders = {name: str(Path(str(out), name)) for name in LAYOUTS}
    for name, folder in folders.items():
        write_phantom(name, folder, patients=patients, seed=seed, workers=workers)


def prepare(
    dataset: str, root: str | list[str], out: str, fraction: float = 1.0, seed: int = 42, **options: Any
) -> None:
    """Turn a data set on disk, real or phantom, into a datalist; prints what was kept and dropped, by reason.

    Args:
        dataset: a name that the command datasets lists, such as chexpert, or table for a CSV of your own (columns
            image, report, and if you have them patient, split, label).
        root: the data set's folder, or the CSV, or several as "['a.csv','b.csv']".
        out: the datalist to write, a JSON file.
        fraction: share of the training patients to keep, in (0, 1].
        seed: seed of splits and fractions.
        options: --strict, and the converter's own options.
    """
    from unimedi_components.data.prepare import prepare as prepare_datalist

    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise ConfigError(f"--fraction must be in (0, 1], got {fraction!r}")
    _whole_number("seed", seed, 0)
    _check_options("prepare", prepare_datalist, options)
    # fire reads a folder called 2024 as a number
    source = [str(file) for file in root] if isinstance(root, (list, tuple)) else str(root)
    share = None if fraction == 1 else float(fraction)
    prepare_datalist(str(dataset), source, str(out), fraction=share, seed=seed, **options)


def datasets(name: str | None = None) -> None:
    """List the data sets that can be prepared: task, where to get them, licence, layout on disk, commands.

    Args:
        name: describe this one only.
    """
    from unimedi_components.data.catalogue import describe

    print(describe(None if name is None else str(name)))


def evaluate(checkpoint: str, patients: int = 200, seed: int = 1000, json: str | None = None, **options: Any) -> None:
    """Measure a checkpoint on held-out phantoms: linear probes, slice precision, report retrieval.

    Args:
        checkpoint: weights that a pre-training run left, such as bundles/pretrain/models/model.pt.
        patients: number of held-out patients per dimension.
        seed: seed of the phantoms; another than that of the training phantoms.
        json: the file that the measures are written to; without it they are only printed.
        options: further options of the measurement.
    """
    from unimedi_components.evaluation.evaluate import evaluate as evaluate_checkpoint

    _whole_number("patients", patients, 1)
    _whole_number("seed", seed, 0)
    _check_options("evaluate", evaluate_checkpoint, options)
    evaluate_checkpoint(
        str(checkpoint), patients=patients, seed=seed, json=None if json is None else str(json), **options
    )


def embed(
    *paths: str,
    checkpoint: str = "bundles/pretrain/models/model.pt",
    out: str = "embeddings.npz",
    device: str = "auto",
    **options: Any,
) -> None:
    """Embed X-rays and CT volumes: DICOM files and series folders, NIfTI, PNG and JPG, or folders of them.

    The npz holds "embed", unit vectors of the space that images and reports share, "cls", "scores" and "selected" of
    volumes' slices, "id", "dim", and as JSON text "entries", "card" (the preparation of the images) and "skipped".

    Args:
        paths: files, folders or patterns.
        checkpoint: weights that a pre-training run left.
        out: the npz to write.
        device: cpu, cuda, or auto for a GPU where there is one.
        options: --batch_2d, --batch_3d, --num_workers, --strict (an unreadable file is an error).
    """
    from unimedi_components.search import Embedder

    if not paths:
        raise ConfigError("embed: name at least one file or folder")
    _check_options("embed", Embedder.images, options)
    found = Embedder(str(checkpoint), str(device)).images([str(path) for path in paths], **options)
    path = found.save(out if str(out).endswith(".npz") else f"{out}.npz")
    for record in found.skipped:
        print(f"skipped {record['file']}: {record['reason']}")
    xrays = int((found.dims == 2).sum())
    print(f"{path}: {xrays} X-rays and {len(found) - xrays} volumes, {len(found.skipped)} files could not be read")


def check(*config: str, **overrides: Any) -> None:
    """Check a bundle's config without running it: unknown keys, overrides, arguments and references.

    Args:
        config: the config file, and the files that overlay it in their order.
        overrides: what `monai.bundle run` would be given, such as --train#trainer#max_epochs 2.
    """
    from unimedi_components.config_check import check_config

    merged = check_config([str(file) for file in config], overrides)
    print(f"ok: {len(merged)} keys in {', '.join(str(file) for file in config)}")


def serve(
    checkpoint: str = "bundles/pretrain/models/model.pt",
    index: str | None = None,
    prompts: str | list[str] = "chest_xray,chest_ct",
    host: str = "127.0.0.1",
    port: int = 8000,
    max_upload_mb: int = 512,
    device: str = "auto",
    allow_remote: bool = False,
) -> None:
    """Open a page in your browser on this machine: drop an X-ray or a CT, see what the network makes of it.

    It shows zero-shot findings, the selected slices and the attention, and with an index the nearest reports and
    studies. Nothing leaves the machine, and nothing of an upload is kept. Needs the extra "serve".

    Args:
        checkpoint: weights that a pre-training run left.
        index: the npz that the command index or embed has written with this checkpoint, to search in.
        prompts: prompt sets for the findings, shipped names or JSON files, joined with a comma.
        host: address to listen at.
        port: port to listen at; 0 takes a free one.
        max_upload_mb: largest upload in megabytes, all its files together.
        device: cpu, cuda, or auto for a GPU where there is one.
        allow_remote: needed for an address that other machines reach; there is no login.
    """
    for name, value, least in (("port", port, 0), ("max_upload_mb", max_upload_mb, 1)):
        _whole_number(name, value, least)
    missing = [name for name in _SERVE_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        lacking = ", ".join(missing)
        raise ConfigError(f"serve needs the extra 'serve' ({lacking}): pip install 'unimedi-components[serve]'")
    from unimedi_components.serve import serve as serve_page

    named = [str(prompts)] if isinstance(prompts, (str, int)) else [str(name) for name in prompts]
    sets = [name.strip() for joined in named for name in joined.split(",") if name.strip()]
    serve_page(
        str(checkpoint),
        index=None if index is None else str(index),
        prompts=sets,
        host=str(host),
        port=port,
        max_upload_mb=max_upload_mb,
        device=str(device),
        allow_remote=bool(allow_remote),
    )


_SERVE_NEEDS = ("fastapi", "uvicorn", "python_multipart")
_COMMANDS: dict[str, Callable[..., None]] = {
    "phantom": phantom,
    "prepare": prepare,
    "datasets": datasets,
    "evaluate": evaluate,
    "embed": embed,
    "serve": serve,
    "check": check,
}


def _whole_number(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"--{name} must be a whole number of at least {least}, got {value!r}")


def _check_options(command: str, function: Callable[..., Any], options: Sequence[str] | dict[str, Any]) -> None:
    """Raise for an option that ``function`` does not take: fire would say so only after the work is done."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for option in options:
        if option not in parameters:
            near = difflib.get_close_matches(option, parameters, n=1)
            hint = f"did you mean '--{near[0]}'?" if near else f"it takes --{', --'.join(parameters)}"
            raise ConfigError(f"unknown option '--{option}' of '{command}'; {hint}")


def _run(words: list[str]) -> None:
    command = words[0] if words else ""
    if command in _COMMANDS:
        flags = [word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")]
        _check_options(command, _COMMANDS[command], [flag for flag in flags if flag not in ("", "help")])
    elif command and not command.startswith("-"):
        near = difflib.get_close_matches(command, _COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(_COMMANDS)}"
        raise ConfigError(f"unknown command '{command}'; {hint}")
    fire.Fire(_COMMANDS, command=words, name="unimedi")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    A fault of the user's data, weights, config or files ends the program with one line, ``error: ...``, and
    exit code 2; ``--debug`` shows the traceback instead.

    Args:
        argv: the words after the program's name; ``sys.argv[1:]`` by default.

    Raises:
        SystemExit: with code 2 for a fault of the user's, 130 if interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        print(__version__)
        return
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        _run(words)
    except (CheckpointError, ConfigError, DataError, OSError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
