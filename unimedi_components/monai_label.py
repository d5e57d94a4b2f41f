# SPDX-License-Identifier: Apache-2.0
"""MONAI Label's answers with a reason: `give_reasons(MyApp)` below an app's `main.py`."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from starlette.exceptions import HTTPException

from unimedi_components.bundle import user_fault
from unimedi_components.errors import DataError


def give_reasons(app: type) -> None:
    """Let an app's inference and training answer 400 with the reason, where MONAI Label 0.8.5 answers 500 with none.

    A training then also ends at the first image or label that cannot be used, which it would leave out otherwise. Of a
    DICOMweb archive, a film is read from its DICOM rather than from the NIfTI that MONAI Label makes of it, which knows
    nothing of inverted greys; and a DICOM SEG names the segments that a mask has, where MONAI Label takes the first
    names of "label_info" whatever they are. ``app``: the class of the app in its `main.py`, such as `MyApp` of the
    sample app `monaibundle`; changed in place.
    """
    infer, train = app.infer, app.train  # type: ignore[attr-defined]

    @functools.wraps(infer)
    def placed(self: Any, request: dict[str, Any], datastore: Any = None) -> Any:
        task, image = self._infers.get(request.get("model")), request.get("image")
        if getattr(task, "dimension", 3) == 2 and isinstance(image, str) and not os.path.exists(image):
            store = datastore or self.datastore()
            # where a series is fetched first, the answer is a temporary file
            store.get_image_uri(image)
            film = _film(store.get_image_uri(image))
            # the mask of a DICOM film would be written as DICOM without its place
            request = {"result_extension": ".nii.gz", **request, "image": film} if film else request
        result = infer(self, request, datastore)
        if isinstance(request.get("label_info"), list) and str(result["file"]).endswith(".nii.gz"):
            _name_segments(request["label_info"], result["file"], task.labels)
        return result

    @functools.wraps(train)
    def checked(self: Any, request: dict[str, Any]) -> Any:
        task = self._trainers.get(request.get("model"))
        # MONAI Label watches files of images and masks, and would train on a JSON label that was deleted
        self.datastore().refresh()
        if task is not None:
            # the method that MONAI Label leaves to be written: it changes the overrides of the run
            task._update_overrides = lambda overrides: overrides.update({"train#dataset#strict": True})
            if "detection" in request["model"]:
                for item in self.datastore().datalist():
                    _check_regions(item["label"])
        return train(self, request)

    app.infer, app.train = _answering(placed), _answering(checked)  # type: ignore[attr-defined]


def _answering(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def answer(self: Any, request: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, request, *args, **kwargs)
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            reason = user_fault(error) or (str(cause) if isinstance(cause, OSError) else None)
            if reason is None:
                raise
            raise HTTPException(400, reason) from error

    return answer


def _film(place: str) -> str | None:
    """The one DICOM file of a series that MONAI Label has fetched, by the place of what it made of it; None if none."""
    folder = Path(place.removesuffix(".nii.gz"))
    if not folder.is_dir():
        return None
    files = [str(file) for file in folder.iterdir()]
    if len(files) != 1:
        raise DataError(f"series {folder.name}: holds {len(files)} films, of which a request cannot name one")
    return files[0]


def _name_segments(info: list[Any], file: str, numbers: dict[str, int]) -> None:
    """Put in place, for each label that a mask has, the entry of its name, or one with its name alone."""
    names = {number: name for name, number in numbers.items()}
    given = {str(entry.get("name", "")).lower(): entry for entry in info}
    found = [names[int(n)] for n in np.unique(np.asanyarray(nib.Nifti1Image.from_filename(file).dataobj)) if n]
    first = {"model_name": info[0]["model_name"]} if info and "model_name" in info[0] else {}
    info[:] = [{**first, **given.get(name, {"name": name})} for name in found]


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
