# SPDX-License-Identifier: Apache-2.0
"""The truth that a phantom set's writer left beside it, read back."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DataError
from .paired import PAIRED

_TRUTH = "truth.json"
logger = logging.getLogger(__name__)


def load_truth(root: str | Path, items: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any] | None:
    """The truth of the phantom set at `root`, or of those in its folders; None for real data.

    ``items``: of a datalist; one that the truth does not know makes it that of phantoms which only lie beside the data:
    None, said in a warning. Raises DataError: a file is damaged.

    Returns:
        "findings", the names of the labels, and "studies", by item id: "labels", "findings", and for volumes
        "lesion_slices" (inferior to superior), "n_slices" and, where the patient can be made again for an X-ray,
        "phantom" (layout, seed, number). Studies of a folder NAME also go by NAME-ID, as `merge_datalists` calls ids
        that collide.
    """
    truth = _find_truth(root)
    if unknown := [item["id"] for item in items if truth is not None and item["id"] not in truth["studies"]]:
        text = "%s: the truth of phantoms there does not know %s (%d such) and is not used"
        logger.warning(text, root, unknown[0], len(unknown))
        return None
    return truth


def _find_truth(root: str | Path) -> dict[str, Any] | None:
    if (Path(root) / _TRUTH).is_file():
        return _read_truth(Path(root) / _TRUTH)
    parts = {path.parent.name: _read_truth(path) for path in sorted(Path(root).glob(f"*/{_TRUTH}"))}
    if not parts:
        return None
    studies: dict[str, Any] = {}
    for name, part in parts.items():
        studies.update(part["studies"])
        studies.update({f"{name}-{key}": study for key, study in part["studies"].items()})
    return {"findings": next(iter(parts.values()))["findings"], "studies": studies}


def _read_truth(path: Path) -> dict[str, Any]:
    try:
        truth = json.loads(path.read_text(encoding="utf-8"))
        studies = truth["studies"]
        if truth.get("layout") in PAIRED:
            made = enumerate(studies.items())
            studies = {name: {**study, "phantom": (truth["layout"], truth["seed"], i)} for i, (name, study) in made}
        return {"findings": truth["findings"], "studies": studies}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no truth file of phantoms ({error!r}); write them again") from error


def labels_of(items: Sequence[Mapping[str, Any]], studies: Mapping[str, Mapping[str, Any]]) -> npt.NDArray[np.int64]:
    """True labels of datalist items, (N, F). Raises DataError: an item is not in the truth file."""
    missing = [item["id"] for item in items if item["id"] not in studies]
    if missing:
        raise DataError(f"truth.json does not know {missing[0]} ({len(missing)} such); write the phantoms again")
    return np.asarray([studies[item["id"]]["labels"] for item in items], dtype=np.int64)
