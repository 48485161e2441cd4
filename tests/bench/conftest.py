"""Tests of bench/: one fork server a worker, which has what their children import."""

import pytest

from bench import processes


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    """As the command line starts it, without open_clip: no child here measures it, and it takes longer than torch."""
    processes.PRELOAD.remove("open_clip.loss")
    processes.start_server()
