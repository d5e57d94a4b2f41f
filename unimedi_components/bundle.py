# SPDX-License-Identifier: Apache-2.0
"""What a bundle's config asks of the command line: where the bundle is, and whether all is spelled right."""

import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from fire.parser import DefaultParseValue

from unimedi_components.command_options import loses_hash
from unimedi_components.errors import CheckpointError, ConfigError, DataError
from unimedi_components.files import NOT_WRITTEN, show_any_name
from unimedi_components.workflow import fit_workflow, folders_in_use, keep_log, log_fault, workflow_in_use

logger = logging.getLogger(__name__)

# the arguments of `monai.bundle run`, in its order, and of the workflow that it makes: not config keys
_RUN_OPTIONS = (
    *("run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "tracking", "args_file"),
    *("workflow_name", "workflow_type", "properties_path"),
)
# what `--tracking mlflow` takes from the overrides (monai.bundle.scripts.run)
_TRACKING_OPTIONS = ("output_dir", "tracking_uri", "experiment_name", "run_name", "save_execute_config")
_RUN_SCRIPT = ("monai", "bundle", "__main__.py")
# what PyTorch says of `--device cuda` without CUDA, a driver or that many devices
_NO_GPU = (
    "not compiled with CUDA",
    "NVIDIA driver",
    "No CUDA GPUs",
    "invalid device ordinal",
    "start of device string",
)
# what MONAI says where a component of a config refuses its arguments
_NOT_BUILT = re.compile(r"Failed to instantiate component '([^']+)'")
# where no folder can be made, such as below /proc, the system says that there is none
_MAKES_FOLDERS = ("mkdir", "makedirs")
_PACKAGE = Path(__file__).resolve().parent


@dataclass
class RunCall:
    """A ``python -m monai.bundle run`` command line: config files, overrides and MONAI's own options."""

    config_files: list[str] = field(default_factory=list)
    overrides: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def bundle_root(name: str, config_file: str | Sequence[str] | None = None) -> str:
    """Find the folder of the bundle ``name``, from whatever folder its config is run.

    MONAI reads a ``bundle_root`` of ``"."`` against the current folder, so a config that is run from the
    repository's root finds nothing. Use ``"bundle_root": "$unimedi_components.bundle_root('pretrain')"``
    instead; ``--bundle_root PATH`` still overrides it. Looked at, in this order: the bundle of ``config_file``, of
    the config that MONAI is reading (``monai.bundle.load``, a ``ConfigWorkflow``, an export) and of
    ``--config_file`` on the command line; ``<name>`` beside each of these; the current folder; ``bundles/<name>``
    below it; the folder that MONAI downloads bundles to; and the repository that the package lies in.

    A folder counts when it holds ``configs/`` and either is called ``name`` or has a config whose own
    ``bundle_root`` asks for ``name``, so that a renamed copy of a bundle keeps its outputs to itself.

    Args:
        name: the bundle's name, such as ``"pretrain"``.
        config_file: one or more config files of the bundle, for use without a command line.

    Returns:
        The absolute path of the bundle's folder.

    Raises:
        ConfigError: if none of the places holds the bundle.
    """
    from torch.hub import get_dir  # heavy, and read late: a program may set the folder

    files = [config_file] if isinstance(config_file, str) else list(config_file or [])
    folders = [Path(file).parent for file in files] + folders_in_use()
    folders += [Path(file).parent for file in parse_run_call(sys.argv).config_files]
    running = [Path(os.path.abspath(folder)).parent for folder in folders]
    places = [
        *running,
        *(bundle.parent / name for bundle in running),
        Path.cwd(),
        Path.cwd() / "bundles" / name,
        Path(get_dir(), "bundle", name),
        _PACKAGE.parent / "bundles" / name,
    ]
    for place in places:
        if _is_bundle(place, name):
            return str(place)
    looked = ", ".join(str(place) for place in dict.fromkeys(places))
    raise ConfigError(f"bundle '{name}' not found (looked at {looked}): pass --bundle_root PATH")


def encoder_weights(ckpt_dir: str, prefer_own: bool = False) -> str:
    """Weights that a task bundle starts from: the pretrain bundle's, or else the task bundle's own.

    Args:
        ckpt_dir: the task bundle's `models` folder.
        prefer_own: take the bundle's own `model.pt` where it is there: a bundle that trains nothing carries the
            pretrain bundle's.

    Returns:
        `models/model.pt` of the pretrain bundle, the one beside the task bundle first. Where that is not there but
        the task bundle has been trained (a bundle that MONAI Label or a colleague was given alone), its own
        `model.pt`. The file need not exist.
    """
    own = Path(ckpt_dir, "model.pt")
    if prefer_own and own.is_file():
        return str(own)
    beside = Path(os.path.abspath(ckpt_dir)).parent.parent / "pretrain"
    try:
        home = beside if _is_bundle(beside, "pretrain") else Path(bundle_root("pretrain"))
    except ConfigError:
        home = Path("bundles", "pretrain")
    pretrained = home / "models" / "model.pt"
    if not pretrained.is_file() and own.is_file():
        logger.warning("%s: not there; starting from the encoder in %s", pretrained, own)
        return str(own)
    return str(pretrained)


def data_dir(bundle_folder: str) -> str:
    """Folder that holds the data sets, one below another: `UNIMEDI_DATA`, or `data` in the repository or the bundle.

    Args:
        bundle_folder: the bundle's root; a bundle in a folder called `bundles` uses `data` beside that folder, so that
            all bundles of a checkout share their data, any other bundle `data` of its own.
    """
    chosen = os.environ.get("UNIMEDI_DATA")
    if chosen:
        return os.path.abspath(os.path.expanduser(chosen))
    folder = Path(bundle_folder).resolve()
    return str((folder.parents[1] if folder.parent.name == "bundles" else folder) / "data")


def _is_bundle(folder: Path, name: str) -> bool:
    configs = folder / "configs"
    if folder.name == name:
        return configs.is_dir()
    call = f"bundle_root('{name}')"
    for file in sorted(configs.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and call in str(content.get("bundle_root", "")):
            return True
    return False


def parse_run_call(argv: Sequence[str]) -> RunCall:
    """Read a command line of ``monai.bundle run`` as fire reads it.

    Args:
        argv: the words of the command line, the program first, as in ``sys.argv``.

    Returns:
        The call. ``--key value``, ``--key=value``, a bare ``--flag`` (True), a positional run id, lists such
        as ``--config_file "['a.json','b.json']"`` and the defaults of an ``--args_file`` are all understood.

    Raises:
        ConfigError: a value of which fire would drop all from a # on.
    """
    words = list(argv[1:])
    words = words[: words.index("--")] if "--" in words else words
    positional: list[str] = []
    values: dict[str, Any] = {}
    while words:
        word = words.pop(0)
        if not _is_flag(word):
            positional.append(word)
            continue
        key, given, value = word.lstrip("-").partition("=")
        if given or (words and not _is_flag(words[0])):
            value = value if given else words.pop(0)
            if loses_hash(value):
                raise ConfigError(
                    f"override '--{key} {value}': what follows '#' is dropped as a comment; write --{key} './{value}'"
                )
            values[_key(key)] = DefaultParseValue(value)
        else:
            values[_key(key)] = True
    # the first positional word is the command, those after it are the options in order
    values.update(zip(_RUN_OPTIONS, positional[1:], strict=False))
    if str(values.get("args_file", "")).lower().endswith((".json", ".yaml", ".yml")):
        from monai.bundle import ConfigParser

        values = {**ConfigParser.load_config_file(values["args_file"]), **values}
    options = {key: values.pop(key) for key in _RUN_OPTIONS if key in values}
    if options.get("tracking") is not None:
        options.update({key: values.pop(key) for key in _TRACKING_OPTIONS if key in values})
    files = options.get("config_file") or []
    return RunCall([files] if isinstance(files, str) else [str(file) for file in files], values, options)


def _is_flag(word: str) -> bool:
    return word.startswith("--") or (word[:1] == "-" and word[1:2].isalpha())


def _key(word: str) -> str:
    return word.replace("-", "_")


def check_run(config_file: str | Sequence[str] | None = None, argv: Sequence[str] | None = None) -> None:
    """Check the config files and the overrides of this run; the first line of a config's ``initialize``.

    MONAI ignores an override or a config key that nothing defines. This makes it an error, before any data
    is touched: ``"initialize": ["$unimedi_components.check_run()", ...]``. See ``check_config`` for what is
    checked.

    Without arguments it reads the command line of ``python -m monai.bundle run`` and ends the program with
    the one line ``error: ...`` and exit code 2, since MONAI would bury an exception under its own. From then
    on, a fault of the user's data, weights or settings (``user_fault``) ends the program in the same way; the
    traceback is shown with ``UNIMEDI_DEBUG=1`` in the environment. What the run logs is added to ``run.log`` in its
    ``output_dir``, see ``keep_log``. In any other program, such as MONAI Label's server, the workflow that Python made
    is checked, see ``check_workflow``. In all of them it is fitted to the call that made it, see ``fit_workflow``.

    Args:
        config_file: the config file or files, instead of the command line's.
        argv: a command line, instead of ``sys.argv``.

    Raises:
        ConfigError: if something is wrong and ``config_file`` or ``argv`` was given, or Python made the workflow.
        SystemExit: if something is wrong with the command line of the running program.
    """
    from unimedi_components.config_check import check_config, check_workflow

    explicit = config_file is not None or argv is not None
    if not explicit:
        show_any_name()
        fit_workflow()
    if not explicit and Path(sys.argv[0]).parts[-3:] != _RUN_SCRIPT:
        workflow = workflow_in_use()
        if workflow is not None:
            check_workflow(workflow)
        return
    try:
        call = parse_run_call(argv if argv is not None else ([] if explicit else sys.argv))
        files = config_file if config_file is not None else call.config_files
        ids = [call.options[key] for key in ("run_id", "init_id", "final_id") if key in call.options]
        check_config(files, call.overrides, run_ids=ids)
    except ConfigError as error:
        if explicit:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if not explicit:
        keep_log()
        if not os.environ.get("UNIMEDI_DEBUG"):
            _report_user_faults()


def user_fault(error: BaseException) -> str | None:
    """The message of the fault of the user's that lies behind an exception, however MONAI has wrapped it.

    Args:
        error: an exception, such as MONAI's "Failed to instantiate target ...".

    Returns:
        The message of the first exception in the chain of causes that is one of `unimedi_components.errors`, a
        ValueError or FloatingPointError that a line of this package raised, a file that may not be written (with the
        options that name another place), a GPU that is not there, MLflow, which is not installed, or a component of the
        config that its arguments do not fit; None when there is none.
    """
    cause: BaseException | None = error
    component = ""
    while cause is not None:
        if isinstance(cause, (CheckpointError, ConfigError, DataError)) or (
            isinstance(cause, (ValueError, FloatingPointError)) and _raised_here(cause)
        ):
            text = str(cause).strip()
            # a loader's worker hands its traceback over as text
            return text.splitlines()[-1].partition(": ")[2] if text.startswith("Caught ") else text
        if isinstance(cause, OSError) and (cause.errno in NOT_WRITTEN or _raised_in(cause)[1] in _MAKES_FOLDERS):
            return (
                f"{cause.filename or 'a file'}: {cause.strerror}; name folders that can be written with --output_dir "
                "PATH, and for a training with --ckpt_dir and --cache_dir, or set UNIMEDI_DATA for the data"
            )
        if isinstance(cause, (AssertionError, RuntimeError)) and any(words in str(cause) for words in _NO_GPU):
            return f"no GPU can be used here ({str(cause).splitlines()[0]}); leave --device out, or give --device cpu"
        if isinstance(cause, ImportError) and "No module named 'mlflow'" in str(cause):
            return "--tracking mlflow needs MLflow: pip install 'unimedi-components[mlflow]', or leave it out"
        if component and isinstance(cause, (TypeError, ValueError)):
            reason = " ".join(str(cause).split())
            return f"{component}: {reason}; correct what the config gives it (UNIMEDI_DEBUG=1 shows where)"
        if isinstance(cause, RuntimeError) and (found := _NOT_BUILT.search(str(cause))):
            component = found[1]
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def _raised_here(error: BaseException) -> bool:
    return Path(_raised_in(error)[0]).is_relative_to(_PACKAGE)


def _raised_in(error: BaseException) -> tuple[str, str]:
    """File and name of the function that raised an exception."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return (trace.tb_frame.f_code.co_filename, trace.tb_frame.f_code.co_name) if trace is not None else ("", "")


def _report_user_faults() -> None:
    """Print an uncaught fault of the user's as one line, and any other exception as before."""
    shown = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        message = user_fault(error)
        log_fault(error)
        if message is None:
            shown(kind, error, trace)
            return
        # under torchrun PyTorch's own hook calls this one, and keeps what goes to sys.stderr until it returns
        print(f"error: {message}", file=sys.__stderr__)
        raise SystemExit(2)

    sys.excepthook = report
