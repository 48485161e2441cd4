"""Building the emoji set from a small fake of its packages: joins, drawings, credits, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import toyset
from PIL import Image

from cibr.data import emoji_build as emoji
from cibr.errors import UsageError
from cibr.run.atomic import atomic_directory

LEFT_HALF = '<path d="M0 0h8v16h-8z" fill="currentColor"/>'
BAR = {"body": '<path d="M0 0h32v16h-32z" fill="#f00"/>', "width": 32, "height": 16}
CODED = emoji.Style("coded", "first", "@x/coded", "1.0.0", "code", names=True)
NAMED = emoji.Style("named", "second", "@x/named", "1.0.0", "name")
FILES = emoji.Style("files", "second", "@x/files", "1.0.0", "file")


def write_package(directory: Path, name: str, version: str, files: Mapping[str, object]) -> None:
    with tarfile.open(directory / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz", "w:gz") as tar:
        for path, content in files.items():
            toyset.add(tar, f"package/{path}", content if isinstance(content, bytes) else json.dumps(content).encode())


@pytest.fixture
def tarballs(tmp_path: Path) -> Path:
    """Packages with an ant, a left and a right hand, the copyright sign, two crickets and a bare skin tone."""
    directory = tmp_path / "npm"
    directory.mkdir()
    labels = {
        "1F41C": "ant",
        "1F448": "hand: left",
        "1F449": "hand: right",
        "00A9-FE0F": "copyright",
        "1F997": "cricket",
    }
    labels |= {"1F3CF": "cricket game"}
    entries = [
        {"hexcode": code, "label": label, "group": 0, "tags": [label, "thing"]} for code, label in labels.items()
    ]
    entries.append({"hexcode": "1F3FB", "label": "light skin tone", "group": 2})
    entries.append({"hexcode": "1F1E6", "label": "regional indicator A"})
    texts = {"meta/groups.json": {"groups": {"0": "objects", "2": "component"}}, "en/data.json": entries}
    write_package(directory, "emojibase-data", emoji.TEXTS["emojibase-data"], texts)
    keywords = {"\U0001f41c": ["ant", "small_insect", "thing"]}
    write_package(directory, "emojilib", emoji.TEXTS["emojilib"], {"dist/emoji-en-US.json": keywords})
    info = {
        "name": "Coded",
        "author": {"name": "A", "url": "https://a"},
        "license": {"spdx": "MIT", "url": "https://m"},
    }
    half = {"body": LEFT_HALF}
    coded: dict[str, Any] = {
        "icons": {"the-ant": half, "left": half, "c": BAR, "cricket": half, "skin": half},
        "aliases": {
            "right": {"parent": "left", "hFlip": True},
            "emmet": {"parent": "the-ant"},
            "both": {"parent": "c"},
        },
        "width": 16,
        "height": 16,
    }
    coded["aliases"]["game"] = {"parent": "cricket"}
    chars = {"1f41c": "the-ant", "1f448": "left", "1f449": "right", "00a9": "c", "1f997": "cricket", "1f3fb": "skin"}
    write_package(directory, "@x/coded", "1.0.0", {"icons.json": coded, "chars.json": chars, "info.json": info})
    named = {
        "icons": {"emmet": half, "handleft": half, "cricket-game": half, "unknown": half},
        "aliases": {"cricket": {"parent": "cricket-game"}},
        "width": 16,
        "height": 16,
    }
    write_package(directory, "@x/named", "1.0.0", {"icons.json": named, "info.json": {**info, "name": "Named"}})
    webp = io.BytesIO()
    Image.new("RGBA", (40, 40), (0, 0, 255, 128)).save(webp, "WEBP", lossless=True)
    write_package(
        directory, "@x/files", "1.0.0", {"assets/1f41c.webp": webp.getvalue(), "assets/1f41c-1f3fb.webp": b""}
    )
    return directory


def read_set(directory: Path, style: str) -> dict[str, tuple[Image.Image, dict[str, object]]]:
    with tarfile.open(directory / f"{style}.tar") as tar:
        files = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    stems = {name.rsplit(".", 1)[0] for name in files}
    read = {s: (Image.open(io.BytesIO(files[f"{s}.png"])), json.loads(files[f"{s}.json"])) for s in stems}
    return {stem.rsplit("_", 1)[0]: pair for stem, pair in read.items()}


def test_emoji_build(tarballs: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    report = emoji.build(out, tarballs=tarballs, size=16, styles=(CODED, NAMED, FILES))
    assert report["built"] and report["concepts"] == 6
    assert report["styles"] == {"coded": 5, "named": 3, "files": 1}

    coded = read_set(out, "coded")
    assert set(coded) == {"1f41c", "1f448", "1f449", "a9", "1f997"}  # neither skin tones nor what has no group
    left, right = coded["1f448"][0], coded["1f449"][0]
    assert left.size == (16, 16) and left.mode == "RGB"
    assert left.getpixel((2, 8)) == (0, 0, 0) and left.getpixel((13, 8)) == (255, 255, 255)
    assert right.getpixel((2, 8)) == (255, 255, 255) and right.getpixel((13, 8)) == (0, 0, 0)
    bar = coded["a9"][0]
    assert bar.getpixel((8, 8)) == (255, 0, 0) and bar.getpixel((8, 1)) == (255, 255, 255)  # wide: padded to a square
    assert coded["1f41c"][1] == {
        "concept": "1f41c",
        "style": "coded",
        "family": "first",
        "label": "ant",
        "keywords": ["thing", "small insect"],
        "group": "objects",
    }

    named = read_set(out, "named")  # ant by an alias, the hand by its label less dashes
    assert set(named) == {"1f41c", "1f448", "1f3cf"}  # the insect's name leads to the game's drawing: the game keeps it
    assert read_set(out, "files")["1f41c"][0].getpixel((8, 8)) in {(127, 127, 255), (126, 126, 255)}  # on white

    with (out / "attribution.csv").open() as file:
        rows = {row["package"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"@x/coded", "@x/named", "@x/files", *emoji.TEXTS}
    assert rows["@x/coded"]["images"] == "5" and rows["@x/coded"]["licence"] == "MIT"


def test_a_name_of_two_concepts_joins_neither_but_a_label_its_own() -> None:
    concepts = {
        key: emoji.Concept(key, label, (), "objects") for key, label in {"a": "up", "b": "down", "c": "top"}.items()
    }
    icons: dict[str, Any] = {"icons": {"arrow": {}, "arrow2": {}}, "aliases": {}}
    more_icons: dict[str, Any] = {"icons": {"top": {}, "arrow2": {}}}
    first, second = {"a": "arrow", "b": "arrow"}, {"a": "top", "b": "arrow2"}
    names = emoji.concept_names(concepts, [(first, icons), (second, more_icons)])
    assert names == {"a": ["up"], "b": ["down", "arrow2"], "c": ["top"]}


def test_emoji_build_again_does_nothing(tarballs: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    emoji.build(out, tarballs=tarballs, size=16, styles=(CODED,))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    assert not emoji.build(out, tarballs=Path("/nowhere"), size=16, styles=(CODED,))["built"]
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before
    with pytest.raises(UsageError, match="holds another emoji set"):
        emoji.build(out, tarballs=tarballs, size=24, styles=(CODED,))
    again = tmp_path / "again"
    emoji.build(again, tarballs=tarballs, size=16, styles=(CODED,))
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {p.name: b for p, (_, b) in before.items()}


def test_emoji_build_leaves_foreign_folders_alone(tarballs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="holds something else"):
        emoji.build(tmp_path / "mine", tarballs=tarballs, styles=(CODED,))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_failed_build_leaves_nothing(tarballs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(size: int) -> object:
        calls = iter(range(3))
        real = renderer(size)
        return lambda drawing: real(drawing) if next(calls) < 2 else 1 / 0

    renderer = emoji._renderer
    monkeypatch.setattr(emoji, "_renderer", broken)
    out = tmp_path / "deep" / "set"
    with pytest.raises((ZeroDivisionError, StopIteration)):
        emoji.build(out, tarballs=tarballs, size=16, styles=(CODED,))
    assert list(out.parent.iterdir()) == []


def test_a_killed_writer_leaves_no_directory_of_that_name(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; from cibr.run.atomic import atomic_directory\n"
        "with atomic_directory(pathlib.Path(sys.argv[1])) as work:\n"
        "    (work / 'set.json').write_text('{}'); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "set")], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "set").exists()
    with atomic_directory(tmp_path / "set") as work:
        (work / "set.json").write_text("{}")
    assert (tmp_path / "set" / "set.json").read_text() == "{}"


def test_missing_npm_is_said_in_plain_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"npm was not found.*--tarballs"):
        emoji.build(tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_npm_failing_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'no such registry' >&2\nexit 7\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UsageError, match="status 7: no such registry"):
        emoji.build(tmp_path / "set")


def test_a_missing_tarball_is_named(tarballs: Path, tmp_path: Path) -> None:
    (tarballs / "x-named-1.0.0.tgz").unlink()
    with pytest.raises(UsageError, match=r"x-named-1\.0\.0\.tgz is not in .*npm pack @x/named@1\.0\.0"):
        emoji.build(tmp_path / "set", tarballs=tarballs, styles=(CODED, NAMED))
