# SPDX-License-Identifier: Apache-2.0
"""The type of NumPy arrays of any values."""

from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
