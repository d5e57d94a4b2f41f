# SPDX-License-Identifier: Apache-2.0
"""Checks of what the command line is given, before a command works for minutes."""

import difflib
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

from fire.parser import DefaultParseValue

from unimedi_components.errors import ConfigError

#: Where the default pre-training run leaves its weights.
CHECKPOINT = "bundles/pretrain/models/model.pt"


def exact_words(words: Sequence[str], lists: bool = False) -> list[str]:
    """Quote what fire would not pass on as it stands: it makes a tuple of "effusion, left", and 1.5 of "1.50".

    Args:
        words: of the command line.
        lists: leave numbers and lists to fire, and keep only what it would drop: all from a # on, as a comment.
    """
    quoted = []
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        kept = not loses_hash(value) if lists else str(DefaultParseValue(value)) == value
        quoted.append(word if kept else f"{flag}{equals}{value!r}")
    return quoted


def loses_hash(value: str) -> bool:
    """Whether fire takes a # in a word for the start of a comment: "film #2.png" becomes "film"."""
    return "#" in value and "#" not in str(DefaultParseValue(value))


def path_names(inputs: Any) -> list[str]:
    """Files, folders and patterns as they were meant, after fire and MONAI have read them.

    Args:
        inputs: one or several. Fire makes a number of a folder called 2024, and MONAI writes :: where a name has a #.

    Raises:
        ConfigError: neither a name nor a list of names.
    """
    given = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    names = []
    for name in given:
        if isinstance(name, bool) or not isinstance(name, (str, int, float, os.PathLike)):
            raise ConfigError(
                f"--inputs {inputs!r} names no files; give a file, a folder, a pattern, or a list of them"
            )
        text = os.fspath(name) if isinstance(name, os.PathLike) else str(name)
        renamed = text.replace("::", "#")
        names.append(renamed if not os.path.exists(text) and os.path.exists(os.path.expanduser(renamed)) else text)
    return names


def whole_number(name: str, value: Any, least: int) -> None:
    """Raise a ConfigError unless the option's value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"--{name} must be a whole number of at least {least}, got {value!r}")


def check_options(command: str, function: Callable[..., Any], options: Sequence[str] | dict[str, Any]) -> None:
    """Raise a ConfigError for an option that `function` does not take: fire would say so after the work is done."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for option in options:
        if option not in parameters:
            near = difflib.get_close_matches(option, parameters, n=1)
            hint = f"did you mean '--{near[0]}'?" if near else f"it takes --{', --'.join(parameters)}"
            raise ConfigError(f"unknown option '--{option}' of '{command}'; {hint}")
