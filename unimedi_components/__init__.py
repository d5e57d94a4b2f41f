# SPDX-License-Identifier: Apache-2.0
"""Components of the UniMedI bundles: one vision transformer for X-rays and CT, pre-trained with reports.

Importing the package is cheap: names and subpackages are loaded when they are first used, so that a config's
``"$import unimedi_components"`` costs nothing and ``$unimedi_components.bundle_root('pretrain')`` just works.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "UniMedI": "networks.unimedi",
    "UniMediImageProcessor": "hub",
    "UnifiedViT": "networks.unified_vit",
    "bundle_root": "bundle",
    "check_config": "config_check",
    "check_run": "bundle",
    "data_dir": "bundle",
    "encoder_weights": "bundle",
    "load_classifier": "networks.classifier",
    "load_encoder": "networks.pretrained",
    "load_network": "networks.cards",
    "load_pretrained": "networks.pretrained",
}
_SUBPACKAGES = (
    "data",
    "distributed",
    "engines",
    "errors",
    "loading",
    "losses",
    "metrics",
    "networks",
    "retrieval",
    "selection",
    "tasks",
)

__all__ = [
    "UniMedI",
    "UniMediImageProcessor",
    "UnifiedViT",
    "__version__",
    "bundle_root",
    "check_config",
    "check_run",
    "data_dir",
    "encoder_weights",
    "load_classifier",
    "load_encoder",
    "load_network",
    "load_pretrained",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    elif name in _SUBPACKAGES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
