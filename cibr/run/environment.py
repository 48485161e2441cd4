"""What a run was computed with, kept beside it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Versions, the state of the source tree, the machine and the command."""
    names = ("cibr-kernels", "torch", "open_clip_torch", "timm", "numpy", "safetensors")
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    here = Path(__file__).parent
    git = {
        "commit": output_of("git", "-C", str(here), "rev-parse", "HEAD"),
        "changed": output_of("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"),
    }
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": platform.platform(),
        **versions,
        "git": git,
    }


def output_of(*command: str) -> str | None:
    """What a command prints; None where there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
