"""Files and directories that appear whole or not at all, and a folder that one process at a time writes to."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cibr.errors import UsageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    Others may read what is in it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        work.chmod(0o755)  # mkdtemp makes it private
        yield work
        for file in sorted(work.rglob("*")):
            file.chmod(0o755 if file.is_dir() else 0o644)
            _fsync(file)
        _fsync(work)
        os.replace(work, path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replaces the file by one that holds `text`."""
    work = path.with_name(f".{path.name}.partial-{os.getpid()}")
    work.write_text(text)
    os.replace(work, path)


def remove_partial(directory: Path) -> None:
    """Deletes what killed writers left in `directory`; call it only where no other process writes."""
    for left in directory.glob(".*.partial-*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Makes `directory` and holds it; a process that ends, however it does, lets go.

    Raises UsageError where another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: workers would hold it, too
        except (BlockingIOError, PermissionError) as error:
            raise UsageError(
                f"another process is writing to {directory}; wait for it, or choose another --out"
            ) from error
        yield


@contextmanager
def full_disk_in_words(advice: str) -> Iterator[None]:
    """A UsageError with `advice` where the system says that there is no room for a file."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UsageError(f"{error.filename or 'a file'} could not be written: {error.strerror}. {advice}") from error
