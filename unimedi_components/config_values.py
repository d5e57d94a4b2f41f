# SPDX-License-Identifier: Apache-2.0
"""Whether a value in an overlay or an override is of the kind that its key means."""

import re
from collections.abc import Iterable
from typing import Any

from monai.bundle.reference_resolver import ReferenceResolver

from unimedi_components.data.datalist import SPLITS
from unimedi_components.data.table import TASKS
from unimedi_components.errors import ConfigError

SEP = ReferenceResolver.sep
MISSING = object()
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
# ids whose value is a file or folder; `inputs` too, which takes a number as it is
_PATH = re.compile(r"(bundle_root|checkpoint|encoder_weights|.*_(dir|file|(?<!drop_)path))$")
# of one or of several, whatever the config has; of a datalist, what makes it or its file
_EITHER = re.compile(r"datalist|keys|inputs|dims|spatial_axis|mode|padding_mode|patch_size|batch_size|.*_range")
_AS_LONG = re.compile(r"vol_size|spatial_size|spacing|window|betas|scale")
# True, False, or a word: a precision, a modality
_SWITCH_OR_WORD = ("amp", "vl_on_full")
# plain words that a key may hold, by its id
_CHOICES = {f"evaluation{SEP}split": SPLITS, "task": TASKS}
# what counts something, by the last word of its id that is no index, and the least that it may be
_COUNTS = {
    0: "seed phantom_seed fraction_seed num_workers batch_2d batch_3d bootstrap center_kinds",
    1: "epochs max_epochs iterations batch_size val_interval patience steps lr_batch depth embed_dim num_heads k "
    "hidden_size num_hidden_layers num_classes hidden_dim out_dim bottleneck_dim feature_size width widths "
    "img_size vol_size spatial_size roi_size patch_size patch_size_3d neighbours max_boxes per_class protocol_queries "
    "sw_batch_size",
    3: "max_length max_position_embeddings",
}
_LEAST = {name: least for least, names in _COUNTS.items() for name in names.split()}
# more would be worker processes that no machine starts, and seeds that NumPy refuses
_MOST = {"num_workers": 512, "seed": 2**32 - 1, "phantom_seed": 2**32 - 1, "fraction_seed": 2**32 - 1}
# shares, and what may be any number from an end of the range on
_WITHIN = {
    "[0, 1]": "dropout prob flip_prob momentum_teacher threshold score_threshold nms_threshold jitter",
    "[0, 1)": "betas",
    "(0, inf)": "max_grad_norm spacing scale init_temperature",
    "[0, inf)": "lr muon_lr encoder_lr weight_decay lr_power power start_lr end_lr rotate rotate_degrees random_shift "
    "warmup_epochs warmup_iters teacher_temp_warmup_epochs freeze_last_layer_epochs figures",
}
_RANGES = {name: interval for interval, names in _WITHIN.items() for name in names.split()}


def items_of(config: Any) -> Iterable[tuple[Any, Any]]:
    """What a dictionary or a list of a config holds, by key or index."""
    if isinstance(config, dict):
        return config.items()
    return enumerate(config) if isinstance(config, list) else ()


def shown(id_: str) -> str:
    """An id as it is written on the command line."""
    return id_.replace(SEP, "#")


def check_value(id_: str, value: Any, default: Any, what: str, overridden: bool = False) -> None:
    """Raise if a value is not of the kind that it was meant as.

    Args:
        default: what it replaces, or a signature's; MISSING where nothing tells.
        what: names the value in the message.
        overridden: on the command line.

    Raises:
        ConfigError: text for a number, a list or True and False, a number for a list or a path, a word for a component,
            a list of another length, a count that is none, a number out of its range, a `#` in a text.
    """
    last = next((word for word in reversed(id_.split(SEP)) if not word.isdigit()), id_)
    if isinstance(value, (dict, list, tuple)):
        _check_parts(id_, value, default, what)
        return
    _check_kind(last, value, default, what)
    if _is_number(value):
        _check_range(last, value, what)
    if isinstance(value, str):
        plain = value[:1] not in ("$", "@", "%")
        is_text = isinstance(default, str) and default[:1] not in ("$", "@", "%")
        number = _NUMBER.fullmatch(value)
        # where nothing tells, digits alone may be a name; an exponent is none
        if number and not is_text and (default is not MISSING or number[2]) and not _PATH.fullmatch(last):
            raise ConfigError(f"{what} is the text '{value}' where a number is meant; write {_yaml_number(value)}")
        if plain and value not in (choices := _CHOICES.get(id_, (value,))):
            raise ConfigError(f"{what} is {value!r}; use one of {', '.join(choices)}")
        if plain and "#" in value and last != "inputs":
            raise ConfigError(
                f"{what}: MONAI turns '#' into '::', so '{value}' would not be found; rename it, or name a link to it "
                "without '#'"
            )
    elif _PATH.fullmatch(last) and isinstance(value, (int, float)) and not isinstance(value, bool):
        written = f"--{shown(id_)} ./{value}" if overridden else f'"./{value}"'
        raise ConfigError(f"{what} is the number {value!r} where a path is meant; write {written}")


