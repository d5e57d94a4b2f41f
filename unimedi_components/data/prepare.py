# SPDX-License-Identifier: Apache-2.0
"""``prepare``: a data set in its own layout to a datalist, with an account of what was kept and dropped."""

import inspect
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unimedi_components.data.catalogue import find_dataset
from unimedi_components.data.datalist import (
    LISTED_DROPS,
    SPLITS,
    DatalistBuilder,
    load_datalist,
    validate_datalist,
    write_datalist,
)
from unimedi_components.data.sources import nearest_hint
from unimedi_components.data.splits import nested_fraction
from unimedi_components.errors import ConfigError, DataError

EXAMPLES = 3


def prepare(
    dataset: str,
    root: Any,
    out: str | Path,
    fraction: float | None = None,
    seed: int = 42,
    strict: bool = False,
    **options: Any,
) -> None:
    """Write the datalist of a data set and print what was kept and dropped.

    Args:
        dataset: a name of :data:`~unimedi_components.data.catalogue.DATASETS`, for example ``chexpert``.
        root: the data set's folder; for ``table`` the csv file or files.
        out: the datalist to write; ``OUT.drops.json`` beside it lists every dropped item, if there are any.
        fraction: keep this share of the training patients, stratified by label and nested over fractions for
            one seed; other splits stay.
        seed: seed of the fraction and of splits that the data set does not define.

    Raises:
        ConfigError: the data set or an option is unknown (the nearest known name is given), an option is of another
            type, or ``out`` is a folder.
        DataError: a fault of the data set as a whole, nothing was kept, or a fault of one file under ``strict``.
    """
    collect = find_dataset(dataset).collect
    if Path(out).expanduser().is_dir():
        raise ConfigError(f"{out}: is a folder. Give the file that the datalist is written to, such as {dataset}.json.")
    parameters = inspect.signature(collect).parameters
    known = {name for name in parameters if name != "root"}
    for name in options:
        if name not in known:
            offered = ", ".join(sorted(known | {"fraction"}))
            hint = nearest_hint(name, known | {"fraction"})
            raise ConfigError(f"prepare {dataset}: unknown option {name!r}. {hint}Options: {offered}.")
    options = {name: _plain_value(f"prepare {dataset}", parameters[name], value) for name, value in options.items()}
    if "seed" in known:
        options["seed"] = seed
    builder = collect(root, strict=strict, **options)
    datalist = builder.build()
    meta = datalist["meta"]
    if fraction is not None:
        datalist["training"] = nested_fraction(datalist["training"], fraction, seed)
        meta["kept"]["training"] = len(datalist["training"])
        meta["fraction"] = fraction
    meta["seed"] = seed
    summary = _summary(builder, meta["kept"])
    if not meta["kept"]["training"]:
        looked = "" if builder.dropped else " The tables list no items."
        unseen = "check_images" in known and "missing image" in builder.dropped
        alone = " --check_images none prepares the tables alone, without a look at the images." if unseen else ""
        raise DataError(
            f"{builder.root}: no training item is left of the {dataset} data.{looked}\n{summary}\n"
            f"Correct ROOT or the reason with the largest count.{alone}"
        )
    path = write_datalist(datalist, out)
    drops = path.with_name(path.name.removesuffix(".json") + ".drops.json")
    drops.unlink(missing_ok=True)
    if builder.dropped:
        write_datalist(builder.dropped, drops)
        summary += f"\nevery dropped item: {drops}"
    print(f"{summary}\ndatalist: {path}")


def _plain_value(place: str, parameter: inspect.Parameter, value: Any) -> Any:
    """An option's value, checked by the type of its default; the command line reads a folder 2024 as a number."""
    default = parameter.default
    if isinstance(default, bool):
        kind, right = "True or False", isinstance(value, bool)
    elif isinstance(default, int):
        kind, right = "a whole number", isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(default, float):
        right = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        kind = "a number"
    else:
        named = default is None and value is not None and "str" in str(parameter.annotation)
        return str(value) if named else value
    if not right:
        raise ConfigError(f"{place}: {parameter.name} is {value!r}, it must be {kind} such as {default}.")
    return value


