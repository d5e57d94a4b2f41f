# SPDX-License-Identifier: Apache-2.0
"""What a number came from: command, commit or version of the package, machine."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def commit() -> str:
    """Commit of the checkout that the package lies in, "+" behind it where files differ; its version without git."""
    from unimedi_components import __version__

    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        line = ["git", "-C", str(root), "-c", "safe.directory=*", *words]
        return subprocess.run(line, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if not (root / ".git").exists():
            return f"version {__version__}"
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return f"version {__version__}"


def provenance(command: Sequence[str] | None = None) -> dict[str, Any]:
    """Where a number comes from: "command", "commit", "machine", "torch"."""
    words = list(command) if command is not None else ["python", *(sys.orig_argv[1:] or sys.argv)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {
        "command": " ".join(map(shlex.quote, words)),
        "commit": commit(),
        "machine": f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
