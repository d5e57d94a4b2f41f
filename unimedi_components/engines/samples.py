# SPDX-License-Identifier: Apache-2.0
"""A sample of a data set for what is computed once from real images."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def spread_images(dataset: Any, dim: int, count: int) -> Iterator[Tensor]:
    """Images of one dimension, evenly spaced over a data set; unreadable ones of the sample are left out.

    Args:
        dataset: `ImageDataset`, or anything with its `dims` and items.

    Yields:
        (1, H, W) or (1, D, H, W).
    """
    indices = [index for index, item in enumerate(dataset.dims) if item == dim]
    step = max(1, len(indices) // max(count, 1))
    for index in indices[::step][:count]:
        item = dataset[index]
        if isinstance(item, dict):
            yield item["image"]
