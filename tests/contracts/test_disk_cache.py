"""disk_cache.cached: computed once for a key, whoever asks, and again for any other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import disk_cache
import pytest


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache, "FOLDER", tmp_path / "cache")


def test_a_key_is_computed_once():
    seen: list[int] = []

    def compute() -> dict[str, int]:
        seen.append(1)
        return {"registers": 3}

    assert [disk_cache.cached(["source", "options"], compute) for _ in range(3)] == [{"registers": 3}] * 3
    assert len(seen) == 1


def test_another_key_is_computed():
    keys = [["a", "b"], ["ab"], ["a", "c"], ["b", "a"], ["a", "b", ""]]
    found = [disk_cache.cached(key, lambda k=k: k) for k, key in enumerate(keys)]
    assert found == list(range(len(keys)))


def test_what_raised_is_not_kept():
    with pytest.raises(ZeroDivisionError):
        disk_cache.cached(["key"], lambda: 1 // 0)
    assert disk_cache.cached(["key"], lambda: 5) == 5
    assert not list(disk_cache.FOLDER.glob("*.partial"))


def test_workers_read_whole_files():
    rows = list(range(20_000))
    with ThreadPoolExecutor(8) as pool:
        assert all(found == rows for found in pool.map(lambda _: disk_cache.cached(["key"], lambda: rows), range(40)))
