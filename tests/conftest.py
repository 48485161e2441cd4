"""Every test: poisoned memory, one seed, one thread, and settings that a test changes put back."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

import cibr_kernels as ck

# inductor's pool of compilers is processes that import torch, beside workers that take every core already
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, and first of them those of the static table, for which one worker may compile for minutes.

    A worker that is free takes tests from the end of another's, so no other waits for that table.
    """

    def key(item: pytest.Item) -> tuple[bool, bool]:
        return item.get_closest_marker("slow") is None, item.path.stem != "test_static"

    items.sort(key=key)


def pytest_collection_finish() -> None:
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Sets aside what lives after a file's tests: a collection among a worker's millions of objects takes seconds."""
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


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
