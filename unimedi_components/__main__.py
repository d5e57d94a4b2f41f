# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m unimedi_components COMMAND`` (or ``unimedi COMMAND``)."""

import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fire

from unimedi_components import __version__
from unimedi_components.command_help import command_help, overview, prepare_help
from unimedi_components.command_options import check_options, exact_words, whole_number
from unimedi_components.errors import CheckpointError, ConfigError, DataError
from unimedi_components.files import NOT_WRITTEN, show_any_name
from unimedi_components.inspect_command import inspect
from unimedi_components.search_commands import embed, index, search
from unimedi_components.serve_command import serve
from unimedi_components.zero_shot_command import zero_shot


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

    whole_number("patients", patients, 1)
    whole_number("seed", seed, 0)
    if workers is not None:
        whole_number("workers", workers, 1)
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
    whole_number("seed", seed, 0)
    check_options("prepare", prepare_datalist, options)
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
    from unimedi_components.retrieval.evaluate import evaluate as evaluate_checkpoint

    whole_number("patients", patients, 1)
    whole_number("seed", seed, 0)
    check_options("evaluate", evaluate_checkpoint, options)
    evaluate_checkpoint(
        str(checkpoint), patients=patients, seed=seed, json=None if json is None else str(json), **options
    )


def report(*run_dirs: str, out: str, tables: str = "results") -> None:
    """Write one static page with figures from finished runs and experiments, beside the paper's numbers.

    Args:
        run_dirs: folders of runs, such as bundles/pretrain, and of experiments, such as results/experiment/small.
        out: folder that the page is written to.
        tables: folder where `make tableN` left its tables.
    """
    from unimedi_components.report.page import report as write_page

    write_page([str(folder) for folder in run_dirs], str(out), str(tables))


def export(checkpoint: str, folder: str, license: str | None = None, format: str = "hub") -> None:
    """Write trained weights for other software: a folder in the Hugging Face hub's form, or ONNX files.

    The hub's folder holds the image encoder of a pre-training run: UnifiedViT.from_pretrained, and transformers'
    AutoModel with trust_remote_code=True, load it. ONNX files (extra [onnx]) hold the encoder and both towers of a
    pre-training run, or a task's network, and are checked with onnxruntime.

    Args:
        checkpoint: weights that a run left, such as bundles/pretrain/models/model.pt.
        folder: to write to; new or empty.
        license: of the weights, as the hub names it; by default apache-2.0 for a run on phantoms, else unknown.
        format: hub or onnx.
    """
    place = Path(str(folder))
    if format not in ("hub", "onnx"):
        raise ConfigError(f"--format {format!r} is unknown; formats are hub and onnx")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"{place} exists and is no empty folder; name a new one")
    if format == "onnx":
        from unimedi_components.networks.onnx_export import write_onnx

        for file, difference in write_onnx(str(checkpoint), place).items():
            print(f"{file}  within {difference:.1e} of torch")
        return
    from unimedi_components.networks import load_encoder

    encoder = load_encoder(str(checkpoint))
    encoder.save_pretrained(place, model_card_kwargs={} if license is None else {"license": str(license)})
    for file in sorted(place.iterdir()):
        print(file)


def check(*config: str, **overrides: Any) -> None:
    """Check a bundle's config without running it: unknown keys, overrides, arguments and references.

    Args:
        config: the config file, and the files that overlay it in their order.
        overrides: what `monai.bundle run` would be given, such as --train#trainer#max_epochs 2.
    """
    from unimedi_components.config_check import check_config

    merged = check_config([str(file) for file in config], overrides)
    print(f"ok: {len(merged)} keys in {', '.join(str(file) for file in config)}")


def cache(*config: str, workers: int | None = None, clean: bool = False, **overrides: Any) -> None:
    """Prepare a config's training and validation images ahead, in parallel; interrupted, it goes on where it was.

    Phantoms and datalists that the config asks for are made first. Runs and their ranks then find every image ready.

    Args:
        config: the config file, and the files that overlay it in their order.
        workers: processes; by default one per core.
        clean: delete what other versions of the software left in the cache.
        overrides: what `monai.bundle run` would be given, such as --cache_dir PATH.
    """
    from unimedi_components.cache import fill_cache, remove_older
    from unimedi_components.config_check import check_config

    if workers is not None:
        whole_number("workers", workers, 0)
    merged = check_config([str(file) for file in config], overrides)
    root = Path(str(config[0])).resolve().parents[1]
    folder = fill_cache({**merged, "bundle_root": overrides.get("bundle_root", str(root))}, workers)
    if clean:
        remove_older(folder)


