"""What a local tar holds, listed once and kept: a start of a run need not read every header again.

A file for each tar in the cache folder, JSON, valid while the tar's size and time of change are those it was listed at.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cibr.data.dataset import Skipped, SkipSample
from cibr.data.listing import Listing, captions_and_class
from cibr.data.tars import TEXTS, image_place, samples
from cibr.run.atomic import write_text

VERSION = 1  # of the files, to be raised with any change of what is listed and what is left out


@dataclass
class TarIndex:
    """A tar's usable samples in order, and what is left out: damaged parts and members first, then samples."""

    rows: list[list[Any]] = field(default_factory=list)  # key, captions, class or None, offset and size of the image
    damaged: list[list[Any]] = field(default_factory=list)  # reason, name of the first, how many
    unusable: list[list[Any]] = field(default_factory=list)  # number of rows before it, reason, name

    def add_to(self, listing: Listing, number: int) -> None:
        """The rows of tar `number`, and what is left out on the way, until the listing is full."""
        for reason, name, count in self.damaged:
            listing.skipped.add(reason, name, count)
        left_out = iter(self.unusable)
        before, reason, name = next(left_out, (-1, "", ""))
        for k in range(len(self.rows) + 1):
            while before == k and not listing.full:
                listing.skipped.add(reason, name)
                before, reason, name = next(left_out, (-1, "", ""))
            if k == len(self.rows) or listing.full:
                return
            key, captions, named, offset, size = self.rows[k]
            listing.add(key, tuple(captions), named, (number, offset, size))


def index_of(tar: Path, caption_column: str | None) -> TarIndex:
    """From the cache, or read and, where there is a place for it, kept.  Raises OSError for a tar that cannot be."""
    stamp = stamp_of(tar, caption_column)
    file = cache_home() / "tars" / f"{hashlib.sha256(repr((tar.resolve(), caption_column)).encode()).hexdigest()[:24]}"
    try:
        kept = json.loads(file.read_text())
        if kept.pop("stamp") == stamp:
            return TarIndex(**kept)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    found = read_index(tar, caption_column)
    if stamp_of(tar, caption_column) == stamp:  # nobody has written to it meanwhile
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps({"stamp": stamp, **vars(found)}))
        except OSError:
            pass
    return found


def stamp_of(tar: Path, caption_column: str | None) -> list[Any]:
    about = tar.stat()
    return [VERSION, str(tar.resolve()), about.st_size, about.st_mtime_ns, caption_column]


def cache_home() -> Path:
    """$XDG_CACHE_HOME/cibr or ~/.cache/cibr."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cibr"


def read_index(tar: Path, caption_column: str | None) -> TarIndex:
    """Reads all headers, and the captions and classes that lie beside the images."""
    damage = Skipped()
    found = samples(tar, damage)
    index = TarIndex(damaged=[[reason, damage.first[reason], count] for reason, count in damage.counts.items()])
    with tar.open("rb") as file:
        for key, endings in found.items():
            try:
                image = image_place(endings)
                texts = {}
                for ending in TEXTS:
                    if ending in endings:
                        file.seek(endings[ending].offset)
                        texts[ending] = file.read(endings[ending].size)
                captions, named = captions_and_class(texts, caption_column)
                index.rows.append([key, captions, named, image.offset, image.size])
            except SkipSample as reason:
                index.unusable.append([len(index.rows), str(reason), f"{key} in {tar.name}"])
    return index
