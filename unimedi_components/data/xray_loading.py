# SPDX-License-Identifier: Apache-2.0
"""X-rays from files into transform chains."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from unimedi_components.errors import DataError
from unimedi_components.images.xray import XrayReader


class LoadXrayd(MapTransform):
    """Read the X-rays that an item names, see `read_xray`; each becomes a MetaTensor (1, H, W) of float32 in [0, 1].

    What was done to the values stands in the meta data, and in the item under "film_values". Raises DataError, OSError:
    when run: an item does not name one file, or see `read_xray`. ``draft_size``: see `read_xray`.
    """

    def __init__(self, keys: KeysCollection, draft_size: int | None = None) -> None:
        super().__init__(keys)
        self.draft_size = draft_size

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        loaded = dict(data)
        for key in self.key_iterator(loaded):
            place = loaded[key]
            if not isinstance(place, (str, Path)):
                if len(place) != 1:
                    raise DataError(f"an X-ray item must name one file, got {len(place)}: {place}")
                place = place[0]
            greys, meta = XrayReader(self.draft_size).get_data(str(place))
            meta |= {"filename_or_obj": str(place), "original_channel_dim": float("nan")}
            loaded[key] = MetaTensor(torch.from_numpy(greys)[None], meta=meta)
            loaded["film_values"] = meta["film_values"]
        return loaded
