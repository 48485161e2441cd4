"""Tests of bench/: their children come from the server of all tests."""

import forks
import pytest

from bench import processes


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    processes.PRELOAD[:] = forks.PRELOAD
    processes.start_server()
