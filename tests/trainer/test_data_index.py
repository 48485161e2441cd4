"""What tars hold is listed once and kept; a tar that changed is listed again."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import bad_data
import pytest

from cibr.data import DataOptions, Dataset, open_dataset, tar_index

MEMBERS: dict[str, bytes] = {
    "0.jpg": bad_data.good(0),
    "0.txt": b"zero\nnothing",
    "1.jpg": bad_data.good(1),
    "2.jpg": bad_data.good(2),
    "2.json": b'{"caption": "two"}',
    "../3.jpg": b"",
    "4.txt": b"no image",
    "5.jpg": bad_data.good(5),
    "5.txt": b"five",
    "b\udcff.jpg": bad_data.good(6),
    "b\udcff.txt": b"six",
}


def write(path: Path, members: dict[str, bytes], append: bool = False) -> None:
    with tarfile.open(path, "a" if append else "w", errors="surrogateescape") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def listed(folder: Path, **options: Any) -> dict[str, Any]:
    dataset: Dataset = open_dataset(DataOptions(data=f"webdataset:{folder}", **options))
    rows = [(dataset.keys[k], dataset.captions(k), dataset.image(k).size) for k in range(len(dataset))]  # type: ignore[union-attr]
    return {"rows": rows, "skipped": str(dataset.skipped), "fingerprint": dataset.fingerprint()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "a.tar", MEMBERS)
    write(
        tmp_path / "set" / "b.tar",
        {"7.png": bad_data.good(7), "7.txt": b"seven", "8.jpg": bad_data.good(), "8.txt": b"eight"},
    )
    return tmp_path / "set"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tars that are read, as it happens."""
    found: list[str] = []
    read = tar_index.read_index

    def watched(tar: Path, caption_column: str | None) -> tar_index.TarIndex:
        found.append(tar.name)
        return read(tar, caption_column)

    monkeypatch.setattr(tar_index, "read_index", watched)
    return found


@pytest.mark.parametrize("limit", [None, 1, 2, 4, 5])
def test_a_second_start_reads_no_header_and_finds_the_same(folder: Path, reads: list[str], limit: int | None) -> None:
    first = listed(folder, limit=limit)
    assert len(first["rows"]) == (6 if limit is None else limit)
    assert listed(folder, limit=limit) == first
    assert reads == (["a.tar"] if limit and limit < 5 else ["a.tar", "b.tar"])


def test_every_tar_is_known_by_its_size_and_time(folder: Path, reads: list[str]) -> None:
    (folder / "b.tar").unlink()
    first = listed(folder)
    assert [key for key, _, _ in first["rows"]] == ["0", "2", "5", "b\udcff"]
    assert "no caption (the first: 1 in a.tar)" in first["skipped"] and "path out of the tar" in first["skipped"]
    write(folder / "a.tar", {"9.jpg": bad_data.good(1), "9.txt": b"nine"}, append=True)
    assert len(listed(folder)["rows"]) == 5 and reads == ["a.tar"] * 2
    content = (folder / "a.tar").read_bytes()
    (folder / "a.tar").write_bytes(content.replace(b"nine", b"neun"))  # of the same size
    os.utime(folder / "a.tar", ns=(1, 1))
    assert listed(folder)["rows"][-1][1] == ("neun",) and reads == ["a.tar"] * 3
    listed(folder, caption_column="caption")
    assert reads == ["a.tar"] * 4
    (folder / "a.tar").rename(folder / "c.tar")
    assert "no caption (the first: 1 in c.tar)" in listed(folder)["skipped"]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"stamp": 3}', '{"rows": 1}', "\0\0"])
def test_a_damaged_cache_is_made_anew(folder: Path, cache_home: Path, reads: list[str], damage: str) -> None:
    (folder / "b.tar").unlink()
    first = listed(folder)
    (kept,) = (cache_home / "cibr" / "tars").iterdir()
    kept.write_text(damage)
    assert listed(folder) == listed(folder) == first and reads == ["a.tar"] * 2
    assert list((cache_home / "cibr" / "tars").iterdir()) == [kept]  # nothing half-written beside it


def test_no_place_for_a_cache_is_no_harm(folder: Path, cache_home: Path, reads: list[str]) -> None:
    (folder / "b.tar").unlink()
    cache_home.write_text("a file where the folder should be")
    assert listed(folder) == listed(folder) and reads == ["a.tar"] * 2


def test_a_tar_that_is_being_written_is_not_kept(
    folder: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "b.tar").unlink()
    stamp, calls = tar_index.stamp_of, iter(range(100))
    monkeypatch.setattr(tar_index, "stamp_of", lambda *given: [*stamp(*given), next(calls)])
    listed(folder)
    assert not (cache_home / "cibr" / "tars").exists()
