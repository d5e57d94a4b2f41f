# SPDX-License-Identifier: Apache-2.0
"""What a training was started with, kept in its checkpoint, so that one that is resumed with something else says so."""

import hashlib
import logging
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimedi_components.data.sources import sha256_of
from unimedi_components.errors import CheckpointError
from unimedi_components.workflow import workflow_in_use

logger = logging.getLogger(__name__)

_WEIGHTS, _IMAGES = "encoder_weights", "training images"
# where a run computes, reads and writes, how long it goes on, and how it is measured: a resumed run may change these
_FREE = (
    *("imports", "bundle_root", "ckpt_dir", "output_dir", "data_dir", "dataset_dir", "cache_dir", "datalist_file"),
    *("resume", "device", "amp", "matmul_precision", "epochs", "iterations", "network", "val_interval", "validate"),
    *("evaluation", "metrics", "initialize", "run", "finalize", "_meta_", "train#handlers"),
    *(f"train#trainer#{name}" for name in ("max_epochs", "device", "non_blocking", "amp", "amp_kwargs")),
    *("tracking_uri", "experiment_name", "run_name", "save_execute_config", "is_not_rank0"),
)
_FREE_WORDS = (
    *("epochs", "patience", "num_workers", "share", "strict", "fused", "compile", "grad_checkpointing"),
    *("accumulation", "root", "out", "cache_dir"),
)
# what is trained on and from: the checkpoint's own value would go on, or a mixture of both
_FIXED = (
    *(_WEIGHTS, _IMAGES, "seed", "dims", "size", "img_size", "vol_size", "label_fraction", "label_names", "task"),
    *("freeze_encoder", "recipe", "data", "datalist", "items", "tokenizer", "network_def", "optimizer"),
    *("preprocessing", *(f"train#{name}" for name in ("dataset", "sampler", "dataloader", "repeated", "features"))),
)


def run_settings(folder: Path, dataset: Any = None) -> dict[str, Any]:
    """The values of the config that is being run which decide what is trained, by id; empty outside a run of MONAI's.

    Args:
        folder: that the run writes its own weights to, so that a file there does not tell what it started from.
        dataset: of the training, whose items tell it from another in the same place.
    """
    workflow = workflow_in_use()
    if workflow is None:
        return {}
    found = {key: value for key, value in _leaves(workflow.parser.get()) if not _is_free(key)}
    if _WEIGHTS in found:
        # a config may look for them, and other weights may have taken the file's place
        weights = workflow.parser.get_parsed_content(_WEIGHTS)
        file = Path(str(weights))
        found[_WEIGHTS] = f"{weights} (sha256 {sha256_of(file)[:12]})" if file.is_file() else weights
        if file.resolve().parent == folder.resolve():
            del found[_WEIGHTS]
    if dataset is not None:
        digest = hashlib.sha256("\n".join(str(item.get("id")) for item in dataset.data).encode(errors="replace"))
        found[_IMAGES] = f"{len(dataset.data)} (ids {digest.hexdigest()[:12]})"
    return found


def check_settings(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Compare a checkpoint's settings with those of the run that resumes it.

    What is trained on or from may not differ; other differences, and keys that only one of both has, as after an
    update, are logged. Where either is empty nothing is compared.

    Args:
        path: of the checkpoint, for the messages.

    Raises:
        CheckpointError: naming keys, both values and the options that give the run's own.
    """
    if not (before and now):
        return
    both = before.keys() & now.keys()
    changed = {
        key: (before.get(key), now.get(key))
        for key in {**before, **now}
        if before.get(key) != now.get(key)
        and _value(before, key) != _value(now, key)
        and (key in both or key != _WEIGHTS)
    }
    fixed = {key: pair for key, pair in changed.items() if key in both and _below(key, _FIXED)}
    if fixed:
        # the data say more of themselves than how many they are
        names = list(fixed) if len(fixed) == 1 else [key for key in fixed if key != _IMAGES]
        differences = ", ".join(f"{key} {_shown(fixed[key][0])}, not {_shown(fixed[key][1])}" for key in names)
        options = " ".join(filter(None, (_option(key, *fixed[key]) for key in names)))
        raise CheckpointError(
            f"{path}: its run was started with {differences}. A resumed run goes on with the same: give "
            f"{options or 'what it was started with'}, or start anew with another --ckpt_dir, without --resume"
        )
    if changed:
        told = ", ".join(f"{key} {_shown(new)} (before: {_shown(old)})" for key, (old, new) in changed.items())
        logger.warning("%s: resumed with other settings, which hold from here on: %s", path, told)


def _leaves(value: Any, id_: str = "") -> Iterator[tuple[str, Any]]:
    """(id, value) of all that a config holds; lists of plain values stay whole."""
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, (list, tuple)) and any(isinstance(part, (Mapping, list, tuple)) for part in value):
        items = list(enumerate(value))
    else:
        yield id_, [_plain(part) for part in value] if isinstance(value, (list, tuple)) else _plain(value)
        return
    for key, part in items:
        yield from _leaves(part, f"{id_}#{key}" if id_ else str(key))


def _plain(value: Any) -> Any:
    """What a checkpoint may hold without code."""
    if value == "$None":
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _value(settings: Mapping[str, Any], key: str) -> Any:
    """A value with what its references lead to, so that it may be spelled in another way; weights by what they are."""
    value = settings.get(key)
    if key == _WEIGHTS:
        return str(value).rpartition(" (sha256 ")[2]
    seen = {key}
    while isinstance(value, str) and value.startswith("@") and value[1:] in settings and value not in seen:
        seen.add(value)
        value = settings[value[1:]]
    return value


def _is_free(key: str) -> bool:
    return _below(key, _FREE) or key.rpartition("#")[2] in _FREE_WORDS


def _below(key: str, ids: tuple[str, ...]) -> bool:
    return any(key == id_ or key.startswith(f"{id_}#") for id_ in ids)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) < 300 else f"{text[:297]}..."


def _option(key: str, old: Any, new: Any) -> str:
    """The words of the command line that give the old value; none where no words can."""
    before, after = (str(value).partition(" (sha256 ")[0] for value in (old, new))
    if key == _IMAGES:
        return "its own --dataset_dir and --datalist_file"
    if before == after or "#" in before:
        return ""
    return f"--{key} {shlex.quote('$None' if old is None else before)}"
