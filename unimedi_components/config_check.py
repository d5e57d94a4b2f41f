# SPDX-License-Identifier: Apache-2.0
"""Find the config keys, overrides, references and arguments that nothing defines; MONAI ignores most."""

import difflib
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import cache
from itertools import combinations
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any

import yaml
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.config_item import ComponentLocator, ConfigComponent
from monai.bundle.properties import InferProperties, TrainProperties
from monai.bundle.reference_resolver import ReferenceResolver
from monai.bundle.utils import merge_kv
from monai.utils import BundlePropertyConfig

from unimedi_components.config_values import MISSING, SEP, check_value, items_of, shown
from unimedi_components.errors import ConfigError

_COMPONENT_KEYS = frozenset(ConfigComponent.non_arg_keys)
_PROPERTY_IDS = frozenset(str(p[BundlePropertyConfig.ID]) for p in (TrainProperties | InferProperties).values())
# read by `monai.bundle run`, its experiment tracking or MONAI Label, though no reference says so
_READ_BY_MONAI = frozenset(
    (
        *("imports", "initialize", "run", "finalize", "_meta_", "output_dir", "network"),
        *(
            *("displayable_configs", "detector", "detector_ops", "pre_transforms"),
            *("post_transforms", "save_execute_config"),
        ),
    )
)
# what two overlays of a bundle set differently if they are of two data sets
_DATA_KEYS = ("data#datalist#dataset", "dataset_dir", "datalist_file", "datalist")
# what no longer stands at the top of a config, by the place that sets it
_MOVED = {
    "amp_dtype": ("amp",),
    "box_weight": ("loss#box_regression",),
    "data_options": ("data#datalist",),
    "data_set": ("data#datalist#dataset",),
    "focal_gamma": ("loss#gamma",),
    "focal_weight": ("loss#alpha",),
    "img_size": ("preprocessing#xray#size", "preprocessing#film#size"),
    "lr_power": ("lr_scheduler#power",),
    "pyramid_width": ("network_def#width",),
    "resize": ("preprocessing#organs#spatial_size",),
    "steps_per_pass": ("train#repeated#steps",),
    "sw_overlap": ("evaluation#overlap",),
}
# what is found elsewhere now, by its name below `unimedi_components`
_RENAMED = {
    "data.PretrainDataset": 'loading.ImageDataset, with "target": "report"',
    "data.LabelledDataset": 'loading.ImageDataset, with "target": "label"',
    "data.DenseDataset": 'loading.ImageDataset, with "target": "mask" or "boxes"',
    "data.FeatureDataset": "loading.FeatureDataset",
    "data.MixedBatchSampler": "loading.MixedBatchSampler",
    "data.MixedCollate": "loading.MixedCollate",
    "data.rank_share": "loading.rank_share",
    "data.repeated.RepeatedDataset": "loading.RepeatedDataset",
    "data.MixedDataLoader": "loading.ImageLoader",
    "data.labelled_loader": "loading.ImageLoader",
    "data.eval_loader": "loading.ImageLoader, with the training's collate_fn",
    "data.image_loader": 'loading.ImageLoader, with "batch_size": [2D, 3D]',
    "data.task_inputs.find_task_images": "data.find_images",
    "engines.fine_tune.fine_tuning_optimizer": "engines.build_optimizer",
    "engines.fine_tune.warmup_poly": "engines.warmup_poly",
    "networks.EmbeddingNetwork": "retrieval.Embedder",
    **{f"engines.{name}": f"retrieval.{name}" for name in ("SaveEmbeddings", "embed_batch", "finish_embedding")},
    **{f"evaluation.{name}": f"retrieval.{name}" for name in ("after_training", "evaluate_datalist")},
    **{f"evaluation.{name}": f"retrieval.{name}" for name in ("ContrastiveLossMetric", "RetrievalRecall")},
    **{f"search.{name}": f"retrieval.{name}" for name in ("Embedder", "SaveNeighbours", "draw_examples")},
    **{f"search.{name}": f"retrieval.{name}" for name in ("evaluate_search", "headline")},
}
_OLD_NAME = re.compile(rf"\bunimedi_components\.({'|'.join(map(re.escape, _RENAMED))})\b")

Config = Mapping[str, Any] | str | Path


