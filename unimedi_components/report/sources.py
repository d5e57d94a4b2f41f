# SPDX-License-Identifier: Apache-2.0
"""What the page is made of: runs of bundles, and experiments of cells."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unimedi_components.arrays import Array
from unimedi_components.errors import DataError

SUMMARY = "experiment.json"
Curves = dict[str, tuple[list[int], list[float]]]


@dataclass(frozen=True)
class Run:
    """A finished run of one bundle.

    Args:
        folder: with `metrics.json`, figures and event files.
        origin: "command", "commit", "machine" where the run left them in `run.json`.
    """

    name: str
    folder: Path
    metrics: dict[str, Any]
    origin: dict[str, Any]

    @property
    def figures(self) -> list[Path]:
        return sorted(self.folder.glob("*.png"))


@dataclass(frozen=True)
class Experiment:
    """The ablation: `experiment.json` and the folders of its cells."""

    folder: Path
    content: dict[str, Any]

    @property
    def variants(self) -> Mapping[str, Any]:
        return self.content["variants"]

    @property
    def cells(self) -> Sequence[Mapping[str, Any]]:
        return self.content["cells"]

    def cell(self, variant: str) -> Path:
        seeds = self.variants.get(variant, {}).get("seeds") or [0]
        return self.folder / variant / str(seeds[0])

    def features(self, variant: str) -> dict[str, Array] | None:
        """Features and labels of the held-out studies by the variant's first seed; None where they are not kept."""
        path = self.cell(variant) / "features.npz"
        if not path.is_file():
            return None
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def summary(self, variant: str, key: str) -> dict[str, Any] | None:
        """Mean, deviation and intervals of a measure, None where it was not measured."""
        return self.variants.get(variant, {}).get(key)


def collect(folders: Sequence[str | Path]) -> tuple[list[Run], list[Experiment]]:
    """Sort folders into runs and experiments. Raises DataError: a folder is neither, or what it holds is damaged."""
    runs, experiments = [], []
    for folder in map(Path, folders):
        if (folder / SUMMARY).is_file():
            experiments.append(Experiment(folder, _read(folder / SUMMARY, ("variants", "cells", "settings"))))
            continue
        places = [place for place in (folder / "eval", folder) if (place / "metrics.json").is_file()]
        if not places:
            raise DataError(
                f"{folder}: holds neither {SUMMARY} nor metrics.json; name the folder of a finished run or experiment"
            )
        place = places[0]
        origin = _read(place / "run.json") if (place / "run.json").is_file() else {}
        name = folder.parent.name if folder.name == "eval" else folder.name
        runs.append(Run(name, place, _read(place / "metrics.json"), origin))
    return runs, experiments


def _read(path: Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _ = [content[key] for key in keys]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error!r}); let the run write it again") from error
    return content


def read_curves(folder: Path) -> Curves:
    """Scalars of a run's TensorBoard event files: steps and values by tag; a step that was run again counts once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    curves: Curves = {}
    for tag in events.Tags()["scalars"]:
        latest = {event.step: float(event.value) for event in events.Scalars(tag)}
        curves[tag] = (sorted(latest), [latest[step] for step in sorted(latest)])
    return curves