def _summary(builder: DatalistBuilder, kept: Mapping[str, int]) -> str:
    dims = [f"{sum(item['dim'] == dim for own in builder.items.values() for item in own)} {dim}D" for dim in (2, 3)]
    lines = [f"{builder.dataset} at {builder.root} ({', '.join(dims)})"]
    lines += [f"  kept     {kept[split]:>8}  {split}" for split in SPLITS]
    for reason, drops in sorted(builder.dropped.items(), key=lambda entry: -len(entry[1])):
        shown = ", ".join(drop["id"] for drop in drops[:EXAMPLES]) + (", ..." if len(drops) > EXAMPLES else "")
        lines.append(f"  dropped  {len(drops):>8}  {reason}: {shown}")
        if "detail" in drops[0]:
            lines.append(f"{'':20} e.g. {drops[0]['detail']}")
    if not builder.dropped:
        lines.append(f"  dropped  {0:>8}")
    return "\n".join(lines + builder.remedies)


def merge_datalists(datalists: Mapping[str, str | Path], out: str | Path, root: str | Path) -> dict[str, Any]:
    """Join several datalists into one, for example X-rays and CT volumes for pre-training.

    Images are found below ``root/NAME`` or else below the root that each datalist records, and get paths
    relative to ``root``. Patients become ``NAME-PATIENT``, ids become ``NAME-ID`` where they collide.

    Args:
        datalists: name -> datalist file.

    Raises:
        DataError: a datalist is invalid, or its images are neither below ``root/NAME`` nor below its recorded
            root, or not below ``root``; or some have reports with punctuation and some without.
    """
    parts = {name: load_datalist(path) for name, path in datalists.items()}
    prefixes = {name: _prefix(name, Path(datalists[name]), part, Path(root)) for name, part in parts.items()}
    seen = Counter(item["id"] for part in parts.values() for split in SPLITS for item in part[split])
    joined: dict[str, Any] = {split: [] for split in SPLITS}
    for name, part in parts.items():
        for split in SPLITS:
            for item in part[split]:
                moved = {**item, "patient": f"{name}-{item['patient']}"}
                moved["id"] = f"{name}-{item['id']}" if seen[item["id"]] > 1 else item["id"]
                for key in ("image", "mask"):
                    if key in item:
                        moved[key] = _moved(prefixes[name], item[key])
                if "files" in item:
                    moved["files"] = [_moved(prefixes[name], file) for file in item["files"]]
                joined[split].append(moved)
    joined["meta"] = _joined_meta(parts, joined, root)
    validate_datalist(joined, str(out))
    write_datalist(joined, out)
    return joined


def _moved(prefix: str, path: str) -> str:
    return os.path.normpath(os.path.join(prefix, path)).replace(os.sep, "/")


def _prefix(name: str, path: Path, part: dict[str, Any], root: Path) -> str:
    """Return the folder of a datalist's images relative to ``root``."""
    first = next(item["image"] for split in SPLITS for item in part[split])
    recorded = Path(part.get("meta", {}).get("root", ""))
    for folder in (root / name, recorded):
        if (folder / first).exists():
            relative = os.path.relpath(folder.resolve(), root.resolve())
            if relative.split(os.sep)[0] == os.pardir:
                raise DataError(f"{path}: images below {folder} are not below root {root}. Give a folder above both.")
            return relative
    raise DataError(
        f"{path}: image {first} is neither below {root / name} nor below {recorded}. "
        f"Move the data there, or prepare {name} again."
    )


def _joined_meta(parts: dict[str, Any], joined: dict[str, Any], root: str | Path) -> dict[str, Any]:
    metas = {name: part.get("meta", {}) for name, part in parts.items()}
    dropped: Counter[str] = Counter()
    listed: dict[str, list[str]] = {}
    for meta in metas.values():
        dropped.update(meta.get("dropped", {}))
        for reason in meta.get("dropped", {}):
            listed[reason] = (listed.get(reason, []) + meta.get("dropped_items", {}).get(reason, []))[:LISTED_DROPS]
    punct = {name: meta["keep_punct"] for name, meta in metas.items() if "keep_punct" in meta}
    if len(set(punct.values())) > 1:
        raise DataError(f"reports with punctuation beside some without ({punct}); prepare all with one --keep_punct")
    return {
        "dataset": "+".join(parts),
        "root": str(root),
        "created_with": next((meta["created_with"] for meta in metas.values() if "created_with" in meta), ""),
        "sources": {f"{name}/{k}": sha for name, meta in metas.items() for k, sha in meta.get("sources", {}).items()},
        "kept": {split: len(joined[split]) for split in SPLITS},
        "dropped": dict(dropped),
        "dropped_items": listed,
        **({"keep_punct": next(iter(punct.values()))} if punct else {}),
        "label_names": {name: meta["label_names"] for name, meta in metas.items() if "label_names" in meta},
    }
