# SPDX-License-Identifier: Apache-2.0
"""The command `cache`: prepare all images of a config ahead, in parallel, so that no step of any rank waits for one."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from unimedi_components.errors import ConfigError
from unimedi_components.loading.store import older_entries

_SPLITS = {"training": "train#dataset", "validation": "validate#dataset"}


def fill_cache(config: Mapping[str, Any], workers: int | None = None) -> str:
    """Prepare the images of a config, training and validation, that are not in its cache yet; returns its folder.

    An interrupted call loses nothing, and any number of them, on any number of machines, may run at a time.

    Args:
        config: merged, as `check_config` returns it, of any bundle that trains.
        workers: processes; None for one per core.

    Raises:
        ConfigError: the config has no cache.
        DataError: a file cannot be read, and the config is `strict`.
    """
    parser = ConfigParser(dict(config))
    if parser.get("cache_dir") is None or any(id_ not in parser for id_ in _SPLITS.values()):
        raise ConfigError("this config caches no images: it needs cache_dir, train#dataset and validate#dataset")
    for name, id_ in _SPLITS.items():
        dataset, begun = parser.get_parsed_content(id_), time.monotonic()
        unreadable = len(dataset.prepare(range(len(dataset)), workers, name))
        seconds = time.monotonic() - begun
        print(f"{name}: {len(dataset) - unreadable} images ready, {unreadable} unreadable, {seconds:.0f} s")
    folder = Path(str(parser.get_parsed_content("cache_dir")))
    size = sum(file.stat().st_size for file in folder.glob("*/*.shard")) / 2**30
    print(f"cache: {folder}, {size:.2f} GiB")
    return str(folder)


def remove_older(folder: str | Path) -> None:
    for path in older_entries(Path(folder)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        print(f"removed {path}")
