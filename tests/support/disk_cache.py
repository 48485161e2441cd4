"""JSON kept in the user's cache folder under the hash of everything that decides it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cibr_kernels"


def digest(key: Iterable[str]) -> str:
    found = hashlib.sha256()
    for part in key:
        found.update(f"{len(part)}:{part}".encode())
    return found.hexdigest()


def cached(key: Iterable[str], compute: Callable[[], Any]) -> Any:
    """What compute() returned when the same key was asked for, or returns now.

    A file is written whole and then named, so a worker of several never reads half of one; two may both compute.
    """
    path = FOLDER / f"{digest(key)}.json"
    if path.exists():
        return json.loads(path.read_text())
    value = compute()
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=FOLDER, suffix=".partial", delete=False) as partial:
        json.dump(value, partial)
    os.replace(partial.name, path)
    return value
