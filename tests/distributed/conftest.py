"""One set of processes for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    workers = Ranks()
    yield workers
    workers.close()