def check_config(
    config: Config | Sequence[Config], overrides: Mapping[str, Any] | None = None, run_ids: Iterable[str] = ()
) -> dict[str, Any]:
    """Check a bundle's config, with its overlays and overrides, without running any of it.

    Each of these is an error that names the nearest known name:

    - a key of the first config that nothing uses: no reference, no MONAI property, no run id;
    - a key of an overlay, or an override, that the configs before it do not define, unless a reference uses
      it or it is an argument of the component that it lies in;
    - an argument that the ``_target_`` does not take, and a ``_target_`` that does not exist;
    - a reference ``@id`` to nothing;
    - two overlays of two data sets, from the folder of the first config;
    - an overlay without the config that it changes;
    - a value of another kind than the one that it replaces, see ``check_value``: text for a number, such as `1e-4` in
      YAML, a number for a path or a list, a word for a component; and a `#` in a text, which MONAI turns into `::`;
    - an override ``true``, ``false`` or ``null``, which MONAI takes as a word, and ``None``, which it drops.

    Args:
        config: a config file or dict, or several in the order of ``--config_file``, the first one overlaid by
            the others.
        overrides: ids and values, as on the command line of ``monai.bundle run``.
        run_ids: keys besides ``initialize``, ``run`` and ``finalize`` that are run.

    Returns:
        The merged config as MONAI sees it, references and expressions unresolved.

    Raises:
        ConfigError: at the first fault, with the key, the file and the nearest known name.
    """
    sources = [config] if isinstance(config, (str, Path, Mapping)) else list(config)
    if not sources:
        raise ConfigError("no config file: name one with --config_file bundles/NAME/configs/train.json")
    layers = [_load(source) for source in sources]
    _check_one_data_set(sources, layers)
    if not isinstance(sources[0], Mapping) and "imports" not in layers[0][1]:
        whole = Path(sources[0]).with_name("train.json")
        if whole.is_file() and whole != Path(sources[0]):
            raise ConfigError(f"{layers[0][0]} is an overlay, of what train.json says; give both: {whole} {sources[0]}")
    overrides = dict(overrides or {})
    referenced = {target for _, content in [*layers, ("", overrides)] for _, _, target in _references(content)}
    used: set[str] = {*referenced, *_PROPERTY_IDS, *_READ_BY_MONAI, *run_ids}

    parser = ConfigParser(config={})
    for number, (name, content) in enumerate(layers):
        for key, value in content.items():
            id_ = ReferenceResolver.normalize_id(key.removeprefix("+"))
            if number or SEP in id_:
                default = _check_defined(id_, parser, used, f"config key '{shown(id_)}' in {name}")
                check_value(id_, value, default, f"'{shown(id_)}' in {name}")
            _check_used(id_, value, used, name, content)
            merge_kv(parser, key, deepcopy(value))
    for key, value in overrides.items():
        _check_override(key, value, parser, referenced)
        parser[key] = deepcopy(value)
    for id_ in run_ids:
        if id_ not in parser:
            raise ConfigError(f"unknown run id '{id_}': the config has no such key{_hint(id_, parser.get())}")

    merged: dict[str, Any] = deepcopy(parser.get())
    _check_references(parser, "%")
    try:
        parser.resolve_macro_and_relative_ids()
    except FileNotFoundError as error:
        raise ConfigError(f"a macro names a file that does not exist: '%{error.filename}'") from error
    _check_components("", parser.get())
    _check_references(parser, "@")
    return merged


def check_workflow(workflow: ConfigWorkflow) -> None:
    """Check the config of a workflow made in Python, where MONAI has merged files and overrides already.

    A key of the merged config is in use if the config refers to it, or one of the files beside it that fit into the
    config did so before an override took the reference's place, or MONAI that of a macro.

    Raises:
        ConfigError: as `check_config`.
    """
    parser = workflow.parser
    used: set[str] = {workflow.init_id, workflow.run_id, workflow.final_id}
    for path in sorted(workflow.config_root_path.glob("*.*")):
        with suppress(ConfigError):
            content = _load(path)[1] if path.suffix in (".json", ".yaml", ".yml") else {}
            if all(key.removeprefix("+") in parser for key in content):
                used |= {target for _, _, target in _references(content)}
    config = parser.get()
    used |= {target for _, _, target in _references(config)} | _PROPERTY_IDS | _READ_BY_MONAI
    for key, value in config.items():
        _check_used(key, value, used, "the workflow", config)
    _check_components("", config)
    _check_references(parser, "@")


def _load(source: Config) -> tuple[str, dict[str, Any]]:
    if isinstance(source, Mapping):
        return "the config", dict(source)
    name = Path(source).name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # MONAI only warns of a key that is there twice
            content = ConfigParser.load_config_file(source)
    except FileNotFoundError as error:
        raise ConfigError(f"config file '{source}' does not exist") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = " ".join(str(problem).split())
        raise ConfigError(f"config file '{source}'{place}: not valid YAML ({problem}); correct it there") from error
    except (OSError, TypeError, ValueError, UserWarning) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot read config file '{source}': {reason}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config file '{source}' holds a {type(content).__name__}, not a dictionary")
    for key in content:
        if not isinstance(key, str):
            raise ConfigError(f"config file '{source}' has the key {key!r}, a {type(key).__name__}; put it in quotes")
    return name, content


