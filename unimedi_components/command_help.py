# SPDX-License-Identifier: Apache-2.0
"""What ``COMMAND --help`` prints: usage, arguments, further options and an example, from the docstrings."""

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

_PROGRAM = "python -m unimedi_components"
_WIDTH = 110
#: An example of each command.
EXAMPLES = {
    "phantom": "phantom bimcv data/bimcv --patients 50",
    "prepare": "prepare chexpert data/CheXpert-v1.0-small chexpert.json --fraction 0.1",
    "datasets": "datasets luna16",
    "evaluate": "evaluate bundles/pretrain/models/model.pt --json evaluation.json",
    "inspect": "inspect scans/ --json inspected.json --png sheets",
    "embed": "embed scans/ 'films/**/*.dcm' --out embeddings.npz",
    "index": "index reports.npz --datalist data/pretrain.json --split training",
    "search": "search reports.npz 'Small left pleural effusion.' scans/1.nii.gz --k 5",
    "zero_shot": "zero_shot films/ --finding 'Edema|Pleural Effusion' --out findings.csv",
    "serve": "serve --index reports.npz --port 8000",
    "report": "report bundles/pretrain results/experiment/small --out page",
    "export": "export bundles/pretrain/models/model.pt encoder",
    "check": "check bundles/pretrain/configs/train.json my.yaml --epochs 2",
    "cache": "cache bundles/pretrain/configs/train.json --workers 16",
    "plan": "plan bundles/pretrain/configs/train.json --size vit_b16 --gpu a100-40",
}


def overview(commands: Mapping[str, Callable[..., Any]]) -> str:
    """All commands with what each does."""
    width = max(map(len, commands)) + 2
    lines = [f"{name:<{width}}{_summary(function)}" for name, function in commands.items()]
    return "\n".join(
        [f"usage: {_PROGRAM} COMMAND ...", "", *lines, "", f"{_PROGRAM} COMMAND --help says more; --version; --debug"]
    )


def command_help(name: str, function: Callable[..., Any], more: Callable[..., Any] | None = None) -> str:
    """Full help of a command.

    Args:
        more: the function that takes what the command's ``**options`` hold.
    """
    parameters = inspect.signature(function).parameters
    text, described = _parsed(function)
    names = [
        f"{p.name.upper()} ..." if p.kind is p.VAR_POSITIONAL else p.name.upper()
        for p in parameters.values()
        if p.kind is p.VAR_POSITIONAL or (p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)
    ]
    taken = [p for p in parameters.values() if p.kind is not p.VAR_KEYWORD]
    lines = [f"usage: {_PROGRAM} {' '.join([name, *names])} [--OPTION VALUE ...]", "", text, ""]
    lines += [line for p in taken for line in _argument(p, described.get(p.name, ""))]
    if more is not None:
        _, described = _parsed(more)
        known = {*parameters, "inputs", "items", "root", "self"}
        options = [p for p in inspect.signature(more).parameters.values() if p.name not in known]
        lines += [line for p in options for line in _argument(p, described.get(p.name, ""))]
    elif any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        rest = next(p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD)
        lines += _row(f"  --{rest.upper()} VALUE", described.get(rest, ""))
    return "\n".join([*lines, *_example(EXAMPLES.get(name))])


def prepare_help(dataset: str | None, function: Callable[..., Any]) -> str:
    """Help of ``prepare``, or of ``prepare DATASET`` with the converter's options and the layout that it reads."""
    from unimedi_components.data.catalogue import DATASETS, describe, find_dataset
    from unimedi_components.data.datalist import OPTIONS

    if dataset is None:
        lines = [command_help("prepare", function).rpartition("\nexample:")[0], "data sets:"]
        lines += [f"  {name:<12}{one.title}" for name, one in DATASETS.items()]
        lines += ["", f"{_PROGRAM} prepare DATASET --help lists the options of one"]
        return "\n".join([*lines, *_example(EXAMPLES["prepare"])])
    collect = find_dataset(dataset).collect
    own, described = inspect.signature(function).parameters, _parsed(function)[1]
    lines = [f"usage: {_PROGRAM} prepare {dataset} ROOT OUT [--OPTION VALUE ...]", "", describe(dataset), ""]
    for name in ("root", "out", "fraction", "seed"):
        lines += _argument(own[name], described.get(name, ""))
    described = {**OPTIONS, **_parsed(collect)[1]}
    for parameter in inspect.signature(collect).parameters.values():
        if parameter.name not in own:
            lines += _argument(parameter, described.get(parameter.name, ""))
    root = "cases.csv" if dataset == "table" else f"data/{dataset}"
    return "\n".join([*lines, *_example(f"prepare {dataset} {root} {dataset}.json --fraction 0.1")])


def _example(command: str | None) -> list[str]:
    return ["", f"example: {_PROGRAM} {command}"] if command else []


def _summary(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _parsed(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The docstring's text above its sections, and its arguments' descriptions."""
    text, _, rest = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    section = re.split(r"\n\n?\S", rest)[0]
    described: dict[str, str] = {}
    for line in textwrap.dedent(section).splitlines():
        match = re.match(r"\*{0,2}(\w+): (.*)", line)
        if match:
            described[match[1]] = match[2]
        elif described and line.strip():
            described[list(described)[-1]] += " " + line.strip()
    return text.strip(), {name: _plain(words) for name, words in described.items()}


def _plain(words: str) -> str:
    """A description without marks of the documentation."""
    words = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", words)
    return words.replace("``", "").replace("`", "").replace("\\*", "*")


def _argument(parameter: inspect.Parameter, words: str) -> list[str]:
    if parameter.default is parameter.empty:
        head = f"  {parameter.name.upper()}"
    else:
        head = f"  --{parameter.name}"
        if parameter.default is not None and parameter.default != "":
            words = f"{words.rstrip('.')} (default: {parameter.default})"
    return _row(head, words)


def _row(head: str, words: str) -> list[str]:
    return textwrap.wrap(f"{head:<24}  {words}", _WIDTH, subsequent_indent=" " * 26)
