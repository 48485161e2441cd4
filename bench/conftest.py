"""`pytest bench/`: one process, because tests that measure must not run beside one another."""

from __future__ import annotations

import pytest


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """For the `-n auto` of pyproject.toml."""
    return 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-ratios", action="store_true", help="record the ratios in bench/results/ratios.json")