def _check_parts(id_: str, value: Any, default: Any, what: str) -> None:
    last = id_.rpartition(SEP)[2]
    if not isinstance(value, dict):
        if _is_number(default) and not _EITHER.fullmatch(last):
            raise ConfigError(f"{what} is the list {list(value)} where one number is meant, such as {default!r}")
        plain = isinstance(default, list) and all(map(_is_number, [*default, *value]))
        if plain and len(value) != len(default) and _AS_LONG.fullmatch(last):
            raise ConfigError(f"{what} is {list(value)} where {len(default)} numbers are meant, such as {default}")
        if last.endswith("window") and all(map(_is_number, value)) and list(value) != sorted(set(value)):
            raise ConfigError(f"{what} is {list(value)}; write the lower end first, then the higher one")
    for key, part in items_of(list(value) if isinstance(value, tuple) else value):
        inner = MISSING
        if isinstance(default, dict) or (isinstance(default, list) and isinstance(key, int) and key < len(default)):
            inner = default.get(key, MISSING) if isinstance(default, dict) else default[key]
        check_value(f"{id_}{SEP}{key}", part, inner, f"{what}, {'key' if isinstance(value, dict) else 'entry'} {key}")


def _check_kind(last: str, value: Any, default: Any, what: str) -> None:
    """Raise if one value stands where the default is of another kind; references, expressions and null may be any."""
    text = isinstance(value, str)
    if value is None or (text and (value[:1] in ("$", "@", "%") or value.lower() in ("null", "none", "true", "false"))):
        return
    if isinstance(default, dict) and not isinstance(value, bool) and not _EITHER.fullmatch(last):
        meant = "a component with a _target_" if "_target_" in default else f"a dictionary of {', '.join(default)}"
        raise ConfigError(f"{what} is {value!r} where {meant} is meant; write it in an overlay, or change its entries")
    if isinstance(default, list) and default and not _EITHER.fullmatch(last):
        raise ConfigError(f"{what} is {value!r} where a list is meant{_such_as(default)}")
    if text and isinstance(default, bool) and last not in _SWITCH_OR_WORD:
        raise ConfigError(f"{what} is the text {value!r} where True or False is meant")
    if text and _is_number(default) and not _NUMBER.fullmatch(value):
        raise ConfigError(f"{what} is the text {value!r} where a number is meant, such as {default!r}")
    least = _LEAST.get(last)
    counts = isinstance(value, int) and not isinstance(value, bool)
    if least is not None and not (counts and value >= least) and not (text and _NUMBER.fullmatch(value)):
        raise ConfigError(f"{what} is {value!r} where a whole number of at least {least} is meant")


def _check_range(last: str, value: float, what: str) -> None:
    interval = _RANGES.get(last, "(-inf, inf)")
    low, high = map(float, interval[1:-1].split(", "))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    if not (above and below):
        meant = f"a number in {interval}" if last in _RANGES else "a finite number"
        raise ConfigError(f"{what} is {value!r} where {meant} is meant")
    if value > _MOST.get(last, value):
        raise ConfigError(f"{what} is {value!r} where at most {_MOST[last]} is meant")


def _such_as(default: Any) -> str:
    return f", such as {default}" if len(str(default)) < 120 else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _yaml_number(text: str) -> str:
    """A number as JSON and YAML 1.1 both read it: an exponent needs a point before it."""
    number = repr(float(text)) if re.search(r"[.eE]", text) else str(int(text))
    mantissa, e, exponent = number.partition("e")
    return f"{mantissa}{'' if '.' in mantissa else '.0'}e{exponent}" if e else number
