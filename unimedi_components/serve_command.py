# SPDX-License-Identifier: Apache-2.0
"""The command serve."""

import importlib.util
from collections.abc import Sequence

from unimedi_components.command_options import CHECKPOINT, whole_number
from unimedi_components.errors import ConfigError

_NEEDS = ("fastapi", "uvicorn", "python_multipart")


def serve(
    checkpoint: str = CHECKPOINT,
    index: str | None = None,
    prompts: str | Sequence[str] = "chest_xray,chest_ct",
    host: str = "127.0.0.1",
    port: int = 8000,
    max_upload_mb: int = 512,
    device: str = "auto",
    allow_remote: bool = False,
    assume_hu: bool = False,
) -> None:
    """Open a page in your browser on this machine: drop an X-ray or a CT, see what the network makes of it.

    It shows zero-shot findings, the selected slices and the attention, and with an index the nearest reports and
    studies. Nothing leaves the machine, and nothing of an upload is kept. Needs the extra "serve".

    Args:
        checkpoint: weights that a pre-training run left.
        index: the npz that the command index or embed has written with this checkpoint, to search in.
        prompts: prompt sets for the findings, shipped names or JSON files, joined with a comma.
        host: address to listen at.
        port: port to listen at; 0 takes a free one.
        max_upload_mb: largest upload in megabytes, all its files together.
        device: cpu, cuda, or auto for a GPU where there is one.
        allow_remote: needed for an address that other machines reach; there is no login.
        assume_hu: take CT values for Hounsfield units that do not say how they are rescaled, or do not look like it.
    """
    for name, value, least in (("port", port, 0), ("max_upload_mb", max_upload_mb, 1)):
        whole_number(name, value, least)
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        lacking = ", ".join(missing)
        raise ConfigError(f"serve needs the extra 'serve' ({lacking}): pip install 'unimedi-components[serve]'")
    from unimedi_components.serve import serve as serve_page

    # fire makes a tuple of words that a comma joins
    named = [prompts] if isinstance(prompts, str) else list(prompts)
    serve_page(
        str(checkpoint),
        index=None if index is None else str(index),
        prompts=[name.strip() for joined in named for name in str(joined).split(",") if name.strip()],
        host=str(host),
        port=port,
        max_upload_mb=max_upload_mb,
        device=str(device),
        allow_remote=bool(allow_remote),
        assume_hu=bool(assume_hu),
    )
