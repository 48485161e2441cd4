"""Every test: poisoned memory, one seed, one thread, and settings that a test changes put back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import cibr_kernels as ck


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, and first of them those of the static table, for which one worker compiles for five minutes.

    A worker that is free takes tests from the end of another's, so no other waits for that table.
    """

    def key(item: pytest.Item) -> tuple[bool, bool]:
        return item.get_closest_marker("slow") is None, item.path.stem != "test_static"

    items.sort(key=key)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` is filled with NaN, so an output element that nobody wrote fails its test.

    PyTorch fills only while deterministic algorithms are on.
    """
    torch.utils.deterministic.fill_uninitialized_memory = True
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def same_state() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of small problems; the tests about threads ask for more
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    ck.set_stash_budget(None)


@pytest.fixture(autouse=True)
def needs_kernels(request: pytest.FixtureRequest) -> None:
    """Skips the tests that name an instruction set where the kernels are not built."""
    if "isa" in request.fixturenames and not ck.native_available():
        pytest.skip("the compiled kernels are not built")
