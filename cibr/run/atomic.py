"""Directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields an empty directory beside `path` that is renamed to `path` when the block ends without an exception.

    Files are flushed to disk before the rename, so neither a kill nor a power cut leaves a half-written `path`; a
    killed process leaves at most a hidden `.NAME.partial-*` beside it. `path` must not exist, or be an empty directory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        work.chmod(0o755)  # mkdtemp makes it private
        yield work
        for file in sorted(work.rglob("*")):
            _fsync(file)
        _fsync(work)
        os.replace(work, path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def remove_partial(directory: Path) -> None:
    """Deletes what killed writers left in `directory`; call it only where no other process writes."""
    for left in directory.glob(".*.partial-*"):
        shutil.rmtree(left, ignore_errors=True)