def plan(
    *config: str,
    gpu: str = "h100-80",
    gpus: int = 8,
    share: float = 0.4,
    xrays: int | None = None,
    cts: int | None = None,
    **overrides: Any,
) -> None:
    """Say what a training needs, of any bundle: parameters, FLOPs, memory, largest batch, hours, cache.

    Counted from the sizes in the config; no data or weights are read. A report encoder that is not at hand counts as a
    BERT-base.

    Args:
        config: the config file, and the files that overlay it in their order.
        gpu: the card, one of v100-32, a100-40, a100-80 and h100-80.
        gpus: number of cards, one rank each.
        share: of the card's peak that the run reaches; assumed, so measure it.
        xrays: X-rays in the training split; by default 300,000 in pre-training; of a task the config's phantoms, or
            what its data set is published with.
        cts: volumes in the training split; by default 10,000 in pre-training, of a task as X-rays.
        overrides: what `monai.bundle run` would be given, such as --train#sampler#batch_2d 48.
    """
    from unimedi_components.config_check import check_config
    from unimedi_components.plan import describe

    merged = check_config([str(file) for file in config], overrides)
    print(describe(merged, gpu=str(gpu), gpus=gpus, share=share, xrays=xrays, cts=cts))


_COMMANDS: dict[str, Callable[..., None]] = {
    "phantom": phantom,
    "prepare": prepare,
    "datasets": datasets,
    "evaluate": evaluate,
    "inspect": inspect,
    "embed": embed,
    "index": index,
    "search": search,
    "zero_shot": zero_shot,
    "serve": serve,
    "report": report,
    "export": export,
    "check": check,
    "cache": cache,
    "plan": plan,
}
# of these, no word is a Python list
_EXACT = ("inspect", "embed", "index", "search", "zero_shot", "export")


def _taker(command: str) -> Callable[..., Any] | None:
    """The function that takes what a command's further options hold; imported when its help is asked for."""
    if command == "evaluate":
        from unimedi_components.retrieval.evaluate import evaluate as evaluate_checkpoint

        return evaluate_checkpoint
    if command in ("embed", "index", "zero_shot"):
        from unimedi_components.retrieval.embedder import Embedder

        return Embedder.images
    return None


def _help(words: list[str]) -> str | None:
    """The help that the words ask for; None where they ask for none."""
    asked = words[: words.index("--")] if "--" in words else words
    if not asked or asked[0] in ("-h", "--help", "help"):
        return overview(_COMMANDS)
    if asked[0] not in _COMMANDS or not {"-h", "--help"} & set(asked[1:]):
        return None
    if asked[0] == "prepare":
        named = [word for word in asked[1:] if not word.startswith("-")]
        return prepare_help(named[0] if named else None, prepare)
    return command_help(asked[0], _COMMANDS[asked[0]], _taker(asked[0]))


def _run(words: list[str]) -> None:
    command = words[0] if words else ""
    if (text := _help(words)) is not None:
        print(text)
        return
    if command in _COMMANDS:
        flags = [word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")]
        check_options(command, _COMMANDS[command], [flag for flag in flags if flag not in ("", "help")])
    elif command and not command.startswith("-"):
        near = difflib.get_close_matches(command, _COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(_COMMANDS)}"
        raise ConfigError(f"unknown command '{command}'; {hint}")
    fire.Fire(_COMMANDS, command=exact_words(words, lists=command not in _EXACT), name="unimedi")


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
    show_any_name()
    try:
        _run(words)
    except (CheckpointError, ConfigError, DataError, OSError) as error:
        if debug:
            raise
        text: object = error
        if isinstance(error, OSError) and error.errno in NOT_WRITTEN:
            text = f"{error.filename or 'a file'}: {error.strerror}. Name a file or folder that can be written"
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(2) from None
    except (RuntimeError, ValueError) as error:
        # MONAI wraps what a component of a config raises, and a network refuses sizes
        from unimedi_components.bundle import user_fault

        reason = None if debug else user_fault(error)
        if reason is None:
            raise
        print(f"error: {reason}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
