# SPDX-License-Identifier: Apache-2.0
"""Folders of slice images: which file is which slice, and which slices stand for the whole scan."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimedi_components.errors import DataError

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


def in_slice_order(names: Sequence[str]) -> list[str]:
    """Sort file names by the numbers in them, whatever their number of digits; other files are left out."""

    def key(name: str) -> list[Any]:
        # Text and number alternate, so that like is compared with like.
        return [int(part) if part.isdigit() else part.lower() for part in re.split(r"([0-9]+)", name)]

    images = [name for name in names if name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(".")]
    return sorted(images, key=lambda name: (key(name), name))


def evenly_spread(count: int, wanted: int) -> list[int]:
    """Choose `wanted` of `count` places, spread evenly and symmetrically; places repeat where there are too few.

    Place i is (i + 1/2) * count / wanted - 1/2, rounded, halves towards the middle (an exact middle goes up). So
    reversed slices give the reversed choice for even `wanted`; the examples of SymmetricalResampler in the
    HKBU-HPML repository come out the same.
    """
    lower = [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]
    return [lower[i] if 2 * i < wanted else count - 1 - lower[wanted - 1 - i] for i in range(wanted)]


def slice_files(folder: str | Path, slices: Sequence[str] | None = None, first_slice: str = "head") -> list[str]:
    """List the files of a volume from its lowest slice to its highest.

    ``slices``: the names that make up the volume, in the scan's order; None takes every image of the folder by number.
    Raises DataError: there is no folder, or no slice in it.
    """
    folder = str(folder)
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder of slices. Correct the path or fetch the scan again")
    names = in_slice_order(os.listdir(folder)) if slices is None else list(slices)
    if not names:
        raise DataError(f"{folder}: holds no slice ({', '.join(IMAGE_ENDINGS)}). Fetch the scan again")
    files = [os.path.join(folder, name) for name in names]
    return files[::-1] if first_slice == "head" else files
