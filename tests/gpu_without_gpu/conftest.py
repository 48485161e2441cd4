"""What tests of GPU code without a GPU share."""

from __future__ import annotations

from pathlib import Path

import fake_device
import pytest


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake device's libraries."""
    try:
        return fake_device.build(tmp_path_factory.mktemp("device"))
    except fake_device.Unavailable as error:
        pytest.skip(str(error))
