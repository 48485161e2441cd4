"""disk_cache: a key is computed once, whoever asks, and another again; of code, a key has what it means."""

from __future__ import annotations

import ast
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


def test_code_means_the_same_in_other_words():
    code = 'class A:\n    """Says."""\n\n    def f(self, x=()):\n        return f"{x}" + "a"  # why\n'
    same = 'class A:\n    def f(self, x=()):\n        """Does."""\n        return (f"{x}" +\n            \'a\')\n'
    others = [code.replace(old, new) for old, new in (('"a"', '"b"'), ("()", "[]"), ("{x}", "{x!r}"), ("A", "B"))]
    assert disk_cache.meaning(ast.parse(code)) == disk_cache.meaning(ast.parse(same))
    assert len({disk_cache.meaning(ast.parse(text)) for text in (code, *others)}) == 5
