# SPDX-License-Identifier: Apache-2.0
"""The call of MONAI that evaluates a config: where its files lie, and what it needs that the config cannot say.

MONAI hands the expressions of a config neither the config's file nor the purpose it is read for. Both are taken from
the calls that lead here, for which MONAI is pinned below 1.7.
"""

import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Any

from unimedi_components.errors import ConfigError
from unimedi_components.files import ANY_NAME

_SCRIPTS = "monai.bundle.scripts"
_NETWORK_CALLS = ("load", "verify_net_in_out", "ckpt_export", "onnx_export", "trt_export")


def folders_in_use() -> list[Path]:
    """Folders of the config files that MONAI is reading in the calls that lead here, the innermost call first."""
    folders: list[Path] = []
    for frame in _callers():
        workflow = _workflow_of(frame)
        if workflow is not None:
            folders.append(Path(workflow.config_root_path))
        elif frame.f_globals.get("__name__") == _SCRIPTS:
            files = frame.f_locals.get("config_file_")
            folders += [Path(file).parent for file in ([files] if isinstance(files, (str, Path)) else files or [])]
    return list(dict.fromkeys(folders))


def only_a_network_is_wanted() -> bool:
    """Whether `monai.bundle.load`, an export or a check of the network leads here, and so no data is to be made."""
    return any(_scripts_call(frame) in _NETWORK_CALLS for frame in _callers())


def workflow_in_use() -> Any:
    """MONAI's ConfigWorkflow that is being initialised or run in the calls that lead here, or None."""
    return next((found for found in map(_workflow_of, _callers()) if found is not None), None)


def fit_workflow() -> None:
    """Fit the workflow that is being initialised to the call that made it; does nothing outside one.

    `monai.bundle.load` copies whatever fits of the weights into `network_def` and keeps the rest random, without a
    word. Here it gets the trained network or an error. MONAI's tracking expects the loss of a decollated batch; a
    trainer with `decollate: false` gets one that logs its own.

    Raises:
        CheckpointError: the weights do not fit the network, or files beside them are missing.
        ConfigError: `net_override` of a network that the weights do not hold.
    """
    workflow = workflow_in_use()
    if workflow is None:
        return
    _fit_tracking(workflow)
    call = next((frame.f_locals for frame in _callers() if _scripts_call(frame) == "load"), None)
    if call is not None:
        _fit_load(workflow, call)


class _RunLog(logging.FileHandler):
    """`run.log` of a run, below the command line; made with the first record, so that a refused run leaves none."""

    def __init__(self, folder: str) -> None:
        super().__init__(Path(folder, "run.log"), encoding="utf-8", delay=True, errors=ANY_NAME)
        self.setFormatter(logging.Formatter("%(asctime)s - %(name)s - %(levelname)s - %(message)s"))

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        stream = super()._open()
        stream.write(f"$ {shlex.join(sys.orig_argv)}\n")
        return stream


def keep_log() -> None:
    """Add what the workflow that is being initialised logs to `run.log` in its `output_dir`, on the first rank.

    A bundle's `logging.conf` cannot: MONAI takes literals alone in it, and the folder is known when the config is read.
    """
    workflow = workflow_in_use()
    if workflow is not None and "output_dir" in workflow.parser and os.environ.get("RANK", "0") == "0":
        folder = workflow.parser.get_parsed_content("output_dir")
        logging.getLogger().addHandler(_RunLog(os.fspath(folder)))


def log_fault(error: BaseException) -> None:
    """Write the traceback of what ends the run to its `run.log`, where the run has begun."""
    record = logging.LogRecord(
        "unimedi_components", logging.ERROR, __file__, 0, str(error), None, (type(error), error, error.__traceback__)
    )
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _RunLog) and handler.stream is not None:
            handler.handle(record)


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _workflow_of(frame: FrameType) -> Any:
    """MONAI's ConfigWorkflow whose method this frame runs, or None."""
    workflows = sys.modules.get("monai.bundle.workflows")
    # a look at the name first: the locals of every frame would be copied
    if workflows is None or "self" not in frame.f_code.co_varnames[:1]:
        return None
    owner = frame.f_locals.get("self")
    return owner if isinstance(owner, workflows.ConfigWorkflow) else None


def _scripts_call(frame: FrameType) -> str:
    return frame.f_code.co_name if frame.f_globals.get("__name__") == _SCRIPTS else ""


def _fit_tracking(workflow: Any) -> None:
    parser = workflow.parser
    if "train#trainer" not in parser or parser["train#trainer"].get("decollate") is not False:
        return
    for handler in parser.get("train#handlers") or ():
        if isinstance(handler, dict) and "from_engine(['loss']" in str(handler.get("output_transform")):
            handler["output_transform"] = "$lambda output: output['loss'].item()"
            parser.parse(reset=True)


def _fit_load(workflow: Any, call: Mapping[str, Any]) -> None:
    from unimedi_components.networks import load_strict
    from unimedi_components.retrieval.embedder import Embedder, load_trained

    checkpoint, override = call["full_path"], call["net_override"]
    if workflow.workflow_type == "train":
        trained = load_trained(checkpoint)
        if not override:
            # train.json builds the network before training, of sizes that the run may have changed
            workflow.parser.ref_resolver.resolved_content["network_def"] = trained
        elif isinstance(trained, Embedder):
            raise ConfigError(
                f"net_override {override}: {checkpoint} is the encoder of the network that train.json builds; leave "
                'net_override out, or load with workflow_type="inference"'
            )
    if not call["copy_model_args"]:
        key, state = call["key_in_ckpt"], call["model_dict"]
        load_strict(workflow.network_def, state if key is None else state[key], checkpoint)
