# SPDX-License-Identifier: Apache-2.0
"""Transform chains by name, so that a config and a trained network's card name the same preparation of images."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.transforms import Compose, Transform

from unimedi_components.data.cubes import luna_cube_transforms
from unimedi_components.data.films import film_transforms
from unimedi_components.data.segmentation import segmentation_transforms
from unimedi_components.data.slice_files import IMAGE_ENDINGS
from unimedi_components.data.slices import slice_volume_transforms
from unimedi_components.data.transforms import ct_transforms, xray_transforms
from unimedi_components.errors import ConfigError

CHAINS: dict[str, Callable[..., list[Transform]]] = {
    "xray": xray_transforms,
    "ct": ct_transforms,
    "slices": slice_volume_transforms,
    "cube": luna_cube_transforms,
    "film": film_transforms,
    "organs": segmentation_transforms,
}


class BySource(Transform):
    """Prepare a folder of PNG, JPG or TIFF slices by one chain, and volume files and DICOM folders by another."""

    def __init__(self, slices: Sequence[Transform], volume: Sequence[Transform]) -> None:
        self.slices, self.volume = Compose(slices), Compose(volume)

    def __call__(self, data: Mapping[Hashable, Any]) -> Any:
        path = Path(str(data["image"]))
        pictures = path.is_dir() and any(entry.name.lower().endswith(IMAGE_ENDINGS) for entry in path.iterdir())
        return (self.slices if pictures else self.volume)(dict(data))


def task_transforms(preprocessing: Mapping[str, Mapping[str, Any]], **options: Any) -> list[Transform]:
    """The deterministic chain (and random crop, where asked for) that a config or a card describes.

    Raises ConfigError: an unknown name, or a combination that has no meaning.

    Args:
        preprocessing: {a name in `CHAINS`: arguments of its function}; "slices" and "ct" together read folders of slice
            images by the one and volumes by the other.
        options: further arguments, such as `random_crop` of "xray" or `target` of "film".
    """
    names = set(preprocessing)
    if names == {"slices", "ct"}:
        return [BySource(slice_volume_transforms(**preprocessing["slices"]), ct_transforms(**preprocessing["ct"]))]
    if len(names) != 1 or not names <= set(CHAINS):
        raise ConfigError(f"preprocessing {sorted(names)} must be one of {', '.join(CHAINS)}, or slices with ct")
    (name,) = names
    return CHAINS[name](**preprocessing[name], **options)
