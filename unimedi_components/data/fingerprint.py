# SPDX-License-Identifier: Apache-2.0
"""What a chain of transforms computes, as a hash: the part of a cache key that follows its parameters."""

import functools
import hashlib
import json
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from torch import Tensor

#: Raise it when a transform of this package changes what it computes from the same parameters.
VERSION = 2


def fingerprint(transforms: Sequence[Callable]) -> str:
    """SHA-256 of the transforms' classes, parameters and MONAI's version, equal in every process.

    Take it from transforms that have not run yet: some of MONAI's keep traces of their last input.
    """
    parts = [VERSION, monai.__version__, describe(transforms)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def describe(value: Any) -> Any:
    """A JSON-able description of a transform and its parameters, equal in every process."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (np.ndarray, Tensor)):
        array = np.ascontiguousarray(value)
        return [str(array.dtype), list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]
    if isinstance(value, Mapping):
        return sorted(([describe(key), describe(item)] for key, item in value.items()), key=repr)
    if isinstance(value, (set, frozenset)):
        return sorted((describe(item) for item in value), key=repr)
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, (bytes, Enum, torch.dtype, np.dtype, Path)):
        return str(value)
    if isinstance(value, functools.partial):
        return [describe(part) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, types.FunctionType):
        # two lambdas of a config share their name and differ in their code alone
        constants = [item for item in value.__code__.co_consts if not isinstance(item, types.CodeType)]
        return [f"{value.__module__}.{value.__qualname__}", value.__code__.co_code.hex(), repr(constants)]
    named = value if hasattr(value, "__qualname__") else type(value)
    attributes = {} if named is value else getattr(value, "__dict__", {})
    kept = {k: v for k, v in attributes.items() if not isinstance(v, (np.random.RandomState, threading.local))}
    return [f"{named.__module__}.{named.__qualname__}", describe(kept)]
