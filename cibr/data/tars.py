"""Local tars by index: where each member lies, so that any sample is read alone, and what is damaged, counted.

A damaged header ends a tar for most readers, and what follows is lost without a word. Here the next readable header is
looked for, and the bytes between are counted as a damaged part.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from cibr.data.dataset import Skipped, SkipSample
from cibr.data.images import ENDINGS, MAX_BYTES
from cibr.data.listing import MAX_TEXT_BYTES

TEXTS = ("txt", "json", "cls")
BLOCK = tarfile.BLOCKSIZE
END = 2 * BLOCK


class Place(NamedTuple):
    offset: int
    size: int


class HeadersOnly:
    """A file of which tarfile reads headers; a header that claims to be larger than a megabyte is damaged."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > 1 << 20:
            raise tarfile.ReadError("header too large")
        return self.file.read(size)


def members(path: Path, skipped: Skipped) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, those after a damaged part included; damaged parts and a missing end are counted."""
    size = path.stat().st_size
    begin = end = 0  # where reading goes on, and where the last member ended
    with path.open("rb") as file:

        def count_damage(after: int) -> bool:
            if damaged := is_damaged(file, end, after, size):
                skipped.add("damaged part of a tar", f"{path.name}, {after - end} bytes at {end}")
            return damaged

        while begin < size:
            file.seek(begin)
            try:
                for member, after in _headers(file):
                    count_damage(member.offset)
                    begin = end = after
                    yield member
                break
            except (tarfile.TarError, ValueError, OverflowError):
                begin += BLOCK
        if not count_damage(size) and size - end < END:
            skipped.add("tar without its end", path.name)


def _headers(file: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Members from where `file` stands, and where the next begins; blocks that are no header are passed over."""
    tar = tarfile.TarFile(fileobj=HeadersOnly(file), ignore_zeros=True)  # type: ignore[arg-type]
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]
        yield member, tar.offset


def is_damaged(file: IO[bytes], begin: int, end: int, size: int) -> bool:
    """Whether what lies between two members, or after the last, is neither nothing nor the end of a tar.

    An end is two blocks of zeros, padded to a record; after one in the middle another tar may be joined. More zeros are
    a hole, where something was lost.
    """
    if end > begin and (end - begin > END + tarfile.RECORDSIZE or (end < size and end % tarfile.RECORDSIZE)):
        return True
    file.seek(begin)
    return bool(file.read(max(0, end - begin)).strip(b"\0"))


def split_name(name: str) -> tuple[str, str]:
    """webdataset's key and ending: `a/000.seg.png` -> (`a/000`, `seg.png`)."""
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, ending.lower()


def check_member(member: tarfile.TarInfo) -> None:
    """Raises SkipSample for a member that is not to be read."""
    parts = PurePosixPath(member.name).parts
    if ".." in parts or member.name.startswith("/"):
        raise SkipSample("tar member with a path out of the tar")
    if not member.isreg() or member.sparse is not None:  # type: ignore[attr-defined]
        raise SkipSample("tar member that is no plain file")
    ending = split_name(member.name)[1]
    if ending in TEXTS and member.size > MAX_TEXT_BYTES:
        raise SkipSample("caption file larger than 1 MB")
    if member.size > MAX_BYTES:
        raise SkipSample("image file larger than 256 MB")


def samples(path: Path, skipped: Skipped) -> dict[str, dict[str, Place]]:
    """`{key: {ending: place}}` in order of appearance; of two members with one name the first counts."""
    size = path.stat().st_size
    found: dict[str, dict[str, Place]] = {}
    for member in members(path, skipped):
        if member.isdir():
            continue
        key, ending = split_name(member.name)
        try:
            check_member(member)
            if member.offset_data + member.size > size:
                raise SkipSample("tar member cut short")
            if ending in found.get(key, ()):
                raise SkipSample("tar member of a name that was there before")
        except SkipSample as reason:
            skipped.add(str(reason), f"{member.name} in {path.name}")
            continue
        found.setdefault(key, {})[ending] = Place(member.offset_data, member.size)
    return found


def image_place(endings: dict[str, Place]) -> Place:
    """Raises SkipSample if no member of the sample is an image."""
    for ending in ENDINGS:
        if ending in endings:
            return endings[ending]
    raise SkipSample("no image")
