# SPDX-License-Identifier: Apache-2.0
"""Phantom folders, each written once for all tests that read it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from unimedi_components.data.phantom import write_phantom


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, int], Path]:
    """A layout's folder of so many patients and a seed."""

    @cache
    def make(layout: str, patients: int, seed: int) -> Path:
        root = tmp_path_factory.mktemp("phantom") / layout
        assert write_phantom(layout, root, patients, seed, workers=1, progress=False).fresh
        return root

    return make
