# SPDX-License-Identifier: Apache-2.0
"""MONAI Label's answers with a reason: `give_reasons(MyApp)` below an app's `main.py`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from starlette.exceptions import HTTPException

from unimedi_components.bundle import user_fault
from unimedi_components.errors import DataError

__all__ = ["give_reasons"]


def give_reasons(app: type) -> None:
    """Let an app's inference and training answer 400 with the reason, where MONAI Label 0.8.5 answers 500 with none.

    A training then also ends at the first image or label that cannot be used, which it would leave out otherwise.

    Args:
        app: the class of the app in its `main.py`, such as `MyApp` of the sample app `monaibundle`; changed in place.
    """
    train = app.train  # type: ignore[attr-defined]

    @functools.wraps(train)
    def checked(self: Any, request: dict[str, Any]) -> Any:
        task = self._trainers.get(request.get("model"))
        if task is not None:
            # the method that MONAI Label leaves to be written: it changes the overrides of the run
            task._update_overrides = lambda overrides: overrides.update({"train#dataset#strict": True})
            if "detection" in request["model"]:
                for item in self.datastore().datalist():
                    _check_regions(item["label"])
        return train(self, request)

    app.train = _answering(checked)  # type: ignore[attr-defined]
    app.infer = _answering(app.infer)  # type: ignore[attr-defined]


def _answering(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def answer(self: Any, request: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, request, *args, **kwargs)
        except Exception as error:
            reason = user_fault(error)
            if reason is None:
                raise
            raise HTTPException(400, reason) from error

    return answer


def _check_regions(path: str) -> None:
    """Refuse markups that MONAI Label reads wrongly or not at all: it takes the centre and the size of each, as LPS."""
    try:
        markups = json.loads(Path(path).read_text(encoding="utf-8"))["markups"]
        for region in markups:
            numbers = np.asarray([region["center"], region["size"]], dtype=np.float64)
            turned = np.abs(np.reshape(region.get("orientation", np.eye(3)), (3, 3))) - np.eye(3)
            if numbers.shape != (2, 3) or np.abs(turned).max() > 1e-3 or region.get("coordinateSystem", "LPS") != "LPS":
                raise ValueError("a region is turned, or not in LPS")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: holds no regions of interest as 3D Slicer saves them ({error}); a label must be JSON "
            '{"markups": [{"center": [x, y, z], "size": [w, h, d]}, ...]}, in mm along the axes of LPS'
        ) from error