def _check_one_data_set(sources: Sequence[Config], layers: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Raise if two overlays beside the first config are of two data sets: a mixture of both would be run."""
    homes = [None if isinstance(source, Mapping) else Path(source).resolve().parent for source in sources]
    own = [layer for home, layer in zip(homes[1:], layers[1:], strict=True) if home and home == homes[0]]
    for (first, one), (second, two) in combinations(own, 2):
        for key in _DATA_KEYS:
            if key in one and key in two and one[key] != two[key]:
                raise ConfigError(
                    f"{first} and {second} are of two data sets ({key} {one[key]!r} and {two[key]!r}); give one of them"
                )


def _references(config: Any, id_: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (where, "@" or "%", what) of every reference ``@id`` and every macro ``%id``."""
    for key, value in items_of(config):
        key_id = ReferenceResolver.normalize_id(str(key).removeprefix("+"))
        yield from _references(value, f"{id_}{SEP}{key_id}" if id_ else key_id)
    if isinstance(config, str):
        text = ConfigParser.resolve_relative_ids(id_, config)
        if text.startswith("%"):
            path, target = ConfigParser.split_path_id(text[1:])
            if not path:
                yield id_, "%", target
        else:
            yield from ((id_, "@", target) for target in ReferenceResolver.match_refs_pattern(text))


# MONAI Label writes the config with its own data in place, and so leaves keys without use
_EXPORTED = "monailabel_train.json"


def _check_used(id_: str, value: Any, used: set[str], name: str, content: Mapping[str, Any]) -> None:
    """Raise if no reference leads to ``id_``, or to a part of a plain dict that is used in parts."""
    parts = id_.split(SEP)
    if name == _EXPORTED:
        return
    if parts[0] == "_meta_" or any(SEP.join(parts[:n]) in used for n in range(1, len(parts) + 1)):
        return
    if not _is_used(id_, used):
        place = _place(id_, ConfigParser(dict(content)))
        raise ConfigError(f"unknown config key '{shown(id_)}' in {name}: nothing uses it{place}")
    if isinstance(value, dict) and "_target_" not in value:
        for key, part in value.items():
            _check_used(f"{id_}{SEP}{key}", part, used, name, content)


def _is_used(id_: str, used: set[str]) -> bool:
    return any(target == id_ or target.startswith(id_ + SEP) for target in used)


def _check_defined(id_: str, parser: ConfigParser, used: set[str], what: str) -> Any:
    """Return the value or default at ``id_``; raise if neither the config nor a signature has it."""
    if id_ in parser:
        return parser[id_]
    scope, _, last = id_.rpartition(SEP)
    parent = parser.get(scope)
    if isinstance(parent, dict) and "_target_" in parent:
        parameters = _parameters(parent["_target_"], scope)
        if parameters is None or last in _COMPONENT_KEYS:
            return MISSING
        if last in parameters:
            return parameters[last].default
    # a new entry of a section, such as `train#sampler`, is sound when another line refers to it
    elif isinstance(parent, dict) and _is_used(id_, used):
        return MISSING
    raise ConfigError(f"unknown {what}: nothing defines it{_place(id_, parser)}")


def _place(id_: str, parser: ConfigParser) -> str:
    """Hint at where a key of the top stands now, its own value before a reference to it; at the nearest name else."""
    names = [name for name in _ids(parser.get()) if name != id_]
    moved = [name for name in map(ReferenceResolver.normalize_id, _MOVED.get(id_, ())) if name in names]
    same = [name for name in names if SEP not in id_ and name.split(SEP)[-1] == id_]
    same = [name for name in same if not str(parser[name]).startswith(("@", "%"))] or same
    near = difflib.get_close_matches(id_, [name for name in names if SEP not in name], n=1, cutoff=0.85)
    joined = [name for name in names if f"_{name.replace(SEP, '_')}".endswith(f"_{id_}")]
    for found in (moved, same, near, joined):
        if found:
            return f"; did you mean '{shown(min(found, key=len))}'?"
    return _hint(id_, [name for name in _ids(parser.get(), signatures=True) if name != id_])


def _check_override(key: str, value: Any, parser: ConfigParser, referenced: set[str]) -> None:
    if key.startswith("+"):
        raise ConfigError(
            f"override '--{key}': '+' merges in config files only; write the whole value with --{key[1:]}"
        )
    id_ = ReferenceResolver.normalize_id(key)
    default = _check_defined(id_, parser, referenced, f"override '--{shown(id_)}'")
    check_value(id_, value, default, f"override '--{shown(id_)}'", overridden=True)
    if value is None:
        raise ConfigError(f"override '--{shown(id_)} None': MONAI drops it; write --{shown(id_)} '$None'")
    word = value.lower() if isinstance(value, str) else ""
    is_text = isinstance(default, str) and default[:1] not in ("$", "@", "%")
    if word == "null" or (word in ("true", "false") and not is_text):
        option = f"--{shown(id_)}"
        meant = "'$None'" if word == "null" else word.capitalize()
        raise ConfigError(f"override '{option} {value}' is the word \"{value}\"; write {option} {meant}")


def _check_name(text: str, id_: str) -> None:
    """Raise if a target or an expression names what has another name now."""
    if old := _OLD_NAME.search(text):
        raise ConfigError(f"'{old[0]}' at '{shown(id_)}' is now unimedi_components.{_RENAMED[old[1]]}")


def _check_components(id_: str, config: Any) -> None:
    """Raise if a component below ``id_`` has an argument that its target does not take."""
    if isinstance(config, str):
        _check_name(config, id_)
    if isinstance(config, dict) and "_target_" in config and config.get("_disabled_") is not True:
        parameters = _parameters(config["_target_"], id_)
        known = [*_COMPONENT_KEYS, *(parameters or ())]
        for key in config:
            if key in known or (parameters is None and not (key.startswith("_") and key.endswith("_"))):
                continue
            where = f"'{config['_target_']}' at '{shown(id_)}'"
            raise ConfigError(f"unknown argument '{key}' of {where}{_hint(key, known)}")
    for key, value in items_of(config):
        _check_components(f"{id_}{SEP}{key}" if id_ else str(key), value)


def _check_references(parser: ConfigParser, mark: str) -> None:
    config = parser.get()
    for where, kind, target in _references(config):
        if kind == mark and target and target not in parser and not target.startswith("_meta_"):
            hint = _hint(target, _ids(config), mark)
            raise ConfigError(f"'{shown(where)}' refers to '{mark}{shown(target)}', which nothing defines{hint}")


def _parameters(target: Any, id_: str) -> Mapping[str, inspect.Parameter] | None:
    """The arguments of a ``_target_`` by name; None if it takes any, or cannot tell."""
    if not isinstance(target, str) or target[:1] in ("$", "@", "%"):
        return None
    _check_name(target, id_)
    component = _locate(target)
    if component is None:
        scope, _, last = target.rpartition(".")
        module = _locate(scope) if scope else None
        hint = _hint(last, [name for name in dir(module) if name[0] != "_"]) if module is not None else ""
        raise ConfigError(f"cannot find '_target_' '{target}' at '{shown(id_)}'{hint}")
    try:
        parameters = inspect.signature(component).parameters
    except (TypeError, ValueError):
        return None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    return parameters


@cache
def _locate(target: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's own warning, of a name that it has twice, comes when it is used
        full_name = ConfigComponent({"_target_": target}, locator=ComponentLocator()).resolve_module_name()
    try:
        return locate(full_name)
    except ErrorDuringImport as error:
        raise ConfigError(f"importing '_target_' '{target}' failed: {error.value}") from error


def _ids(config: Any, prefix: str = "", signatures: bool = False) -> list[str]:
    """All ids of a config, outer ones first; with ``signatures``, also what its components take."""
    ids: list[str] = []
    for key, value in items_of(config):
        id_ = f"{prefix}{SEP}{key}" if prefix else ReferenceResolver.normalize_id(str(key).removeprefix("+"))
        ids += [id_, *_ids(value, id_, signatures)]
    if signatures and isinstance(config, dict) and "_target_" in config:
        ids += [f"{prefix}{SEP}{name}" for name in _parameters(config["_target_"], prefix) or () if name not in config]
    return ids


def _hint(id_: str, candidates: Iterable[str], mark: str = "") -> str:
    """Name the nearest: one with the same last word, else one beside it, else any; or all those beside it."""
    names = list(dict.fromkeys(candidates))
    scope, _, last = id_.rpartition(SEP)
    same_word = [] if last.isdigit() else [name for name in names if name.rpartition(SEP)[2] == last]
    words = [name.rpartition(SEP)[2] for name in names if name.rpartition(SEP)[0] == scope]
    near = difflib.get_close_matches(id_, same_word, n=1, cutoff=0)
    if not near and not last.isdigit():
        near = [f"{scope}{SEP * bool(scope)}{word}" for word in difflib.get_close_matches(last, words, n=1)]
        near = near or difflib.get_close_matches(id_, names, n=1, cutoff=0.85)
    if near:
        return f"; did you mean '{mark}{shown(near[0])}'?"
    return f"; '{shown(scope)}' has: {', '.join(words)}" if scope and words else ""
