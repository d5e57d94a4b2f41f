# SPDX-License-Identifier: Apache-2.0
"""Components of the UniMedI bundles: one vision transformer for X-rays and CT, pre-trained with reports.

Importing the package is cheap: names and subpackages are loaded when they are first used, so that a config's
``"$import unimedi_components"`` costs nothing and ``$unimedi_components.bundle_root('pretrain')`` just works.
"""

from typing import Any

from unimedi_components.lazy import import_lazily

__version__ = "0.1.0"

_HOMES = {
    "": "data distributed engines errors loading losses metrics networks retrieval selection tasks",
    "bundle": "bundle_root check_run data_dir encoder_weights",
    "config_check": "check_config",
    "hub": "UniMediImageProcessor",
    "networks.cards": "load_network",
    "networks.classifier": "load_classifier",
    "networks.pretrained": "load_encoder load_pretrained",
    "networks.unified_vit": "UnifiedViT",
    "networks.unimedi": "UniMedI",
}

__all__ = ["__version__", *" ".join(names for home, names in _HOMES.items() if home).split()]


def __getattr__(name: str) -> Any:
    return import_lazily(globals(), _HOMES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_HOMES[""].split()})
